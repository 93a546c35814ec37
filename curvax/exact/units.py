"""Unit vectors: exact for any function, at one Hessian-vector product per parameter."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.exact.derivatives import hessian_product
from curvax.trees import diag_dtype
from curvax.varying import varying_like

# Unit vectors at once, where the caller does not say.
CHUNK = 16


def function_diag(
    function: Callable[[Any], jax.Array], params: Any, chunk_size: int | None = None
) -> tuple[jax.Array, Any, Any]:
    """The value, the gradient and the Hessian diagonal of a scalar function of a tree: `e_i . H e_i` for every i."""
    value, grad, product = hessian_product(function, params)
    leaves, treedef = jax.tree.flatten(params)

    def diagonal(leaf: int):
        def entry(unit, index):
            vector = [unit if i == leaf else jnp.zeros_like(x) for i, x in enumerate(leaves)]
            return jax.tree.leaves(product(treedef.unflatten(vector)))[leaf].ravel()[index]

        return along_units(entry, leaves[leaf], chunk_size)

    return value, grad, treedef.unflatten([diagonal(leaf) for leaf in range(len(leaves))])


def second_derivatives(function: Callable[[jax.Array], jax.Array], x: jax.Array, chunk_size: int | None) -> jax.Array:
    """The Hessian diagonal of a scalar function of one array.

    Args:
        function: from an array like `x` to a scalar.
        x: where.
        chunk_size: unit vectors at once.

    Returns:
        An array like `x`, at least float32.
    """
    product = hessian_product(function, x)[2]
    return along_units(lambda unit, index: product(unit).ravel()[index], x, chunk_size)


def along_units(
    function: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, chunk_size: int | None
) -> jax.Array:
    """`function(unit, index)` of each unit vector of the space of `x` and its index, arranged like `x`."""
    dtype = diag_dtype(x.dtype)

    def at(index):
        unit = jax.nn.one_hot(index, x.size, dtype=x.dtype).reshape(x.shape)
        return function(varying_like(unit, x), index).astype(dtype)

    if not x.size:
        return jnp.zeros(x.shape, dtype)
    return jax.lax.map(at, jnp.arange(x.size), batch_size=chunk_size or CHUNK).reshape(x.shape)
