"""The diagonal by all unit vectors: exact for any function, at one Hessian-vector product per parameter."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.curvature.estimate import Estimate, at_least_float32
from curvax.exact.derivatives import hessian_product

# Unit vectors in a pass, where the caller does not say.
CHUNK = 16


def basis(objective: Callable[[Any], jax.Array], params: Any, *, chunk_size: int | None = None) -> Estimate:
    """`e_i . H e_i` for every unit vector, `chunk_size` of them in a pass."""
    value, grad, product = hessian_product(objective, params)
    leaves, treedef = jax.tree.flatten(params)

    def entry(leaf: int, index):
        unit = [jnp.zeros_like(x) for x in leaves]
        unit[leaf] = unit[leaf].ravel().at[index].set(1).reshape(leaves[leaf].shape)
        return jax.tree.leaves(product(treedef.unflatten(unit)))[leaf].ravel()[index]

    def diagonal(leaf: int, x):
        entries = functools.partial(entry, leaf)
        return jax.lax.map(entries, jnp.arange(x.size), batch_size=chunk_size or CHUNK).reshape(x.shape)

    diag = treedef.unflatten([at_least_float32(diagonal(i, x)) for i, x in enumerate(leaves)])
    return Estimate(value, grad, diag, jax.tree.map(jnp.zeros_like, diag))
