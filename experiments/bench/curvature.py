"""What exact curvature costs, in gradients of the same network, and how exact it is.

Each diagonal and the gradient are compiled apart, and timed in turn.
"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import curvax
from curvax.curvature.gauss_newton import sampled_gauss_newton
from curvax.exact import exact_diag, explain, ggn_diag
from experiments import data, models
from experiments.bench.measure import Row, Say, ratio, seconds, timed
from experiments.bench.optimizers import Run
from experiments.config import TrainConfig
from experiments.step import cross_entropy

NUMBERS = ("NHWC", "HWIO", "NHWC")


def rows(say: Say, repeats: int, quick: bool) -> Iterator[Row]:
    """The table."""
    batch_size, compiling = 4 if quick else 128, {}
    for num_classes, bars in ((10, (8.0, 6.0)), (100, (60.0, 40.0))):
        say(f"the exact diagonal of AlexNet, C = {num_classes}")
        what = f"exact diagonal / gradient, AlexNet, C = {num_classes}"
        row, compiling[num_classes] = cost(what, exact_diag, batch_size, num_classes, repeats, bars)
        yield row
    yield ratio("compile, C = 100 over C = 10", compiling[100], compiling[10], (1.3,))
    both, words = curvax.value_grad_and_hessian_diag, "gradient with one sample of {} / gradient, AlexNet"
    for what, function, method, bars in (
        ("{}, one sample / gradient, AlexNet", curvax.hessian_diag, "ggn_mc", (1.2,)),
        (words, both, "ggn_mc", ()),
        (words, both, "hutchinson", (2.2,)),
    ):
        say(what.format(method))
        sample = functools.partial(function, method=method, key=jax.random.key(0))
        yield cost(what.format(method), sample, batch_size, 10, repeats, bars)[0]
    say("errors")
    yield from (estimate_error(), product_share(), *dense_errors())
    yield from refresh_cost(say, repeats, quick)


def cost(
    what: str, method: Callable, batch_size: int, num_classes: int, repeats: int, bars: tuple
) -> tuple[Row, float]:
    """`method(objective, params)` beside a gradient of AlexNet, and the seconds that it took to compile."""
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(batch_size, 32, 32, 3)), rng.integers(0, num_classes, batch_size)
    problem = alexnet(TrainConfig(hidden=1024, dropout=0.0), images, labels, num_classes)
    functions = {"gradient": (gradient, *problem), "method": (method, *problem)}
    _, times, compiling = timed(functions, repeats, warm_up=False)
    return ratio(what, times["method"], times["gradient"], bars), compiling["method"]


def gradient(objective: curvax.Objective, params: Any, *_: Any) -> Any:
    """What all that is measured here is compared with."""
    return jax.grad(objective)(params)


def alexnet(config: TrainConfig, images, labels, num_classes: int) -> tuple[curvax.Objective, Any]:
    """The loss of a network on one batch, and its initial parameters."""
    definition, params, stats = models.build(config, num_classes, jax.random.key(0))
    predict = lambda params, batch: models.apply(definition, params, stats, batch["images"])[0]
    batch = {"images": jnp.asarray(images, jnp.float32), "labels": jnp.asarray(labels)}
    return curvax.Objective(predict, cross_entropy, batch), params


def refresh_cost(say: Say, repeats: int, quick: bool) -> Iterator[Row]:
    """Training steps of `cblr`, curvature refreshed at every tenth, beside those of the same chain without radii.

    The steps take turns; of every ten the mean counts, and of those means the median.
    """
    batch_size = 40 if quick else 256
    narrow = {"width": 1 / 16, "hidden": 32} if quick else {"hidden": 1024}
    config = TrainConfig(dataset="generated", batch_size=batch_size, dropout=0.0, augment=False, **narrow)
    dataset = data.generated(config.image_size, num_train=10 * batch_size, num_test=10)
    sizes, runs = {"sgd": None, "a slice": batch_size // 8, "the whole batch": batch_size}, {}
    for name, size in sizes.items():
        say(f"AlexNet's step at batch {batch_size}, {name}: compilation")
        optimizer = {"optimizer": "cblr", "curvature_batch_size": size} if size else {"optimizer": "sgd"}
        runs[name] = Run(dataclasses.replace(config, **optimizer), dataset)
        jax.block_until_ready([runs[name].step(batch) for batch in (0, 1)])
    say(f"AlexNet's step at batch {batch_size}, {20 * repeats} of each")
    windows = {name: [] for name in runs}
    for _ in range(2 * repeats):
        steps = {name: [] for name in runs}
        for batch, (name, run) in itertools.product(range(10), runs.items()):
            steps[name].append(seconds(run.step, batch))
        for name in runs:
            windows[name].append(statistics.fmean(steps[name]))
    means = {name: statistics.median(values) for name, values in windows.items()}
    for name, bars in (("a slice", (1.06,)), ("the whole batch", ())):
        what = f"cblr, every 10, curvature of {sizes[name]} of {batch_size} / sgd, AlexNet's step"
        yield ratio(what, means[name], means["sgd"], bars)


def estimate_error() -> Row:
    """The relative error of one random column on a small ReLU network, the mean over ten keys."""
    objective, params = small_cnn(jnp.float32)
    exact = jax.jit(ggn_diag)(objective, params)[2]
    sample = jax.jit(lambda key: sampled_gauss_newton(objective, params, key).diag)
    errors = [relative_error(sample(key), exact) for key in jax.random.split(jax.random.key(0), 10)]
    return Row("ggn_mc, one sample, relative error", float(np.mean(errors)), (0.48,), f"up to {max(errors):.3f}")


def product_share() -> Row:
    """Hessian-vector products for a GELU network over its parameters."""
    sizes = (784, 256, 256, 10)
    keys = jax.random.split(jax.random.key(0), len(sizes))
    weights = [jax.random.normal(key, s) / 30 for key, s in zip(keys, itertools.pairwise(sizes), strict=False)]

    def predict(params, batch):
        hidden = batch["images"]
        for weight in params[:-1]:
            hidden = jax.nn.gelu(hidden @ weight)
        return hidden @ params[-1]

    batch = {"images": jnp.ones((8, sizes[0])), "labels": jnp.zeros(8, int)}
    products = explain(curvax.Objective(predict, cross_entropy, batch), weights).products
    number = sum(weight.size for weight in weights)
    return Row("HVPs / parameters, GELU MLP", products / number, (0.05,), f"{products} / {number}")


def dense_errors() -> list[Row]:
    """The small ReLU network's diagonal against its dense Hessian in float64."""
    with jax.enable_x64(True):
        objective, params = small_cnn(jnp.float64)
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        dense = unravel(jnp.diag(jax.jit(jax.hessian(lambda flat: objective(unravel(flat))))(flat)))
        wide = relative_error(jax.jit(exact_diag)(objective, params)[2], dense)
    narrow = relative_error(jax.jit(exact_diag)(*small_cnn(jnp.float32))[2], dense)
    return [
        Row("error against a dense float64 Hessian, float32", narrow, (1e-5,), "small ReLU CNN"),
        Row("error against a dense float64 Hessian, float64", wide, (1e-10,), "small ReLU CNN"),
    ]


def relative_error(found: Any, expected: Any) -> float:
    """The L2 norm of the difference over that of `expected`, over all leaves."""
    flat = lambda tree: np.concatenate([np.ravel(np.asarray(leaf, float)) for leaf in jax.tree.leaves(tree)])
    return float(np.linalg.norm(flat(found) - flat(expected)) / np.linalg.norm(flat(expected)))


def small_cnn(dtype: Any) -> tuple[curvax.Objective, Any]:
    """Two convolutions, two poolings, one dense layer, small enough for a dense Hessian, on random images."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1])), dtype)
    params = {"first": normal(3, 3, 2, 6), "second": normal(3, 3, 6, 8), "dense": normal(32, 10)}

    def predict(params, batch):
        hidden = batch["images"]
        for name in ("first", "second"):
            hidden = lax.conv_general_dilated(hidden, params[name], (1, 1), "SAME", dimension_numbers=NUMBERS)
            hidden = lax.reduce_window(jax.nn.relu(hidden), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return hidden.reshape(hidden.shape[0], -1) @ params["dense"]

    images, labels = rng.normal(size=(64, 8, 8, 2)), rng.integers(0, 10, 64)
    batch = {"images": jnp.asarray(images, dtype), "labels": jnp.asarray(labels)}
    return curvax.Objective(predict, cross_entropy, batch), params
