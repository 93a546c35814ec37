"""Hutchinson's estimate with what a few products have learnt of the matrix taken out.

The products `Y = A W` with random signs span most of the range of a matrix whose spectrum decays. With an orthonormal
basis Q of that span, `diag(Q Q^T A)` is known exactly from the products `A Q`, and only the rest is left to chance. To
use the same probes for both would be biased; so probe i judges the basis of all the others, which differs from Q by one
direction `s_i`, and the mean is taken over i. Epperly, Tropp and Webber, "XTrace: making the most of every sample in
stochastic trace estimation" (SIAM J. Matrix Anal. Appl. 2024), section 1.4.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from curvax.curvature.estimate import UNROLLED, Estimate, Moments
from curvax.curvature.method import Method
from curvax.curvature.products import product_matrix, same_diagonal
from curvax.exact import Explanation, explain_products
from curvax.trees import at_least_float32
from curvax.wide import power_of_two, wide


@dataclasses.dataclass(frozen=True, repr=False)
class XDiag(Method):
    """Hutchinson's estimate of what a few products leave unknown of the Hessian (Epperly, Tropp and Webber 2024).

    Formula:
      `k = num_samples` probes, each judged by the others: `2 k` products, and memory for several copies of the
      parameters for each. Where the spectrum decays its error falls faster than Hutchinson's.

    Args:
      num_samples: how many probes.
      chunk_size: how many of them share a pass.
      micro_batches: into how many parts the batch is split.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import XDiag, hessian_diag
      >>> loss = lambda w: (w[0] + w[1] + w[2]) ** 2
      >>> hessian_diag(loss, jnp.ones(3), XDiag(num_samples=2), key=0).round(3).tolist()
      [2.0, 2.0, 2.0]
    """

    num_samples: int = 5

    name = "xdiag"
    stochastic = True

    def _estimate(self, objective: Any, params: Any, key: jax.Array) -> Estimate:
        wide = jax.tree.map(at_least_float32, params)
        flat, unflatten = ravel_pytree(wide)
        value, grad, multiply = same_diagonal(objective, params)

        def product(vector: jax.Array) -> jax.Array:
            tangent = jax.tree.map(lambda v, x: v.astype(x.dtype), unflatten(vector), params)
            return ravel_pytree(jax.tree.map(at_least_float32, multiply(tangent)))[0]

        def products(vectors: jax.Array) -> jax.Array:
            # As in `add_samples`: convolutions are slow in loops.
            if vectors.shape[1] <= UNROLLED:
                return jnp.stack([product(vector) for vector in vectors.T], 1)
            rows: jax.Array = jax.lax.map(product, vectors.T, batch_size=self.chunk_size or 1)
            return rows.T

        signs = jax.random.rademacher(key, (flat.size, self.num_samples), flat.dtype)
        estimates = _leave_one_out(signs, products)
        mean = jnp.mean(estimates, 1)
        off = estimates - mean[:, None]
        largest = jnp.max(jnp.abs(off), 1)
        relative = off / jnp.where(largest > 0, largest, 1)[:, None]
        moments = Moments(self.num_samples, mean, largest * jnp.linalg.norm(relative, axis=1))
        error = moments.standard_error()
        return Estimate(value, grad, unflatten(mean), None if error is None else unflatten(error))

    def _explain(self, objective: Any, params: Any) -> Explanation:
        matrix, why = product_matrix(objective, params)
        return explain_products(params, [2 * self.num_samples], f"probes, {matrix} products", why)


def _leave_one_out(signs: jax.Array, products: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """For each probe (column) the diagonal known by the basis of the others, and its own estimate of the rest."""
    images = products(signs)
    # By a power of two, which rounds nothing: squares of what is left are floats.
    largest = jnp.max(jnp.abs(images))
    scale = power_of_two(-wide(jnp.where(jnp.isfinite(largest), largest, 1)).exponent, images.dtype)
    images = images * scale
    basis, outside = _basis(images)
    of_basis = products(basis) * scale
    # Column i: the one direction of the basis that is only there because of probe i.
    lost, lost_image = basis @ outside, of_basis @ outside
    known = jnp.sum(basis * of_basis, 1)[:, None] - lost * lost_image
    coordinates = of_basis.T @ signs
    coordinates -= outside * jnp.sum(outside * coordinates, 0, keepdims=True)
    return (known + signs * (images - basis @ coordinates)) / scale


def _basis(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An orthonormal basis of the columns, `(n, k)`, and in it, for each column, the direction lost without it.

    Where the columns are dependent, the basis has columns of zeros, and a direction that others span is not lost. With
    `Y = U S V^T` and all k columns needed, that direction is `S^-1 V_i^T` up to its length.
    """
    orthogonal, triangle = jnp.linalg.qr(images)
    left, sizes, right = jnp.linalg.svd(triangle, full_matrices=False)
    rounding = max(images.shape) * jnp.finfo(images.dtype).eps
    there = sizes > rounding * sizes[0]
    basis = orthogonal @ jnp.where(there[None], left, 0)
    rows = jnp.where(there[:, None], right, 0)
    directions = rows / jnp.where(there, sizes, 1)[:, None]
    # A row of V has norm 1 if its column is needed for the rank, and less if the others span it.
    needed = jnp.sum(rows**2, 0, keepdims=True) > 1 - rounding**0.5
    lengths = jnp.linalg.norm(directions, axis=0, keepdims=True)
    return basis, jnp.where(needed, directions / jnp.where(lengths > 0, lengths, 1), 0)
