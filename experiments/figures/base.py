"""What a figure is, and what it works with."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from experiments.commands import Preset
from experiments.config import TrainConfig
from experiments.records import Record as Row

Trained = Callable[[TrainConfig], list[Row]]

# A constant learning rate, since the paper names two rates and no schedule. Its experiments ran on PyTorch, whose
# initial parameters are those of the full scale; from them plain gradient descent first rests on a plateau for longer
# than the smaller scales last.
COMMON = {"optimizer": "sgd", "schedule": "constant", "warmup_epochs": 0.0, "weight_decay": 0.0, "momentum": 0.0}
# A run of the smaller scales takes less than a minute: not worth a checkpoint.
SMALL = {**COMMON, "augment": False, "checkpoint_seconds": None}
CPU = {"dataset": "cifar10", "width": 0.125, "dropout": 0.25, "train_images": 8192, "test_images": 2048}
BASES = {
    "smoke": {**SMALL, "dataset": "generated", "image_size": 16, "width": 0.05, "dropout": 0.0},
    "cpu": {**SMALL, **CPU},
    "paper": {**COMMON, "dataset": "cifar10", "init": "pytorch", "micro_batch_size": 1024},
}
# The layer of Figure 3: AlexNet's first fully connected one.
LAYER = "linears/0/kernel"
STRIDES = ("parameter_stride", "loss_stride")
# Columns of figures, with their axes.
TEST_LOSS = ("test_loss", "test loss (nats per image)")
TEST_ACCURACY = ("test_accuracy", "test accuracy (%)")


class Claim(NamedTuple):
    """A sentence that a machine can check, the numbers with their spread, and one of `statistics.VERDICTS`."""

    statement: str
    evidence: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class Place:
    """At which scale a figure is made, where TFDS keeps its data sets, and where the runs are kept."""

    preset: Preset
    data_dir: Path | None = None
    out: Path = Path("runs")

    def config(self, **changes) -> TrainConfig:
        """AlexNet with plain gradient descent at this scale, but for these fields."""
        return TrainConfig(**{**BASES[self.preset], "data_dir": self.data_dir, "out": self.out, **changes})


class Figure:
    """One figure of the paper: its number there, what it shows, the paper's claim, and panels side by side.

    A figure of runs says which they are in `grid`; one that only measures says in `measurement` what that takes: the
    gradients of which network, in chunks of how many images, of how many in all.
    """

    number: int
    title: str
    claim: str
    panels = 1
    # What tells the runs apart, as columns of the rows.
    keys: tuple[str, ...] = ()
    # The claims, and the plot, from the numbers alone; what was chosen where the paper leaves it open.
    judge: Callable[[Sequence[Row]], list[Claim]]
    draw: Callable[[Sequence[Axes], Sequence[Row]], None]
    settings: Callable[[Place], str]

    def grid(self, place: Place) -> dict[tuple, TrainConfig]:
        """The runs, by the values of `keys`, as far as they are known beforehand."""
        del place
        return {}

    def measurement(self, place: Place) -> tuple[TrainConfig, int, int] | None:
        """What it takes that is no run."""
        del place

    def rows(self, place: Place, trained: Trained) -> Iterable[Row]:
        """The numbers, from a place and a function that gives the records of a run."""
        for key, config in self.grid(place).items():
            yield from run_rows(trained(config), dict(zip(self.keys, key, strict=True)))

    @property
    def name(self) -> str:
        """Of its files."""
        return f"figure-{self.number:02d}"


def run_rows(records: Sequence[Row], about: Row) -> Iterator[Row]:
    """A row for each epoch of a run, with the means of its probes over the epoch's steps, and a `final` one."""
    names = ("epoch", "step", "loss", "accuracy", "test_loss", "test_accuracy")
    for record in records:
        if record["kind"] == "epoch":
            own = [step for step in records if (step["kind"], step["epoch"]) == ("step", record["epoch"])]
            row = {**about, **{name: record[name] for name in names}, "steps": len(own)}
            if any(STRIDES[0] in name for name in own[0]):
                means = {f"mean_{name}": float(np.mean([r[f"{name}/{LAYER}"] for r in own])) for name in STRIDES}
                row |= {**means, "learning_rate": own[0]["learning_rate"]}
            yield row
    last = last_epoch(records)
    yield {**about, "final": True, **{name: last[name] for name in names[1:]}}


def last_epoch(records: Sequence[Row]) -> Row:
    """The last epoch of a run; of one that diverged, an accuracy of 0 and no loss."""
    if records[-1]["kind"] == "epoch":
        return records[-1]
    return {**records[-1], "accuracy": 0.0, "test_accuracy": 0.0, "loss": None, "test_loss": None}


def count(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun}" + "s" * (number != 1)
