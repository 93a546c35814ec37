"""Figure 2: the radius of curvature of AlexNet's layers, weights and biases apart, at the initial parameters.

By eq. 9 with the exact diagonal of the Hessian, and by eq. 17, |w / g|. Where an entry of either denominator is zero
(dead ReLUs) the radius is infinite, and near there a mean is ruled by a few entries; so a layer's bar is the median
over the entries whose radius is finite. As in the paper the biases' radii are multiplied by ten. Biases begin at
PyTorch's uniform values: at zero they would have no eq. 17.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import curvax
from experiments import plots
from experiments.figures import statistics
from experiments.figures.base import Claim, Figure, Place, count
from experiments.figures.first_step import first_step
from experiments.records import column

IMAGES = {"smoke": 16, "cpu": 512, "paper": 512}
SEEDS = {"smoke": 1, "cpu": 3, "paper": 3}
NAMES = [f"conv {i + 1}" for i in range(5)] + [f"fc {i + 1}" for i in range(3)]
BIAS_FACTOR = 10
SOURCES = {"exact": "eq. 9, exact Hessian diagonal", "eq17": "eq. 17, |w / g|"}

exact_diag = jax.jit(functools.partial(curvax.hessian_diag, method="exact"))


def config(place: Place, seed: int):
    """PyTorch's initial parameters at any scale."""
    images = IMAGES[place.preset]
    return place.config(init="pytorch", train_images=images, batch_size=images, dropout=0.0, seed=seed)


def summary(radius) -> dict[str, float | None]:
    """Quartiles of the finite radii of an array, if there are any, and the share of the others."""
    finite = radius[np.isfinite(radius)]
    quartiles = np.quantile(finite, [0.25, 0.5, 0.75]).tolist() if finite.size else [None] * 3
    low, median, high = quartiles
    return {"low": low, "median": median, "high": high, "infinite": 1 - finite.size / radius.size}


def layers(tree):
    """The layers' parameters, from the images to the logits."""
    return [tree[part][i] for part, number in (("convs", 5), ("linears", 3)) for i in range(number)]


def medians(rows, kind, source) -> np.ndarray:
    """Of the layers in order, a row per seed."""
    return np.array([column(rows, "median", kind=kind, source=source, layer=name) for name in NAMES], float).T


class LayerRadii(Figure):
    """Bars of weights and biases, for both radii."""

    number, title, panels = 2, "Radius of curvature across the layers of AlexNet", 2
    claim = "The curvature varies remarkably from layer to layer."

    def rows(self, place, trained):
        images = IMAGES[place.preset]
        for seed in range(SEEDS[place.preset]):
            step = first_step(config(place, seed), images)
            grads = step.gradient(0, images)
            diag = exact_diag(step.objective(0, images), step.params)
            for name, w, g, h in zip(NAMES, *(layers(tree) for tree in (step.params, grads, diag)), strict=True):
                for kind in ("kernel", "bias"):
                    exact = (1 + g[kind] ** 2) ** 1.5 / jnp.abs(h[kind])
                    for source, radius in (("exact", exact), ("eq17", jnp.abs(w[kind]) / jnp.abs(g[kind]))):
                        about = {"seed": seed, "layer": name, "kind": kind, "source": source}
                        yield {**about, **summary(np.asarray(radius, np.float64))}

    def judge(self, rows):
        exact, rough = (medians(rows, "kernel", source) for source in SOURCES)
        ratio = statistics.mean(np.log10(np.nanmax(exact, 1) / np.nanmin(exact, 1)))
        orders = [stats.spearmanr(x, y, nan_policy="omit").statistic for x, y in zip(exact, rough, strict=True)]
        order = statistics.mean(orders)
        differ = "Radii of curvature differ remarkably (here: by more than a factor of 10) between layers."
        ranked = f"rank correlation over the {len(NAMES)} layers' weights {order}"
        return [
            Claim(differ, f"largest over smallest median of the weights, exact: 10^{ratio}", ratio.above(1)),
            Claim("Eq. 17 ranks the layers as the exact radius does.", ranked, order.above(0)),
        ]

    def draw(self, axes, rows):
        places = np.arange(len(NAMES))
        for panel, (source, title) in zip(axes, SOURCES.items(), strict=True):
            for shift, kind, label, factor, look in (
                (-0.2, "kernel", "weights", 1, {"color": "#56b4e9"}),
                (0.2, "bias", f"biases (x {BIAS_FACTOR})", BIAS_FACTOR, {"color": "#e69f00", "hatch": "///"}),
            ):
                values = factor * medians(rows, kind, source)
                middle = np.median(values, axis=0)
                reach = np.abs(np.array([values.min(0), values.max(0)]) - middle)
                panel.bar(places + shift, middle, 0.4, yerr=reach, label=label, capsize=2, edgecolor="black", **look)
            panel.set_yscale("log")
            plots.name_axes(panel, "", "median radius (parameter units)", title)
            panel.set_xticks(places, NAMES, rotation=45, fontsize=8)

    def settings(self, place):
        return (
            f"{config(place, 0).describe()}; curvature and gradient of these images, median over each array's entries;"
            f" bars: median and range of {count(SEEDS[place.preset], 'seed')}."
        )

    def measurement(self, place):
        # One gradient, and an exact diagonal, which takes about a dozen.
        images = IMAGES[place.preset]
        return config(place, 0), images, SEEDS[place.preset] * images * 13


FIGURES = (LayerRadii(),)
