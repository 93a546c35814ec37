"""How close each estimate of a Hessian diagonal comes for how many gradients, on one batch of real images.

Ours stand beside those of optax and of matfree, on the same network, at its initial parameters. The truth is the exact
diagonal. The price of a sample is measured once, in gradients; that of many is so many times as much.
"""

import functools
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from experiments import data, plots
from experiments.bench.curvature import alexnet, gradient, relative_error
from experiments.bench.measure import Row, Say, timed
from experiments.config import TrainConfig
from experiments.errors import UsageError

SAMPLES = (1, 3, 10, 30)
PROBES = (2, 5, 15)
SEEDS = 3


def rows(say: Say, repeats: int, quick: bool, dataset: data.Dataset) -> Iterator[Row]:
    """A line for every estimator and number of samples; of a narrow network, if it is to be quick."""
    config = TrainConfig(width=1 / 32 if quick else 1 / 8, hidden=32 if quick else 512, dropout=0.0)
    images = data.normalise(jnp.asarray(dataset.train.images[:128]), *data.channel_statistics(dataset.train.images))
    problem = alexnet(config, images, dataset.train.labels[:128], dataset.num_classes)
    exact = lambda objective, params, key: curvax.hessian_diag(objective, params, method="exact")
    say("the exact diagonal, and the price of one sample of each")
    functions = {"gradient": gradient, "exact": exact, **one_sample()}
    calls, times, _ = timed({name: (f, *problem, jax.random.key(0)) for name, f in functions.items()}, repeats)
    truth, prices = calls["exact"](), {name: times[name] / times["gradient"] for name in times}
    yield row("exact", 1, prices["exact"], 0.0)
    for name in one_sample():
        say(name)
        sample = lambda seed, name=name: calls[name].func(*problem, seed)
        for samples, error in averages(sample, truth, SAMPLES[: 2 if quick else None]).items():
            yield row(name, samples, samples * prices[name], error)
    for name, estimator in many_samples().items():
        say(name)
        for probes in PROBES[: 1 if quick else None]:
            estimate = jax.jit(estimator(probes))
            found = [estimate(*problem, jax.random.key(seed)) for seed in range(SEEDS)]
            # Two products for each probe, and one product is what a sample of the same library's Hutchinson costs.
            price = 2 * probes * prices[name.replace("xdiag", "hutchinson")]
            yield row(name, probes, price, statistics.median(relative_error(some, truth) for some in found))


def row(estimator: str, samples: int, gradients: float, error: float) -> Row:
    """One estimate: by which estimator, from how many samples, at how many gradients, and its relative L2 error."""
    point = {"estimator": estimator, "samples": samples, "gradients": gradients, "error": error}
    what = f"relative error of {estimator}, samples: {samples}"
    return Row(what, error, (), f"{gradients:.3g} gradients", data=point)


def averages(sample: Callable, truth: Any, numbers: tuple[int, ...]) -> dict[int, float]:
    """The error of means over ever more samples, the median over seeds."""
    errors = {number: [] for number in numbers}
    for seed in range(SEEDS):
        total = jax.tree.map(jnp.zeros_like, truth)
        for number, key in enumerate(jax.random.split(jax.random.key(seed), numbers[-1]), 1):
            total = optax.tree.add(total, sample(key))
            if number in errors:
                errors[number].append(relative_error(optax.tree.scale(1 / number, total), truth))
    return {number: statistics.median(found) for number, found in errors.items()}


def one_sample() -> dict[str, Callable]:
    """Estimators of which samples are averaged: `(objective, params, key) -> diagonal`."""
    methods = {"hutchinson": "hutchinson", "ggn_mc_of_batches": curvax.GaussNewton(1, "batch"), "ggn_mc": "ggn_mc"}
    ours = {name: functools.partial(_ours, method=method) for name, method in methods.items()}
    theirs = {"matfree hutchinson": functools.partial(_matfree_diagonal, 1, _hutchinson)} if _matfree() else {}
    return {**ours, "optax.contrib hutchinson": _optax_hutchinson, **theirs}


def many_samples() -> dict[str, Callable]:
    """Estimators that take all their probes at once, by name: from their number to such a function."""
    ours = {"xdiag": lambda probes: functools.partial(_ours, method="xdiag", num_samples=probes)}
    theirs = {"matfree xdiag": lambda probes: functools.partial(_matfree_diagonal, probes, _xdiag)}
    return ours | (theirs if _matfree() else {})


def _ours(objective, params, key, **options):
    return curvax.hessian_diag(objective, params, key=key, **options)


def _optax_hutchinson(objective, params, key):
    estimator = optax.contrib.hutchinson_estimator_diag_hessian(key)
    return estimator.update(params, estimator.init(params), params, obj_fn=objective)[0]


def _matfree_diagonal(probes, estimator, objective, params, key):
    estimate = estimator(_matfree(), _matfree().sampler_signs(params, num=probes))
    return estimate(functools.partial(curvax.hvp, objective, params), key)


def _hutchinson(matfree, sampler):
    return matfree.estimator_monte_carlo(matfree.monte_carlo_diagonal(), sampler=sampler)


def _xdiag(matfree, sampler):
    return matfree.estimator_leave_one_out(matfree.leave_one_out_xdiag(), sampler=sampler)


def _matfree() -> Any:
    """The module of matfree's estimators, or None where it is not installed: it is part of the extra `bench`."""
    return importlib.import_module("matfree.stochtrace") if importlib.util.find_spec("matfree") else None


def check_installed():
    """Raises a UsageError where matfree, part of the comparison, is missing."""
    if not _matfree():
        raise UsageError("bench estimators compares with matfree; pip install -e '.[bench]' brings it")


def plot(points: list[Mapping], dataset: str, path: Path):
    """Error against cost, both logarithmic, and the exact diagonal's cost as a line, from the `data` of rows."""

    def draw(panels, points):
        [panel] = panels
        for name in dict.fromkeys(point["estimator"] for point in points):
            some, style = [point for point in points if point["estimator"] == name], plots.look(name)
            if name == "exact":
                panel.axvline(some[0]["gradients"], color=style["color"], linestyle=":", label="curvax exact: no error")
                continue
            cost, error = np.array([(point["gradients"], point["error"]) for point in some]).T
            panel.plot(cost, error, label=name if " " in name else f"curvax {name}", **style)
        plots.name_axes(panel, "cost (gradients of the same batch)", "relative L2 error")
        panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
        plots.plain_log(panel, "x")
        plots.plain_log(panel, "y")

    caption = (
        f"AlexNet at an eighth of its width, FC layers of 512, at its initial parameters, on 128 images of {dataset}."
        f" Medians over {SEEDS} seeds. A cost is the number of samples times the measured price of one; xdiag takes two"
        " products for each probe."
    )
    plots.save(draw, 1, points, "The error of each estimate against its cost", caption, path, size=(7.5, 5))
