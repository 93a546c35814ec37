"""Figures 1, 5 and 8: the same network trained for the same epochs at batch sizes from 32 to the whole data set.

One learning rate for all batch sizes, without momentum or schedule: eqs. 4-8 speak of the rate times the gradient, and
the paper gives no rule by which its rate changes. A second arm, with the rate grown by the root of the batch after a
warm-up, tells how much of Figure 1 is the fixed rate.
"""

import numpy as np
from matplotlib.ticker import LogFormatter

from experiments import plots
from experiments.figures import statistics
from experiments.figures.base import TEST_LOSS, Claim, Figure, Place, count
from experiments.records import column, distinct, where

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


class Sweep(Figure):
    """Runs at all batch sizes; every second one has to do for the growing rate."""

    keys = ("arm", "batch_size", "seed")
    arms = ("fixed",)

    def grid(self, place):
        sizes = {"fixed": SIZES[place.preset], "root": SIZES[place.preset][::2]}
        keys = [(a, b, seed) for a in self.arms for b in sizes[a] for seed in range(SEEDS[place.preset])]
        return {(arm, batch, seed): config(place, batch, seed, arm) for arm, batch, seed in keys}

    def settings(self, place):
        return (
            f"{config(place, 32, 0).describe()}, {RATE} at every batch size; {EPOCHS[place.preset]} epochs,"
            f" {count(SEEDS[place.preset], 'seed')} (points, or line and range); strides are of the first fully"
            " connected layer."
        )


class FinalAccuracy(Sweep):
    """Where the runs of both arms end."""

    number, title, claim = 1, "Final accuracy against batch size", "Accuracy falls as the batch grows."
    arms = tuple(ARMS)

    def judge(self, rows):
        claims = []
        for arm, statement in (
            ("fixed", "The final accuracy falls with the batch size."),
            ("root", "It does so with the learning rate grown by the root of the batch (ours)."),
        ):
            own = where(rows, arm=arm, final=True)
            batches, diverged = distinct(own, "batch_size"), sum(row["test_loss"] is None for row in own)
            ends = [column(own, "test_accuracy", batch_size=batch) for batch in (batches[0], batches[-1])]
            lost = statistics.difference(*ends)
            order = statistics.rank_correlation(*(column(own, name) for name in ("batch_size", "test_accuracy")))
            evidence = (
                f"test accuracy {statistics.spread(ends[0], 100)} % at batch {batches[0]},"
                f" {statistics.spread(ends[1], 100)} % at {batches[-1]}; difference {lost}; rank correlation {order};"
                f" {diverged} of {len(own)} diverged"
            )
            both = {lost.above(0), order.below(0)}
            # A run that diverged says that its rate is too high, and nothing of its batch size.
            verdict = both.pop() if len(both) == 1 and not diverged else statistics.UNDECIDED
            claims.append(Claim(statement, evidence, verdict))
        return claims

    def draw(self, axes, rows):
        ends = sorted(where(rows, final=True), key=lambda row: row["batch_size"])
        accuracy = "test_accuracy", "final test accuracy (%), 0 if diverged"
        plots.lines(axes[0], ends, ("arm", ARMS), "batch_size", accuracy, 100)


class OverEpochs(Sweep):
    """A column over epochs, a line per batch size of the fixed rate."""

    column: tuple[str, str]

    def draw(self, axes, rows):
        labels = {batch: f"batch {batch}" for batch in distinct(rows, "batch_size")}
        plots.lines(axes[0], where(rows, final=None), ("batch_size", labels), "epoch", self.column)
        axes[0].set_yscale("log")
        # Within a decade the powers of ten that are usually written say nothing.
        axes[0].yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))


class Path(OverEpochs):
    """The area under the stride per epoch, the "searching space"."""

    number, title = 5, "Parameter stride in each epoch"
    claim = "The area below the curve, the parameters' searching space, falls with the batch size."
    column = "mean_parameter_stride", "mean |parameter step| (parameter units)"

    def judge(self, rows):
        area, path, last = {}, {}, {}
        for row in where(rows, final=None):
            run, stride = (row["batch_size"], row["seed"]), row["mean_parameter_stride"]
            area[run] = area.get(run, 0) + stride
            path[run] = path.get(run, 0) + stride * row["steps"]
            last[run] = stride
        claims = []
        for values, statement in (
            (area, "The area below the curve of the mean stride per epoch falls with the batch size."),
            (last, "So does the stride in the last epoch (ours)."),
            (path, "So does the length of the whole path, all steps of all epochs (ours)."),
        ):
            both = [batch for batch, _ in values], list(values.values())
            order, slope = statistics.rank_correlation(*both), statistics.slope(*both)
            claims.append(Claim(statement, f"rank correlation {order}; exponent {slope}", order.below(0)))
        return claims


class Loss(OverEpochs):
    """How much the test loss fluctuates."""

    number, title = 8, "Loss curves"
    claim = "Loss fluctuates much at small and large batch sizes, little at medium ones."
    column = TEST_LOSS

    def judge(self, rows):
        batches, noise = distinct(rows, "batch_size"), {}
        for batch in batches:
            runs = where(rows, batch_size=batch, final=None)
            curves = [column(runs, "test_loss", seed=seed) for seed in distinct(runs, "seed")]
            noise[batch] = [statistics.fluctuation(curve[: min(map(len, curves))]) for curve in curves]
        calm = min(batches[1:-1], key=lambda batch: np.mean(noise[batch]))
        claims = []
        for batch, word in ((batches[0], "small"), (batches[-1], "large")):
            ratio = statistics.difference(np.log(noise[batch]), np.log(noise[calm]))
            levels = f"{statistics.spread(noise[batch])} at batch {batch}, {statistics.spread(noise[calm])} at {calm}"
            statement = f"The loss of {word} batches fluctuates more than of medium ones."
            claims.append(Claim(statement, f"fluctuation of the test loss {levels}; log ratio {ratio}", ratio.above(0)))
        return claims


FIGURES = (FinalAccuracy(), Path(), Loss())
