"""From the records of runs to the rows of figures, and from these to columns and lines."""

import collections
from collections.abc import Sequence

import numpy as np

from experiments.figures.base import Row

# The layer of Figure 3: AlexNet's first fully connected one.
LAYER = "linears/0/kernel"


def epoch_curves(records: Sequence[Row], about: Row):
    """The epochs of a run; none of the last, where it diverged."""
    names = ("epoch", "step", "loss", "accuracy", "test_loss", "test_accuracy")
    for record in records:
        if record["kind"] == "epoch":
            yield {**about, **{name: record[name] for name in names}}


def epoch_rows(records: Sequence[Row], about: Row):
    """The epochs of a run, with the means of the probes over their steps."""
    steps = collections.defaultdict(list)
    for record in records:
        if record["kind"] == "step":
            steps[record["epoch"]].append(record)
    for record in records:
        if record["kind"] == "epoch":
            own = steps[record["epoch"]]
            probes = {f"mean_{name}": mean(own, f"{name}/{LAYER}") for name in ("parameter_stride", "loss_stride")}
            [row] = epoch_curves([record], about)
            yield {**row, **probes, "steps": len(own), "learning_rate": own[0]["learning_rate"]}


def mean(steps: Sequence[Row], name: str) -> float:
    """Of a column over the steps of an epoch."""
    return float(np.mean([step[name] for step in steps]))


def column(rows: Sequence[Row], name: str, batch: int, **about) -> list[float]:
    """A column at one batch size, a value per seed."""
    chosen = [r for r in rows if r["batch_size"] == batch and all(r[key] == value for key, value in about.items())]
    return [row[name] for row in sorted(chosen, key=lambda row: row["seed"])]


def sizes(rows: Sequence[Row]) -> list[int]:
    """Batch sizes in order."""
    return sorted({row["batch_size"] for row in rows})


def by_label(rows, key, labels, name: str, scale: float = 1.0, x: str = "epoch"):
    """Lines of a column over epochs: for each label the points of each seed.

    Args:
        rows: one per epoch.
        key: the column that tells lines apart.
        labels: from the values of that column to labels, in order.
        name: the column to draw.
        scale: by which it is multiplied.
        x: `"epoch"` or `"step"`.
    """
    lines = {}
    for value, label in labels.items():
        own = [row for row in rows if row[key] == value]
        seeds = sorted({row["seed"] for row in own})
        lines[label] = [[(r[x], scale * r[name]) for r in own if r["seed"] == seed] for seed in seeds]
    return lines


def fluctuation(values: Sequence[float]) -> float:
    """How far a curve jumps about its own course: the root mean square of what is left of second differences."""
    # The second difference of a straight line is 0, that of independent noise has 6 times its variance.
    return float(np.sqrt(np.mean(np.diff(values, 2) ** 2) / 6))
