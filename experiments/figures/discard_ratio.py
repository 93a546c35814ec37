"""Figure 9: the mean absolute gradient of the second fully connected layer against the share of images left out.

The images with the smallest losses of one batch of 8192 are left out, at step 1. Leaving out as many at random is the
control: by eq. 4 a smaller batch alone has a larger gradient. And since an untrained network says nearly the same of
every image, its loss tells classes rather than images apart: how much of the choice the class explains is measured too.
"""

import jax
import numpy as np

import curvax
from experiments import plots
from experiments.figures import statistics
from experiments.figures.base import Claim, Figure, Place, count
from experiments.figures.first_step import first_step, linear_kernel, mean_abs
from experiments.records import column

FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Of the control a few are enough: it goes as the law of Figure 3 says.
CONTROLS = (0.0, 0.3, 0.6, 0.9)
BATCH = {"smoke": 512, "cpu": 8192, "paper": 8192}
CHUNK = {"smoke": 512, "cpu": 1024, "paper": 1024}
SEEDS = {"smoke": 2, "cpu": 5, "paper": 5}
ARMS = {"loss": "the smallest losses left out", "chance": "as many left out at random"}
GRADIENT = "mean_abs_gradient"


def config(place: Place, seed: int):
    """The first images of the training split, as many as the batch has."""
    batch = BATCH[place.preset]
    return place.config(init="pytorch", train_images=batch, batch_size=batch, dropout=0.0, seed=seed)


def explained(kept, labels) -> float:
    """The share of the variance of a choice that the class explains: 1 if it falls on whole classes."""
    shares = np.bincount(labels, weights=kept) / np.maximum(np.bincount(labels), 1)
    return float(np.var(shares[labels]) / np.var(kept))


class DiscardRatio(Figure):
    """Both arms, at step 1."""

    number, title = 9, "Mean gradient of the second fully connected layer against the discard ratio"
    claim = "Discarding small-loss samples enlarges the gradient."

    def rows(self, place, trained):
        batch = BATCH[place.preset]
        for seed in range(SEEDS[place.preset]):
            step = first_step(config(place, seed), CHUNK[place.preset])
            losses = step.losses(0, batch)
            kept, labels = curvax.discard_small_losses(losses, 0.3), step.labels(0, batch)
            yield {"seed": seed, "arm": "class", "explained": explained(np.asarray(kept) > 0, np.asarray(labels))}
            for fraction in FRACTIONS:
                weights = {"loss": curvax.discard_small_losses(losses, fraction)}
                if fraction in CONTROLS:
                    weights["chance"] = curvax.discard_random_losses(jax.random.key(seed), losses, fraction)
                for arm, some in weights.items():
                    value = float(mean_abs(linear_kernel(step.gradient(0, batch, some), 1)))
                    yield {"seed": seed, "arm": arm, "fraction": fraction, GRADIENT: value}

    def judge(self, rows):
        at = lambda fraction, arm="loss": column(rows, GRADIENT, arm=arm, fraction=fraction)
        order = statistics.rank_correlation(FRACTIONS, [np.mean(at(fraction)) for fraction in FRACTIONS])
        gain, excess = (statistics.mean(np.divide(at(0.3), base)) for base in (at(0.0), at(0.3, "chance")))
        by_class = statistics.mean(column(rows, "explained", arm="class"))
        evidence = f"rank correlation with the ratio {order}; at 30 %: {gain} times"
        whole = "What is left out at step 1 are mostly whole classes, not easy images (ours)."
        share = f"share of the choice at 30 % that the class explains: {by_class}"
        random = "More so than leaving out as many images at random (ours)."
        return [
            Claim("Leaving out small losses enlarges the mean gradient.", evidence, order.above(0)),
            Claim(random, f"at 30 %: {excess} times the control's", excess.above(1)),
            Claim(whole, share, by_class.above(0.5)),
        ]

    def draw(self, axes, rows):
        percent = [{**row, "fraction": 100 * row["fraction"]} for row in rows if row["arm"] in ARMS]
        plots.lines(axes[0], percent, ("arm", ARMS), "fraction", (GRADIENT, "mean |gradient| (loss / parameter)"))
        axes[0].set(xlabel="images left out (%)", yscale="log")

    def settings(self, place):
        seeds = count(SEEDS[place.preset], "seed")
        return f"{config(place, 0).describe()}; batch {BATCH[place.preset]}, step 1, {seeds}."

    def measurement(self, place):
        gradients = SEEDS[place.preset] * (len(FRACTIONS) + len(CONTROLS))
        return config(place, 0), CHUNK[place.preset], gradients * BATCH[place.preset]


FIGURES = (DiscardRatio(),)
