"""The problems on which the methods are compared: everything but the method and its hyper-parameters, held fixed."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.config import METHODS, TrainConfig
from experiments.errors import UsageError
from experiments.search import best

# Results that are committed with the project: a file for each problem, data set and batch size.
RESULTS = Path(__file__).parents[1] / "docs" / "race"
# Images whose gradient is computed at once: what fits the caches of a CPU.
MICRO = 1024


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is held fixed."""

    # Of every run, but for its optimizer and its hyper-parameters.
    config: TrainConfig
    methods: tuple[str, ...]
    # Tuning runs of each method, on other seeds of the same training images but for a fraction, which judges them.
    trials: int
    tune_seeds: int
    holdout: float
    seeds: int
    # Steps that a run has at least, in as many more passes over the images.
    least_steps: int = 1

    def settled(self, batch_size: int | None, epochs: int | None, number: int, **changes: Any) -> TrainConfig:
        """The configuration at a batch size, by default the problem's, on so many training images."""
        batch_size = min(batch_size or self.config.batch_size, number)
        epochs = epochs or max(self.config.epochs, math.ceil(self.least_steps / (number // batch_size)))
        micro = max(size for size in range(1, MICRO + 1) if batch_size % size == 0)
        changes |= {"warmup_epochs": epochs * self.config.warmup_epochs / self.config.epochs}
        changes |= {"micro_batch_size": micro if micro < batch_size else None}
        return dataclasses.replace(self.config, batch_size=batch_size, epochs=epochs, **changes)


RACE = {"image_size": 16, "batch_size": 8192, "epochs": 25, "warmup_epochs": 2.5, "nesterov": True}
PROBLEMS = {
    "digits": Problem(
        TrainConfig(width=0.125, dropout=0.25, batch_size=512, epochs=40, warmup_epochs=4, weight_decay=0.0),
        methods=("sgd", "lars", "mclr", "percent_delta", "cblr"),
        trials=6,
        tune_seeds=2,
        holdout=0.2,
        seeds=2,
    ),
    "alexnet": Problem(
        TrainConfig(dataset="cifar10", width=0.1875, hidden=256, dropout=0.0, **RACE),
        methods=METHODS,
        trials=10,
        tune_seeds=1,
        holdout=0.1,
        seeds=5,
        least_steps=60,
    ),
    "resnet18": Problem(
        TrainConfig(dataset="cifar10", model="resnet18", width=0.0625, **RACE),
        methods=METHODS,
        trials=10,
        tune_seeds=1,
        holdout=0.1,
        seeds=3,
        least_steps=60,
    ),
}


def committed() -> Iterator[tuple[str, dict[str, Any], dict[str, float]]]:
    """The committed results: the name of each, its settings, and the best learning rate of each method."""
    for path in sorted(RESULTS.glob("*.jsonl")):
        settings, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        trials = [row for row in rows if row["kind"] == "trial"]
        of = lambda method, trials=trials: [trial for trial in trials if trial["method"] == method]
        yield path.stem, settings, {row["method"]: best(of(row["method"]))["learning_rate"] for row in trials}


def default_learning_rate(config: TrainConfig) -> tuple[float, str]:
    """The learning rate for a configuration that states none, and the results in which it was the best.

    Raises:
        UsageError: if the method was tuned on no problem at all.
    """
    # First those of this data set; then of CIFAR-10, the nearer to any other photographs; then any.
    order = lambda of: (
        of[1]["dataset"] != config.dataset,
        of[1]["dataset"] != "cifar10",
        of[1]["model"] != config.model,
    )
    for name, _, rates in sorted(committed(), key=order):
        if config.optimizer in rates:
            return rates[config.optimizer], name
    raise UsageError(f"--optimizer {config.optimizer} has not been tuned: give its --learning-rate")
