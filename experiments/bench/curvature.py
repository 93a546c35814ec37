"""What exact curvature costs, in gradients of the same network, and how exact it is.

Every ratio is of two programs compiled apart and timed in turn in one process, so that a machine whose speed drifts
slows both; medians of the times are compared. `python -m experiments.bench.curvature` prints the table.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from curvax.exact import exact_diag, explain, ggn_diag, ggn_mc_diag
from curvax.objective import Objective

NUMBERS = ("NHWC", "HWIO", "NHWC")


class Row(NamedTuple):
    """A line of the table: what was measured, the bar it is measured against, and the raw figures."""

    what: str
    value: float
    bar: float
    detail: str


def rows(batch_size: int = 128, repeats: int = 5, classes: tuple[int, ...] = (10, 100)) -> list[Row]:
    """The table.

    Args:
        batch_size: examples in AlexNet's batch.
        repeats: timed calls of each program, of which the median counts.
        classes: numbers of classes; the time to compile is compared between the first and the last.

    Returns:
        One row for each figure.
    """
    costs = {c: exact_cost(batch_size, c, repeats) for c in classes}
    bars = {10: 6.0, 100: 40.0}
    table = [
        Row(f"exact diagonal / gradient, AlexNet, C = {c}", cost.ratio, bars.get(c, np.nan), cost.detail)
        for c, cost in costs.items()
    ]
    first, last = costs[classes[0]], costs[classes[-1]]
    what = f"compile, C = {classes[-1]} over C = {classes[0]}"
    detail = f"{last.compile_seconds:.1f} s over {first.compile_seconds:.1f} s"
    table.append(Row(what, last.compile_seconds / first.compile_seconds, 1.3, detail))
    estimate = estimate_cost(batch_size, repeats)
    table.append(Row("ggn_mc, one sample / gradient, AlexNet", estimate.ratio, 1.2, estimate.detail))
    return [*table, estimate_error(), product_share(), *dense_errors()]


class Cost(NamedTuple):
    """A program's time over the gradient's."""

    ratio: float
    compile_seconds: float
    detail: str


def exact_cost(batch_size: int, num_classes: int, repeats: int) -> Cost:
    """The exact diagonal, with value and gradient, against the gradient alone."""
    objective, params = alexnet_problem(batch_size, num_classes)
    return compare(lambda objective, params: exact_diag(objective, params), objective, params, repeats)


def estimate_cost(batch_size: int, repeats: int) -> Cost:
    """One sample of the Gauss-Newton diagonal against a gradient."""
    objective, params = alexnet_problem(batch_size, 10)
    sample = lambda objective, params: ggn_mc_diag(objective, params, jax.random.key(0))[2]
    return compare(sample, objective, params, repeats)


def compare(method: Callable, objective: Objective, params: Any, repeats: int) -> Cost:
    """Times `method(objective, params)` and a gradient in turn."""
    gradient, _ = compiled(lambda objective, params: jax.grad(objective)(params), objective, params)
    program, compile_seconds = compiled(method, objective, params)
    times = [(seconds(program, objective, params), seconds(gradient, objective, params)) for _ in range(repeats)]
    ours, theirs = map(statistics.median, zip(*times, strict=True))
    spread = sorted(a / b for a, b in times)
    return Cost(
        ours / theirs, compile_seconds, f"{ours:.3f} s / {theirs:.3f} s, runs {spread[0]:.2f} to {spread[-1]:.2f}"
    )


def compiled(method: Callable, *arguments: Any) -> tuple[Callable, float]:
    """The compiled program, warmed up, and the seconds it took to compile."""
    lowered = jax.jit(method).lower(*arguments)
    start = time.perf_counter()
    program = lowered.compile()
    took = time.perf_counter() - start
    jax.block_until_ready(program(*arguments))
    return program, took


def seconds(program: Callable, *arguments: Any) -> float:
    """The time of one call."""
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start


def estimate_error() -> Row:
    """The relative error of one random column on a small ReLU network, the mean over ten keys."""
    objective, params = small_cnn_problem(jnp.float32)
    exact = jax.jit(ggn_diag)(objective, params)[2]
    sample = jax.jit(lambda key: ggn_mc_diag(objective, params, key)[2])
    errors = [relative_error(sample(key), exact) for key in jax.random.split(jax.random.key(0), 10)]
    return Row("ggn_mc, one sample, relative error", float(np.mean(errors)), 0.48, f"up to {max(errors):.3f}")


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
    return Row("HVPs / parameters, GELU MLP", explanation.products / count, 0.05, f"{explanation.products} / {count}")


def dense_errors() -> list[Row]:
    """The small ReLU network's diagonal against its dense Hessian in float64."""
    with jax.enable_x64(True):
        objective, params = small_cnn_problem(jnp.float64)
        dense = jax.jit(lambda params: dense_diagonal(objective, params))(params)
        wide = relative_error(jax.jit(exact_diag)(objective, params)[2], dense)
    single = jax.jit(exact_diag)(*small_cnn_problem(jnp.float32))[2]
    narrow = relative_error(jax.tree.map(np.asarray, single), jax.tree.map(np.asarray, dense))
    return [
        Row("error against a dense float64 Hessian, float32", narrow, 1e-5, "small ReLU CNN"),
        Row("error against a dense float64 Hessian, float64", wide, 1e-10, "small ReLU CNN"),
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


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128, help="examples in AlexNet's batch")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; their median is reported")
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100], help="numbers of classes")
    arguments = parser.parse_args()
    table = rows(arguments.batch_size, arguments.repeats, tuple(arguments.classes))
    for row in table:
        verdict = "met" if row.value <= row.bar else "missed"
        print(f"{row.what:<50}  {row.value:>9.3g}  bar {row.bar:>7.3g}  {verdict:<6}  {row.detail}")


if __name__ == "__main__":
    main()
