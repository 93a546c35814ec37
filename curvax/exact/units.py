"""Unit vectors: exact for any function, at one second derivative per parameter."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from curvax.exact.trace import wide

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
    second = _second_in_reverse if _only_in_reverse(jax.make_jaxpr(function)(x).jaxpr) else _second
    return along_units(lambda direction: second(function, x, direction), x, chunk_size)


def along_units(function: Callable[[jax.Array], jax.Array], x: jax.Array, chunk_size: int | None) -> jax.Array:
    """`function` of each unit vector of the space of `x`, arranged like `x`."""
    dtype = wide(x.dtype)

    def at(index):
        return function(jax.nn.one_hot(index, x.size, dtype=x.dtype).reshape(x.shape)).astype(dtype)

    if not x.size:
        return jnp.zeros(x.shape, dtype)
    return jax.lax.map(at, jnp.arange(x.size), batch_size=chunk_size or CHUNK).reshape(x.shape)


def _second(function, x, direction):
    """Forwards twice: no gradient of the parameters is ever formed, only its one entry."""
    slope = lambda x: jax.jvp(function, (x,), (direction,))[1]
    return jax.jvp(slope, (x,), (direction,))[1]


def _second_in_reverse(function, x, direction):
    product = jax.jvp(jax.grad(function), (x,), (direction,))[1]
    return jnp.sum(product * direction)


def _only_in_reverse(jaxpr: Jaxpr) -> bool:
    """Whether a `custom_vjp`, which has no forward derivative, is anywhere inside."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith("custom_vjp"):
            return True
        inner = [item for value in eqn.params.values() for item in (value if isinstance(value, tuple) else (value,))]
        if any(_only_in_reverse(i.jaxpr if isinstance(i, ClosedJaxpr) else i) for i in inner if _is_jaxpr(i)):
            return True
    return False


def _is_jaxpr(value) -> bool:
    return isinstance(value, (Jaxpr, ClosedJaxpr))
