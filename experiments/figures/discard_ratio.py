"""Figure 9: the mean absolute gradient of the second fully connected layer against the share of images left out.

The images with the smallest losses of one batch of 8192 are left out, at step 1. Leaving out as many at random is the
control: by eq. 4 a smaller batch alone has a larger gradient. And since an untrained network says nearly the same of
every image, its loss tells classes rather than images apart: how much of the choice the class explains is measured too.
"""

import jax
import numpy as np

import curvax
from experiments.figures import statistics
from experiments.figures.base import Claim, Figure, Measurement, Place, count, describe
from experiments.figures.first_step import first_step, linear_kernel, mean_abs
from experiments.plots import curves, name_axes

FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Of the control a few are enough: it goes as the law of Figure 3 says.
CONTROLS = (0.0, 0.3, 0.6, 0.9)
BATCH = {"smoke": 512, "cpu": 8192, "paper": 8192}
CHUNK = {"smoke": 512, "cpu": 1024, "paper": 1024}
SEEDS = {"smoke": 2, "cpu": 5, "paper": 5}
ARMS = {"loss": "the smallest losses left out", "chance": "as many left out at random"}


def config(place: Place, seed: int):
    """The first images of the training split, as many as the batch has."""
    batch = BATCH[place.preset]
    return place.config(init="pytorch", train_images=batch, batch_size=batch, dropout=0.0, seed=seed)


def rows(place: Place, trained):
    """The layer's mean gradient at each ratio."""
    del trained
    batch = BATCH[place.preset]
    for seed in range(SEEDS[place.preset]):
        step = first_step(config(place, seed), CHUNK[place.preset])
        losses = step.losses(0, batch)
        kept = np.asarray(curvax.discard_small_losses(losses, 0.3)) > 0
        yield {"seed": seed, "arm": "class", "explained": explained(kept, np.asarray(step.batch(0, batch)["labels"]))}
        for fraction in FRACTIONS:
            weights = {
                "loss": curvax.discard_small_losses(losses, fraction),
                "chance": curvax.discard_random_losses(jax.random.key(seed), losses, fraction),
            }
            for arm in ARMS if fraction in CONTROLS else ("loss",):
                value = float(mean_abs(linear_kernel(step.gradient(0, batch, weights[arm]), 1)))
                yield {"seed": seed, "arm": arm, "fraction": fraction, "mean_abs_gradient": value}


def explained(kept, labels) -> float:
    """The share of the variance of a choice that the class explains: 1 if it falls on whole classes."""
    shares = np.bincount(labels, weights=kept) / np.maximum(np.bincount(labels), 1)
    return float(np.var(shares[labels]) / np.var(kept))


def column(rows, arm, fraction):
    """The values of the seeds, in order."""
    chosen = [row for row in rows if row["arm"] == arm and row["fraction"] == fraction]
    return [row["mean_abs_gradient"] for row in sorted(chosen, key=lambda row: row["seed"])]


def judge(rows):
    """Does the gradient grow, and more than for a batch that is smaller by chance?"""
    grown = [np.mean(column(rows, "loss", fraction)) for fraction in FRACTIONS]
    order = statistics.rank_correlation(FRACTIONS, grown)
    whole, loss, chance = column(rows, "loss", 0.0), column(rows, "loss", 0.3), column(rows, "chance", 0.3)
    gain = statistics.mean(np.divide(loss, whole))
    by_class = statistics.mean([row["explained"] for row in rows if row["arm"] == "class"])
    excess = statistics.mean(np.divide(loss, chance))
    return [
        Claim(
            "Leaving out small losses enlarges the mean gradient.",
            f"rank correlation with the ratio {order}; at 30 %: {gain} times",
            order.above(0),
        ),
        Claim(
            "More so than leaving out as many images at random (ours).",
            f"at 30 %: {excess} times the control's",
            excess.above(1),
        ),
        Claim(
            "What is left out at step 1 are mostly whole classes, not easy images (ours).",
            f"share of the choice at 30 % that the class explains: {by_class}",
            by_class.above(0.5),
        ),
    ]


def draw(axes, rows):
    """Both arms over the ratio."""
    [panel] = axes
    seeds = sorted({row["seed"] for row in rows})
    lines = {}
    for (arm, label), fractions in zip(ARMS.items(), (FRACTIONS, CONTROLS), strict=True):
        lines[label] = [[(100 * f, column(rows, arm, f)[i]) for f in fractions] for i in range(len(seeds))]
    curves(panel, lines)
    panel.set_yscale("log")
    name_axes(panel, "images left out (%)", "mean |gradient| (loss / parameter)")


def settings(place: Place) -> str:
    """The small print."""
    return f"{describe(config(place, 0))}; batch {BATCH[place.preset]}, step 1, {count(SEEDS[place.preset], 'seed')}."


def measurement(place: Place) -> Measurement:
    """How many gradients that is."""
    gradients = SEEDS[place.preset] * (len(FRACTIONS) + len(CONTROLS))
    return Measurement(config(place, 0), CHUNK[place.preset], gradients * BATCH[place.preset])


FIGURES = (
    Figure(
        9,
        "Mean gradient of the second fully connected layer against the discard ratio",
        "Discarding small-loss samples enlarges the gradient.",
        rows,
        judge,
        draw,
        settings,
        measurement=measurement,
    ),
)
