"""How far an array may go in the layers of `"kernel"`: neither too far, nor hardly at all.

A bias follows its kernel's radius and a norm's scale that of all kernels, whatever their own gradients are; and the
median of a gradient says nothing of its largest entries. So no array goes further, at a learning rate of 1, than a few
times what its kernel's parameters are large, in root mean square. LARS's radius takes a kernel once that far.

And a step in proportion to a kernel that is nearly zero beside the others, as heads of fine-tuned networks begin, would
leave it there: it takes steps as if it were larger.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax.order_statistics import population_size
from curvax.radii import Arrays, AxisName, Leaves, Rule, Scalar, TreeRule, root_mean_square
from curvax.wide import Wide, cast, least, norm, product_of, quotient, select, times, to_float, wide

#: The longest step of an array, in multiples of its kernel's parameters, both in root mean square.
LONGEST = 3.0
#: A kernel counts for no smaller than this part of what all kernels are large, in root mean square.
SMALLEST = 0.1


class _Kernel(NamedTuple):
    """What others need to know of a kernel.

    Attributes:
      radius: once it is known.
      size: the root mean square of the parameters that move, as of all, the others being taken for zeros.
      slope: that of the gradient.
      moving: how many entries have a gradient.
      count: how many there are.
    """

    radius: Wide | None
    size: Wide
    slope: Wide
    moving: jax.Array
    count: int


def bounded(rule: Rule, trust_coefficient: Scalar, follow_all: bool, axis_name: AxisName) -> TreeRule:
    """A rule that also says what follows no kernel, and bounds what any array does.

    Formula:
      `min(R, 3 * trust_coefficient * rms(w) / rms(g))`, with w the parameters of the kernel that the array follows and
      g the array's gradient. A kernel whose `rms(w)` is below a tenth of that of all kernels together has LARS's
      radius with this tenth in its place. What follows no kernel follows all together: `R^2 = sum_k R_k^2 norm2(g_k)^2
      / sum_k norm2(g_k)^2`, which is LARS's radius of them all if each has LARS's; w is then that of all, too. Where
      there are none, or only zeros, the radius is 1, and at most `1 / rms(g)`. Entries without a gradient do not count.

    Args:
      rule: one radius for a layer, as `radii.lars` and others return it.
      trust_coefficient: the one that is inside this radius.
      follow_all: whether what has no kernel has the radius of all together; else 1, bounded alike, and so has a kernel
        of zeros: for updates that are steps already, such as Newton's.
      axis_name: mesh axes (of `shard_map` or `pmap`) that split parameters.

    Returns:
      A rule for all layers.
    """

    def longest(size: Wide) -> Wide:
        return select(size.value == 0, wide(jnp.ones_like(size.value)), times(LONGEST, times(trust_coefficient, size)))

    def measure(measured: Leaves) -> _Kernel:
        size, slope = (root_mean_square(x, axis_name) for x in (measured.w, measured.g))
        return _Kernel(None, size, slope, _moving(measured.g, axis_name), population_size(measured.w, axis_name))

    def with_radius(kernel: _Kernel, measured: Leaves, of_all: Wide) -> _Kernel:
        size, slope = kernel.size, kernel.slope
        share = jnp.sqrt(kernel.moving.astype(size.value.dtype) / max(kernel.count, 1))
        least_size = times(SMALLEST * share, cast(of_all, size.value.dtype))
        is_small = to_float(quotient(size, _or_one(least_size))) < 1
        is_small &= (least_size.value != 0) & (slope.value != 0)
        if not follow_all:
            is_small &= size.value != 0
        size = select(is_small, least_size, size)
        radius = select(is_small, times(trust_coefficient, quotient(size, _or_one(slope))), rule(measured, measured)[0])
        return kernel._replace(radius=_at_most(radius, longest(size), slope), size=size)

    def radii(layers: Sequence[tuple[Leaves, Leaves]], kernels: Leaves):
        del kernels
        own = [measure(measured) if measured.w else None for measured, _ in layers]
        of_all = _size_of([kernel for kernel in own if kernel], "moving")
        own = [kernel and with_radius(kernel, layers[i][0], of_all) for i, kernel in enumerate(own)]
        radius_of_all, size_of_all = _together([kernel for kernel in own if kernel], follow_all)
        found = []
        for kernel, (_, scaled) in zip(own, layers, strict=True):
            radius, size = radius_of_all, size_of_all
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


def _moving(g: Arrays, axis_name: AxisName) -> jax.Array:
    """How many entries have a gradient."""
    total = sum(jnp.sum(x != 0, dtype=jnp.float32) for x in g)
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def _together(kernels: Sequence[_Kernel], follow_all: bool) -> tuple[Wide, Wide]:
    """The radius of all kernels that are not zero, and their root mean square."""
    size = _size_of(kernels, "count")
    if not kernels or not follow_all:
        return wide(jnp.ones_like(size.value)), size
    radius, slope = (_column(kernels, name) for name in ("radius", "slope"))
    slope = times(jnp.sqrt(_counts(kernels, "count")), slope)
    steps, slopes = norm(product_of(radius, slope)), norm(slope)
    radius = quotient(steps, _or_one(slopes))
    return select(slopes.value != 0, radius, wide(jnp.ones_like(radius.value))), size


def _size_of(kernels: Sequence[_Kernel], among: str) -> Wide:
    """The root mean square of all kernels that are not zero, over all of their entries or those that move."""
    if not kernels:
        return wide(jnp.zeros((), jnp.float32))
    total = norm(times(jnp.sqrt(_counts(kernels, "count")), _column(kernels, "size")))
    return times(1 / jnp.sqrt(jnp.maximum(jnp.sum(_counts(kernels, among)), 1)), total)


def _column(kernels: Sequence[_Kernel], name: str) -> Wide:
    dtype = max((kernel.size.value.dtype for kernel in kernels), key=lambda dtype: dtype.itemsize)
    parts = [cast(getattr(kernel, name), dtype) for kernel in kernels]
    return Wide(*(jnp.stack(x) for x in zip(*parts, strict=True)))


def _counts(kernels: Sequence[_Kernel], name: str) -> jax.Array:
    size = _column(kernels, "size").value
    counts = jnp.stack([jnp.asarray(getattr(kernel, name), size.dtype) for kernel in kernels])
    return jnp.where(size == 0, 0, counts)


def _or_one(a: Wide) -> Wide:
    """What can be divided by."""
    return Wide(jnp.where(a.value == 0, 1, a.value), a.exponent)


def _at_most(radius: Wide, step: Wide, slope: Wide) -> Wide:
    """The radius, or what takes a gradient of this size one step far, whichever is smaller."""
    radius, step = (cast(x, slope.value.dtype) for x in (radius, step))
    bound = quotient(step, _or_one(slope))
    return select(slope.value != 0, least(radius, bound), radius)
