"""How far an array may go in the layers of `"kernel"`: neither too far, nor hardly at all.

A bias follows its kernel's radius and a norm's scale that of all kernels, whatever their own gradients are; and the
median of a gradient says nothing of its largest entries. So no array moves, at a learning rate of 1, by more than three
times the root mean square of its kernel's parameters. LARS's radius takes a kernel a third of that far.

And a step in proportion to a kernel that is nearly zero beside the others, as heads of fine-tuned networks begin, would
leave it there: it takes steps as if it were larger.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax.magnitudes import population_size
from curvax.radii import Leaves, Rule, Scalar, TreeRule, along, count, pairs, squared_norms, together
from curvax.sums import squares_and_moving, totals
from curvax.varying import AxisName
from curvax.wide import (
    Factors,
    Wide,
    append,
    cast,
    concatenate,
    factors,
    least,
    norm,
    product_of,
    quotient,
    root,
    select,
    take,
    times,
    to_float,
    wide,
)

#: The longest step of an array, in multiples of its kernel's parameters, both in root mean square.
LONGEST = 3.0
#: A kernel smaller than this part of the root mean square of all kernels is treated as if it had that size.
SMALLEST = 0.1


class _Kernels(NamedTuple):
    """What is known of all kernels, one entry each: a thousand small layers compile as one.

    Attributes:
      size: the root mean square of the parameters that move, as of all, the others being taken for zeros.
      slope: that of the gradient.
      moving: how many entries have a gradient.
      number: how many there are.
    """

    size: Wide
    slope: Wide
    moving: jax.Array
    number: jax.Array


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

    def with_radius(kernels: _Kernels, own: Wide) -> tuple[_Kernels, Wide]:
        size, slope = kernels.size, kernels.slope
        least_size = times(SMALLEST * jnp.sqrt(kernels.moving / kernels.number), _size_of(kernels, kernels.moving))
        is_small = to_float(quotient(size, _or_one(least_size))) < 1
        is_small &= (least_size.value != 0) & (slope.value != 0)
        if not follow_all:
            is_small &= size.value != 0
        size = select(is_small, least_size, size)
        radius = select(is_small, times(trust_coefficient, quotient(size, _or_one(slope))), own)
        return kernels._replace(size=size), _at_most(radius, longest(size), slope)

    def radii(layers: Sequence[tuple[Leaves, Leaves]]) -> list[list[Factors]]:
        measured = [measured for measured, _ in layers if measured.w]
        radius, size = wide(jnp.ones(1)), wide(jnp.zeros(1))
        known: list[Wide] = []
        if measured:
            kernels, own = _measured(rule, measured, axis_name)
            kernels, radius = with_radius(kernels, own)
            radius_of_all, size_of_all = _together(kernels, radius, follow_all)
            # NaN is not zero, and stays.
            is_zero = kernels.size.value == 0
            radius = append(select(is_zero, radius_of_all, radius), radius_of_all)
            size = append(select(is_zero, size_of_all, kernels.size), size_of_all)
            known = [kernels.slope]
        # For each slice of each scaled leaf its kernel; the last entry is for what follows none.
        last, start = sum(map(count, measured)), 0
        leaves: list[jax.Array] = []
        places: list[int] = []
        for of_layer, scaled in layers:
            number = count(of_layer) if of_layer.w else 0
            leaves += scaled.g
            for g in scaled.g:
                places += range(start, start + number) if number else [last] * g.shape[0]
            start += number
        slopes = _all_slopes(leaves, measured, known, axis_name)
        radius, size = (cast(take(x, places), slopes.value.dtype) for x in (radius, size))
        found = _at_most(radius, longest(size), slopes)
        return _apart(found, [scaled.g for _, scaled in layers])

    return radii


def _all_slopes(
    leaves: Sequence[jax.Array], kernels: Sequence[Leaves], slopes: Sequence[Wide], axis_name: AxisName
) -> Wide:
    """The root mean square of each slice of the leaves, where those of the kernels are known."""
    starts = np.cumsum([0, *map(count, kernels)])
    known = {id(x.g[0]): start for x, start in zip(kernels, starts[:-1], strict=True) if len(x.g) == 1}
    others = [g for g in leaves if id(g) not in known]
    start = int(starts[-1])
    places: list[int] = []
    for g in leaves:
        first = known.get(id(g), start)
        places += range(first, first + g.shape[0])
        start += 0 if id(g) in known else g.shape[0]
    found = [*slopes, *([_slopes(others, axis_name)] if others else [])]
    return take(concatenate(found), places)


def _apart(found: Wide, layers: Sequence[Sequence[jax.Array]]) -> list[list[Factors]]:
    """For each leaf of each layer its entries, in its dtype, as they multiply it."""
    dtypes = {jnp.finfo(g.dtype).dtype for leaves in layers for g in leaves}
    in_dtype = {dtype: factors(cast(found, dtype)) for dtype in dtypes}
    starts = itertools.accumulate((g.shape[0] for leaves in layers for g in leaves), initial=0)

    def of_leaf(g: jax.Array, start: int) -> Factors:
        number = g.shape[0]
        own = take(in_dtype[jnp.finfo(g.dtype).dtype], start if number == 1 else range(start, start + number))
        return Factors(*(along(x, g) for x in own))

    return [[of_leaf(g, next(starts)) for g in leaves] for leaves in layers]


def _measured(rule: Rule, kernels: Sequence[Leaves], axis_name: AxisName) -> tuple[_Kernels, Wide]:
    """What is known of all kernels, and their radii by the rule."""

    def of_kind(layers: Sequence[Leaves]) -> tuple[Wide, ...]:
        return (*totals(squares_and_moving, [pairs(x.w, x.g) for x in layers], axis_name), rule(layers))

    size, slope, moving, own = together(of_kind, kernels)
    counts = [n for x in kernels for n in _counts(x.w, axis_name)]
    size, slope = (_root_mean(x, counts) for x in (size, slope))
    return _Kernels(size, slope, moving.value, jnp.asarray(np.maximum(counts, 1), size.value.dtype)), own


def _slopes(leaves: Sequence[jax.Array], axis_name: AxisName) -> Wide:
    """The root mean square of each."""
    squared = squared_norms([[g] for g in leaves], axis_name)
    return _root_mean(squared, [n for g in leaves for n in _counts([g], axis_name)])


def _counts(arrays: Sequence[jax.Array], axis_name: AxisName) -> list[int]:
    """How many entries each slice has, over all devices."""
    number = arrays[0].shape[0]
    return [population_size(arrays, axis_name) // number] * number


def _root_mean(squared: Wide, counts: Sequence[int]) -> Wide:
    return root(Wide(squared.value / jnp.asarray(np.maximum(counts, 1), squared.value.dtype), squared.exponent))


def _together(kernels: _Kernels, radius: Wide, follow_all: bool) -> tuple[Wide, Wide]:
    """The radius of all kernels that are not zero, and their root mean square."""
    size = _size_of(kernels, kernels.number)
    one = wide(jnp.ones_like(size.value))
    if not follow_all:
        return one, size
    slope = times(jnp.sqrt(_alive(kernels, kernels.number)), kernels.slope)
    steps, slopes = norm(product_of(radius, slope)), norm(slope)
    return select(slopes.value != 0, quotient(steps, _or_one(slopes)), one), size


def _size_of(kernels: _Kernels, counts: jax.Array) -> Wide:
    """The root mean square of all kernels that are not zero, over so many entries of each."""
    total = norm(times(jnp.sqrt(_alive(kernels, kernels.number)), kernels.size))
    return times(1 / jnp.sqrt(jnp.maximum(jnp.sum(_alive(kernels, counts)), 1)), total)


def _alive(kernels: _Kernels, counts: jax.Array) -> jax.Array:
    return jnp.where(kernels.size.value == 0, 0, counts)


def _or_one(a: Wide) -> Wide:
    """What can be divided by."""
    return Wide(jnp.where(a.value == 0, 1, a.value), a.exponent)


def _at_most(radius: Wide, step: Wide, slope: Wide) -> Wide:
    """The radius, or what takes a gradient of this size one step far, whichever is smaller."""
    bound = quotient(step, _or_one(slope))
    return select(slope.value != 0, least(radius, bound), radius)
