"""A run is a folder: begun if it is new, continued if it was stopped, read if it is done.

The folder holds `metrics.jsonl`, whose first line is the configuration, and checkpoints. Records reach the disk before
the checkpoint of their step does, so that a checkpoint never lacks the records before it. A run that goes on drops the
records after its checkpoint and makes them again: same state, same step, same bits.
"""

import contextlib
import dataclasses
import fcntl
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments import data, processes, records
from experiments.checkpoints import Checkpoints
from experiments.config import TrainConfig, load_config
from experiments.console import console
from experiments.errors import RunError
from experiments.problems import default_learning_rate
from experiments.step import Stepper, TrainState
from experiments.train import Record, refuse_divergence, train

METRICS = "metrics.jsonl"


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
    """
    config = settled(config)
    with contextlib.ExitStack() as stack:
        past = processes.from_first(lambda: recover(config, stack.enter_context(opened(folder))))
        if past:
            refuse_divergence(past[-1])
        if is_done(config, past):
            return past
        return go_on(config, folder, past, show)


def folder_of(config: TrainConfig) -> Path:
    """The folder in `config.out` that every run with these results shares, and no other has."""
    return config.out / f"train-{settled(config).name}"


def settled(config: TrainConfig) -> TrainConfig:
    """The configuration with the learning rate that it leaves to `tune`."""
    if config.learning_rate is not None or config.phases:
        return config
    return dataclasses.replace(config, learning_rate=default_learning_rate(config)[0])


def is_done(config: TrainConfig, past: list[Record]) -> bool:
    """Whether the records end with those of the last epoch."""
    return bool(past) and past[-1]["kind"] == "epoch" and past[-1]["epoch"] == num_epochs(config)


def num_epochs(config: TrainConfig) -> int:
    """Passes over the training images in a run."""
    return sum(phase.epochs for phase in config.plan(1.0).phases)


def num_steps(config: TrainConfig) -> int:
    """Optimizer steps in a run; reads the data set if that was not done."""
    return sum(epoch.steps for epoch in config.plan(1.0).epochs(len(stepper_of(config).train)))


def go_on(config: TrainConfig, folder: Path, past: list[Record], show: Callable[[Record], None]) -> list[Record]:
    """Trains from the last checkpoint that is whole, or from the beginning."""
    stepper, checkpoints = stepper_of(config), Checkpoints(folder / "checkpoints")
    state, past = resume(stepper, config.seed, checkpoints, past)
    if config.checkpoint_seconds is not None:
        processes.from_first(lambda: checkpoints.check_room(state))
    with writing(config, folder / METRICS, past) as writer:
        save = saver(config.checkpoint_seconds, checkpoints, writer)
        for record in train(stepper, config.seed, config.learning_rate, state, tuple(past), save):
            if writer:
                writer.write(record)
                show(record)
            past.append(record)
    return past


@contextlib.contextmanager
def writing(config: TrainConfig, path: Path, past: list[Record]) -> Iterator[records.Writer | None]:
    """A writer that goes on after these records; None in all processes but the first."""
    if not processes.is_first():
        yield None
        return
    records.rewrite(path, [{"kind": "config", **config.as_dict()}, *past])
    with records.Writer(path) as writer:
        yield writer


def resume(stepper: Stepper, seed: int, checkpoints: Checkpoints, past: list[Record]):
    """The state to go on from, and the records up to it."""
    state = stepper.init(seed)
    step = processes.from_first(lambda: checkpoints.latest(at_most=past[-1]["step"])) if past else None
    if step is not None:
        state = checkpoints.restore(step, like=state)
        console.print(f"going on after step {step}", soft_wrap=True)
    return state, [record for record in past if record["step"] <= (step or 0)]


def saver(
    seconds: float | None, checkpoints: Checkpoints, writer: records.Writer | None
) -> Callable[[TrainState, int, bool], None]:
    """A function that saves the last state, and another once so many seconds have passed since it saved one."""
    saved = time.monotonic()

    def save(state: TrainState, step: int, last: bool):
        nonlocal saved
        # The clocks of several processes differ, and all of them have to take part.
        if seconds is not None and (last or processes.from_first(lambda: time.monotonic() - saved >= seconds)):
            if writer:
                writer.sync()
            checkpoints.save(state, step)
            saved = time.monotonic()

    return save


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Path]:
    """Makes a folder, tries to write there, and keeps other runs out; gives the path of its metrics.

    Raises:
        RunError: if any of this fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / METRICS).open("a").close()
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise RunError(f"cannot write to {folder} ({error.strerror}): give another --out") from error
    try:
        # The system lifts this lock when the process ends, in whichever way.
        take(lock, folder)
        yield folder / METRICS
    finally:
        os.close(lock)


def take(lock: int, folder: Path):
    """Takes a lock on a folder, or says who has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(f"another run is writing to {folder}: wait for it, or give another --out") from error


def recover(config: TrainConfig, path: Path) -> list[Record]:
    """The records of a run, if it was begun.

    Raises:
        RunError: if they are of a run with other results.
    """
    first, *past = records.read_whole(path) or [None]
    if first is None:
        return []
    held = load_config({name: value for name, value in first.items() if name != "kind"})
    if held.name != config.name:
        raise RunError(f"{path.parent} holds the run {held.name}, not {config.name}: give another --out, or delete it")
    return past


def stepper_of(config: TrainConfig) -> Stepper:
    """What is compiled for a configuration; shared by runs that differ in seed and learning rate."""
    same = dict.fromkeys(("learning_rate", "coordinator", "num_processes", "process_id", "checkpoint_seconds"))
    return _stepper(dataclasses.replace(config, seed=0, out=Path(), **same))


@functools.lru_cache(maxsize=2)
def _stepper(config: TrainConfig) -> Stepper:
    return Stepper(config, data.load(config))
