"""The same step under `jit` and what goes with it, for trees of a few fixed forms, so that little is compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import curvax
from tests.fuzz.trees.examples import needs_curvature
from tests.fuzz.trees.run import Broken, Ran, check_same, leaves, said


def compiled(ran: Ran) -> None:
    """The update of a compiled step is that of an eager one, to rounding."""
    example = ran.example
    function = _function(example.transformation, example.name, example.structure, example.detail)
    try:
        updates = function(ran.w, ran.g, ran.h)
    except Exception as error:
        raise Broken(said(error)) from error
    if example.detail == "derivative":
        # Adam's root has none at a gradient of zero.
        if example.name == "lamb":
            return
        if not all(np.isfinite(x).all() for x in leaves(updates)):
            raise Broken(f"the derivative of a step with respect to parameters and gradient is {updates}")
        return
    # Sums run in another order, and halves are rounded once instead of twice.
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in example.leaves)
    check_same(ran.updates, updates, 8 * eps, example.detail)


@functools.cache
def _function(transformation: str, name: str, structure: str, detail: str):
    """`(w, g, h) -> updates` of one step; the structure is only there to keep functions of other trees apart."""
    tx = eval(transformation, {"curvax": curvax})
    del structure

    def step(w, g, h, state):
        return tx.update(g, state, w, **({"hessian_diag": h} if needs_curvature(name) else {}))

    return _WAYS[detail](step, tx.init)


def _jit(step, init):
    return jax.jit(lambda w, g, h: step(w, g, h, init(w))[0])


def _vmap(step, init):
    """The second of two rows, both of the same numbers."""
    rows = jax.vmap(lambda w, g, h: step(w, g, h, init(w))[0])
    twice = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)
    return jax.jit(lambda *trees: jax.tree.map(lambda x: x[1], rows(*map(twice, trees))))


def _scan(step, init):
    """The first of two steps in a loop, whose state must not change its form."""

    def loop(w, g, h):
        def body(state, _):
            updates, state = step(w, g, h, state)
            return state, updates

        return jax.tree.map(lambda x: x[0], jax.lax.scan(body, init(w), None, 2)[1])

    return jax.jit(loop)


def _donate(step, init):
    """Gradients and state give up their memory."""
    donated = jax.jit(step, donate_argnums=(1, 3))
    copy = lambda tree: jax.tree.map(jnp.array, tree)
    return lambda w, g, h: donated(w, copy(g), h, copy(init(w)))[0]


def _mesh(step, init):
    """An explicit mesh of two devices, with every first axis that can be divided between them."""
    function = _jit(step, init)

    def on_mesh(*trees):
        explicit = jax.sharding.AxisType.Explicit
        mesh = jax.make_mesh((2,), ("x",), axis_types=(explicit,), devices=jax.devices()[:2])

        def place(x):
            spec = jax.P("x") if x.ndim and x.shape[0] and x.shape[0] % 2 == 0 else jax.P()
            return jax.device_put(x, jax.NamedSharding(mesh, spec))

        with jax.set_mesh(mesh):
            return function(*jax.tree.map(place, trees))

    return on_mesh


def _derivative(step, init):
    """Through a step, as meta-learning takes it."""

    def loss(w, g, h):
        updates, _ = step(w, g, h, init(w))
        moved = jax.tree.map(lambda x, u: (x + u).astype(jnp.float32), w, updates)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(moved))

    return jax.jit(jax.grad(loss, (0, 1)))


_WAYS = {"derivative": _derivative, "jit": _jit, "vmap": _vmap, "scan": _scan, "donate": _donate, "mesh": _mesh}
