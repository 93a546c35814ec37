"""Figures 1, 5 and 8: the same network trained for the same epochs at batch sizes from 32 to the whole data set.

One learning rate for all batch sizes, without momentum or schedule: eqs. 4-8 speak of the rate times the gradient, and
the paper gives no rule by which its rate changes. A second arm, with the rate grown by the root of the batch after a
warm-up, tells how much of Figure 1 is the fixed rate.
"""

import collections

import numpy as np
from matplotlib.ticker import LogFormatter

from experiments.figures import statistics
from experiments.figures.base import Claim, Figure, Place, Trained, count, describe, last_epoch
from experiments.figures.rows import by_label, column, epoch_rows, fluctuation, sizes
from experiments.plots import batch_axis, curves, name_axes

SIZES = {
    "smoke": (128, 256, 512),
    "cpu": (32, 128, 512, 2048, 8192),
    "paper": (32, 128, 512, 2048, 8192, 16384, 32768, 49152),
}
SEEDS = {"smoke": 2, "cpu": 5, "paper": 5}
EPOCHS = {"smoke": 3, "cpu": 10, "paper": 200}
RATE = 0.05
ARMS = {"fixed": f"learning rate {RATE}", "root": f"{RATE} sqrt(batch / smallest), warm-up"}


def config(place: Place, batch: int, seed: int, arm: str = "fixed"):
    """One run. At the smallest batch both arms are the same one."""
    epochs, smallest = EPOCHS[place.preset], SIZES[place.preset][0]
    changes = {"learning_rate": RATE, "probes": True}
    if arm == "root" and batch > smallest:
        changes = {"learning_rate": RATE * (batch / smallest) ** 0.5, "warmup_epochs": 0.2 * epochs}
    return place.config(batch_size=batch, epochs=epochs, seed=seed, **changes)


def sweep(place: Place, arm: str = "fixed"):
    """All runs of one arm, by batch size and seed; every second batch size has to do for the growing rate."""
    seeds = range(SEEDS[place.preset])
    batches = SIZES[place.preset] if arm == "fixed" else SIZES[place.preset][::2]
    return {(batch, seed): config(place, batch, seed, arm) for batch in batches for seed in seeds}


def runs(place: Place):
    """The runs with the fixed rate."""
    return list(sweep(place).values())


def all_runs(place: Place):
    """Those with the growing rate too."""
    return [configuration for arm in ARMS for configuration in sweep(place, arm).values()]


def epochs(place: Place, trained: Trained):
    """One row per epoch of each run with the fixed rate: what was seen in its steps."""
    for (batch, seed), configuration in sweep(place).items():
        yield from epoch_rows(trained(configuration), {"batch_size": batch, "seed": seed})


def finals(place: Place, trained: Trained):
    """One row per run of both arms: where it ended."""
    for arm in ARMS:
        for (batch, seed), configuration in sweep(place, arm).items():
            last = last_epoch(trained(configuration))
            results = {name: last[name] for name in ("step", "accuracy", "test_accuracy", "test_loss")}
            yield {"arm": arm, "batch_size": batch, "seed": seed, **results}


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
            f" {statistics.spread(ends[1], 100)} % at {batches[-1]}; difference {lost}; rank correlation {order};"
            f" {diverged(own)} of {len(own)} diverged"
        )
        both = {lost.above(0), order.below(0)}
        # A run that diverged says that its rate is too high, and nothing of its batch size.
        decided = len(both) == 1 and not diverged(own)
        claims.append(Claim(statement, evidence, both.pop() if decided else statistics.UNDECIDED))
    return claims


def diverged(rows) -> int:
    """How many of these runs did."""
    return sum(row["test_loss"] is None for row in rows)


def draw_accuracy(axes, rows):
    """Final test accuracy against batch size, both arms."""
    [panel] = axes
    lines = {}
    for arm, label in ARMS.items():
        own = [row for row in rows if row["arm"] == arm]
        seeds = range(len(column(own, "seed", sizes(own)[0])))
        lines[label] = [[(b, 100 * column(own, "test_accuracy", b)[i]) for b in sizes(own)] for i in seeds]
    curves(panel, lines)
    batch_axis(panel, sizes(rows))
    name_axes(panel, "batch size (images)", "final test accuracy (%), 0 if diverged")


def judge_path(rows):
    """Does the area under the stride per epoch, the "searching space", fall?"""
    area, path, last = collections.defaultdict(float), collections.defaultdict(float), {}
    for row in rows:
        run = row["batch_size"], row["seed"]
        area[run] += row["mean_parameter_stride"]
        path[run] += row["mean_parameter_stride"] * row["steps"]
        last[run] = row["mean_parameter_stride"]
    batches = [batch for batch, _ in area]
    claims = []
    for values, statement in (
        (area, "The area below the curve of the mean stride per epoch falls with the batch size."),
        (last, "So does the stride in the last epoch (ours)."),
        (path, "So does the length of the whole path, all steps of all epochs (ours)."),
    ):
        order, slope = (f(batches, list(values.values())) for f in (statistics.rank_correlation, statistics.slope))
        claims.append(Claim(statement, f"rank correlation {order}; exponent {slope}", order.below(0)))
    return claims


def by_batch(rows, name: str):
    """Lines over epochs, one per batch size."""
    return by_label(rows, "batch_size", {batch: f"batch {batch}" for batch in sizes(rows)}, name)


def draw_over_epochs(name: str, label: str):
    """Draws a column over epochs, a line per batch size."""

    def draw(axes, rows):
        [panel] = axes
        curves(panel, by_batch(rows, name))
        panel.set_yscale("log")
        # Within a decade the powers of ten that are usually written say nothing.
        panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
        name_axes(panel, "epoch", label)

    return draw


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
        f" {count(SEEDS[place.preset], 'seed')} (points, or line and range); strides are of the first fully connected"
        " layer."
    )


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
        5,
        "Parameter stride in each epoch",
        "The area below the curve, the parameters' searching space, falls with the batch size.",
        epochs,
        judge_path,
        draw_over_epochs("mean_parameter_stride", "mean |parameter step| (parameter units)"),
        settings,
        runs,
    ),
    Figure(
        8,
        "Loss curves",
        "Loss fluctuates much at small and large batch sizes, little at medium ones.",
        epochs,
        judge_fluctuation,
        draw_over_epochs("test_loss", "test loss (nats per image)"),
        settings,
        runs,
    ),
)
