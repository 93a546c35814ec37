"""What a figure is, and what it works with."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from experiments.commands import Preset
from experiments.config import TrainConfig
from experiments.records import Record as Row

Trained = Callable[[TrainConfig], list[Row]]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement that a machine can check, and how it came out.

    Attributes:
        statement: in a sentence.
        evidence: the numbers, with their spread.
        verdict: one of `statistics.VERDICTS`.
    """

    statement: str
    evidence: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class Place:
    """At which scale a figure is made, and where things are.

    Attributes:
        preset: the scale.
        data_dir: where TFDS keeps its data sets.
        out: where the runs are kept.
    """

    preset: Preset
    data_dir: Path | None = None
    out: Path = Path("runs")

    def config(self, **changes) -> TrainConfig:
        """AlexNet with plain gradient descent at this scale, but for these fields."""
        return TrainConfig(**{**BASES[self.preset], "data_dir": self.data_dir, "out": self.out, **changes})


# A constant learning rate, since the paper names two rates and no schedule. Its experiments ran on PyTorch, whose
# initial parameters are those of the full scale; from them plain gradient descent first rests on a plateau for longer
# than the smaller scales last.
COMMON = {"optimizer": "sgd", "schedule": "constant", "warmup_epochs": 0.0, "weight_decay": 0.0, "momentum": 0.0}
# A run of the smaller scales takes less than a minute: not worth a checkpoint.
SMALL = {**COMMON, "augment": False, "checkpoint_seconds": None}
BASES = {
    "smoke": {**SMALL, "dataset": "generated", "image_size": 16, "width": 0.05, "dropout": 0.0},
    "cpu": {
        **{**SMALL, "dataset": "cifar10", "width": 0.125, "dropout": 0.25},
        **{"train_images": 8192, "test_images": 2048},
    },
    "paper": {**COMMON, "dataset": "cifar10", "init": "pytorch", "micro_batch_size": 1024},
}


def no_runs(place: Place) -> list[TrainConfig]:
    """Of a figure that trains nothing."""
    del place
    return []


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a figure that trains nothing measures: the gradient of many images.

    Attributes:
        config: of the network.
        chunk: images at once.
        images: in all.
    """

    config: TrainConfig
    chunk: int
    images: int


@dataclasses.dataclass(frozen=True)
class Figure:
    """One figure of the paper.

    Attributes:
        number: in the paper.
        title: what it shows.
        claim: the paper's, in a sentence.
        rows: from a place and a function that gives the records of a run to the numbers.
        judge: from the numbers to the claims.
        draw: from axes and the numbers to the plot.
        settings: what was chosen where the paper leaves it open, for a place.
        runs: the configurations whose records `rows` will ask for, as far as they are known beforehand.
        panels: side by side.
        measurement: for the figures without runs, what they measure.
    """

    number: int
    title: str
    claim: str
    rows: Callable[[Place, Trained], Iterable[Row]]
    judge: Callable[[Sequence[Row]], list[Claim]]
    draw: Callable[[Sequence[Axes], Sequence[Row]], None]
    settings: Callable[[Place], str]
    runs: Callable[[Place], list[TrainConfig]] = no_runs
    panels: int = 1
    measurement: Callable[[Place], Measurement] | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        return f"figure-{self.number:02d}"


def count(number: int, noun: str) -> str:
    """A number of things.

    Example:
        >>> count(1, "seed"), count(5, "seed")
        ('1 seed', '5 seeds')
    """
    return f"{number} {noun}" + "s" * (number != 1)


def last_epoch(records: Sequence[Row]) -> Row:
    """The last epoch of a run; of one that diverged, an accuracy of 0 and no loss."""
    if records[-1]["kind"] == "epoch":
        return records[-1]
    nothing = {"accuracy": 0.0, "test_accuracy": 0.0, "loss": None, "test_loss": None}
    return {**records[-1], **nothing}


def describe(config: TrainConfig, init: str | None = None) -> str:
    """The settings of a run that matter to its figure, in words; `init` where it stands for more than one."""
    images = f"the first {config.train_images:,}" if config.train_images else "all"
    parts = [
        f"{config.model} at width {config.width:g}, {init or config.init} initialisation, {images} training images of"
        f" {config.dataset} at {config.image_size} pixels",
        f"dropout {config.dropout:g}" if config.model == "alexnet" else "",
        "crops and flips" if config.augment else "no augmentation",
        f"momentum {config.momentum:g}",
        f"weight decay {config.weight_decay:g}",
        f"{config.schedule} learning rate",
    ]
    return ", ".join(part for part in parts if part)
