"""A run is a folder: begun if it is new, continued if it was stopped, read if it is done.

The folder holds `metrics.jsonl`, whose first line is the configuration, and checkpoints. Records reach the disk before
the checkpoint of their step does, so that a checkpoint never lacks the records before it. A run that goes on drops the
records after its checkpoint and makes them again: same state, same step, same bits.
"""

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import processes, records
from experiments.config import TrainConfig, load_config
from experiments.console import TrainingBars, say
from experiments.errors import Diverged, RunError, Stopped
from experiments.problems import default_learning_rate
from experiments.records import Record
from experiments.signals import listener
from experiments.train import is_record, refuse_divergence, train

if TYPE_CHECKING:
    from experiments.step import Stepper, TrainState

METRICS = "metrics.jsonl"
# Of the files in a folder; another number is another meaning.
FORMAT = 1


def run(config: TrainConfig, folder: Path, show: Callable[[Record], None] = lambda record: None) -> list[Record]:
    """Carries out a run, or what is left of it.

    Args:
        config: of the run; `folder_of` gives a folder that it determines.
        folder: of the run, of this one alone.
        show: sees each new record once it is on the disk, in the first process.

    Returns:
        All records of the run but its configuration: the same, but for seconds, however often it was interrupted.

    Raises:
        Diverged: if the loss is not finite; again without training if it was so before. The records are in the folder.
        RunError: if the folder cannot be used. Nothing is lost that was in it.
        Stopped: by a signal, once the last step is saved.
    """
    config = settled(config)
    with contextlib.ExitStack() as stack:
        past = processes.from_first(lambda: stack.enter_context(opened(config, folder)))
        if past:
            refuse_divergence(past[-1])
            if past[-1]["kind"] == "epoch" and past[-1]["epoch"] == config.num_epochs:
                return past
        return go_on(config, folder, past, show)


def folder_of(config: TrainConfig) -> Path:
    """The folder in `config.out` that every run with these results shares, and no other has."""
    return config.out / f"train-{settled(config).name}"


def settled(config: TrainConfig) -> TrainConfig:
    """The configuration with the learning rate that it leaves to the trials of `race`."""
    if config.learning_rate is not None or config.phases:
        return config
    return dataclasses.replace(config, learning_rate=default_learning_rate(config)[0])


def num_steps(config: TrainConfig) -> int:
    """Optimizer steps in a run; reads the data set if that was not done."""
    return sum(epoch.steps for epoch in config.plan(1.0).epochs(len(stepper_of(config).train)))


def go_on(config: TrainConfig, folder: Path, past: list[Record], show: Callable[[Record], None]) -> list[Record]:
    """Trains from the last checkpoint that is whole, or from the beginning."""
    saver, metrics = Saver(config, folder), folder / METRICS
    state, step = saver.resume(past[-1]["step"] if past else 0)
    past = [record for record in past if record["step"] <= step]
    first = processes.is_first()
    if first:
        head = {"kind": "config", "format": FORMAT, **config.as_dict()}
        records.write(metrics, "".join(map(records.line, (head, *past))))
    with listener.waiting():
        for record in train(stepper_of(config), config.seed, config.learning_rate, state, tuple(past), saver):
            if first:
                records.append(metrics, record)
                show(record)
            past.append(record)
        signal, _ = processes.agree(listener.caught(), False)
        if signal:
            raise Stopped(signal, "this run is done; the same command goes on with what is left")
    return past


class Saver:
    """Keeps states: the last one, one before a signal's end, and others so many seconds apart."""

    def __init__(self, config: TrainConfig, folder: Path):
        from experiments.checkpoints import Checkpoints

        self._stepper, self._seconds, self._total = stepper_of(config), config.checkpoint_seconds, num_steps(config)
        self._checkpoints, self._metrics = Checkpoints(folder / "checkpoints"), folder / METRICS
        self._state, self._saved = self._stepper.init(config.seed), time.monotonic()

    def resume(self, at_most: int) -> tuple["TrainState", int]:
        """The state to go on from, of so many steps at most, and its steps."""
        arrays = self._stepper.arrays(self._state)

        def restore() -> int:
            nonlocal arrays
            step, arrays = self._checkpoints.restore(at_most, arrays)
            # What comes after is made again.
            self._checkpoints.keep(range(1, step + 1))
            if self._seconds is not None:
                self._checkpoints.check_room(arrays)
            return step

        if step := processes.from_first(restore):
            self._state = self._stepper.place(processes.arrays_from_first(arrays), self._state)
            say(f"going on after step {step}")
        return self._state, step

    def __call__(self, state: "TrainState", step: int, last: bool):
        due = self._seconds is not None and time.monotonic() - self._saved >= self._seconds
        signal, due = processes.agree(listener.caught(), due)
        if self._seconds is not None and (last or due or signal):
            processes.from_first(lambda: self._write(state, step))
            self._saved = time.monotonic()
        if signal and self._seconds is None:
            raise Stopped(signal, f"step {step} of {self._total} is not saved, for --checkpoint-seconds is none")
        if signal:
            again = processes.AGAIN if processes.several() else "the same command goes on from there"
            raise Stopped(signal, f"step {step} of {self._total} is saved; {again}")

    def _write(self, state: "TrainState", step: int):
        with records.explained(self._metrics), self._metrics.open("r+b") as file:
            records.sync(file)
        self._checkpoints.save(self._stepper.arrays(state), step)


@contextlib.contextmanager
def opened(config: TrainConfig, folder: Path) -> Iterator[list[Record]]:
    """Makes the folder of a run, tries to write there, and keeps other runs out; gives the records that it holds."""
    records.refuse_links(folder, folder / METRICS, folder / "checkpoints")
    with records.folder(folder):
        lock = os.open(folder, os.O_RDONLY)
        try:
            # The system lifts it when the process ends, in whichever way.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield recover(config, folder / METRICS)
        except BlockingIOError as error:
            raise RunError(f"another run is writing to {folder}: wait for it, or give another --out") from error
        finally:
            os.close(lock)


def recover(config: TrainConfig, path: Path) -> list[Record]:
    """The records of a run, if it was begun; raises a RunError if they are of another one, or of another version."""
    if not path.exists():
        return []
    rows, damaged = records.read_whole(path)
    if not rows:
        raise RunError(f"{path} is not of a run: move it elsewhere, or give another --out")
    first, *past = rows
    fields = {name: value for name, value in first.items() if name not in ("kind", "format")}
    new = sorted(fields.keys() - {field.name for field in dataclasses.fields(config)})
    if first.get("format") != FORMAT or new:
        what = f"it knows the option {new[0]}" if new else f"format {first.get('format')}, not {FORMAT}"
        raise RunError(f"{path.parent} is of another version of this program ({what}): use that, or give another --out")
    try:
        held = load_config(fields)
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path} does not begin with the options of a run ({error}): give another --out") from error
    if held.name != config.name:
        raise RunError(f"{path.parent} holds the run {held.name}, not {config.name}: give another --out, or delete it")
    whole = list(itertools.takewhile(is_record, past))
    if damaged or len(whole) < len(past):
        say(f"{path} is damaged after {len(whole)} records: what follows is made again")
    return whole


def stepper_of(config: TrainConfig) -> "Stepper":
    """What is compiled for a configuration; shared by runs that differ in seed and learning rate."""
    same = dict.fromkeys(("learning_rate", "coordinator", "num_processes", "process_id", "checkpoint_seconds"))
    return _stepper(dataclasses.replace(config, seed=0, out=Path(), **same))


@functools.lru_cache(maxsize=2)
def _stepper(config: TrainConfig) -> "Stepper":
    # Before anything else of JAX, with which images are made.
    processes.start_devices(config.devices)
    from experiments import data
    from experiments.step import Stepper

    return Stepper(config, data.load(config))


class Runner:
    """Gives the records of runs, carrying out those that were not yet, on bars; may `tell` where each new one is."""

    def __init__(self, bars: TrainingBars, tell: bool = False):
        self._bars, self._tell = bars, tell

    def __call__(self, config: TrainConfig, name: str) -> list[Record]:
        """The records of a run, which is called so on the screen. One that diverged has no last epoch."""
        folder, show = folder_of(config), self._bars.follow(name, lambda: num_steps(config))
        try:
            return run(config, folder, show)
        except Diverged:
            return records.read(folder / METRICS)[1:]
        finally:
            if show.seen and self._tell:
                show.finish()
                say(f"{name}: {folder}")
