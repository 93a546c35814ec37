"""Runs on disk: a new folder for each, with its records as JSON, one per line, the configuration first."""

import json
import math
import time
from collections.abc import Mapping
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
        self._file.close()

    def write(self, record: Mapping[str, Any]):
        """Appends one record; numbers that are not finite become null, since JSON has none."""
        self._file.write(json.dumps({name: _finite(value) for name, value in record.items()}) + "\n")
        self._file.flush()


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
