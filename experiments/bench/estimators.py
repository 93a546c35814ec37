"""How close each estimate of a Hessian diagonal comes for how many gradients, on one batch of real images.

Ours stand beside those of optax and of matfree, on the same network, at its initial parameters. The truth is the exact
diagonal. The price of a sample is measured once, in gradients; that of many is so many times as much.
"""

import functools
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from experiments import data, models, plots
from experiments.bench.curvature import cross_entropy, relative_error
from experiments.bench.measure import compiled, in_turns
from experiments.bench.table import Row, Say
from experiments.config import TrainConfig
from experiments.errors import UsageError

SAMPLES = (1, 3, 10, 30)
PROBES = (2, 5, 15)
SEEDS = 3


class Point(NamedTuple):
    """One estimate: by which estimator, from how many samples, at how many gradients, and its relative L2 error."""

    estimator: str
    samples: int
    gradients: float
    error: float


def rows(say: Say, repeats: int, quick: bool, dataset: data.Dataset) -> Iterator[Row]:
    """A line for every estimator and number of samples; of a narrow network, if it is to be quick."""
    objective, params = alexnet_problem(dataset, quick)
    say("the exact diagonal")
    truth = jax.jit(functools.partial(curvax.hessian_diag, method="exact"))(objective, params)
    say("the price of one sample of each")
    prices = price(objective, params, repeats)
    yield _row(Point("exact", 1, prices["exact"], 0.0))
    for name in one_sample():
        say(name)
        for point in averages(name, objective, params, truth, prices[name], SAMPLES[: 2 if quick else None]):
            yield _row(point)
    for name in many_samples():
        say(name)
        for probes in PROBES[: 1 if quick else None]:
            # Two products for each probe, and one product is what a sample of the same library's Hutchinson costs.
            cost = 2 * probes * prices[name.replace("xdiag", "hutchinson")]
            yield _row(Point(name, probes, cost, error_of(many_samples()[name](probes), objective, params, truth)))


def _row(point: Point) -> Row:
    what = f"relative error of {point.estimator}, samples: {point.samples}"
    return Row(what, point.error, (), f"{point.gradients:.3g} gradients", data=point._asdict())


def alexnet_problem(dataset: data.Dataset, quick: bool) -> tuple[curvax.Objective, Any]:
    """AlexNet at an eighth of its width, with FC layers of 512, on one batch of 128 images."""
    mean, std = data.channel_statistics(dataset.train.images)
    config = TrainConfig(width=1 / 32 if quick else 1 / 8, hidden=32 if quick else 512, dropout=0.0)
    definition, params, stats = models.build(config, dataset.num_classes, jax.random.key(0))

    def predict(params, batch):
        return models.apply(definition, params, stats, batch["image"])[0]

    batch = {
        "image": data.normalise(jnp.asarray(dataset.train.images[:128]), mean, std),
        "label": jnp.asarray(dataset.train.labels[:128]),
    }
    return curvax.Objective(predict, cross_entropy, batch), params


def one_sample() -> dict[str, Callable]:
    """Estimators of which samples are averaged: `(objective, params, key) -> diagonal`."""
    methods = {"hutchinson": "hutchinson", "ggn_mc_of_batches": curvax.GaussNewton(1, "batch"), "ggn_mc": "ggn_mc"}
    ours = {name: functools.partial(_ours, method=method) for name, method in methods.items()}
    matfree = _matfree()
    sampled = {} if matfree is None else {"matfree hutchinson": _matfree_hutchinson}
    return {**ours, "optax.contrib hutchinson": _optax_hutchinson, **sampled}


def many_samples() -> dict[str, Callable]:
    """Estimators that take all their probes at once, by name: from their number to such a function."""
    ours = {"xdiag": lambda probes: functools.partial(_ours, method="xdiag", num_samples=probes)}
    theirs = {"matfree xdiag": lambda probes: functools.partial(_matfree_xdiag, probes=probes)}
    return ours | (theirs if _matfree() is not None else {})


def _ours(objective, params, key, **options):
    return curvax.hessian_diag(objective, params, key=key, **options)


def _optax_hutchinson(objective, params, key):
    estimator = optax.contrib.hutchinson_estimator_diag_hessian(key)
    return estimator.update(params, estimator.init(params), params, obj_fn=objective)[0]


def _matfree_hutchinson(objective, params, key):
    stochtrace = _matfree()
    sampler = stochtrace.sampler_signs(params, num=1)
    estimate = stochtrace.estimator_monte_carlo(stochtrace.monte_carlo_diagonal(), sampler=sampler)
    return estimate(functools.partial(curvax.hvp, objective, params), key)


def _matfree_xdiag(objective, params, key, probes):
    stochtrace = _matfree()
    sampler = stochtrace.sampler_signs(params, num=probes)
    estimate = stochtrace.estimator_leave_one_out(stochtrace.leave_one_out_xdiag(), sampler=sampler)
    return estimate(functools.partial(curvax.hvp, objective, params), key)


def _matfree() -> Any:
    """The module of matfree's estimators, or None where it is not installed: it is part of the extra `bench`."""
    return importlib.import_module("matfree.stochtrace") if importlib.util.find_spec("matfree") else None


def price(objective, params, repeats: int) -> dict[str, float]:
    """What one sample of each estimator takes, in gradients."""
    exact = lambda objective, params, key: curvax.hessian_diag(objective, params, method="exact")
    programs = {"gradient": lambda objective, params, key: jax.grad(objective)(params), "exact": exact, **one_sample()}
    arguments = objective, params, jax.random.key(0)
    calls = {name: functools.partial(compiled(f, *arguments).call, *arguments) for name, f in programs.items()}
    times = in_turns(calls, repeats)
    return {name: times[name] / times["gradient"] for name in times}


def averages(name: str, objective, params, truth, price: float, numbers: tuple[int, ...]) -> Iterator[Point]:
    """The error of means over ever more samples, the median over seeds."""
    sample, errors = jax.jit(one_sample()[name]), {number: [] for number in numbers}
    for seed in range(SEEDS):
        total = jax.tree.map(jnp.zeros_like, truth)
        for number, key in enumerate(jax.random.split(jax.random.key(seed), numbers[-1]), 1):
            total = jax.tree.map(jnp.add, total, sample(objective, params, key))
            if number in errors:
                mean = jax.tree.map(lambda t, n=number: t / n, total)
                errors[number].append(relative_error(mean, truth))
    for number, found in errors.items():
        yield Point(name, number, number * price, statistics.median(found))


def error_of(estimate: Callable, objective, params, truth) -> float:
    """The median over seeds."""
    estimate = jax.jit(estimate)
    return statistics.median(
        relative_error(estimate(objective, params, jax.random.key(seed)), truth) for seed in range(SEEDS)
    )


def plot(points: list[Mapping], dataset: str, path: Path) -> None:
    """Error against cost, both logarithmic, and the exact diagonal's cost as a line, from fields of `Point`s."""

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


def check_installed() -> None:
    """Raises a UsageError where matfree, part of the comparison, is missing."""
    if _matfree() is None:
        raise UsageError("bench estimators compares with matfree; pip install -e '.[bench]' brings it")
