"""How far an array may go in the layers of `"kernel"`.

A bias follows its kernel's radius and a norm's scale that of all kernels, whatever their own gradients are; and the
median of a gradient says nothing of its largest entries. So no array goes further, at a learning rate of 1, than a few
times what its kernel's parameters are large, in root mean square. LARS's radius takes a kernel once that far.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from curvax.order_statistics import population_size
from curvax.radii import Arrays, AxisName, Leaves, Rule, Scalar, TreeRule, norm

#: The longest step of an array, in multiples of its kernel's parameters, both in root mean square.
LONGEST = 3.0


def bounded(rule: Rule, trust_coefficient: Scalar, follow_all: bool, axis_name: AxisName) -> TreeRule:
    """A rule that also says what follows no kernel, and bounds what any array does.

    Formula:
      `min(R, 3 * trust_coefficient * rms(w) / rms(g))`, with w the parameters of the kernel that the array follows and
      g the array's gradient. What follows no kernel follows all kernels together. Where w is zero it is that of all
      kernels, too; where these are zero, or there are none, the radius is at most `1 / rms(g)`.

    Args:
      rule: one radius for a layer, 1 if nothing is measured: `radii.lars` and others.
      trust_coefficient: the one that is inside this radius.
      follow_all: whether what follows no kernel has the radius of all kernels together; else 1, and the same bound.
      axis_name: mesh axes (of `shard_map` or `pmap`) that split parameters.

    Returns:
      A rule for all layers.
    """

    def longest(of_layer: jax.Array, of_all: jax.Array):
        size = jnp.where(of_layer > 0, of_layer, of_all.astype(of_layer.dtype))
        return jnp.where(size > 0, jnp.asarray(LONGEST * trust_coefficient, size.dtype) * size, 1)

    def radii(layers: Sequence[tuple[Leaves, Leaves]], kernels: Leaves):
        of_all = _root_mean_square(kernels.w, axis_name)
        found = []
        for measured, scaled in layers:
            followed = measured if measured.w or not follow_all else kernels
            step = longest(_root_mean_square(measured.w, axis_name), of_all)
            pairs = zip(rule(followed, scaled), scaled.g, strict=True)
            found.append([_at_most(radius, step, _root_mean_square([g], axis_name)) for radius, g in pairs])
        return found

    return radii


def _at_most(radius: jax.Array, step: jax.Array, gradient: jax.Array) -> jax.Array:
    """The radius, or what takes a gradient of this size one step far, whichever is smaller."""
    is_known = gradient > 0
    bound = step.astype(gradient.dtype) / jnp.where(is_known, gradient, 1)
    return jnp.where(is_known, jnp.minimum(radius.astype(gradient.dtype), bound), radius.astype(gradient.dtype))


def _root_mean_square(x: Arrays, axis_name: AxisName) -> jax.Array:
    if not x:
        return jnp.zeros((), jnp.float32)
    size = population_size(x, axis_name)
    total = norm(x, axis_name)
    return total / jnp.sqrt(jnp.asarray(max(size, 1), total.dtype))
