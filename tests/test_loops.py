"""Examples are told apart through loops and branches, or the batch is left whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import SymbolicZero

import curvax
from curvax.curvature.micro_batches import micro_batch
from curvax.exact.independence import example_axes
from curvax.exact.primitives import Axis

B, T, D, L = 4, 3, 2, 3
X = jax.random.normal(jax.random.key(0), (B, T, D))
PARAMS = {"w": jax.random.normal(jax.random.key(1), (L, D, D)), "v": jax.random.normal(jax.random.key(2), (D,))}
DATA = {"x": X, "mask": jnp.arange(T) < 2, "keys": jax.random.split(jax.random.key(3), L)}


def scanned(block):
    """A network whose blocks, from activations `(B, T, D)` and a kernel to activations, are scanned."""
    return lambda p, d: lax.scan(lambda h, w: (block(h, w), None), d["x"], p["w"])[0]


@jax.custom_jvp
def centred(h):
    """Whose derivative reads the whole batch, and whose value does not."""
    return jnp.tanh(h)


@centred.defjvp
def _(primals, tangents):
    (h,), (t,) = primals, tangents
    return centred(h), t * (1 - h**2) + 0 * jnp.mean(t)


def lstm(p, d):
    """Over time, with states of each example."""

    def cell(state, x):
        h, c = state
        c = jax.nn.sigmoid(x @ p["w"][0]) * c + jnp.tanh(h @ p["w"][1])
        return (jnp.tanh(c), c), c

    zeros = jnp.zeros((d["x"].shape[0], D))
    return jnp.moveaxis(lax.scan(cell, (zeros, zeros), jnp.moveaxis(d["x"], 1, 0), reverse=True)[1], 0, 1)


def repeated(p, d):
    return lax.fori_loop(0, 5, lambda i, h: jnp.sin(h @ p["w"][0]) + i.astype(h.dtype), d["x"])


def until(p, d):
    """A loop of as many steps for all, whose number no trace knows."""
    return lax.while_loop(lambda s: s[0] < p["v"][0], lambda s: (s[0] + 1, jnp.tanh(s[1])), (-2.0, d["x"]))[1]


def branched(p, d):
    return lax.cond(p["v"][0] > 0, lambda h: jnp.tanh(h), lambda h: h * h, d["x"])


PROVED = {
    "scanned layers": scanned(lambda h, w: jax.nn.gelu(h @ w)),
    "layers with rules of their own": scanned(lambda h, w: jax.nn.silu(jax.nn.relu(h @ w))),
    "rematerialised layers": scanned(jax.checkpoint(lambda h, w: jnp.tanh(h @ w))),
    "scanned attention": scanned(lambda h, w: jax.nn.softmax(h @ w @ h.mT) @ h),
    "a scan in a scan": scanned(lambda h, w: lax.scan(lambda c, r: (c + jnp.sin(h * r[None, None]), None), h, w)[0]),
    "a recurrence in time": lstm,
    "examples one by one": lambda p, d: lax.map(lambda h: jnp.tanh(h @ p["w"][0]), d["x"]),
    "a loop with a number of steps": repeated,
    "a loop until parameters say": until,
    "a branch by parameters": branched,
}


def objective(predict):
    return curvax.Objective(predict, lambda z, d: jnp.sum(z**2, (1, 2)), DATA)


@pytest.mark.parametrize("name", PROVED)
def test_proved(name):
    """What is proved is true: the losses of a part are those of its examples, and so are their derivatives."""
    predict = PROVED[name]
    axes = example_axes(objective(predict), PARAMS, 2)
    assert axes == [None, None, Axis(0)]
    half = micro_batch(DATA, axes, 2, 1)
    losses = lambda p, d: jnp.sum(predict(p, d) ** 2, (1, 2))
    np.testing.assert_allclose(losses(PARAMS, half), losses(PARAMS, DATA)[1::2], rtol=1e-6)
    slopes = lambda d, v: jax.jvp(lambda x: losses(PARAMS, d | {"x": x}), (d["x"],), (v,))[1]
    direction = jnp.cos(X)
    np.testing.assert_allclose(slopes(half, direction[1::2]), slopes(DATA, direction)[1::2], rtol=1e-5)


def running(p, d):
    """From example to example."""
    return lax.scan(lambda c, x: (c + x, c * x), jnp.zeros((T, D)), d["x"])[1]


COUPLED = {
    "a mean over the batch in a layer": scanned(lambda h, w: h @ w - jnp.mean(h, 0, keepdims=True)),
    "a derivative that is one": scanned(lambda h, w: centred(h @ w)),
    "a carry that mixes": lambda p, d: d["x"] * lax.scan(lambda c, w: (c + jnp.sum(d["x"] @ w), None), 0.0, p["w"])[0],
    "a running sum": running,
    "weights by place": lambda p, d: (
        d["x"] * lax.scan(lambda c, _: (c / 2, c), 1.0, None, length=d["x"].shape[0])[1][:, None, None]
    ),
    "as many steps as examples": lambda p, d: (
        d["x"] * lax.scan(lambda c, _: (c / 2, None), 1.0, None, length=d["x"].shape[0])[0]
    ),
    "places counted in a layer": scanned(lambda h, w: h @ w * jnp.arange(h.shape[0], dtype=h.dtype)[:, None, None]),
    "noise in a layer": lambda p, d: lax.scan(
        lambda h, k: (h + jax.random.normal(k, h.shape), None), d["x"], d["keys"]
    )[0],
    "steps until the batch says": lambda p, d: lax.while_loop(
        lambda h: jnp.sum(h**2) > 1, lambda h: h / 2, d["x"] * p["v"][0]
    ),
    "a branch by the batch": lambda p, d: lax.cond(jnp.sum(d["x"]) > 0, jnp.tanh, jnp.sin, d["x"]),
    "turned around": lambda p, d: lax.scan(lambda h, w: (h[::-1] @ w, None), d["x"], p["w"])[0],
}


TABLE = jax.random.normal(jax.random.key(7), (2 * B, T, D))
number_of = lambda d: d["x"].shape[0]
size = lambda d: float(d["x"].shape[0])
keys_of = lambda d, number: jax.random.split(jax.random.key(9), number)
first = lambda p, d: d["x"] @ p["w"][0]


@jax.custom_jvp
def with_symbolic_zeros(w, h):
    return h * w[0]


def _of_data(primals, tangents):
    """A rule that reads the whole batch where the batch is not differentiated."""
    (w, h), (t, still) = primals, tangents
    return h * w[0], jnp.mean(h) * t[0] * jnp.ones_like(h) if isinstance(still, SymbolicZero) else h * t[0]


with_symbolic_zeros.defjvp(_of_data, symbolic_zeros=True)
COUPLED |= {
    "keys for each example": lambda p, d: lax.map(
        lambda a: a[0] @ p["w"][0] + jax.random.normal(a[1], (T, D)), (d["x"], keys_of(d, number_of(d)))
    ),
    "as many keys of a fixed number": lambda p, d: (
        first(p, d) + jax.vmap(lambda k: jax.random.normal(k, (T, D)))(keys_of(d, 2 * B)[: number_of(d)])
    ),
    "a table cut to the batch": lambda p, d: first(p, d) * TABLE[: number_of(d)],
    "a table cut in a layer": scanned(lambda h, w: h @ w * TABLE[: h.shape[0]]),
    "a table cut from somewhere": lambda p, d: first(p, d) * lax.dynamic_slice_in_dim(TABLE, 1, number_of(d)),
    "a table split": lambda p, d: first(p, d) * jnp.split(TABLE, [number_of(d)])[0],
    "a table over which a map runs": lambda p, d: lax.map(lambda a: a[0] * a[1], (d["x"], TABLE[: number_of(d)])),
    "a row overwritten": lambda p, d: first(p, d).at[0].set(0.0),
    "a row added to": lambda p, d: first(p, d).at[0].add(p["v"]),
    "a row updated": lambda p, d: lax.dynamic_update_slice(first(p, d), jnp.ones((1, T, D)), (0, 0, 0)),
    "a row overwritten in a layer": scanned(lambda h, w: (h @ w).at[0].set(0.0)),
    "its size from a branch": lambda p, d: first(p, d) * lax.cond(p["v"][0] > 0, lambda: size(d), lambda: size(d) + 1),
    "its size from a scan": lambda p, d: first(p, d) * lax.scan(lambda c, w: (c, size(d)), 0.0, p["w"])[1][0],
    "its size carried": lambda p, d: first(p, d) * lax.scan(lambda c, w: (size(d), None), 0.0, p["w"])[0],
    "other parameters for a small batch": lambda p, d: d["x"] @ (p["w"][0] if size(d) > B / 2 else p["w"][1]),
    "another order for a small batch": lambda p, d: d["x"] * (p["v"] - 2 if size(d) > B / 2 else 2 - p["v"]),
    "a rule with symbolic zeros": lambda p, d: with_symbolic_zeros(p["v"], d["x"]),
    "two places": lambda p, d: first(p, d) * TABLE[jnp.arange(number_of(d)), jnp.arange(number_of(d)) % T][:, None],
    "what Python computes": lambda p, d: (
        first(p, d) * jax.pure_callback(functools.partial(np.float32, size(d)), jax.ShapeDtypeStruct((), jnp.float32))
    ),
    "steps of each example": lambda p, d: jax.vmap(
        lambda h: lax.while_loop(lambda s: jnp.sum(s**2) > 0.1, lambda s: s / 2, h)
    )(first(p, d)),
}


@pytest.mark.parametrize("name", COUPLED)
def test_not_proved(name):
    """With rows and columns promoted as users have them: what is written is to be refused for what it does."""
    with jax.numpy_rank_promotion("allow"):
        assert isinstance(example_axes(objective(COUPLED[name]), PARAMS, 2), str)


def test_the_estimate_of_a_scanned_network_is_that_of_its_layers_written_out():
    def written_out(p, d):
        h = d["x"]
        for w in p["w"]:
            h = jax.nn.relu(h @ w)
        return h

    scan = scanned(lambda h, w: jax.nn.relu(h @ w))
    found, wanted = (curvax.hessian_diag(objective(f), PARAMS, "ggn") for f in (scan, written_out))
    np.testing.assert_allclose(found["w"], wanted["w"], rtol=1e-4, atol=1e-6)
