"""The problems on which the methods are compared: everything but the method and its learning rate, held fixed.

`tune` tries the same number of learning rates for every method, a factor apart, from a start of its own, since gamma
differs by orders of magnitude between rules. `race` then gives each method the one that did best.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.config import METHODS, TrainConfig
from experiments.errors import RunError, UsageError

RACERS = ("sgd", "lars", "mclr", "percent_delta", "cblr")
GRID_POINTS = 6
GRID_FACTOR = 2.0
TUNED_FILE = Path(__file__).with_name("tuned.json")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is held fixed, and where each method's grid begins."""

    # Of every run, but for its optimizer and learning rate.
    config: TrainConfig
    # A test accuracy: a method's steps until it reaches this are reported.
    target: float
    # Fraction of the training images by which learning rates are judged.
    holdout: float
    tune_seeds: int
    race_seeds: int
    # The smallest learning rate of each method's grid.
    lowest: Mapping[str, float]

    def change(self, **changes: Any) -> "Problem":
        """A problem with other fields in its configuration."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))

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
        lowest=dict(zip(METHODS, (0.005, 0.002, 0.0001, 0.004, 0.001, 0.001), strict=True)),
    ),
    "cifar10": Problem(
        TrainConfig(dataset="cifar10", width=0.125, dropout=0.25, batch_size=1024, epochs=5, warmup_epochs=0.5),
        target=0.5,
        holdout=0.1,
        tune_seeds=1,
        race_seeds=2,
        lowest=dict(zip(METHODS, (0.01, 0.002, 0.0002, 0.004, 0.002, 0.001), strict=True)),
    ),
}


def load_tuned(path: Path) -> dict[str, Any]:
    """The results of `tune`, by problem; none if there is no file.

    Raises:
        UsageError: if the file holds something else.
        RunError: if it cannot be read.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        for problem in results.values():
            for method in problem["methods"].values():
                float(method["best"]), [float(trial["learning_rate"]) for trial in method["trials"]]
            problem["settings"]["seeds"]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RunError(f"cannot read {path} ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UsageError(f"{path} does not hold the results of tune: remove it, or give another --file") from None
    return results


def tuned_learning_rate(problem: str, optimizer: str) -> float | None:
    """The best learning rate of a method on a problem's committed grid, or None if it was not tuned there."""
    try:
        return load_tuned(TUNED_FILE)[problem]["methods"][optimizer]["best"]
    except KeyError:
        return None


def default_learning_rate(config: TrainConfig) -> tuple[float, str]:
    """The learning rate for a configuration that states none, and the problem on which it was tuned.

    Raises:
        UsageError: if the method was tuned on no problem at all.
    """
    # First the problem with this data set; then CIFAR-10, the nearer to any other photographs; then any.
    names = sorted(PROBLEMS, key=lambda name: (name != config.dataset, name != "cifar10"))
    for name in names:
        if rate := tuned_learning_rate(name, config.optimizer):
            return rate, name
    raise UsageError(f"--optimizer {config.optimizer} has not been tuned: give its --learning-rate")
