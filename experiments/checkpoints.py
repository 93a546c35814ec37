"""Training states on disk, none of which is believed before it is proven whole.

Orbax writes a state into the folder `<step>`; the SHA-256 of every file of it then goes into `<step>.json`, which
appears in one instant by renaming. A run that is killed while it writes leaves a folder without digests, and a disk
that errs leaves files that do not match theirs: either is reported, and the state before it is used. So two are always
kept.

What is stored is a flat dict of arrays without devices. Where they go is said when they are restored, and may be
another mesh than the one they came from.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments import processes
from experiments.console import console
from experiments.errors import RunError

KEPT = 2


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: of its own; made with the first checkpoint.
    """

    def __init__(self, folder: Path):
        # Orbax wants paths that a change of the working folder does not move.
        self.folder = folder.absolute()
        # At the level of warnings it lists every array that is restored onto other devices.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._orbax = ocp.StandardCheckpointer()

    def check_room(self, state: Any):
        """Raises `RunError` unless the disk has room for all the checkpoints that are there at once."""
        needed = (KEPT + 1) * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder.parent).free
        if free < needed:
            raise RunError(
                f"checkpoints need {needed / 1e6:,.0f} MB, and {self.folder.parent} has {free / 1e6:,.0f} MB left: free"
                " some space, give another --out, or do without by --checkpoint-seconds None"
            )

    def save(self, state: Any, step: int):
        """Writes a state; once it is whole, removes all but the last two.

        Raises:
            RunError: if it cannot be written. The checkpoints before it stay.
        """
        try:
            self._orbax.save(self.folder / str(step), flat(state), force=True)
            self._orbax.wait_until_finished()
            if processes.is_first():
                self._seal(state, step)
        # Orbax passes on what TensorStore makes of an error of the file system: OSError, ValueError and others.
        except Exception as error:
            if jax.process_count() > 1 and isinstance(error, processes.LOST):
                # Not of this file system.
                raise
            reason = str(error).splitlines()[0]
            raise RunError(
                f"cannot write a checkpoint to {self.folder} ({reason}): free some space, or mend the folder's"
                " permissions; the same command then goes on from the checkpoint before"
            ) from error

    def latest(self, at_most: int) -> int | None:
        """The last step, not above `at_most`, whose checkpoint is whole; says which were not."""
        for step in sorted((step for step in self._steps() if step <= at_most), reverse=True):
            fault = self._fault(step)
            if fault is None:
                return step
            console.print(f"checkpoint {self.folder / str(step)} is {fault}: going on from the one before")
        return None

    def restore(self, step: int, like: Any) -> Any:
        """A state.

        Args:
            step: of a whole checkpoint.
            like: a state of the same shapes, placed as the restored one should be.

        Raises:
            RunError: if the arrays in the checkpoint are others than those of `like`.
        """
        held, wanted = json.loads(self._contents(step).read_text())["arrays"], described(like)
        other = sorted(name for name in {*held, *wanted} if held.get(name) != wanted.get(name))
        if other:
            raise RunError(
                f"checkpoint {self.folder / str(step)} is of another network or optimizer: {other[0]} is"
                f" {held.get(other[0])} there, and {wanted.get(other[0])} here; to start again, delete"
                f" {self.folder.parent}"
            )
        shapes = {name: ocp.utils.to_shape_dtype_struct(leaf) for name, leaf in flat(like).items()}
        arrays = self._orbax.restore(self.folder / str(step), shapes)
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in shapes])

    def _steps(self) -> list[int]:
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def _contents(self, step: int) -> Path:
        return self.folder / f"{step}.json"

    def _fault(self, step: int) -> str | None:
        try:
            expected = json.loads(self._contents(step).read_text())["files"]
            found = digests(self.folder / str(step))
        except FileNotFoundError:
            return "half written"
        except (OSError, ValueError) as error:
            return f"unreadable ({error})"
        names = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        return f"damaged (in {names[0]})" if names else None

    def _seal(self, state, step):
        contents = {"arrays": described(state), "files": digests(self.folder / str(step))}
        write_at_once(self._contents(step), json.dumps(contents, indent=1))
        self._prune()

    def _prune(self):
        whole = [step for step in self._steps() if self._contents(step).exists()]
        kept = {path.name for step in whole[-KEPT:] for path in (self.folder / str(step), self._contents(step))}
        for path in self.folder.iterdir():
            if path.name not in kept:
                remove(path)


def flat(state: Any) -> dict[str, jax.Array]:
    """The arrays of a tree by their paths."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def described(state: Any) -> dict[str, str]:
    """The dtype and shape of every array of a tree, by its path."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in flat(state).items()}


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, by its path there."""
    result = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                result[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    if not result:
        raise FileNotFoundError(folder)
    return result


def write_at_once(path: Path, text: str):
    """Writes a file that is there whole or not at all, whenever the machine stops."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def remove(path: Path):
    """Removes a file or a folder."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
