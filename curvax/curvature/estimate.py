"""What a method returns: an estimate of the diagonal of a Hessian, and the mean of many."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax.trees import at_least_float32

# Chunks of samples up to which a loop is written out.
UNROLLED = 8


class Estimate(NamedTuple):
    """The diagonal of the Hessian of a loss, and what comes with it at no further cost.

    Attributes:
      value: the loss, penalty included.
      grad: its gradient, a tree like the parameters.
      diag: the diagonal of its Hessian, a tree like the parameters, float32 (float64 for float64 parameters).
      standard_error: of each entry of `diag`; zeros where that is exact, `None` where one sample cannot tell.
      aux: the other output of an objective with `has_aux`, else `None`.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import value_grad_and_hessian_diag
      >>> estimate = value_grad_and_hessian_diag(lambda w: jnp.sum(w**3), jnp.array([1.0, 2.0]))
      >>> float(estimate.value), estimate.grad.tolist(), estimate.diag.tolist()
      (9.0, [3.0, 12.0], [6.0, 12.0])
    """

    value: jax.Array
    grad: Any
    diag: Any
    standard_error: Any = None
    aux: Any = None


class Moments(NamedTuple):
    """The samples seen so far, by Welford's recurrence: their number, mean, and the norm of deviations from it.

    The squares of these need not be floats.
    """

    number: int
    mean: Any
    deviations: Any

    def standard_error(self) -> Any:
        """Of the mean; None for fewer than two samples."""
        if self.number < 2:
            return None
        return jax.tree.map(lambda d: d / np.sqrt((self.number - 1) * self.number).astype(d.dtype), self.deviations)


def no_samples(params: Any) -> Moments:
    """Where sampling begins, for diagonals of `params`."""
    zeros = jax.tree.map(lambda x: jnp.zeros_like(at_least_float32(x)), params)
    return Moments(0, zeros, zeros)


def add_samples(
    sample: Callable[[jax.Array], Any], keys: jax.Array, moments: Moments, chunk_size: int | None = None
) -> Moments:
    """Adds `sample(key)` for every key, `chunk_size` (by default one) of them in a pass."""

    def add(carry: Any, step: tuple[Any, jax.Array]) -> tuple[Any, None]:
        drawn, number = step
        mean, deviations = carry
        off = jax.tree.map(jnp.subtract, drawn, mean)
        new_mean = jax.tree.map(lambda m, d: m + d / number.astype(d.dtype), mean, off)
        share = jnp.sqrt((number - 1) / number)
        return (new_mean, jax.tree.map(lambda v, d: jnp.hypot(v, share.astype(d.dtype) * d), deviations, off)), None

    def add_chunk(carry: Any, step: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        some, numbers = step
        if len(numbers) > 1:
            return jax.lax.scan(add, carry, (jax.vmap(sample)(some), numbers))
        return add(carry, (sample(some[0]), numbers[0]))

    count, size = len(keys), min(chunk_size or 1, len(keys))
    numbers = jnp.arange(moments.number + 1, moments.number + count + 1, dtype=jnp.float32)
    chunks, whole = count // size, count - count % size
    steps = jax.tree.map(lambda x: x[:whole].reshape(chunks, size), (keys, numbers))
    carry = moments[1:]
    # XLA on CPU runs convolutions inside a loop many times slower, so that a few chunks are better unrolled. `scan`
    # itself does not: it keeps a loop of one trip for a single chunk.
    if chunks <= UNROLLED:
        for step in zip(*steps, strict=True):
            carry, _ = add_chunk(carry, step)
    else:
        carry, _ = jax.lax.scan(add_chunk, carry, steps)
    if whole < count:
        carry, _ = add_chunk(carry, (keys[whole:], numbers[whole:]))
    return Moments(moments.number + count, *carry)
