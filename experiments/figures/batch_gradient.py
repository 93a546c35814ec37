"""Figure 3: the mean absolute gradient of the first fully connected layer against the batch size, at step 1.

Eq. 4 takes the gradients of single images as normal with mean 0. With a mean mu and a deviation sigma, the mean over n
images is normal with mean mu and variance sigma^2 / n. The expectation of its magnitude over a layer of parameters
whose mu is itself about normal, with root mean square mu, is

    E|g| = sqrt(2 / pi) sqrt(mu^2 + sigma^2 / n),

which falls as n^(-1/2) only up to n = (sigma / mu)^2, the gradient noise scale, and then rests on the mean gradient.
(Eq. 4 as printed is sqrt(2) too large.)
"""

from collections import defaultdict

import numpy as np
from scipy import optimize

from experiments.figures import statistics
from experiments.figures.base import Claim, Figure, Measurement, Place, count, describe
from experiments.figures.first_step import first_step, linear_kernel, mean_abs
from experiments.plots import MARKS, batch_axis, name_axes

# The paper's largest batch is 60000; CIFAR-10 has 50000 training images.
SIZES = {"smoke": (32, 64, 128, 256, 512), "cpu": (*(2**k for k in range(5, 16)), 50_000)}
SIZES["paper"] = SIZES["cpu"]
SEEDS = {"smoke": 1, "cpu": 5, "paper": 5}
REPEATS = 8
CHUNK = {"smoke": 64, "cpu": 1024, "paper": 1024}
# The exponent counts as -1/2 within this distance, about the width of a line in the plot.
TOLERANCE = 0.05


def config(place: Place, seed: int):
    """All images, and PyTorch's initial parameters at any scale: nothing is trained."""
    return place.config(init="pytorch", train_images=None, batch_size=32, dropout=0.0, seed=seed)


def rows(place: Place, trained):
    """The layer's mean gradient in several disjoint batches of each size."""
    del trained
    for seed in range(SEEDS[place.preset]):
        step = first_step(config(place, seed), CHUNK[place.preset])
        sums = chunk_sums(step)
        for size in SIZES[place.preset]:
            gradients = [gradient(step, sums, i, size) for i in range(min(REPEATS, len(step) // size))]
            for repeat, value in enumerate(map(mean_abs, gradients)):
                yield {"seed": seed, "batch_size": size, "repeat": repeat, "mean_abs_gradient": float(value)}


def chunk_sums(step):
    """The layer's gradient summed over each chunk of the images: larger batches are made of these."""
    chunks = [(start, min(step.chunk, len(step) - start)) for start in range(0, len(step), step.chunk)]
    return [np.asarray(size * linear_kernel(step.gradient(start, size), 0)) for start, size in chunks]


def gradient(step, sums, number: int, size: int):
    """The layer's gradient of the batch of this number among those of one size."""
    if size < step.chunk:
        return linear_kernel(step.gradient(number * size, size), 0)
    first, last = number * size // step.chunk, -(-(number + 1) * size // step.chunk)
    return sum(sums[first:last]) / size


def by_size(rows, seed=None):
    """Mean over batches and seeds for each batch size."""
    groups = defaultdict(list)
    for row in rows:
        if seed in (None, row["seed"]):
            groups[row["batch_size"]].append(row["mean_abs_gradient"])
    return {size: float(np.mean(values)) for size, values in sorted(groups.items())}


def law(n, mu, sigma):
    """The corrected eq. 4."""
    return np.sqrt(2 / np.pi) * np.sqrt(mu**2 + sigma**2 / n)


def fit(sizes, values) -> tuple[float, float]:
    """mu and sigma that are closest to the values on a logarithmic scale."""
    sizes, values = np.asarray(sizes, float), np.asarray(list(values), float)
    start = np.log([values[-1], values[0] * np.sqrt(sizes[0])])
    found = optimize.least_squares(lambda p: np.log(law(sizes, *np.exp(p)) / values), start)
    return tuple(np.exp(found.x))


def judge(rows):
    """Does it fall, does it fall as the root, and does the corrected law describe it?"""
    means = by_size(rows)
    sizes, values = list(means), list(means.values())
    half = len(sizes) // 2
    order = statistics.rank_correlation(sizes, values)
    early, late = statistics.slope(sizes[: half + 1], values[: half + 1]), statistics.slope(sizes[half:], values[half:])
    mu, sigma = fit(sizes, values)
    error = np.max(np.abs(np.array(values) / law(np.array(sizes), mu, sigma) - 1))
    critical = [float((s / m) ** 2) for m, s in (fit(sizes, by_size(rows, seed).values()) for seed in seeds(rows))]
    return [
        Claim("The mean gradient falls with the batch size.", f"rank correlation {order}", order.below(0)),
        Claim(
            "It falls as batch^(-1/2) (eq. 4) to the largest batch.",
            f"exponent up to batch {sizes[half]}: {early}; from there on: {late}",
            late.within(-0.5 - TOLERANCE, -0.5 + TOLERANCE),
        ),
        Claim(
            "The law with a mean, sqrt(2/pi) sqrt(mu² + sigma²/n), describes it (ours).",
            f"largest error {error:.1%}; noise scale (sigma/mu)² = {statistics.spread(critical)} images",
            statistics.Estimate(error, error, error).below(0.1),
        ),
    ]


def seeds(rows):
    """Of the rows, in order."""
    return sorted({row["seed"] for row in rows})


def draw(axes, rows):
    """Means with the fitted law, and eq. 4 with its mean of 0 for comparison."""
    [panel] = axes
    means = by_size(rows)
    sizes = np.array(list(means))
    for i, seed in enumerate(seeds(rows)):
        own = by_size(rows, seed)
        panel.plot(list(own), list(own.values()), MARKS[i], color="black", fillstyle="none", label=f"seed {seed}")
    mu, sigma = fit(sizes, list(means.values()))
    panel.plot(sizes, law(sizes, mu, sigma), "-", color="#d55e00", label="sqrt(2/pi) sqrt(mu² + sigma²/n), fitted")
    panel.plot(sizes, law(sizes, 0, sigma), ":", color="#0072b2", label="the same with mu = 0 (eq. 4)")
    panel.set_yscale("log")
    batch_axis(panel, sizes)
    name_axes(panel, "batch size n (images)", "mean |gradient| (loss / parameter)")


def settings(place: Place) -> str:
    """The small print."""
    return (
        f"{describe(config(place, 0))}. Up to {REPEATS} disjoint batches of each size,"
        f" {count(SEEDS[place.preset], 'seed')}; the largest batch is the data set."
    )


def measurement(place: Place) -> Measurement:
    """How many gradients that is."""
    sizes, chunk = SIZES[place.preset], CHUNK[place.preset]
    images = max(sizes) + sum(REPEATS * size for size in sizes if size < chunk)
    return Measurement(config(place, 0), chunk, SEEDS[place.preset] * images)


FIGURES = (
    Figure(
        3,
        "Mean gradient of the first fully connected layer at step 1",
        "The mean absolute gradient falls as the inverse root of the batch size, to zero.",
        rows,
        judge,
        draw,
        settings,
        measurement=measurement,
    ),
)
