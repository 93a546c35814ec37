"""Exact medians and quantiles of magnitudes: which ranks to ask for, and how two neighbours make one answer.

Ranks are integers, and exact as long as 32 bits hold them (64, where these are enabled); `selection` finds what has
them. The arithmetic between the two neighbours is that of `jnp.median` and `jnp.quantile`, to the bit.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from curvax.checks import check_number
from curvax.magnitudes import Population, magnitude, magnitude_dtype, patterns, population_size, real_rows
from curvax.selection import select
from curvax.varying import AxisName

_Pair = tuple[jax.Array, jax.Array]


@functools.partial(jax.jit, static_argnames="axis_name")
def median(x: Any, axis_name: AxisName = None, without: jax.Array | None = None) -> jax.Array:
    """The median of magnitudes, exact.

    Formula:
        `median |x|`, the mean of the two middle magnitudes where their number is even; the statistic of Gao & Zhong,
        eq. 20-22. Bit for bit `jnp.median(jnp.abs(x))`, but that the mean of two huge magnitudes does not overflow.

    Args:
        x: an array, or a pytree of arrays taken together as one population. Integers are cast to the default float,
            complex numbers enter by their modulus, several dtypes by their promotion.
        axis_name: name or names of the `shard_map`, `pmap` or `vmap` axes that split every array of `x`. Under plain
            `jit`, sharded arrays need none.
        without: how many zeros to leave out of the population, an integer scalar; it has so many at least.

    Returns:
        A scalar of the (promoted) dtype; NaN if any element is; 0 for an empty population. Its derivative is that
        of the magnitudes at these ranks, the mean over those that tie.

    Raises:
        OverflowError: if there are 2**32 magnitudes or more, and 64-bit counts are disabled.

    Example:
        >>> import jax.numpy as jnp
        >>> from curvax.order_statistics import median
        >>> float(median([jnp.array([-3., 1.]), jnp.array([[2., -8.]])]))
        2.5
    """
    low, high = middles(x, axis_name, without)
    half = lax.full_like(low, 0.5)
    mean = lax.mul(lax.add(low, high), half)
    # The sum of two floats may overflow where their mean does not.
    rise = jnp.where(low < high, lax.mul(lax.sub(high, low), half), lax.full_like(low, 0))
    return jnp.where(mean < np.inf, mean, lax.add(low, rise))


def middles(x: Any, axis_name: AxisName = None, without: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The two magnitudes of which `median` is the mean; twice the same where their number is odd."""
    size = population_size(x, axis_name)
    dtype = count_dtype(size)
    if without is None:
        low, high = order_statistics(x, np.asarray(max(size - 1, 0) // 2, dtype), axis_name)
        return low, low if size % 2 else high
    # Zeros come first: without k of them, ranks begin at k.
    without, one = without.astype(dtype), np.asarray(1, dtype)
    count = jnp.maximum(np.asarray(size, dtype) - without, one)
    low, high = order_statistics(x, without + (count - one) // 2, axis_name)
    return low, jnp.where(count % 2 == one, low, high)


def zeros(x: Any, axis_name: AxisName = None) -> jax.Array:
    """How many entries are zero, in a type that holds as many as there are."""
    dtype = count_dtype(population_size(x, axis_name))
    count: jax.Array = functools.reduce(jnp.add, [jnp.sum(leaf == 0, dtype=dtype) for leaf in jax.tree.leaves(x)])
    return count if axis_name is None else lax.psum(count, axis_name)


def quantile(x: Any, q: Any, axis_name: AxisName = None) -> jax.Array:
    """The quantile of magnitudes with linear interpolation, exact.

    Formula:
        `(1 - f) a_i + f a_(i+1)` of the sorted magnitudes `a_0 <= ... <= a_(n-1)`, where `i + f = q (n - 1)`: bit for
        bit `jnp.quantile(jnp.abs(x), q)`. From 2**24 magnitudes on, `i` is still the exact integer part.

    Args:
        x: an array, or a pytree of arrays taken together as one population, as in `median`.
        q: a scalar in [0, 1], a Python float or an array, possibly traced. The arithmetic is in its dtype, that of `x`
            or float32, whichever is widest.
        axis_name: name or names of the axes that split every array of `x`, as in `median`.

    Returns:
        A scalar of the (promoted) dtype; NaN if any element is; 0 for an empty population. Its derivative is that
        of the magnitudes at these ranks, the mean over those that tie.

    Raises:
        ValueError: if `q` is no number in [0, 1].
        OverflowError: if there are 2**32 magnitudes or more, and 64-bit counts are disabled.

    Example:
        >>> import jax.numpy as jnp
        >>> from curvax.order_statistics import quantile
        >>> float(quantile(jnp.array([0., -1., 2., -3., 4.]), 0.375))
        1.5
    """
    check_number("q", q, "[0, 1]")
    found: jax.Array = _quantile(x, q, axis_name)
    return found


@functools.partial(jax.jit, static_argnames="axis_name")
def _quantile(x: Any, q: Any, axis_name: AxisName) -> jax.Array:
    size = population_size(x, axis_name)
    dtype = magnitude_dtype(x)
    q = _widened(q, dtype)
    rank, fraction = _rank_and_fraction(q, max(size - 1, 0))
    low, above = order_statistics(x, rank, axis_name)
    high = jnp.where(fraction > 0, above, low)
    return _interpolated(low.astype(q.dtype), high.astype(q.dtype), fraction, dtype)


@functools.partial(jax.jit, static_argnames="axis_name")
def order_statistics(x: Any, rank: Any, axis_name: AxisName = None) -> tuple[jax.Array, jax.Array]:
    """The magnitude of a given rank and the one after it, exact.

    Formula:
        `(a_k, a_min(k+1, n-1))` of the sorted magnitudes `a_0 <= ... <= a_(n-1)`; k = 0 is the smallest.

    Args:
        x: an array, or a pytree of arrays taken together as one population, as in `median`.
        rank: the rank k, a whole number in [0, n), possibly traced.
        axis_name: name or names of the axes that split every array of `x`, as in `median`.

    Returns:
        Two scalars of the (promoted) dtype; NaN if any element is; 0 for an empty population.

    Raises:
        OverflowError: if there are 2**32 magnitudes or more, and 64-bit counts are disabled.

    Example:
        >>> import jax.numpy as jnp
        >>> from curvax.order_statistics import order_statistics
        >>> [float(a) for a in order_statistics(jnp.array([5., -7., 1.]), 1)]
        [5.0, 7.0]
    """
    dtype, size = magnitude_dtype(x), population_size(x, axis_name)
    leaves = [real_rows(leaf, dtype) for leaf in jax.tree.leaves(x) if np.size(leaf)]
    if not leaves:
        return jnp.zeros((), dtype), jnp.zeros((), dtype)
    last = np.asarray(size - 1, count_dtype(size))
    found: _Pair = _ranked(leaves, jnp.minimum(jnp.asarray(rank).astype(last.dtype), last), axis_name)
    return found


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _ranked(leaves: list[jax.Array], rank: jax.Array, axis_name: AxisName) -> _Pair:
    """The magnitude of that rank in real arrays of one dtype, and the one after it."""
    dtype = leaves[0].dtype
    population = Population(leaves, population_size(leaves, axis_name), axis_name)
    found, above, largest = select(population, rank)
    is_nan = largest > population.infinity
    number = lambda pattern: jnp.where(is_nan, np.asarray(np.nan, dtype), magnitude(pattern, dtype))
    return number(found), number(above)


@_ranked.defjvp
def _ranked_jvp(axis_name: AxisName, primals: Any, tangents: Any) -> tuple[_Pair, _Pair]:
    """A magnitude changes as the entry does that has it, or as those do on average."""
    leaves, slopes = primals[0], tangents[0]
    values = _ranked(*primals, axis_name)

    def slope(value: jax.Array) -> jax.Array:
        parts = []
        for x, t in zip(leaves, slopes, strict=True):
            has_it = patterns(x) == patterns(value)
            parts.append((jnp.sum(jnp.where(has_it, jnp.sign(x) * t, 0)), jnp.sum(has_it).astype(x.dtype)))
        pair = [functools.reduce(jnp.add, column) for column in zip(*parts, strict=True)]
        total, count = pair if axis_name is None else lax.psum(pair, axis_name)
        slope: jax.Array = total / jnp.maximum(count, 1)
        return slope

    return values, (slope(values[0]), slope(values[1]))


def count_of(fraction: Any, size: Any) -> Any:
    """How many of `size` a fraction in [0, 1] is, rounded down, in the dtype of counts.

    A float stands for the decimal number that is nearest to it: 0.29 of 100 are 29, though its product in binary falls
    short of that, as a number of Python and as an array of float32.

    Args:
        fraction: a number, or an array, possibly traced.
        size: a number, or a scalar of the dtype of counts, possibly traced.

    Example:
        >>> import numpy as np
        >>> int(count_of(0.29, 100)), int(count_of(np.float32(0.29), 100)), int(count_of(1 - 1e-7, 10))
        (29, 29, 9)
    """
    if isinstance(fraction, float | int) and isinstance(size, int):
        return np.asarray(math.floor(fraction * size * (1 + 2.0**-51)), count_dtype(size))
    size = np.asarray(size, count_dtype(size)) if isinstance(size, int) else size
    q = jnp.asarray(fraction)
    q = q if jnp.issubdtype(q.dtype, jnp.floating) else q.astype(jnp.float32)
    reach = (jnp.nextafter(q, jnp.ones_like(q)) - q) / 2
    if _has_64_bits():
        up_to = (q.astype(jnp.float64) + reach.astype(jnp.float64)) * (1 + 2.0**-51)
        return jnp.floor(up_to * size.astype(jnp.float64)).astype(size.dtype)
    q, reach = q.astype(jnp.float32), reach.astype(jnp.float32)
    fixed = (jnp.clip(q, 0, 1 - 2.0**-24) * 2.0**32).astype(jnp.uint32)
    up_to = fixed + jnp.maximum((reach * 2.0**32).astype(jnp.uint32), 1)
    return jnp.where(q < 1, _long_product(up_to, size)[0], size)


def _widened(q: Any, dtype: np.dtype) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):
        return jnp.asarray(q, jnp.result_type(jnp.asarray(q).dtype, dtype, jnp.float32))


def _has_64_bits() -> bool:
    # JAX 0.10 makes its settings attributes at run time.
    return bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined,unused-ignore]


def count_dtype(size: int) -> np.dtype:
    """The integers that count so many."""
    if size >= 2**32 and not _has_64_bits():
        raise OverflowError(
            f"{size} magnitudes are too many to rank with 32-bit counts, which end at 2**32 - 1. Enable 64-bit types"
            " (jax.config.update('jax_enable_x64', True)), or split the layer."
        )
    return np.dtype(np.uint32 if size < 2**32 else np.uint64)


def _rank_and_fraction(q: jax.Array, last: int) -> tuple[jax.Array, jax.Array]:
    """Integer and fractional part of `q * last`."""
    if last >= 2**24 and _has_64_bits():
        q = q.astype(jnp.float64)
    if last < 2 ** (jnp.finfo(q.dtype).nmant + 1):
        position = jnp.clip(q * np.asarray(last, q.dtype), 0, last)
        return jnp.floor(position), position - jnp.floor(position)
    return _long_multiplication(q, last)


def _long_multiplication(q: jax.Array, last: int) -> tuple[jax.Array, jax.Array]:
    """`_rank_and_fraction` in 32-bit integers, by halves: float32 cannot hold such ranks."""
    fixed = (jnp.clip(q, 0, 1 - 2.0**-24) * 2.0**32).astype(jnp.uint32)
    rank, fraction = _long_product(fixed, np.uint32(last))
    # The second branch is 0 for q = 1, and NaN for NaN.
    return jnp.where(q < 1, rank, np.uint32(last)), jnp.where(q < 1, fraction.astype(q.dtype) * 2.0**-16, q - q)


def _long_product(fixed: jax.Array, size: Any) -> tuple[jax.Array, jax.Array]:
    """`fixed * size / 2**32` of 32-bit integers: its integer part, and the first 16 bits after it."""
    high, low, size_high, size_low = fixed >> 16, fixed & 0xFFFF, size >> 16, size & 0xFFFF
    middle = high * size_low + (low * size_low >> 16)
    cross = low * size_high + (middle & 0xFFFF)
    return high * size_high + (middle >> 16) + (cross >> 16), cross & 0xFFFF


def _interpolated(low: jax.Array, high: jax.Array, fraction: jax.Array, dtype: np.dtype) -> jax.Array:
    products = [low * (1 - fraction), high * fraction]
    # XLA contracts one product into a fused multiply-add. The other is positive: its absolute value changes nothing but
    # that the one is what it is, on CPUs, in a call of jnp.quantile (and depends on the width of its result).
    other = 0 if jnp.finfo(dtype).bits > 16 else 1
    products[other] = jnp.abs(products[other])
    return (products[0] + products[1]).astype(dtype)
