"""Files and folders of this program's own: written whole or not at all, and never through somebody else's link."""

import contextlib
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.errors import RunError

Record = dict[str, Any]


def refuse_links(*paths: Path):
    """Raises a RunError if one of these paths, all of this program's own making, is a link to something else."""
    for path in paths:
        if os.path.islink(path):
            raise RunError(
                f"{path} is a link, and what is behind it is not this run's: remove it, or give another --out"
            )


@contextlib.contextmanager
def folder(path: Path, option: str = "--out") -> Iterator[Path]:
    """Makes a folder that is not there, tries to write to it, and takes it back if nothing was written in the end.

    Raises:
        RunError: if that fails; `option` sets another folder.
    """
    made = [place for place in (path, *path.parents) if not os.path.lexists(place)]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise RunError(f"cannot write to {path} ({error.strerror}): give another {option}") from error
        yield path
    finally:
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()


def new_folder(parent: Path, name: str) -> Path:
    """Makes `parent/<date>-<time>-<name>`, numbered if it exists; raises a RunError if it cannot be written."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    with folder(parent):
        for number in itertools.count(1):
            path = parent / "-".join([stamp, name] + [str(number)] * (number > 1))
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what a disk refuses into a RunError."""
    try:
        yield
    except FileNotFoundError as error:
        raise RunError(f"{path} was removed while it was written: the same command begins again") from error
    except OSError as error:
        raise RunError(
            f"cannot write to {path} ({error.strerror}): free some space, or mend its permissions; the same command"
            " then goes on"
        ) from error


def write(path: Path, content: str | bytes):
    """Puts this in place of what is in a file: all or nothing, or a RunError."""
    draft = path.with_name(path.name + ".draft")
    with explained(path):
        draft.unlink(missing_ok=True)
        try:
            with draft.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                sync(file)
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def append(path: Path, record: Mapping[str, Any]):
    """Adds a record to a file that must be there still, complete before the next; or raises a RunError."""
    with explained(path), path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(line(record).encode())


def sync(file: Any):
    """Returns when all that was written to a file would outlive a failure of the machine."""
    file.flush()
    os.fsync(file.fileno())


def line(record: Mapping[str, Any]) -> str:
    """A record as it is written, with its end of line; numbers that are not finite become null, JSON has none."""
    finite = lambda value: None if isinstance(value, float) and not math.isfinite(value) else value
    return json.dumps({name: finite(value) for name, value in record.items()}) + "\n"


def read(path: Path) -> list[Record]:
    """All records of a file; raises a RunError if it cannot be read, or holds something else."""
    records, rest = read_whole(path)
    if rest:
        raise RunError(f"line {len(records) + 1} of {path} is damaged: remove it, and make it again")
    return records


def read_whole(path: Path) -> tuple[list[Record], bool]:
    """The records of a file up to the first line that is none, as of a run that was killed; and whether there is."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise RunError(f"cannot read {path} ({error.strerror})") from error
    records = []
    with contextlib.suppress(ValueError, RecursionError):
        for text in lines:
            record = json.loads(text)
            if not (text.endswith(b"\n") and isinstance(record, dict)):
                break
            records.append(record)
    return records, len(records) < len(lines)


def where(rows: Sequence[Record], **about: Any) -> list[Record]:
    """The rows with these values, by seed; a row may lack a column that is to be None."""
    chosen = [row for row in rows if all(row.get(name) == value for name, value in about.items())]
    return sorted(chosen, key=lambda row: row.get("seed", 0))


def column(rows: Sequence[Record], name: str, **about: Any) -> list[Any]:
    """A column of these rows, by seed."""
    return [row[name] for row in where(rows, **about)]


def distinct(rows: Sequence[Record], name: str) -> list[Any]:
    """The values of a column, in order."""
    return sorted({row[name] for row in rows})
