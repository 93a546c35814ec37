"""What is read off the runs of several methods on one problem: shared by `race` and `tune`."""

from collections.abc import Sequence
from typing import NamedTuple

from experiments.config import TrainConfig
from experiments.records import Record
from experiments.train import step_seconds


class Outcome(NamedTuple):
    """One run, in its last epoch; if it diverged, with infinite losses and an accuracy of 0."""

    method: str
    learning_rate: float
    seed: int
    loss: float
    test_loss: float
    test_accuracy: float
    # Until the target accuracy was first seen at the end of an epoch, if ever.
    steps_to_target: int | None
    step_seconds: float
    # What the steps that compiled took longer than the others.
    compile_seconds: float


def outcome(config: TrainConfig, records: Sequence[Record], target: float) -> Outcome:
    """Reads an outcome off the records of a run; one that diverged does not end with an epoch."""
    steps, epochs = ([record for record in records if record["kind"] == kind] for kind in ("step", "epoch"))
    reached = (record["step"] for record in epochs if record["test_accuracy"] >= target)
    diverged = {"loss": float("inf"), "test_loss": float("inf"), "test_accuracy": 0.0}
    last = records[-1] if records[-1]["kind"] == "epoch" else diverged
    typical = step_seconds(steps)
    compiling = sum(max(0.0, step["seconds"] - typical) for step in steps if step["compiled"])
    about, ends = (config.optimizer, config.learning_rate, config.seed), [last[name] for name in diverged]
    return Outcome(*about, *ends, next(reached, None), typical, compiling)
