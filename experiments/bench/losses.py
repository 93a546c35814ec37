"""What `cblr` takes by default for the curvature of a loss, what that costs, and how near it comes.

One network of two hidden layers and thirteen losses. The estimate and the gradient are compiled apart, and timed in
turn; the error is that of one estimate, averaged over some keys, against the exact Gauss-Newton diagonal.
"""

import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from experiments.bench.measure import compiled, in_turns
from experiments.bench.table import Row, Say

KEYS = 5


def cross_entropy(z, d):
    return optax.softmax_cross_entropy_with_integer_labels(z, d["label"])


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
    """The table.

    Args:
        say: is told what is measured next.
        repeats: timed calls of each program, of which the median counts.
        quick: 8 examples in place of 512.

    Yields:
        One row for each loss: the time of one estimate over that of the gradient, what is taken, and its error.
    """
    data, params = problem(8 if quick else 512)
    for name, loss in LOSSES.items():
        say(name)
        yield row(name, curvax.Objective(network, loss, data), params, repeats)


def row(name: str, objective: curvax.Objective, params, repeats: int) -> Row:
    """The line of one loss."""
    estimate = functools.partial(curvax.hessian_diag, method=None)
    key = jax.random.key(0)
    programs = {
        "gradient": compiled(lambda o, p, key: jax.grad(o)(p), objective, params, key),
        "estimate": compiled(lambda o, p, key: estimate(o, p, key=key), objective, params, key),
    }
    calls = {label: functools.partial(program.call, objective, params, key) for label, program in programs.items()}
    times = in_turns(calls, repeats)
    truth = jax.jit(functools.partial(curvax.hessian_diag, method="ggn"))(objective, params)
    errors = [distance(programs["estimate"].call(objective, params, jax.random.key(i)), truth) for i in range(KEYS)]
    explanation = curvax.explain(objective, params, None)
    taken = explanation.method.partition(", chosen")[0]
    detail = f"{taken}, error {np.mean(errors):.2g}: {explanation.rows[0].reason}"
    return Row(name, times["estimate"] / times["gradient"], (), detail)


def problem(examples: int) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Random images and labels, and a network of He's initialisation for them."""
    rng, classes, sizes = np.random.default_rng(0), 10, (196, 64, 64, 10)
    data = {
        "x": rng.normal(size=(examples, sizes[0])),
        "target": rng.normal(size=(examples, classes)),
        "share": rng.dirichlet(np.ones(classes), examples),
        "weight": rng.normal(size=examples),
    }
    data = {name: jnp.asarray(x, jnp.float32) for name, x in data.items()}
    data |= {"label": jnp.asarray(rng.integers(0, classes, examples)), "kept": data["target"] > 0}
    pairs = itertools.pairwise(sizes)
    kernels = [jnp.asarray(rng.normal(size=(i, o)) * np.sqrt(2 / i), jnp.float32) for i, o in pairs]
    return data, {f"kernel_{i}": kernel for i, kernel in enumerate(kernels)}


def network(params, data):
    """Three dense layers with ReLUs between them."""
    hidden = jax.nn.relu(data["x"] @ params["kernel_0"])
    return jax.nn.relu(hidden @ params["kernel_1"]) @ params["kernel_2"]


def distance(found, truth) -> float:
    """The relative L2 error of a tree."""
    off = optax.tree.norm(jax.tree.map(jnp.subtract, found, truth))
    return float(off / optax.tree.norm(truth))
