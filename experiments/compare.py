"""What is read off the runs of several methods on one problem: shared by `race` and `tune`."""

from collections.abc import Sequence
from typing import NamedTuple

from experiments.config import TrainConfig
from experiments.records import Record
from experiments.timing import compile_seconds, step_seconds


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
    compile_seconds: float


def outcome(config: TrainConfig, records: Sequence[Record], target: float) -> Outcome:
    """Reads an outcome off the records of a run; one that diverged does not end with an epoch."""
    steps = [record for record in records if record["kind"] == "step"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    reached = (record["step"] for record in epochs if record["test_accuracy"] >= target)
    if records[-1]["kind"] != "epoch":
        epochs.append({"loss": float("inf"), "test_loss": float("inf"), "test_accuracy": 0.0})
    return Outcome(
        config.optimizer,
        config.learning_rate,
        config.seed,
        *(epochs[-1][name] for name in ("loss", "test_loss", "test_accuracy")),
        steps_to_target=next(reached, None),
        step_seconds=step_seconds(steps),
        compile_seconds=compile_seconds(steps),
    )
