"""What `cblr` takes by default for the curvature of a loss, what that costs, and how near it comes.

One network of two hidden layers and thirteen losses. The estimate and the gradient are compiled apart, and timed in
turn; the error is that of one estimate, averaged over some keys, against the exact Gauss-Newton diagonal.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from experiments.bench.curvature import gradient, relative_error
from experiments.bench.measure import Row, Say, ratio, timed
from experiments.step import cross_entropy

KEYS = 5
LOSSES: dict[str, Callable] = {
    "softmax cross-entropy": cross_entropy,
    "smooth labels, temperature 2": lambda z, d: optax.softmax_cross_entropy(z / 2, d["share"]),
    "advantages of either sign": lambda z, d: d["weight"] * cross_entropy(z, d),
    "two tasks": lambda z, d: cross_entropy(z, d) + jnp.mean((z - d["target"]) ** 2, -1),
    "squared": lambda z, d: jnp.mean((z - d["target"]) ** 2, -1),
    "masked squares": lambda z, d: jnp.sum(jnp.where(d["kept"], (z - d["target"]) ** 2, 0), -1),
    "binary cross-entropy": lambda z, d: jnp.sum(optax.sigmoid_binary_cross_entropy(z, d["share"]), -1),
    "Poisson": lambda z, d: jnp.sum(jnp.exp(z) - d["share"] * z, -1),
    "Huber": lambda z, d: jnp.sum(optax.huber_loss(z, d["target"]), -1),
    "z-loss": lambda z, d: cross_entropy(z, d) + 1e-2 * jax.nn.logsumexp(z, -1) ** 2,
    "focal": lambda z, d: (1 - jnp.exp(-cross_entropy(z, d))) ** 2 * cross_entropy(z, d),
    "cosine distance": lambda z, d: optax.cosine_distance(z, d["target"]),
    "contrast over the batch": lambda z, d: optax.softmax_cross_entropy_with_integer_labels(
        z @ d["target"].T, jnp.arange(z.shape[0])
    ),
}


def rows(say: Say, repeats: int, quick: bool) -> Iterator[Row]:
    """One row for each loss: the time of one estimate over that of the gradient, what is taken, and its error."""
    data, params = problem(8 if quick else 512)
    estimate = lambda objective, params, key: curvax.hessian_diag(objective, params, method=None, key=key)
    for name, loss in LOSSES.items():
        say(name)
        objective = curvax.Objective(network, loss, data)
        arguments = objective, params, jax.random.key(0)
        calls, times, _ = timed({"gradient": (gradient, *arguments), "estimate": (estimate, *arguments)}, repeats)
        truth = jax.jit(functools.partial(curvax.hessian_diag, method="ggn"))(objective, params)
        program = calls["estimate"].func
        errors = [relative_error(program(objective, params, jax.random.key(i)), truth) for i in range(KEYS)]
        explanation = curvax.explain(objective, params, None)
        taken = explanation.method.partition(", chosen")[0]
        detail = f"{taken}, error {np.mean(errors):.2g}: {explanation.rows[0].reason}"
        yield ratio(name, times["estimate"], times["gradient"])._replace(detail=detail)


def problem(examples: int) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Random images and labels, and kernels of He's initialisation."""
    rng, classes, sizes = np.random.default_rng(0), 10, (196, 64, 64, 10)
    data = {
        "x": rng.normal(size=(examples, sizes[0])),
        "target": rng.normal(size=(examples, classes)),
        "share": rng.dirichlet(np.ones(classes), examples),
        "weight": rng.normal(size=examples),
    }
    data = {name: jnp.asarray(x, jnp.float32) for name, x in data.items()}
    data |= {"labels": jnp.asarray(rng.integers(0, classes, examples)), "kept": data["target"] > 0}
    kernels = [rng.normal(size=(i, o)) * np.sqrt(2 / i) for i, o in itertools.pairwise(sizes)]
    return data, {f"kernel_{i}": jnp.asarray(kernel, jnp.float32) for i, kernel in enumerate(kernels)}


def network(params: Any, data: Any) -> jax.Array:
    """Three dense layers with ReLUs between them."""
    hidden = jax.nn.relu(data["x"] @ params["kernel_0"])
    return jax.nn.relu(hidden @ params["kernel_1"]) @ params["kernel_2"]
