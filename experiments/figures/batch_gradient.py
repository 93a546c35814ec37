"""Figure 3: the mean absolute gradient of the first fully connected layer against the batch size, at step 1.

Eq. 4 takes the gradients of single images as normal with mean 0. With a mean mu and a deviation sigma, the mean over n
images is normal with mean mu and variance sigma^2 / n. The expectation of its magnitude over a layer of parameters
whose mu is itself about normal, with root mean square mu, is

    E|g| = sqrt(2 / pi) sqrt(mu^2 + sigma^2 / n),

which falls as n^(-1/2) only up to n = (sigma / mu)^2, the gradient noise scale, and then rests on the mean gradient.
(Eq. 4 as printed is sqrt(2) too large.)
"""

import numpy as np
from scipy import optimize

from experiments import plots
from experiments.figures import statistics
from experiments.figures.base import Claim, Figure, Place, count
from experiments.figures.first_step import first_step, linear_kernel, mean_abs
from experiments.records import column, distinct

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


def by_size(rows, **about):
    """Batch sizes in order, and the mean over batches and seeds at each."""
    sizes = np.array(distinct(rows, "batch_size"))
    return sizes, np.array([np.mean(column(rows, "mean_abs_gradient", batch_size=n, **about)) for n in sizes])


def law(n, mu, sigma):
    """The corrected eq. 4."""
    return np.sqrt(2 / np.pi) * np.sqrt(mu**2 + sigma**2 / n)


def fit(sizes, values) -> tuple[float, float]:
    """mu and sigma that are closest to the values on a logarithmic scale."""
    start = np.log([values[-1], values[0] * np.sqrt(sizes[0])])
    found = optimize.least_squares(lambda p: np.log(law(sizes, *np.exp(p)) / values), start)
    return tuple(np.exp(found.x))


class BatchGradient(Figure):
    """Means over disjoint batches, beside both laws."""

    number, title = 3, "Mean gradient of the first fully connected layer at step 1"
    claim = "The mean absolute gradient falls as the inverse root of the batch size, to zero."

    def rows(self, place, trained):
        for seed in range(SEEDS[place.preset]):
            step = first_step(config(place, seed), CHUNK[place.preset])
            sums = chunk_sums(step)
            for size in SIZES[place.preset]:
                gradients = [gradient(step, sums, i, size) for i in range(min(REPEATS, len(step) // size))]
                for repeat, value in enumerate(map(mean_abs, gradients)):
                    yield {"seed": seed, "batch_size": size, "repeat": repeat, "mean_abs_gradient": float(value)}

    def judge(self, rows):
        sizes, values = by_size(rows)
        half = len(sizes) // 2
        order = statistics.rank_correlation(sizes, values)
        early, late = (statistics.slope(sizes[part], values[part]) for part in np.s_[: half + 1, half:])
        error = np.max(np.abs(values / law(sizes, *fit(sizes, values)) - 1))
        fits = [fit(*by_size(rows, seed=seed)) for seed in distinct(rows, "seed")]
        scale = statistics.spread([float((sigma / mu) ** 2) for mu, sigma in fits])
        verdict = late.within(-0.5 - TOLERANCE, -0.5 + TOLERANCE)
        exponents = f"exponent up to batch {sizes[half]}: {early}; from there on: {late}"
        ours = "The law with a mean, sqrt(2/pi) sqrt(mu² + sigma²/n), describes it (ours)."
        fitted = f"largest error {error:.1%}; noise scale (sigma/mu)² = {scale} images"
        return [
            Claim("The mean gradient falls with the batch size.", f"rank correlation {order}", order.below(0)),
            Claim("It falls as batch^(-1/2) (eq. 4) to the largest batch.", exponents, verdict),
            Claim(ours, fitted, statistics.exactly(error, 0.1)),
        ]

    def draw(self, axes, rows):
        [panel] = axes
        for seed, look in zip(distinct(rows, "seed"), plots.LOOKS, strict=False):
            style = {"color": "black", "fillstyle": "none", "label": f"seed {seed}"}
            panel.plot(*by_size(rows, seed=seed), look["marker"], **style)
        sizes, values = by_size(rows)
        mu, sigma = fit(sizes, values)
        for mean, line, label in (
            (mu, {"color": "#d55e00"}, "sqrt(2/pi) sqrt(mu² + sigma²/n), fitted"),
            (0, {"color": "#0072b2", "linestyle": ":"}, "the same with mu = 0 (eq. 4)"),
        ):
            panel.plot(sizes, law(sizes, mean, sigma), label=label, **line)
        panel.set_yscale("log")
        plots.batch_axis(panel, sizes)
        plots.name_axes(panel, "batch size n (images)", "mean |gradient| (loss / parameter)")

    def settings(self, place):
        return (
            f"{config(place, 0).describe()}. Up to {REPEATS} disjoint batches of each size,"
            f" {count(SEEDS[place.preset], 'seed')}; the largest batch is the data set."
        )

    def measurement(self, place):
        sizes, chunk = SIZES[place.preset], CHUNK[place.preset]
        images = max(sizes) + sum(REPEATS * size for size in sizes if size < chunk)
        return config(place, 0), chunk, SEEDS[place.preset] * images


FIGURES = (BatchGradient(),)
