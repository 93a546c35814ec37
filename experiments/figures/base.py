"""What a figure is, and what it works with."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

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


class Measurement(NamedTuple):
    """The gradients that a figure takes which trains nothing: of which network, of how many images, in which chunks."""

    config: TrainConfig
    chunk: int
    images: int


class Figure:
    """One figure of the paper: its number there, what it shows, the paper's claim, and panels side by side."""

    number: int
    title: str
    claim: str
    panels = 1

    def rows(self, place: Place, trained: Trained) -> Iterable[Row]:
        """The numbers, from a place and a function that gives the records of a run."""
        raise NotImplementedError

    def judge(self, rows: Sequence[Row]) -> list[Claim]:
        """The claims, from the numbers."""
        raise NotImplementedError

    def draw(self, axes: Sequence[Axes], rows: Sequence[Row]):
        """The plot, from the numbers."""
        raise NotImplementedError

    def settings(self, place: Place) -> str:
        """What was chosen where the paper leaves it open."""
        raise NotImplementedError

    def runs(self, place: Place) -> list[TrainConfig]:
        """The configurations whose records `rows` will ask for, as far as they are known beforehand."""
        del place
        return []

    def measurement(self, place: Place) -> Measurement | None:
        """What it takes, if that is no run."""
        del place

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


def describe(config: TrainConfig, init: str | None = None) -> str:
    """The settings of a run that matter to its figure, in words; `init` where it stands for more than one."""
    images = f"the first {config.train_images:,}" if config.train_images else "all"
    dropout = f" dropout {config.dropout:g}," if config.model == "alexnet" else ""
    return (
        f"{config.model} at width {config.width:g}, {init or config.init} initialisation, {images} training images of"
        f" {config.dataset} at {config.image_size} pixels,{dropout}"
        f" {'crops and flips' if config.augment else 'no augmentation'}, momentum {config.momentum:g}, weight decay"
        f" {config.weight_decay:g}, {config.schedule} learning rate"
    )
