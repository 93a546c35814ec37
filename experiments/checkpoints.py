"""Training states on disk, none of which is believed before it is proven whole.

A state is one file, NumPy's `.npz`, that appears in one instant by renaming, and whose name ends with the SHA-256 of
what is in it. A run that is killed while it writes leaves a draft, and a disk that errs a file that does not match its
name: either is reported, and the state before it is used. So two are always kept. Only what is named here is removed.

What is stored is a flat dict of arrays without devices. Where they go is said when they are restored, and may be
another mesh than the one they came from. The first process alone reads and writes.
"""

import hashlib
import io
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from experiments import records
from experiments.console import say
from experiments.errors import RunError

KEPT = 2
NAME = re.compile(r"step-([1-9]\d*)-([0-9a-f]{64})\.npz(\.draft)?")
Arrays = Mapping[str, np.ndarray]


class Checkpoints:
    """The checkpoints of one run, in a folder that is made with the first of them."""

    def __init__(self, folder: Path):
        self.folder = folder

    def check_room(self, arrays: Arrays):
        """Raises `RunError` unless the disk has room for all the checkpoints that are there at once."""
        needed = (KEPT + 1) * sum(array.nbytes for array in arrays.values())
        free = shutil.disk_usage(self.folder.parent).free
        if free < needed:
            raise RunError(
                f"checkpoints need {needed / 1e6:,.0f} MB, and {self.folder.parent} has {free / 1e6:,.0f} MB left: free"
                " some space, give another --out, or do without by --checkpoint-seconds none"
            )

    def save(self, arrays: Arrays, step: int):
        """Writes a state, or raises a RunError; once it is whole, removes all but the last two."""
        file = io.BytesIO()
        np.savez(file, **arrays)
        content = file.getvalue()
        with records.explained(self.folder):
            self.folder.mkdir(exist_ok=True)
        records.write(self.folder / f"step-{step}-{hashlib.sha256(content).hexdigest()}.npz", content)
        self.keep(sorted({step for step, _ in self._own()})[-KEPT:])

    def restore(self, at_most: int, like: Arrays) -> tuple[int, Arrays]:
        """The last state that is whole, of so many steps at most, and its steps; says which were not.

        Or 0 and `like`, arrays of the names, shapes and dtypes that are wanted; raises a RunError if others are there.
        """
        kinds = lambda arrays: {name: f"{a.dtype}{list(a.shape)}" for name, a in arrays.items()}
        for step, path in sorted(self._own(), reverse=True):
            if step <= at_most and (arrays := self._read(path)) is not None:
                there, here = kinds(arrays), kinds(like)
                for name in sorted(name for name in {*there, *here} if there.get(name) != here.get(name)):
                    raise RunError(
                        f"checkpoint {path} is of another network or optimizer: {name} is {there.get(name)} there, and"
                        f" {here.get(name)} here; to start again, delete {self.folder.parent}"
                    )
                return step, arrays
        return 0, like

    def _read(self, path: Path) -> Arrays | None:
        """The arrays of a file, if it is whole."""
        fault = "half written"
        if path.suffix == ".npz":
            try:
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() == NAME.fullmatch(path.name)[2]:
                    return dict(np.load(io.BytesIO(content)))
                fault = "damaged"
            except OSError as error:
                fault = f"unreadable ({error.strerror})"
        say(f"checkpoint {path} is {fault}: going on from the one before")
        return None

    def keep(self, steps: list[int]):
        """Removes all checkpoints but these, and what a killed run has left half written."""
        for step, path in self._own():
            if step not in steps or path.suffix != ".npz":
                path.unlink(missing_ok=True)

    def _own(self) -> Iterator[tuple[int, Path]]:
        """Steps and paths of what this class writes, among whatever else there may be."""
        records.refuse_links(self.folder)
        for path in list(self.folder.iterdir()) if self.folder.is_dir() else []:
            if (match := NAME.fullmatch(path.name)) and (path.is_symlink() or path.is_file()):
                records.refuse_links(path)
                yield int(match[1]), path
