"""Files and folders of this program's own: written whole or not at all, and never through somebody else's link."""

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from experiments.errors import RunError

Record = dict[str, Any]


def refuse_links(*paths: Path):
    """Raises a RunError if one of these paths, all of this program's own making, is a link to something else."""
    for path in paths:
        if os.path.islink(path):
            raise RunError(
                f"{path} is a link, and what is behind it is not this run's: remove it, or give another --out"
            )


def make_folder(path: Path, option: str = "--out") -> list[Path]:
    """Makes a folder that is not there, and tries to write to it; `option` sets another.

    Returns:
        What was made, the innermost first: `remove_empty` takes it back.

    Raises:
        RunError: if that fails.
    """
    made = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        remove_empty(made)
        raise RunError(f"cannot write to {path} ({error.strerror}): give another {option}") from error
    return made


def remove_empty(folders: Iterable[Path]):
    """Removes these folders, the innermost first, as far as nothing is in them."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def new_folder(parent: Path, name: str) -> Path:
    """Makes `parent/<date>-<time>-<name>`, numbered if it exists; raises a RunError if it cannot be written."""
    make_folder(parent)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1, 1000):
        with contextlib.suppress(FileExistsError):
            folder = parent / "-".join([stamp, name] + [str(number)] * (number > 1))
            folder.mkdir()
            return folder
    raise RunError(f"{parent} holds a thousand runs of this second")


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what a disk refuses into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write to {path} ({error.strerror}): free some space, or mend its permissions; the same command"
            " then goes on"
        ) from error


def write(path: Path, content: str | bytes | Callable[[BinaryIO], Any]):
    """Puts this, or what a function writes, in place of what is in a file: all or nothing, or a RunError."""
    content = content.encode() if isinstance(content, str) else content
    put = content if callable(content) else lambda file: file.write(content)
    draft = path.with_name(path.name + ".draft")
    with explained(path):
        draft.unlink(missing_ok=True)
        try:
            with draft.open("xb") as file:
                put(file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


class Writer:
    """Appends records to a file, each complete on the disk before the next; `past` replaces what is in it."""

    def __init__(self, path: Path, past: Iterable[Mapping[str, Any]] = ()):
        self.path = path
        write(path, "".join(map(line, past)))
        with explained(path):
            self._file = path.open("ab")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error):
        # What a full disk refused is refused again on closing; it has been said once.
        with contextlib.suppress(OSError):
            self._file.close()

    def write(self, record: Mapping[str, Any]):
        """Appends one record; numbers that are not finite become null, since JSON has none.

        Raises:
            RunError: if the disk does not take it, or the file is no longer where it was.
        """
        with explained(self.path):
            self._file.write(line(record).encode())
            self._file.flush()
            self._check_there()

    def fileno(self) -> int:
        """Of the open file."""
        return self._file.fileno()

    def sync(self):
        """Returns when all records would outlive a failure of the machine."""
        with explained(self.path):
            os.fsync(self.fileno())
            self._check_there()

    def _check_there(self):
        # The system keeps a removed file for those who have it open, and lets them write on.
        try:
            there = os.path.samestat(os.stat(self.path), os.fstat(self.fileno()))
        except FileNotFoundError:
            there = False
        if not there:
            raise RunError(f"{self.path} was removed or replaced while it was written: the same command begins again")


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
    for text in lines:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not (text.endswith(b"\n") and isinstance(record, dict)):
            break
        records.append(record)
    return records, len(records) < len(lines)


def line(record: Mapping[str, Any]) -> str:
    """A record as it is written, with its end of line."""
    finite = lambda value: None if isinstance(value, float) and not math.isfinite(value) else value
    return json.dumps({name: finite(value) for name, value in record.items()}) + "\n"
