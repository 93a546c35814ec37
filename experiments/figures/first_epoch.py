"""Figures 4 and 7: how far the parameters and the loss go in the steps of the first epoch, over the learning rate.

That is the gradient's mean magnitude and mean square, so eqs. 6 and 8 say batch^(-1/2) and 1 / batch. But a mean over
the first epoch is also one over a path, and small batches go further along it: where the gradient changes on the way,
that shows as well. From PyTorch's small initial parameters, where the paper began, training rests on a plateau for the
first epoch, and only the noise differs; from He's it does not, and the first gradients are by far the largest.
"""

import dataclasses

import numpy as np

from experiments.figures import batch_sweep, statistics
from experiments.figures.base import Claim, Figure, Place, Trained, count, describe
from experiments.figures.rows import epoch_rows, sizes
from experiments.plots import COLORS, MARKS, batch_axis, name_axes

# As in Figure 3.
TOLERANCE = 0.05
INITS = {"pytorch": "PyTorch's initial parameters", "he": "He's initial parameters (ours)"}


def config(place: Place, init: str, batch: int, seed: int):
    """The run of the sweep where it begins from these parameters, else its first epoch."""
    swept = batch_sweep.config(place, batch, seed)
    return swept if swept.init == init else dataclasses.replace(swept, init=init, epochs=1)


def grid(place: Place):
    """All runs, by initial parameters, batch size and seed."""
    seeds = range(batch_sweep.SEEDS[place.preset])
    keys = [(init, batch, seed) for init in INITS for batch in batch_sweep.SIZES[place.preset] for seed in seeds]
    return {key: config(place, *key) for key in keys}


def rows(place: Place, trained: Trained):
    """The first epoch of each run."""
    for (init, batch, seed), configuration in grid(place).items():
        for row in epoch_rows(trained(configuration), {"init": init, "batch_size": batch, "seed": seed}):
            if row["epoch"] == 1:
                yield row


def points(rows, init: str, name: str):
    """Batch sizes and normalised strides, a point per run."""
    own = [row for row in rows if row["init"] == init]
    return [row["batch_size"] for row in own], [row[name] / row["learning_rate"] for row in own]


def judge(name: str, exponent: float, what: str, law: str):
    """Judges a stride: does it fall, and as the law says?"""

    def judge_rows(rows):
        claims = []
        for init, words in INITS.items():
            x, y = points(rows, init, name)
            order, slope = statistics.rank_correlation(x, y), statistics.slope(x, y)
            band = 2 * TOLERANCE * abs(exponent)
            verdict = slope.within(exponent - band, exponent + band)
            claims += [
                Claim(f"The normalised {what} falls, from {words}.", f"rank correlation {order}", order.below(0)),
                Claim(f"It falls as {law}, from {words}.", f"exponent {slope}", verdict),
            ]
        return claims

    return judge_rows


def draw(name: str, exponent: float, label: str):
    """Draws the runs of both, and the slope of the law."""

    def draw_rows(axes, rows):
        [panel] = axes
        for place, (init, words) in enumerate(INITS.items()):
            x, y = (np.array(values) for values in points(rows, init, name))
            panel.plot(x, y, MARKS[place], color=COLORS[place], fillstyle="none", label=words)
            first = np.exp(np.mean(np.log(y[x == x.min()])))
            line = np.array([x.min(), x.max()], float)
            law = {"label": f"batch^({exponent:g}), the law's slope"} if place == 0 else {}
            panel.plot(line, first * (line / line[0]) ** exponent, "--", color=COLORS[place], **law)
        panel.set_yscale("log")
        batch_axis(panel, sizes(rows))
        name_axes(panel, "batch size (images)", label)

    return draw_rows


def settings(place: Place) -> str:
    """The small print."""
    return (
        f"{describe(config(place, 'he', 32, 0), 'either')} {batch_sweep.RATE} at every batch size;"
        f" {count(batch_sweep.SEEDS[place.preset], 'seed')}, a point each; strides are of the first fully connected"
        " layer."
    )


def figure(number: int, what: str, claim: str, name: str, exponent: float, law: str, label: str) -> Figure:
    """One of the two."""
    verdicts, picture = judge(name, exponent, what, law), draw(name, exponent, label)
    title = f"Normalised {what} in the first epoch"
    return Figure(number, title, claim, rows, verdicts, picture, settings, lambda place: list(grid(place).values()))


FIGURES = (
    figure(
        4,
        "parameter stride",
        "The parameter stride over the learning rate shrinks as the inverse root of the batch size.",
        "mean_parameter_stride",
        -0.5,
        "batch^(-1/2) (eq. 6)",
        "mean |step| / learning rate (loss / parameter)",
    ),
    figure(
        7,
        "loss stride",
        "The loss stride over the learning rate shrinks as the inverse of the batch size.",
        "mean_loss_stride",
        -1.0,
        "1 / batch (eq. 8)",
        "mean loss stride / learning rate (loss² / parameter²)",
    ),
)
