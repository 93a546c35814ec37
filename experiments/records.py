"""Runs on disk: a new folder for each, with its records as JSON, one per line, the configuration first."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.errors import RunError


def new_folder(parent: Path, name: str) -> Path:
    """Makes `parent/<date>-<time>-<name>`, numbered if it exists.

    Raises:
        RunError: if it cannot be written.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1, 1000):
        folder = parent / "-".join([stamp, name] + [str(number)] * (number > 1))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise RunError(f"cannot write to {parent} ({error.strerror}): give another --out") from error
    raise RunError(f"{parent} holds a thousand runs of this second")


class Writer:
    """Appends records to a file, each complete on the disk before the next."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("a")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error):
        # What a full disk refused is refused again on closing; it has been said once.
        with contextlib.suppress(OSError):
            self._file.close()

    def write(self, record: Mapping[str, Any]):
        """Appends one record; numbers that are not finite become null, since JSON has none.

        Raises:
            RunError: if the disk does not take it.
        """
        with self._explained():
            self._file.write(line(record))
            self._file.flush()

    def sync(self):
        """Returns when all records would outlive a failure of the machine."""
        with self._explained():
            os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _explained(self):
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write to {self.path} ({error.strerror}): free some space; the same command then goes on"
            ) from error


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_whole(path: Path) -> list[dict[str, Any]]:
    """The records of a file up to the first line that is not one, such as the last of a run that was killed."""
    result = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            result.append(json.loads(line))
        except ValueError:
            break
        if not (line.endswith(b"\n") and isinstance(result[-1], dict)):
            return result[:-1]
    return result


def rewrite(path: Path, rows: Iterable[Mapping[str, Any]]):
    """Puts these records in place of those in a file, all or none of them."""
    draft = path.with_name(path.name + ".draft")
    draft.unlink(missing_ok=True)
    with Writer(draft) as writer:
        for row in rows:
            writer.write(row)
        writer.sync()
    draft.replace(path)


def line(record: Mapping[str, Any]) -> str:
    """A record as it is written, with its end of line."""
    return json.dumps({name: _finite(value) for name, value in record.items()}) + "\n"


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
