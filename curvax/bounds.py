"""How far an array may go in the layers of `"kernel"`.

A bias follows its kernel's radius and a norm's scale that of all kernels, whatever their own gradients are; and the
median of a gradient says nothing of its largest entries. So no array goes further, at a learning rate of 1, than a few
times what its kernel's parameters are large, in root mean square. LARS's radius takes a kernel once that far.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from curvax.radii import AxisName, Leaves, Rule, Scalar, TreeRule, root_mean_square
from curvax.wide import Wide, cast, least, quotient, select, times, wide

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

    def longest(of_layer: Wide, of_all: Wide):
        size = select(of_layer.value > 0, of_layer, cast(of_all, of_layer.value.dtype))
        return select(size.value > 0, times(LONGEST, times(trust_coefficient, size)), wide(jnp.ones_like(size.value)))

    def radii(layers: Sequence[tuple[Leaves, Leaves]], kernels: Leaves):
        of_all = _size(kernels, axis_name)
        found = []
        for measured, scaled in layers:
            followed = measured if measured.w or not follow_all else kernels
            step = longest(_size(measured, axis_name), of_all)
            pairs = zip(rule(followed, scaled), scaled.g, strict=True)
            found.append([_at_most(radius, step, root_mean_square([g], axis_name)) for radius, g in pairs])
        return found

    return radii


def _at_most(radius: Wide, step: Wide, gradient: Wide) -> Wide:
    """The radius, or what takes a gradient of this size one step far, whichever is smaller."""
    radius, step = (cast(x, gradient.value.dtype) for x in (radius, step))
    is_known = gradient.value > 0
    bound = quotient(step, Wide(jnp.where(is_known, gradient.value, 1), gradient.exponent))
    return select(is_known, least(radius, bound), radius)


def _size(leaves: Leaves, axis_name: AxisName) -> Wide:
    """The root mean square of the parameters; 0 without any."""
    return root_mean_square(leaves.w, axis_name) if leaves.w else wide(jnp.zeros((), jnp.float32))
