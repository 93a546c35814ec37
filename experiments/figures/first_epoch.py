"""Figures 4 and 7: how far the parameters and the loss go in the steps of the first epoch, over the learning rate.

That is the gradient's mean magnitude and mean square, so eqs. 6 and 8 say batch^(-1/2) and 1 / batch. But a mean over
the first epoch is also one over a path, and small batches go further along it: where the gradient changes on the way,
that shows as well. From PyTorch's small initial parameters, where the paper began, training rests on a plateau for the
first epoch, and only the noise differs; from He's it does not, and the first gradients are by far the largest.
"""

import dataclasses

import numpy as np

from experiments import plots
from experiments.figures import batch_sweep, statistics
from experiments.figures.base import Claim, Figure, Place, count
from experiments.records import distinct, where

# As in Figure 3.
TOLERANCE = 0.05
INITS = {"pytorch": "PyTorch's initial parameters", "he": "He's initial parameters (ours)"}


def config(place: Place, init: str, batch: int, seed: int):
    """The run of the sweep where it begins from these parameters, else its first epoch."""
    swept = batch_sweep.config(place, batch, seed)
    return swept if swept.init == init else dataclasses.replace(swept, init=init, epochs=1)


class FirstEpoch(Figure):
    """A stride, by its name and in words, and how the law says that it falls."""

    keys = ("init", "batch_size", "seed")

    def __init__(self, number, what, claim, stride, exponent, law, label):
        self.number, self.claim, self.stride, self.exponent = number, claim, stride, exponent
        self.what, self.law, self.label = what, law, label
        self.title = f"Normalised {what} in the first epoch"

    def grid(self, place):
        sizes, seeds = batch_sweep.SIZES[place.preset], range(batch_sweep.SEEDS[place.preset])
        return {key: config(place, *key) for key in [(i, b, seed) for i in INITS for b in sizes for seed in seeds]}

    def points(self, rows, init):
        """Batch sizes and normalised strides, a point per run."""
        own = where(rows, init=init, epoch=1)
        strides = [row[self.stride] / row["learning_rate"] for row in own]
        return np.array([row["batch_size"] for row in own]), np.array(strides)

    def judge(self, rows):
        claims = []
        for init, words in INITS.items():
            x, y = self.points(rows, init)
            order, slope = statistics.rank_correlation(x, y), statistics.slope(x, y)
            band = 2 * TOLERANCE * abs(self.exponent)
            verdict = slope.within(self.exponent - band, self.exponent + band)
            falls = f"The normalised {self.what} falls, from {words}."
            claims.append(Claim(falls, f"rank correlation {order}", order.below(0)))
            claims.append(Claim(f"It falls as {self.law}, from {words}.", f"exponent {slope}", verdict))
        return claims

    def draw(self, axes, rows):
        [panel] = axes
        for init, look in zip(INITS, plots.LOOKS, strict=False):
            x, y = self.points(rows, init)
            panel.plot(x, y, look["marker"], color=look["color"], fillstyle="none", label=INITS[init])
            first = np.exp(np.mean(np.log(y[x == x.min()])))
            line = np.array([x.min(), x.max()], float)
            law = {"label": f"batch^({self.exponent:g}), the law's slope"} if init == "pytorch" else {}
            panel.plot(line, first * (line / line[0]) ** self.exponent, "--", color=look["color"], **law)
        panel.set_yscale("log")
        plots.batch_axis(panel, distinct(rows, "batch_size"))
        plots.name_axes(panel, plots.AXES["batch_size"], self.label)

    def settings(self, place):
        return (
            f"{config(place, 'he', 32, 0).describe('either')} {batch_sweep.RATE} at every batch size;"
            f" {count(batch_sweep.SEEDS[place.preset], 'seed')}, a point each; strides are of the first fully connected"
            " layer."
        )


FIGURES = (
    FirstEpoch(
        *(4, "parameter stride"),
        "The parameter stride over the learning rate shrinks as the inverse root of the batch size.",
        *("mean_parameter_stride", -0.5, "batch^(-1/2) (eq. 6)", "mean |step| / learning rate (loss / parameter)"),
    ),
    FirstEpoch(
        *(7, "loss stride", "The loss stride over the learning rate shrinks as the inverse of the batch size."),
        *("mean_loss_stride", -1.0, "1 / batch (eq. 8)", "mean loss stride / learning rate (loss² / parameter²)"),
    ),
)
