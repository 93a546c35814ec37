"""The problems on which the methods are compared: everything but the method and its learning rate, held fixed.

`tune` tries the same number of learning rates for every method, a factor apart, from a start of its own, since gamma
differs by orders of magnitude between rules. `race` then gives each method the one that did best.
"""

import dataclasses
from collections.abc import Mapping

from experiments import methods
from experiments.config import TrainConfig
from experiments.errors import UsageError

RACERS = ("sgd", "lars", "mclr", "percent_delta", "cblr")
GRID_POINTS = 6
GRID_FACTOR = 2.0


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is held fixed, and where each method's grid begins.

    Attributes:
        config: of every run, but for its optimizer and learning rate.
        target: test accuracy; a method's steps until it reaches this are reported.
        holdout: fraction of the training images by which learning rates are judged.
        tune_seeds: number of runs per learning rate.
        race_seeds: number of runs per method in a race.
        lowest: the smallest learning rate of each method's grid.
    """

    config: TrainConfig
    target: float
    holdout: float
    tune_seeds: int
    race_seeds: int
    lowest: Mapping[str, float]

    def grid(self, method: str) -> list[float]:
        """The learning rates that `tune` tries."""
        return [float(f"{self.lowest[method] * GRID_FACTOR**k:.3g}") for k in range(GRID_POINTS)]


PROBLEMS = {
    "digits": Problem(
        TrainConfig(
            dataset="digits", width=0.125, dropout=0.25, batch_size=512, epochs=40, warmup_epochs=4, weight_decay=0.0
        ),
        target=0.9,
        holdout=0.2,
        tune_seeds=2,
        race_seeds=2,
        lowest={"sgd": 0.005, "lars": 0.002, "mclr": 0.0001, "percent_delta": 0.004, "cblr": 0.001},
    ),
    "cifar10": Problem(
        TrainConfig(dataset="cifar10", width=0.125, dropout=0.25, batch_size=1024, epochs=5, warmup_epochs=0.5),
        target=0.5,
        holdout=0.1,
        tune_seeds=1,
        race_seeds=2,
        lowest={"sgd": 0.01, "lars": 0.002, "mclr": 0.0002, "percent_delta": 0.004, "cblr": 0.002},
    ),
}


def default_learning_rate(config: TrainConfig) -> tuple[float, str]:
    """The learning rate for a configuration that states none, and the problem on which it was tuned.

    Raises:
        UsageError: if the method was tuned on no problem at all.
    """
    # First the problem with this data set; then CIFAR-10, the nearer to any other photographs; then any.
    names = sorted(PROBLEMS, key=lambda name: (name != config.dataset, name != "cifar10"))
    for name in names:
        if rate := methods.tuned_learning_rate(name, config.optimizer):
            return rate, name
    raise UsageError(f"--optimizer {config.optimizer} has not been tuned: give its --learning-rate")
