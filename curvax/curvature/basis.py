"""The diagonal by all unit vectors: exact for any function, at one Hessian-vector product per parameter."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.curvature.estimate import Estimate
from curvax.exact.derivatives import hessian_product
from curvax.exact.units import along_units


def basis(objective: Callable[[Any], jax.Array], params: Any, *, chunk_size: int | None = None) -> Estimate:
    """`e_i . H e_i` for every unit vector, `chunk_size` of them in a pass."""
    value, grad, product = hessian_product(objective, params)
    leaves, treedef = jax.tree.flatten(params)

    def diagonal(leaf: int):
        def entry(unit, index):
            vector = [unit if i == leaf else jnp.zeros_like(x) for i, x in enumerate(leaves)]
            return jax.tree.leaves(product(treedef.unflatten(vector)))[leaf].ravel()[index]

        return along_units(entry, leaves[leaf], chunk_size)

    diag = treedef.unflatten([diagonal(leaf) for leaf in range(len(leaves))])
    return Estimate(value, grad, diag, jax.tree.map(jnp.zeros_like, diag))
