"""How far an array may go in the layers of `"kernel"`.

A bias follows its kernel's radius and a norm's scale that of all kernels, whatever their own gradients are; and the
median of a gradient says nothing of its largest entries. So no array goes further, at a learning rate of 1, than a few
times what its kernel's parameters are large, in root mean square. LARS's radius takes a kernel once that far.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from curvax.order_statistics import population_size
from curvax.radii import AxisName, Leaves, Rule, Scalar, TreeRule, root_mean_square
from curvax.wide import Wide, cast, least, norm, product_of, quotient, select, times, wide

#: The longest step of an array, in multiples of its kernel's parameters, both in root mean square.
LONGEST = 3.0


class _Kernel(NamedTuple):
    """What others need to know of a kernel: its radius, and the root mean squares of w and g, over so many entries."""

    radius: Wide
    size: Wide
    slope: Wide
    count: int


def bounded(rule: Rule, trust_coefficient: Scalar, follow_all: bool, axis_name: AxisName) -> TreeRule:
    """A rule that also says what follows no kernel, and bounds what any array does.

    Formula:
      `min(R, 3 * trust_coefficient * rms(w) / rms(g))`, with w the parameters of the kernel that the array follows and
      g the array's gradient. What follows no kernel, and a kernel of zeros, follows all others together: `R^2 = sum_k
      R_k^2 norm2(g_k)^2 / sum_k norm2(g_k)^2`, which is LARS's radius of them all if each has LARS's; w is then that of
      all others, too. Where there are none the radius is 1, and at most `1 / rms(g)`.

    Args:
      rule: one radius for a layer, as `radii.lars` and others return it.
      trust_coefficient: the one that is inside this radius.
      follow_all: whether what has no kernel, or is one of zeros, has the radius of all others; else 1, bounded alike.
      axis_name: mesh axes (of `shard_map` or `pmap`) that split parameters.

    Returns:
      A rule for all layers.
    """

    def longest(size: Wide) -> Wide:
        return select(size.value == 0, wide(jnp.ones_like(size.value)), times(LONGEST, times(trust_coefficient, size)))

    def of_kernel(measured: Leaves) -> _Kernel:
        size, slope = (root_mean_square(x, axis_name) for x in (measured.w, measured.g))
        radius = _at_most(rule(measured, measured)[0], longest(size), slope)
        return _Kernel(radius, size, slope, population_size(measured.w, axis_name))

    def radii(layers: Sequence[tuple[Leaves, Leaves]], kernels: Leaves):
        del kernels
        own = [of_kernel(measured) if measured.w else None for measured, _ in layers]
        of_all = _together([kernel for kernel in own if kernel], follow_all)
        found = []
        for kernel, (_, scaled) in zip(own, layers, strict=True):
            radius, size = of_all
            if kernel is not None:
                dtype = kernel.size.value.dtype
                # NaN is not zero, and stays.
                radius, size = (
                    select(kernel.size.value == 0, cast(of_others, dtype), x)
                    for of_others, x in ((radius, kernel.radius), (size, kernel.size))
                )
            found.append([_at_most(radius, longest(size), root_mean_square([g], axis_name)) for g in scaled.g])
        return found

    return radii


def _together(kernels: Sequence[_Kernel], follow_all: bool) -> tuple[Wide, Wide]:
    """The radius of all kernels that are not zero, and their root mean square."""
    one = wide(jnp.ones((), jnp.float32))
    if not kernels:
        return one, wide(jnp.zeros((), jnp.float32))
    dtype = max((kernel.size.value.dtype for kernel in kernels), key=lambda dtype: dtype.itemsize)

    def column(name: str) -> Wide:
        parts = [cast(getattr(kernel, name), dtype) for kernel in kernels]
        return Wide(*(jnp.stack(x) for x in zip(*parts, strict=True)))

    radius, size, slope = map(column, ("radius", "size", "slope"))
    count = jnp.where(size.value == 0, 0, jnp.asarray([kernel.count for kernel in kernels], dtype))
    slope = times(jnp.sqrt(count), slope)
    steps, slopes, sizes = norm(product_of(radius, slope)), norm(slope), norm(times(jnp.sqrt(count), size))
    size = times(1 / jnp.sqrt(jnp.maximum(jnp.sum(count), 1)), sizes)
    if not follow_all:
        return cast(one, dtype), size
    is_known = slopes.value != 0
    radius = quotient(steps, Wide(jnp.where(is_known, slopes.value, 1), slopes.exponent))
    return select(is_known, radius, cast(one, dtype)), size


def _at_most(radius: Wide, step: Wide, slope: Wide) -> Wide:
    """The radius, or what takes a gradient of this size one step far, whichever is smaller."""
    radius, step = (cast(x, slope.value.dtype) for x in (radius, step))
    is_known = slope.value != 0
    bound = quotient(step, Wide(jnp.where(is_known, slope.value, 1), slope.exponent))
    return select(is_known, least(radius, bound), radius)
