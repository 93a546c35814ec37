"""From the records of runs to the rows of figures, and from these to columns and lines."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.figures.base import Row

# The layer of Figure 3: AlexNet's first fully connected one.
LAYER = "linears/0/kernel"


def epoch_curves(records: Sequence[Row], about: Row) -> Iterator[Row]:
    """The epochs of a run; none of the last, where it diverged."""
    names = ("epoch", "step", "loss", "accuracy", "test_loss", "test_accuracy")
    for record in records:
        if record["kind"] == "epoch":
            yield {**about, **{name: record[name] for name in names}}


def epoch_rows(records: Sequence[Row], about: Row) -> Iterator[Row]:
    """The epochs of a run, with the means of the probes over their steps."""
    for row in epoch_curves(records, about):
        own = [record for record in records if (record["kind"], record["epoch"]) == ("step", row["epoch"])]
        mean = lambda name, own=own: float(np.mean([step[f"{name}/{LAYER}"] for step in own]))
        probes = {f"mean_{name}": mean(name) for name in ("parameter_stride", "loss_stride")}
        yield {**row, **probes, "steps": len(own), "learning_rate": own[0]["learning_rate"]}


def last_epoch(records: Sequence[Row]) -> Row:
    """The last epoch of a run; of one that diverged, an accuracy of 0 and no loss."""
    if records[-1]["kind"] == "epoch":
        return records[-1]
    return {**records[-1], "accuracy": 0.0, "test_accuracy": 0.0, "loss": None, "test_loss": None}


def where(rows: Sequence[Row], **about: Any) -> list[Row]:
    """The rows with these values, by seed; a row may lack a column that is to be None."""
    chosen = [row for row in rows if all(row.get(name) == value for name, value in about.items())]
    return sorted(chosen, key=lambda row: row.get("seed", 0))


def column(rows: Sequence[Row], name: str, **about: Any) -> list[Any]:
    """A column of these rows, by seed."""
    return [row[name] for row in where(rows, **about)]


def distinct(rows: Sequence[Row], name: str) -> list[Any]:
    """The values of a column, in order."""
    return sorted({row[name] for row in rows})


def lines(rows: Sequence[Row], key: str, labels: Mapping[Any, str], name: str, scale: float = 1.0, x: str = "epoch"):
    """Lines of a column over another: for each label the points of each seed.

    Args:
        rows: one per point.
        key: the column that tells lines apart.
        labels: from the values of that column to labels, in order.
        name: the column to draw.
        scale: by which it is multiplied.
        x: the column below.
    """
    points = lambda seed, own: [(row[x], scale * row[name]) for row in own if row["seed"] == seed]
    own = {label: where(rows, **{key: value}) for value, label in labels.items()}
    return {label: [points(seed, some) for seed in distinct(some, "seed")] for label, some in own.items()}


def fluctuation(values: Sequence[float]) -> float:
    """How far a curve jumps about its own course: the root mean square of what is left of second differences."""
    # The second difference of a straight line is 0, that of independent noise has 6 times its variance.
    return float(np.sqrt(np.mean(np.diff(values, 2) ** 2) / 6))
