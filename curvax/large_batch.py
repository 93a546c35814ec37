"""Tools for large batches: training on the examples that still have something to teach.

The gradient of a large batch is small because those of its examples cancel (Gao & Zhong, eq. 4). Section 3.1 of the
paper enlarges it by leaving out the examples whose loss is small. That is a matter of weights: each example's loss is
multiplied by one, and the mean is taken as ever, so a selection needs no ragged batch and no change to the training
loop.
"""

from typing import Any

import jax
import jax.numpy as jnp

from curvax import order_statistics
from curvax.checks import check_number
from curvax.keys import Key, as_key
from curvax.varying import AxisName


def discard_small_losses(losses: jax.Array, fraction: jax.typing.ArrayLike, *, axis_name: AxisName = None) -> jax.Array:
    """Weights that leave out the examples with the smallest losses.

    Formula:
      `B / (B - k)` for the `B - k` largest of `B` losses and 0 for the `k = floor(fraction * B)` smallest; Gao & Zhong,
      section 3.1. The weights average 1, so that `mean(weights * losses)` is the mean over those that are kept. Of
      losses that tie at the border, those of the later examples are kept.

    Args:
      losses: one loss per example, `(B,)`.
      fraction: how many to leave out, in [0, 1); it may be traced, so that a schedule can end the discarding. 0 changes
        nothing, bit for bit.
      axis_name: mesh axes (of `shard_map` or `pmap`) that split the examples: the smallest of all are left out, not
        those of each device. Under `jit` a sharded vector needs none.

    Returns:
      Weights `(B,)` of the dtype of `losses`, float32 for integers, through which no gradient flows. Where a loss is
      NaN all of them are 0, and the weighted mean is NaN.

    Raises:
      ValueError: if `losses` is no vector, or `fraction` a number outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import discard_small_losses
      >>> discard_small_losses(jnp.array([0.1, 2.0, 0.5, 3.0]), 0.5).tolist()
      [0.0, 2.0, 0.0, 2.0]
    """
    _check(losses, fraction)
    losses = jax.lax.stop_gradient(losses)
    own = jax.typeof(losses).sharding
    # Explicit axes want to be asked before a sort along them.
    everything = jax.sharding.reshard(losses, jax.sharding.PartitionSpec()) if own.mesh.explicit_axes else losses
    everything = everything if axis_name is None else jax.lax.all_gather(losses, axis_name, tiled=True)
    size = everything.size
    discarded = jnp.asarray(order_statistics.count_of(fraction, size), jnp.int32)
    # Losses may be negative, which the order statistics of magnitudes are not for. A batch is quickly sorted.
    ranks = jnp.argsort(jnp.argsort(everything))
    if axis_name is not None:
        first = jax.lax.axis_index(axis_name) * losses.size
        ranks = jax.lax.dynamic_slice_in_dim(ranks, first, losses.size)
    ranks = jax.sharding.reshard(ranks, own) if own.mesh.explicit_axes else ranks
    kept = (ranks >= discarded) & ~jnp.any(jnp.isnan(everything))
    return jnp.where(kept, size / (size - discarded), 0).astype(_weights_dtype(losses))


def discard_random_losses(
    key: Key, losses: jax.Array, fraction: jax.typing.ArrayLike, *, axis_name: AxisName = None
) -> jax.Array:
    """Weights that leave out as many examples as `discard_small_losses` does, whatever their loss.

    Formula:
      That of `discard_small_losses` on random numbers: the control which tells the effect of choosing small losses from
      that of a smaller batch.

    Args:
      key: a seed or a `jax.random.key`, the same on all devices.
      losses: one loss per example, `(B,)`; only their number and dtype matter.
      fraction: how many to leave out, in [0, 1).
      axis_name: mesh axes that split the examples; each device then draws numbers of its own.

    Returns:
      Weights `(B,)` that average 1.

    Raises:
      ValueError: as `discard_small_losses`.

    Example:
      >>> import jax
      >>> from curvax import discard_random_losses
      >>> weights = discard_random_losses(jax.random.key(0), jax.numpy.zeros(8), 0.25)
      >>> int((weights == 0).sum()), float(weights.mean())
      (2, 1.0)
    """
    _check(losses, fraction)
    key = as_key(key)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    weights = discard_small_losses(jax.random.uniform(key, losses.shape), fraction, axis_name=axis_name)
    return weights.astype(_weights_dtype(losses))


def _weights_dtype(losses: jax.Array) -> Any:
    """That of the losses; integers have none for weights."""
    return losses.dtype if jnp.issubdtype(losses.dtype, jnp.floating) else jnp.float32


def _check(losses: jax.Array, fraction: jax.typing.ArrayLike) -> None:
    if getattr(losses, "ndim", None) != 1:
        said = f"have the shape {losses.shape}" if hasattr(losses, "shape") else f"are a {type(losses).__name__}"
        raise ValueError(f"losses {said}; pass one loss per example, an array (B,).")
    real = jnp.issubdtype(losses.dtype, jnp.floating) or jnp.issubdtype(losses.dtype, jnp.integer)
    if not real:
        raise ValueError(f"losses are {losses.dtype}, which have no order; pass real numbers.")
    check_number("fraction", fraction, "[0, 1)")
