"""What exact curvature costs, in gradients of the same network, and how exact it is.

Each diagonal and the gradient are compiled apart, and timed in turn.
"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import curvax
from curvax.curvature.gauss_newton import sampled_gauss_newton
from curvax.exact import exact_diag, explain, ggn_diag
from curvax.objective import Objective
from experiments import data
from experiments.bench.measure import compiled, in_turns, seconds
from experiments.bench.table import Row, Say
from experiments.bench.updates import Run
from experiments.config import TrainConfig

NUMBERS = ("NHWC", "HWIO", "NHWC")


def rows(say: Say, repeats: int, quick: bool) -> Iterator[Row]:
    """The table."""
    batch_size, costs = 4 if quick else 128, []
    for num_classes, bars in ((10, (8.0, 6.0)), (100, (60.0, 40.0))):
        say(f"the exact diagonal of AlexNet, C = {num_classes}")
        costs.append(compare(exact_diag, *alexnet_problem(batch_size, num_classes), repeats))
        yield Row(f"exact diagonal / gradient, AlexNet, C = {num_classes}", costs[-1].ratio, bars, costs[-1].detail)
    few, many = (cost.compile_seconds for cost in costs)
    yield Row("compile, C = 100 over C = 10", many / few, (1.3,), f"{many:.1f} s over {few:.1f} s")
    say("one sample of the Gauss-Newton diagonal")
    sample = cost_of(curvax.hessian_diag, "ggn_mc", batch_size, repeats)
    yield Row("ggn_mc, one sample / gradient, AlexNet", sample.ratio, (1.2,), sample.detail)
    for method, bars in (("ggn_mc", ()), ("hutchinson", (2.2,))):
        say(f"a gradient with one sample of {method}")
        both = cost_of(curvax.value_grad_and_hessian_diag, method, batch_size, repeats)
        yield Row(f"gradient with one sample of {method} / gradient, AlexNet", both.ratio, bars, both.detail)
    say("errors")
    yield from (estimate_error(), product_share(), *dense_errors())
    yield from refresh_cost(say, repeats, quick)


class Cost(NamedTuple):
    """A program's time over the gradient's."""

    ratio: float
    compile_seconds: float
    detail: str


def cost_of(function: Callable, method: str, batch_size: int, repeats: int) -> Cost:
    """One sample, with or without value and gradient, against the gradient alone."""
    sample = functools.partial(function, method=method, key=jax.random.key(0))
    return compare(sample, *alexnet_problem(batch_size, 10), repeats)


def refresh_cost(say: Say, repeats: int, quick: bool) -> Iterator[Row]:
    """Training steps of `cblr`, curvature refreshed at every tenth, beside those of the same chain without radii.

    The steps take turns; of every ten the mean counts, and of those means the median.
    """
    batch_size = 40 if quick else 256
    narrow = {"width": 1 / 16, "hidden": 32} if quick else {"hidden": 1024}
    config = TrainConfig(dataset="generated", batch_size=batch_size, dropout=0.0, augment=False, **narrow)
    dataset = data.generated(config.image_size, num_train=10 * batch_size, num_test=10)
    slices = {"sgd": None, "a slice": batch_size // 8, "the whole batch": batch_size}
    runs = {}
    for name, size in slices.items():
        optimizer = "cblr" if size else "sgd"
        say(f"AlexNet's step at batch {batch_size}, {name}: compilation")
        runs[name] = Run(dataclasses.replace(config, optimizer=optimizer, curvature_batch_size=size), dataset)
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
        what = f"cblr, every 10, curvature of {slices[name]} of {batch_size} / sgd, AlexNet's step"
        yield Row(what, means[name] / means["sgd"], bars, f"{means[name]:.3f} / {means['sgd']:.3f} s")


def compare(method: Callable, objective: Objective, params: Any, repeats: int) -> Cost:
    """Times `method(objective, params)` and a gradient in turn."""
    programs = {"gradient": compiled(lambda objective, params: jax.grad(objective)(params), objective, params)}
    programs["method"] = compiled(method, objective, params)
    calls = {name: functools.partial(program.call, objective, params) for name, program in programs.items()}
    times = in_turns(calls, repeats, warm_up=False)
    ours, theirs = times["method"], times["gradient"]
    return Cost(ours / theirs, programs["method"].compile_seconds, f"{ours:.3f} s / {theirs:.3f} s")


def estimate_error() -> Row:
    """The relative error of one random column on a small ReLU network, the mean over ten keys."""
    objective, params = small_cnn_problem(jnp.float32)
    exact = jax.jit(ggn_diag)(objective, params)[2]
    sample = jax.jit(lambda key: sampled_gauss_newton(objective, params, key).diag)
    errors = [relative_error(sample(key), exact) for key in jax.random.split(jax.random.key(0), 10)]
    return Row("ggn_mc, one sample, relative error", float(np.mean(errors)), (0.48,), f"up to {max(errors):.3f}")


def product_share() -> Row:
    """Hessian-vector products for a GELU network over its parameters."""
    sizes = (784, 256, 256, 10)
    keys = jax.random.split(jax.random.key(0), len(sizes))
    shapes = itertools.pairwise(sizes)
    weights = [jax.random.normal(key, shape) / 30 for key, shape in zip(keys, shapes, strict=False)]

    def predict(params, data):
        hidden = data["x"]
        for weight in params[:-1]:
            hidden = jax.nn.gelu(hidden @ weight)
        return hidden @ params[-1]

    data = {"x": jnp.ones((8, sizes[0])), "label": jnp.zeros(8, int)}
    explanation = explain(Objective(predict, cross_entropy, data), weights)
    count = sum(weight.size for weight in weights)
    return Row(
        "HVPs / parameters, GELU MLP", explanation.products / count, (0.05,), f"{explanation.products} / {count}"
    )


def dense_errors() -> list[Row]:
    """The small ReLU network's diagonal against its dense Hessian in float64."""
    with jax.enable_x64(True):
        objective, params = small_cnn_problem(jnp.float64)
        dense = jax.jit(lambda params: dense_diagonal(objective, params))(params)
        wide = relative_error(jax.jit(exact_diag)(objective, params)[2], dense)
    single = jax.jit(exact_diag)(*small_cnn_problem(jnp.float32))[2]
    narrow = relative_error(jax.tree.map(np.asarray, single), jax.tree.map(np.asarray, dense))
    return [
        Row("error against a dense float64 Hessian, float32", narrow, (1e-5,), "small ReLU CNN"),
        Row("error against a dense float64 Hessian, float64", wide, (1e-10,), "small ReLU CNN"),
    ]


def dense_diagonal(objective: Objective, params: Any) -> Any:
    """The diagonal of `jax.hessian`."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return unravel(jnp.diag(jax.hessian(lambda flat: objective(unravel(flat)))(flat)))


def relative_error(found: Any, expected: Any) -> float:
    """The L2 norm of the difference over that of `expected`, over all leaves."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    wrong = sum(float(np.sum(np.square(np.asarray(f, float) - np.asarray(e, float)))) for f, e in pairs)
    return float(np.sqrt(wrong / sum(float(np.sum(np.square(np.asarray(e, float)))) for _, e in pairs)))


def cross_entropy(outputs: jax.Array, data: Any) -> jax.Array:
    """Softmax cross-entropy with integer labels."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, data["label"])


def convolve(images: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
    """A convolution that keeps the size, up to its stride."""
    return lax.conv_general_dilated(images, kernel, (strides, strides), "SAME", dimension_numbers=NUMBERS)


def max_pool(images: jax.Array) -> jax.Array:
    """The largest of every 2 x 2 pixels."""
    return lax.reduce_window(images, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def alexnet(params: Any, data: Any) -> jax.Array:
    """AlexNet for CIFAR-10 in plain `lax`: five convolutions, three poolings, three dense layers."""
    hidden = data["image"]
    for index, (kernel, bias) in enumerate(params["conv"]):
        hidden = jax.nn.relu(convolve(hidden, kernel, 1 if index else 2) + bias)
        hidden = max_pool(hidden) if index in (0, 1, 4) else hidden
    hidden = hidden.reshape(hidden.shape[0], -1)
    for kernel, bias in params["dense"][:-1]:
        hidden = jax.nn.relu(hidden @ kernel + bias)
    kernel, bias = params["dense"][-1]
    return hidden @ kernel + bias


def alexnet_problem(batch_size: int, num_classes: int) -> tuple[Objective, Any]:
    """AlexNet with 1024 features, 4.4 million parameters, on random images."""
    channels, features = (3, 64, 192, 384, 256, 256), (1024, 1024, 1024, num_classes)
    conv_shapes = [(3, 3, i, o) for i, o in itertools.pairwise(channels)]
    shapes = {"conv": conv_shapes, "dense": list(itertools.pairwise(features))}
    rng = np.random.default_rng(0)
    weights = {kind: [(he_normal(rng, s), jnp.zeros(s[-1])) for s in some] for kind, some in shapes.items()}
    return Objective(alexnet, cross_entropy, images_and_labels(rng, batch_size, 32, 3, num_classes)), weights


def small_cnn(params: Any, data: Any) -> jax.Array:
    """Two convolutions, two poolings, one dense layer."""
    hidden = max_pool(jax.nn.relu(convolve(data["image"], params["first"], 1)))
    hidden = max_pool(jax.nn.relu(convolve(hidden, params["second"], 1)))
    return hidden.reshape(hidden.shape[0], -1) @ params["dense"]


def small_cnn_problem(dtype: Any) -> tuple[Objective, Any]:
    """A ReLU network small enough for its dense Hessian, on random images."""
    rng = np.random.default_rng(0)
    shapes = {"first": (3, 3, 2, 6), "second": (3, 3, 6, 8), "dense": (32, 10)}
    params = {name: he_normal(rng, shape, dtype) for name, shape in shapes.items()}
    return Objective(small_cnn, cross_entropy, images_and_labels(rng, 64, 8, 2, 10, dtype)), params


def he_normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Weights that keep the scale of what passes through a ReLU."""
    return jnp.asarray(rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1])), dtype)


def images_and_labels(
    rng, batch_size: int, side: int, channels: int, num_classes: int, dtype: Any = jnp.float32
) -> Any:
    """Random images, random labels."""
    images, labels = rng.normal(size=(batch_size, side, side, channels)), rng.integers(0, num_classes, batch_size)
    return {"image": jnp.asarray(images, dtype), "label": jnp.asarray(labels)}
