"""A diagonal from random signs z: entry i of `z * A z` has `A_ii` for its mean, and the rest of row i for its noise."""

import dataclasses
from typing import Any

import jax
import optax

from curvax.curvature.estimate import Estimate, add_samples, no_samples
from curvax.curvature.method import Method
from curvax.curvature.products import product_matrix, same_diagonal
from curvax.exact import Explanation, explain_products
from curvax.trees import at_least_float32


@dataclasses.dataclass(frozen=True, repr=False)
class Hutchinson(Method):
    """The mean of `z * H z` over random signs z (Bekas et al. 2007), for any function.

    Formula:
      Unbiased; the standard error falls as `1 / sqrt(num_samples)`. Where the trace proves that the Gauss-Newton matrix
      has the same diagonal, as for a ReLU network, that matrix takes the place of H, at fewer operations.

    Args:
      num_samples: how many products are averaged.
      chunk_size: how many of them share a pass.
      micro_batches: into how many parts the batch is split.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import Hutchinson, hessian_diag
      >>> hessian_diag(lambda w: jnp.sum(w**3), jnp.array([1.0, 2.0]), Hutchinson(num_samples=4), key=0).tolist()
      [6.0, 12.0]
    """

    num_samples: int = 1

    name = "hutchinson"
    stochastic = True

    def _estimate(self, objective: Any, params: Any, key: jax.Array) -> Estimate:
        value, grad, product = same_diagonal(objective, params)

        def sample(key: jax.Array) -> Any:
            z = optax.tree.random_like(key, params, jax.random.rademacher)
            return jax.tree.map(lambda a, b: at_least_float32(a) * at_least_float32(b), z, product(z))

        keys = jax.random.split(key, self.num_samples)
        moments = add_samples(sample, keys, no_samples(params), self.chunk_size)
        return Estimate(value, grad, moments.mean, moments.standard_error())

    def _explain(self, objective: Any, params: Any) -> Explanation:
        matrix, why = product_matrix(objective, params)
        return explain_products(params, [self.num_samples], f"signs, {matrix} products", why)
