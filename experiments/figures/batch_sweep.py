"""Figures 1, 4, 5, 7 and 8: the same network trained for the same epochs at batch sizes from 32 to the whole data set.

One learning rate for all batch sizes, without momentum or schedule: eqs. 4-8 speak of the rate times the gradient, and
the paper gives no rule by which its rate changes. A second arm with the rate grown by the root of the batch tells how
much of Figure 1 is the fixed rate.
"""

import collections
from collections.abc import Sequence

import numpy as np

from experiments.figures import statistics
from experiments.figures.base import Claim, Figure, Place, Row, Trained, describe, last_epoch
from experiments.figures.render import caption_axes, curves

SIZES = {
    "smoke": (128, 256, 512),
    "cpu": (32, 128, 512, 2048, 8192),
    "paper": (32, 128, 512, 2048, 8192, 16384, 32768, 49152),
}
SEEDS = {"smoke": 2, "cpu": 3, "paper": 3}
EPOCHS = {"smoke": 3, "cpu": 10, "paper": 200}
RATE = 0.05
# The layer of Figure 3.
LAYER = "linears/0/kernel"
# As in Figure 3.
TOLERANCE = 0.05
ARMS = {"fixed": "learning rate 0.05", "root": "0.05 sqrt(batch / 32)"}


def config(place: Place, batch: int, seed: int, arm: str = "fixed"):
    """One run."""
    rate = RATE if arm == "fixed" else RATE * (batch / 32) ** 0.5
    return place.config(
        batch_size=batch, learning_rate=rate, epochs=EPOCHS[place.preset], seed=seed, probes=arm == "fixed"
    )


def sweep(place: Place, arm: str = "fixed"):
    """All runs of one arm, by batch size and seed; every second batch size has to do for the growing rate."""
    seeds = range(SEEDS[place.preset])
    batches = SIZES[place.preset] if arm == "fixed" else SIZES[place.preset][::2]
    return {(batch, seed): config(place, batch, seed, arm) for batch in batches for seed in seeds}


def runs(place: Place):
    """The runs with the fixed rate."""
    return list(sweep(place).values())


def all_runs(place: Place):
    """Those with the growing rate too; both are the same at the smallest batch but for the probes."""
    return runs(place) + list(sweep(place, "root").values())


def epochs(place: Place, trained: Trained):
    """One row per epoch of each run with the fixed rate: what was seen in its steps."""
    for (batch, seed), configuration in sweep(place).items():
        yield from epoch_rows(trained(configuration), {"batch_size": batch, "seed": seed})


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


def epoch_curves(records: Sequence[Row], about: Row):
    """The epochs of a run; none of the last, where it diverged."""
    names = ("epoch", "step", "loss", "accuracy", "test_loss", "test_accuracy")
    for record in records:
        if record["kind"] == "epoch":
            yield {**about, **{name: record[name] for name in names}}


def mean(steps: Sequence[Row], name: str) -> float:
    """Of a column over the steps of an epoch."""
    return float(np.mean([step[name] for step in steps]))


def finals(place: Place, trained: Trained):
    """One row per run of both arms: where it ended."""
    for arm in ARMS:
        for (batch, seed), configuration in sweep(place, arm).items():
            last = last_epoch(trained(configuration))
            results = {name: last[name] for name in ("step", "accuracy", "test_accuracy", "test_loss")}
            yield {"arm": arm, "batch_size": batch, "seed": seed, **results}


def column(rows: Sequence[Row], name: str, batch: int, **about) -> list[float]:
    """A column at one batch size, a value per seed."""
    chosen = [r for r in rows if r["batch_size"] == batch and all(r[key] == value for key, value in about.items())]
    return [row[name] for row in sorted(chosen, key=lambda row: row["seed"])]


def sizes(rows: Sequence[Row]) -> list[int]:
    """Batch sizes in order."""
    return sorted({row["batch_size"] for row in rows})


def judge_accuracy(rows):
    """Does the accuracy fall, and is the fixed rate all there is to it?"""
    claims = []
    for arm, statement in (
        ("fixed", "The final accuracy falls with the batch size."),
        ("root", "It does so with the learning rate grown by the root of the batch (ours)."),
    ):
        own = [row for row in rows if row["arm"] == arm]
        batches = sizes(own)
        ends = [column(own, "test_accuracy", batch) for batch in (batches[0], batches[-1])]
        lost = statistics.difference(*ends)
        order = statistics.rank_correlation(*zip(*((r["batch_size"], r["test_accuracy"]) for r in own), strict=True))
        evidence = (
            f"test accuracy {statistics.spread(ends[0], 100)} % at batch {batches[0]},"
            f" {statistics.spread(ends[1], 100)} % at {batches[-1]}; difference {lost}; rank correlation {order}"
        )
        both = {lost.above(0), order.below(0)}
        claims.append(Claim(statement, evidence, both.pop() if len(both) == 1 else statistics.UNDECIDED))
    return claims


def draw_accuracy(axes, rows):
    """Final test accuracy against batch size, both arms."""
    [panel] = axes
    lines = {}
    for arm, label in ARMS.items():
        own = [row for row in rows if row["arm"] == arm]
        seeds = range(len(column(own, "seed", sizes(own)[0])))
        lines[label] = [[(b, 100 * column(own, "test_accuracy", b)[i]) for b in sizes(own)] for i in seeds]
    curves(panel, lines)
    panel.set_xscale("log", base=2)
    caption_axes(panel, "batch size (images)", "final test accuracy (%)")


def first_epoch(rows, name: str):
    """Batch sizes and values of a normalised stride in the first epoch, a point per run."""
    first = [row for row in rows if row["epoch"] == 1]
    return [row["batch_size"] for row in first], [row[name] / row["learning_rate"] for row in first]


def judge_stride(name: str, exponent: float, statement: str, law: str):
    """Judges a normalised stride of the first epoch: does it fall, and as the law says?"""

    def judge(rows):
        x, y = first_epoch(rows, name)
        order, slope = statistics.rank_correlation(x, y), statistics.slope(x, y)
        band = 2 * TOLERANCE * abs(exponent)
        return [
            Claim(statement, f"rank correlation {order}", order.below(0)),
            Claim(law, f"exponent {slope}", slope.within(exponent - band, exponent + band)),
        ]

    return judge


def draw_stride(name: str, exponent: float, label: str):
    """Draws a normalised stride of the first epoch with the slope of the law."""

    def draw(axes, rows):
        [panel] = axes
        x, y = (np.array(values) for values in first_epoch(rows, name))
        panel.plot(x, y, "o", color="black", fillstyle="none", label="runs")
        first = np.exp(np.mean(np.log(y[x == x.min()])))
        line = np.array([x.min(), x.max()], float)
        law = f"batch^({exponent:g})"
        panel.plot(line, first * (line / line[0]) ** exponent, "--", color="#d55e00", label=f"{law}, the law's slope")
        panel.set(xscale="log", yscale="log")
        caption_axes(panel, "batch size (images)", label)

    return draw


def judge_path(rows):
    """Does the area under the stride per epoch, the "searching space", fall?"""
    area = collections.defaultdict(float)
    path = collections.defaultdict(float)
    for row in rows:
        area[row["batch_size"], row["seed"]] += row["mean_parameter_stride"]
        path[row["batch_size"], row["seed"]] += row["mean_parameter_stride"] * row["steps"]
    batches = [batch for batch, _ in area]
    claims = []
    for values, statement in (
        (area, "The area below the curve of the mean stride per epoch falls with the batch size."),
        (path, "So does the length of the whole path, all steps of all epochs (ours)."),
    ):
        order, slope = (f(batches, list(values.values())) for f in (statistics.rank_correlation, statistics.slope))
        claims.append(Claim(statement, f"rank correlation {order}; exponent {slope}", order.below(0)))
    return claims


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


def by_batch(rows, name: str):
    """Lines over epochs, one per batch size."""
    return by_label(rows, "batch_size", {batch: f"batch {batch}" for batch in sizes(rows)}, name)


def draw_over_epochs(name: str, label: str, log: bool):
    """Draws a column over epochs, a line per batch size."""

    def draw(axes, rows):
        [panel] = axes
        curves(panel, by_batch(rows, name))
        if log:
            panel.set_yscale("log")
        caption_axes(panel, "epoch", label)

    return draw


def fluctuation(values: Sequence[float]) -> float:
    """How far a curve jumps about its own course: the root mean square of what is left of second differences."""
    # The second difference of a straight line is 0, that of independent noise has 6 times its variance.
    return float(np.sqrt(np.mean(np.diff(values, 2) ** 2) / 6))


def judge_fluctuation(rows):
    """Do medium batches fluctuate less than the smallest and the largest?"""
    lines = {batch: seeds for batch, seeds in zip(sizes(rows), by_batch(rows, "test_loss").values(), strict=True)}
    noise = {batch: [fluctuation([y for _, y in seed]) for seed in seeds] for batch, seeds in lines.items()}
    batches = sizes(rows)
    calmest = min(batches[1:-1], key=lambda batch: np.mean(noise[batch]))
    claims = []
    for batch, word in ((batches[0], "small"), (batches[-1], "large")):
        ratio = statistics.difference(np.log(noise[batch]), np.log(noise[calmest]))
        levels = f"{statistics.spread(noise[batch])} at batch {batch}, {statistics.spread(noise[calmest])} at {calmest}"
        evidence = f"fluctuation of the test loss {levels}; log ratio {ratio}"
        claims.append(
            Claim(f"The loss of {word} batches fluctuates more than of medium ones.", evidence, ratio.above(0))
        )
    return claims


def settings(place: Place) -> str:
    """The small print."""
    return (
        f"{describe(config(place, 32, 0))}, {RATE} at every batch size; {EPOCHS[place.preset]} epochs,"
        f" {SEEDS[place.preset]} seeds (points, or line and range); strides are of the first fully connected layer."
    )


STRIDE, LOSS_STRIDE = ("mean_parameter_stride", -0.5), ("mean_loss_stride", -1.0)
FIGURES = (
    Figure(
        1,
        "Final accuracy against batch size",
        "Accuracy falls as the batch grows.",
        finals,
        judge_accuracy,
        draw_accuracy,
        settings,
        all_runs,
    ),
    Figure(
        4,
        "Normalised parameter stride in the first epoch",
        "The parameter stride over the learning rate shrinks as the inverse root of the batch size.",
        epochs,
        judge_stride(*STRIDE, "The normalised parameter stride falls.", "It falls as batch^(-1/2) (eq. 6)."),
        draw_stride(*STRIDE, "mean |parameter step| / learning rate (loss / parameter)"),
        settings,
        runs,
    ),
    Figure(
        5,
        "Parameter stride in each epoch",
        "The area below the curve, the parameters' searching space, falls with the batch size.",
        epochs,
        judge_path,
        draw_over_epochs("mean_parameter_stride", "mean |parameter step| (parameter units)", log=True),
        settings,
        runs,
    ),
    Figure(
        7,
        "Normalised loss stride in the first epoch",
        "The loss stride over the learning rate shrinks as the inverse of the batch size.",
        epochs,
        judge_stride(*LOSS_STRIDE, "The normalised loss stride falls.", "It falls as 1 / batch (eq. 8)."),
        draw_stride(*LOSS_STRIDE, "mean loss decrease per parameter / learning rate (loss² / parameter²)"),
        settings,
        runs,
    ),
    Figure(
        8,
        "Loss curves",
        "Loss fluctuates much at small and large batch sizes, little at medium ones.",
        epochs,
        judge_fluctuation,
        draw_over_epochs("test_loss", "test loss (nats per image)", log=False),
        settings,
        runs,
    ),
)
