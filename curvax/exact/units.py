"""Unit vectors: exact for any function, at one second derivative per parameter."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr

from curvax.curvature.estimate import diag_dtype
from curvax.varying import varying_like

# Directions at once, where the caller does not say.
CHUNK = 16


def second_derivatives(function: Callable[[jax.Array], jax.Array], x: jax.Array, chunk_size: int | None) -> jax.Array:
    """The Hessian diagonal of a scalar function of one array.

    Args:
        function: from an array like `x` to a scalar.
        x: where.
        chunk_size: directions at once.

    Returns:
        An array like `x`, at least float32.
    """
    return along_units(lambda direction: second_derivative(function, x, direction), x, chunk_size)


def along_units(function: Callable[[jax.Array], jax.Array], x: jax.Array, chunk_size: int | None) -> jax.Array:
    """`function` of each unit vector of the space of `x`, arranged like `x`."""
    dtype = diag_dtype(x.dtype)

    def at(index):
        direction = jax.nn.one_hot(index, x.size, dtype=x.dtype).reshape(x.shape)
        return function(varying_like(direction, x)).astype(dtype)

    if not x.size:
        return jnp.zeros(x.shape, dtype)
    return jax.lax.map(at, jnp.arange(x.size), batch_size=chunk_size or CHUNK).reshape(x.shape)


def second_derivative(function: Callable[[Any], jax.Array], x: Any, direction: Any) -> jax.Array:
    """The second derivative of a scalar function of a pytree along a direction.

    Forwards twice, so that of the gradient nothing is formed but its one entry.
    """
    if _only_in_reverse(function, x):
        product = jax.jvp(jax.grad(function), (x,), (direction,))[1]
        return optax.tree.vdot(product, direction)
    slope = lambda x: jax.jvp(function, (x,), (direction,))[1]
    return jax.jvp(slope, (x,), (direction,))[1]


def pushforward(function: Callable[[jax.Array], Any], x: jax.Array) -> Callable[[jax.Array], Any]:
    """The Jacobian of `function`, which returns a pytree, at `x`, times a direction."""
    if not _only_in_reverse(function, x):
        return lambda direction: jax.jvp(function, (x,), (direction,))[1]
    out, pull = jax.vjp(function, x)
    # Pulling back is linear: its own transpose pushes forward.
    zeros = jax.tree.map(jnp.zeros_like, out)
    return lambda direction: jax.vjp(lambda v: pull(v)[0], zeros)[1](direction)[0]


def _only_in_reverse(function, x) -> bool:
    """Whether a `custom_vjp`, which has no forward derivative, is anywhere inside."""
    return _has_custom_vjp(jax.make_jaxpr(function)(x).jaxpr)


def _has_custom_vjp(jaxpr: Jaxpr) -> bool:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith("custom_vjp"):
            return True
        inner = [item for value in eqn.params.values() for item in (value if isinstance(value, tuple) else (value,))]
        inner = [item.jaxpr if isinstance(item, ClosedJaxpr) else item for item in inner]
        if any(_has_custom_vjp(item) for item in inner if isinstance(item, Jaxpr)):
            return True
    return False
