"""Magnitudes as integers, in several arrays on several devices, and what can be learnt of them in one pass.

The bits of a non-negative IEEE float, read as an integer, order like the float; such an integer is called a pattern. To
compare patterns is to see denormals, which float comparisons may flush to zero. A population may be divided between
arrays and devices, and is never moved or copied: a pass reduces every array where it lies to a few numbers, and only
these are combined.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

from curvax.varying import AxisName

#: From patterns, the arrays that monoids reduce.
Operands = Callable[[jax.Array], Sequence[jax.Array]]


class Population(NamedTuple):
    """Magnitudes that are ranked together.

    Attributes:
        leaves: real arrays of one dtype, not all empty, none of them empty.
        size: the number of magnitudes, over all arrays and devices.
        axis_name: the axes that split every array.
    """

    leaves: list[jax.Array]
    size: int
    axis_name: AxisName

    @property
    def infinity(self) -> int:
        """The pattern of infinity: those of NaNs are larger, all others smaller."""
        dtype = self.leaves[0].dtype
        return int(np.asarray(np.inf, dtype).view(_word(dtype)))

    def fold(self, operands: Operands, monoids: Sequence["Monoid"]) -> list[jax.Array]:
        """`operands(patterns)`, each reduced by its monoid over every array and device."""
        partial = [_reduce(leaf, operands, monoids) for leaf in self.leaves]
        columns = zip(monoids, zip(*partial, strict=True), strict=True)
        return [self.across(monoid.across, functools.reduce(monoid.combine, column)) for monoid, column in columns]

    def across(self, collective: Callable[..., Any], x: Any) -> Any:
        """`x` combined over the devices."""
        return x if self.axis_name is None else collective(x, self.axis_name)


def population_size(x: Any, axis_name: AxisName = None) -> int:
    """How many magnitudes there are in `x`, over all devices."""
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(x))
    return size if axis_name is None else size * lax.axis_size(axis_name)


def magnitude_dtype(x: Any) -> np.dtype:
    """The real dtype in which the magnitudes of `x` are compared."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*(jnp.result_type(leaf) for leaf in jax.tree.leaves(x) or [0.0]))
    # The finfo of a complex dtype is that of its parts.
    return jnp.finfo(dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.result_type(float)).dtype


def real_rows(leaf: Any, dtype: np.dtype) -> jax.Array:
    """The real numbers of an array, as a matrix where a reshape moves nothing."""
    x = (jnp.abs(leaf) if jnp.iscomplexobj(leaf) else jnp.asarray(leaf)).astype(dtype)
    # Rows, since XLA's CPU compiler splits a reduction over threads by its outputs alone; reshaped before the search,
    # since it would otherwise divide indices within.
    return x.reshape(math.gcd(x.size, 32) if x.size >= 2**16 else 1, -1) if is_local(x) else x


def patterns(leaf: jax.Array) -> jax.Array:
    """The pattern of each magnitude, in integers of 32 bits at least."""
    word = _word(leaf.dtype)
    bits = lax.bitcast_convert_type(leaf, word) & np.iinfo(word).max
    # XLA's CPU compiler vectorises 16-bit comparisons badly where they feed 32-bit counts.
    return bits.astype(max(word, np.dtype(np.int32)))


def magnitude(pattern: jax.Array, dtype: np.dtype) -> jax.Array:
    """The float of a pattern."""
    return lax.bitcast_convert_type(pattern.astype(_word(dtype)), dtype)


def is_local(x: Any) -> bool:
    """Whether each device that computes with `x` is known to hold all of it, so that it may be reshaped and sampled."""
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    is_automatic = any(
        n > 1 and kind == AxisType.Auto for n, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    )
    return not is_automatic and all(axis is None for axis in sharding.spec)


def rows_of(
    populations: Sequence[Sequence[Sequence[jax.Array]]], most: int = 1024
) -> tuple[list[list[jax.Array]], list[int], np.ndarray]:
    """Small populations as rows of matrices, filled up with zeros: what is done to many of them compiles once.

    Args:
      populations: each as columns, which are sequences of arrays `(number, ...)`; those of a population have the same
        shapes, and are as many populations as their first axis counts.
      most: how many numbers a small population has at most.

    Returns:
      The matrices, each by its columns; which other populations there are; and where each single population stands in
      the rows of all matrices, followed by the others.
    """
    numbers = [columns[0][0].shape[0] for columns in populations]
    size_of = lambda arrays: sum(math.prod(x.shape[1:]) for x in arrays)
    widths: dict[int, list[int]] = {}
    for i, columns in enumerate(populations):
        if size_of(columns[0]) <= most and all(is_local(x) for column in columns for x in column):
            # A power of two: networks have layers of many sizes.
            widths.setdefault(1 << max(size_of(columns[0]) - 1, 0).bit_length(), []).append(i)

    def filled(arrays: Sequence[jax.Array], width: int) -> list[jax.Array]:
        number = arrays[0].shape[0]
        parts: list[Any] = [x.reshape(number, -1) for x in arrays if x.size]
        parts.append(np.zeros((number, width - size_of(arrays)), arrays[0].dtype))
        # Of one population the parts are joined with those of all.
        return [x.reshape(-1) for x in (parts if number == 1 else [jnp.concatenate(parts, 1)]) if x.size]

    found = [
        [
            jnp.concatenate([x for arrays in column for x in filled(arrays, width)]).reshape(-1, width)
            for column in zip(*(populations[i] for i in members), strict=True)
        ]
        for width, members in widths.items()
    ]
    order = [i for members in widths.values() for i in members]
    others = [i for i in range(len(populations)) if i not in set(order)]
    return found, others, np.argsort([i for i in order + others for _ in range(numbers[i])], kind="stable")


def _word(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"int{jnp.finfo(dtype).bits}")


# Reductions.


class Monoid(NamedTuple):
    """A way to combine integers: of two, over the axes of an array, over devices; and of none."""

    combine: Callable[[jax.Array, jax.Array], jax.Array]
    total: Callable[[jax.Array, Sequence[int]], jax.Array]
    across: Callable[..., Any]
    identity: Callable[[np.dtype], int]


SUM = Monoid(lax.add, lax.reduce_sum, lax.psum, lambda dtype: 0)
MIN = Monoid(lax.min, lax.reduce_min, lax.pmin, lambda dtype: np.iinfo(dtype).max)
MAX = Monoid(lax.max, lax.reduce_max, lax.pmax, lambda dtype: np.iinfo(dtype).min)


def one_pass(values: Sequence[jax.Array], monoids: Sequence[Monoid], axes: tuple[int, ...]) -> list[jax.Array]:
    """One variadic reduction. XLA's CPU compiler turns separate ones into as many passes, each ten times slower."""

    identities = tuple(np.asarray(m.identity(v.dtype), v.dtype) for m, v in zip(monoids, values, strict=True))
    found: list[jax.Array] = lax.reduce(tuple(values), identities, _combine(tuple(monoids)), axes)
    return found


@functools.cache
def _combine(monoids: tuple[Monoid, ...]) -> Callable[..., tuple[jax.Array, ...]]:
    # The same function for the same monoids: JAX compiles a reduction by another one anew.
    return lambda left, right: tuple(m.combine(a, b) for m, a, b in zip(monoids, left, right, strict=True))


def _reduce(leaf: jax.Array, operands: Operands, monoids: Sequence[Monoid]) -> list[jax.Array]:
    values = operands(patterns(leaf))
    if is_local(leaf):
        return one_pass(one_pass(values, monoids, (1,)), monoids, (0,))
    axes = tuple(range(leaf.ndim))
    if _is_on_few_cpus(leaf):
        return one_pass(values, monoids, axes)
    return [m.total(value, axes) for m, value in zip(monoids, values, strict=True)]


def _is_on_few_cpus(x: jax.Array) -> bool:
    # The partitioner gathers the partial results of a variadic reduction, one per device, where it would add up those
    # of separate ones. Gathering suits the CPU while the devices are few; elsewhere separate reductions fuse anyway.
    return jax.default_backend() == "cpu" and jax.typeof(x).sharding.mesh.size <= 16
