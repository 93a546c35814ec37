"""Runs of several methods on one problem, and what is read off them: shared by `race` and `tune`."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence

from experiments.problems import Problem
from experiments.step import Stepper
from experiments.train import Diverged, Record, train

# One refresh of `cblr`'s curvature with its default interval falls into every window of this many steps.
TIMING_WINDOW = 10
# A step with a refresh, and one without.
COMPILING = 2


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
        step_seconds: median over windows of the mean duration of a step, without the first two, which compile.
        compile_seconds: what the first two steps took longer.
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
    seconds = step_seconds([record["seconds"] for record in steps])
    if diverged:
        epochs.append({"loss": float("inf"), "test_loss": float("inf"), "test_accuracy": 0.0})
    return Outcome(
        method,
        learning_rate,
        seed,
        *(epochs[-1][name] for name in ("loss", "test_loss", "test_accuracy")),
        steps_to_target=next(reached, None),
        step_seconds=seconds,
        compile_seconds=max(0.0, sum(step["seconds"] - seconds for step in steps[:COMPILING])),
    )


def step_seconds(seconds: Sequence[float]) -> float:
    """Median over windows of steps of their mean duration; the first two, which compile, are left out.

    A plain median would never see the one step in ten that estimates curvature, and a plain mean sees every hiccup of
    the machine.

    Example:
        >>> round(step_seconds([9.0, 2.0] + [0.1] * 8 + [0.2] + [0.1] * 9 + [0.2] + [0.1]), 6)
        0.11
    """
    rest = list(seconds[COMPILING:]) or list(seconds)
    windows = [rest[i : i + TIMING_WINDOW] for i in range(0, len(rest) - TIMING_WINDOW + 1, TIMING_WINDOW)] or [rest]
    return statistics.median(statistics.fmean(window) for window in windows)


def configs(problem: Problem, methods: Sequence[str], **changes) -> dict:
    """The configuration of each method on a problem."""
    return {name: dataclasses.replace(problem.config, optimizer=name, **changes) for name in methods}
