"""A diagonal from random signs z: entry i of `z * A z` has `A_ii` for its mean, and the rest of row i for its noise."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from curvax.curvature.estimate import Estimate, add_samples, at_least_float32, no_samples
from curvax.curvature.products import same_diagonal


def hutchinson(
    objective: Callable[[Any], jax.Array],
    params: Any,
    key: jax.Array,
    *,
    num_samples: int = 1,
    chunk_size: int | None = None,
) -> Estimate:
    """The mean of `z * A z` over random signs z (Bekas et al. 2007), with a matrix A of the Hessian's diagonal."""
    value, grad, product = same_diagonal(objective, params)

    def sample(key):
        z = optax.tree.random_like(key, params, jax.random.rademacher)
        return jax.tree.map(lambda a, b: at_least_float32(a) * at_least_float32(b), z, product(z))

    moments = add_samples(sample, jax.random.split(key, num_samples), no_samples(params), chunk_size)
    return Estimate(value, grad, moments.mean, moments.standard_error())
