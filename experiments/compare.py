"""Runs of several methods on one problem, and what is read off them: shared by `race` and `tune`."""

import dataclasses
from collections.abc import Callable, Sequence

from experiments.problems import Problem
from experiments.step import Stepper
from experiments.timing import compile_seconds, step_seconds
from experiments.train import Diverged, Record, train


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
        method: its name.
        learning_rate: peak.
        seed: of the run.
        loss: mean training loss over its last epoch; infinite if it diverged.
        test_loss: after its last epoch; infinite if it diverged.
        test_accuracy: after its last epoch, between 0 and 1; 0 if it diverged.
        steps_to_target: optimizer steps until the target accuracy was first seen at the end of an epoch, if ever.
        step_seconds: see `timing.step_seconds`.
        compile_seconds: see `timing.compile_seconds`.
    """

    method: str
    learning_rate: float
    seed: int
    loss: float
    test_loss: float
    test_accuracy: float
    steps_to_target: int | None
    step_seconds: float
    compile_seconds: float


def run(stepper: Stepper, rate: float, seed: int, target: float, see: Callable[[Record], None]) -> Outcome:
    """Trains once, showing every record to `see`; a run that diverges is an outcome too."""
    records, diverged = [], False
    try:
        for record in train(stepper, seed, rate):
            see(record)
            records.append(record)
    except Diverged:
        diverged = True
    return summarise(records, stepper.config.optimizer, rate, seed, target, diverged)


def summarise(records: Sequence[Record], method, learning_rate, seed, target, diverged: bool) -> Outcome:
    """Reads an outcome off the records of a run."""
    steps = [record for record in records if record["kind"] == "step"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    reached = (record["step"] for record in epochs if record["test_accuracy"] >= target)
    seconds = [record["seconds"] for record in steps]
    if diverged:
        epochs.append({"loss": float("inf"), "test_loss": float("inf"), "test_accuracy": 0.0})
    return Outcome(
        method,
        learning_rate,
        seed,
        *(epochs[-1][name] for name in ("loss", "test_loss", "test_accuracy")),
        steps_to_target=next(reached, None),
        step_seconds=step_seconds(seconds),
        compile_seconds=compile_seconds(seconds),
    )


def configs(problem: Problem, methods: Sequence[str], **changes) -> dict:
    """The configuration of each method on a problem."""
    return {name: dataclasses.replace(problem.config, optimizer=name, **changes) for name in methods}
