"""Exact medians and quantiles of magnitudes, found by counting.

The bits of a non-negative IEEE float, read as an integer, order like the float. So the k-th smallest magnitude is the
pattern p with at most k patterns below it and more than k up to it, and one pass over the data that counts at a few
thresholds narrows the bracket [low, high] around p. Nothing is sorted, moved or copied: counts add up over the arrays
of a layer and over devices, and comparing integers sees denormals, which float comparisons may flush to zero.

Three guesses make the passes few, and none can make the answer wrong, since every bracket is counted:

1. A strided sample, sorted, opens with a bracket of a few standard errors of its quantiles.
2. Inside a bracket, ranks are taken as uniform over patterns. The rank sought is then off by the standard deviation of
   a binomial, so that thresholds a few deviations around it leave about the square root of the population.
3. A pass that did not shrink the bracket eightfold (ties, gaps) is followed by one at equal steps, which must.

With two patterns or fewer left in the bracket, a last pass reads them off. Four million normal floats take five passes;
without a sample, or with ties, about a dozen; no float32 two dozen, since every second pass gains three bits of 31.
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

AxisName = str | tuple[str, ...] | None

# Up to this many magnitudes one sort compiles and runs faster than a search; beyond, it is the size of the sample.
_SAMPLE = 4096
# Thresholds in standard errors of the sample's quantiles, and of an interpolated rank: denser where likelier.
_SAMPLE_ERRORS = np.array([-3.5, -1.2, 0.0, 1.2, 3.5], np.float32)
_RANK_ERRORS = np.array([-3.5, -1.6, -0.7, 0.0, 0.7, 1.6, 3.5], np.float32)
_STEPS = np.arange(1, 8, dtype=np.float32)


@functools.partial(jax.jit, static_argnames="axis_name")
def median(x: Any, axis_name: AxisName = None) -> jax.Array:
    """The median of magnitudes, exact.

    Formula:
        `median |x|`, the mean of the two middle magnitudes where their number is even; the statistic of Gao & Zhong,
        eq. 20-22. Bit for bit `jnp.median(jnp.abs(x))`, overflow of the mean of two huge magnitudes included.

    Args:
        x: an array, or a pytree of arrays taken together as one population. Integers are cast to the default float,
            complex numbers enter by their modulus, several dtypes by their promotion.
        axis_name: name or names of the `shard_map`, `pmap` or `vmap` axes that split every array of `x`. Under plain
            `jit`, sharded arrays need none.

    Returns:
        A scalar of the (promoted) dtype; NaN if any element is; 0 for an empty population. Its gradient is zero.

    Raises:
        OverflowError: if there are 2**32 magnitudes or more, and 64-bit counts are disabled.

    Example:
        >>> import jax.numpy as jnp
        >>> from curvax.order_statistics import median
        >>> float(median([jnp.array([-3., 1.]), jnp.array([[2., -8.]])]))
        2.5
    """
    size = population_size(x, axis_name)
    middle = np.asarray(max(size - 1, 0) // 2, _count_dtype(size))
    low, high = order_statistics(x, middle, axis_name)
    return lax.mul(lax.add(low, low if size % 2 else high), lax.full_like(low, 0.5))


@functools.partial(jax.jit, static_argnames="axis_name")
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
        A scalar of the (promoted) dtype; NaN if any element is; 0 for an empty population. Its gradient is zero.

    Raises:
        OverflowError: if there are 2**32 magnitudes or more, and 64-bit counts are disabled.

    Example:
        >>> import jax.numpy as jnp
        >>> from curvax.order_statistics import quantile
        >>> float(quantile(jnp.array([0., -1., 2., -3., 4.]), 0.375))
        1.5
    """
    size = population_size(x, axis_name)
    dtype = _magnitude_dtype(x)
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
    dtype, size = _magnitude_dtype(x), population_size(x, axis_name)
    leaves = [_rows(leaf, dtype) for leaf in jax.tree.leaves(x) if np.size(leaf)]
    if not leaves:
        return jnp.zeros((), dtype), jnp.zeros((), dtype)
    population = _Population(leaves, size, axis_name, _infinity(dtype))
    last = np.asarray(size - 1, _count_dtype(size))
    rank = jnp.minimum(jnp.asarray(rank).astype(last.dtype), last)
    sample = _sorted_sample(leaves)
    if sample is not None and sample.size == size:
        found, above, largest = sample[rank], sample[jnp.minimum(rank + 1, last)], sample[-1]
    else:
        found, above, largest = _search(population, sample, rank)
    is_nan = largest > population.infinity
    return tuple(jnp.where(is_nan, np.asarray(np.nan, dtype), _magnitude(p, dtype)) for p in (found, above))


# Magnitudes as integers, ranks as integers.


def population_size(x: Any, axis_name: AxisName = None) -> int:
    """How many magnitudes there are in `x`, over all devices."""
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(x))
    return size if axis_name is None else size * lax.axis_size(axis_name)


def count_of(fraction: Any, size: int) -> jax.Array:
    """How many of `size` a fraction is, rounded down."""
    # The slack makes 0.3 of 10 the 3 that is meant, where the product in binary falls short of it.
    if isinstance(fraction, float | int):
        return jnp.asarray(math.floor(fraction * size + 1e-6), _count_dtype(size)).astype(jnp.int32)
    return jnp.floor(jnp.asarray(fraction, jnp.float32) * size + 1e-6).astype(jnp.int32)


def _magnitude_dtype(x: Any) -> np.dtype:
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*(jnp.result_type(leaf) for leaf in jax.tree.leaves(x) or [0.0]))
    # The finfo of a complex dtype is that of its parts.
    return jnp.finfo(dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.result_type(float)).dtype


def _widened(q: Any, dtype: np.dtype) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):
        return jnp.asarray(q, jnp.result_type(jnp.asarray(q).dtype, dtype, jnp.float32))


def _word(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"int{jnp.finfo(dtype).bits}")


def _rows(leaf: Any, dtype: np.dtype) -> jax.Array:
    """The real numbers of an array, as a matrix where a reshape moves nothing."""
    leaf = (jnp.abs(leaf) if jnp.iscomplexobj(leaf) else jnp.asarray(leaf)).astype(dtype)
    # Rows, since XLA's CPU compiler splits a reduction over threads by its outputs alone; reshaped before the search,
    # since it would otherwise divide indices within.
    return leaf.reshape(math.gcd(leaf.size, 32) if leaf.size >= 2**16 else 1, -1) if _is_local(leaf) else leaf


def _patterns(leaf: jax.Array) -> jax.Array:
    word = _word(leaf.dtype)
    bits = lax.bitcast_convert_type(leaf, word) & np.iinfo(word).max
    # XLA's CPU compiler vectorises 16-bit comparisons badly where they feed 32-bit counts.
    return bits.astype(max(word, np.dtype(np.int32)))


def _magnitude(pattern: jax.Array, dtype: np.dtype) -> jax.Array:
    return lax.bitcast_convert_type(pattern.astype(_word(dtype)), dtype)


def _infinity(dtype: np.dtype) -> int:
    return int(np.asarray(np.inf, dtype).view(_word(dtype)))


def _count_dtype(size: int) -> np.dtype:
    if size >= 2**32 and not jax.config.jax_enable_x64:
        raise OverflowError(
            f"{size} magnitudes are too many to rank with 32-bit counts, which end at 2**32 - 1. Enable 64-bit types"
            " (jax.config.update('jax_enable_x64', True)), or split the layer."
        )
    return np.dtype(np.uint32 if size < 2**32 else np.uint64)


def _rank_and_fraction(q: jax.Array, last: int) -> tuple[jax.Array, jax.Array]:
    """Integer and fractional part of `q * last`."""
    if last >= 2**24 and jax.config.jax_enable_x64:
        q = q.astype(jnp.float64)
    if last < 2 ** (jnp.finfo(q.dtype).nmant + 1):
        position = jnp.clip(q * np.asarray(last, q.dtype), 0, last)
        return jnp.floor(position), position - jnp.floor(position)
    return _long_multiplication(q, last)


def _long_multiplication(q: jax.Array, last: int) -> tuple[jax.Array, jax.Array]:
    """`_rank_and_fraction` in 32-bit integers, by halves: float32 cannot hold such ranks."""
    fixed = (jnp.clip(q, 0, 1 - 2.0**-24) * 2.0**32).astype(jnp.uint32)
    q_high, q_low, last_high, last_low = fixed >> 16, fixed & 0xFFFF, np.uint32(last >> 16), np.uint32(last & 0xFFFF)
    middle = q_high * last_low + (q_low * last_low >> 16)
    cross = q_low * last_high + (middle & 0xFFFF)
    rank = q_high * last_high + (middle >> 16) + (cross >> 16)
    fraction = (cross & 0xFFFF).astype(q.dtype) * 2.0**-16
    # The second branch is 0 for q = 1, and NaN for NaN.
    return jnp.where(q < 1, rank, np.uint32(last)), jnp.where(q < 1, fraction, q - q)


def _interpolated(low: jax.Array, high: jax.Array, fraction: jax.Array, dtype: np.dtype) -> jax.Array:
    products = [low * (1 - fraction), high * fraction]
    # XLA contracts one product into a fused multiply-add. The other is positive: its absolute value changes nothing but
    # that the one is what it is, on CPUs, in a call of jnp.quantile (and depends on the width of its result).
    other = 0 if jnp.finfo(dtype).bits > 16 else 1
    products[other] = jnp.abs(products[other])
    return (products[0] + products[1]).astype(dtype)


# The search.


class _Population(NamedTuple):
    leaves: list[jax.Array]
    size: int
    axis_name: AxisName
    infinity: int


class _Bracket(NamedTuple):
    """The pattern sought is in [low, high]; `below` patterns are < low, `upto` are <= high: below <= rank < upto."""

    low: jax.Array
    high: jax.Array
    below: jax.Array
    upto: jax.Array


def _search(population: _Population, sample: jax.Array | None, rank: jax.Array) -> tuple[jax.Array, ...]:
    """The pattern of that rank, its successor and the largest pattern."""

    def is_wide(state):
        bracket, _ = state
        return (bracket.low < bracket.high) & (bracket.upto - bracket.below > 2)

    def narrow(state):
        bracket, thresholds = state
        # The barrier keeps the patterns, a copy of the whole population, from being computed once and stored.
        leaves, _ = lax.optimization_barrier((population.leaves, thresholds))
        counts = _fold(
            population._replace(leaves=leaves),
            lambda p: [(p < t).astype(rank.dtype) for t in thresholds],
            [_SUM] * len(thresholds),
        )
        narrower = _narrowed(bracket, thresholds, jnp.stack(counts), rank)
        shrank = narrower.high - narrower.low <= (bracket.high - bracket.low) >> 3
        return narrower, _thresholds(narrower, shrank, rank)

    bracket = _everything(population, rank.dtype)
    thresholds = _thresholds(bracket, False, rank) if sample is None else _sample_thresholds(population, sample, rank)
    bracket, _ = lax.while_loop(is_wide, narrow, (bracket, thresholds))
    return _read_off(population, bracket, rank)


def _everything(population: _Population, count_dtype: np.dtype) -> _Bracket:
    # Zeros that vary over the same device axes as the counts will: a loop's carry may not change its type.
    zero = functools.reduce(lax.add, (_patterns(lax.full_like(leaf, 0, shape=())) for leaf in population.leaves))
    zero = _across(lax.psum, zero, population.axis_name)
    none = zero.astype(count_dtype)
    return _Bracket(zero, zero + population.infinity, none, none + np.asarray(population.size, count_dtype))


def _narrowed(bracket: _Bracket, thresholds: jax.Array, counts: jax.Array, rank: jax.Array) -> _Bracket:
    is_low = counts <= rank
    ends = (
        jnp.where(is_low, thresholds, bracket.low),
        jnp.where(is_low, bracket.high, thresholds - 1),
        jnp.where(is_low, counts, bracket.below),
        jnp.where(is_low, bracket.upto, counts),
    )
    return _Bracket(*_one_pass(ends, [_MAX, _MIN, _MAX, _MIN], (0,)))


def _thresholds(bracket: _Bracket, interpolate: jax.Array | bool, rank: jax.Array) -> jax.Array:
    """Seven thresholds in (low, high]: around the interpolated rank, or at equal steps."""
    # Rounding to float32 only moves guesses.
    width = (bracket.high - bracket.low).astype(jnp.float32)
    inside = (bracket.upto - bracket.below).astype(jnp.float32)
    share = jnp.minimum(((rank - bracket.below).astype(jnp.float32) + 0.5) / inside, 1)
    error = jnp.sqrt(share * (1 - share) / inside)
    # Neighbouring patterns at the least, so that a narrow bracket is resolved at once.
    guesses = width * (share + error * _RANK_ERRORS) + (_STEPS - 4)
    offsets = jnp.where(interpolate, guesses, jnp.maximum(width / 8 * _STEPS, _STEPS))
    return bracket.low + jnp.clip(offsets, 1, width).astype(bracket.low.dtype)


def _sorted_sample(leaves: list[jax.Array]) -> jax.Array | None:
    """All patterns if they are few, else evenly spaced ones; none if that might move them between devices."""
    if not all(map(_is_local, leaves)):
        return None
    # Odd, since an even stride would meet few columns of a matrix whose width is a power of two.
    stride = -(-sum(leaf.size for leaf in leaves) // _SAMPLE) | 1
    return lax.sort(jnp.concatenate([_patterns(leaf.reshape(-1)[::stride]) for leaf in leaves]), is_stable=False)


def _sample_thresholds(population: _Population, sample: jax.Array, rank: jax.Array) -> jax.Array:
    error = max(1.0, math.sqrt(sample.size) / 2)
    position = rank.astype(jnp.float32) * (sample.size / population.size) + error * _SAMPLE_ERRORS
    guesses = sample[jnp.clip(jnp.round(position), 0, sample.size - 1).astype(jnp.int32)]
    # Each device has its own sample: the widest bracket of all is sure to suit them all.
    low = _across(lax.pmin, guesses[:2], population.axis_name)
    high = _across(lax.pmax, guesses[2:], population.axis_name)
    # v and v + 1 enclose the ties of a v that is sampled often, such as the zeros of a gradient.
    thresholds = jnp.stack([low[0], low[0] + 1, low[1], high[0], high[0] + 1, high[1], high[2] + 1])
    # A sampled NaN lies beyond infinity.
    return jnp.minimum(thresholds, population.infinity)


def _read_off(population: _Population, bracket: _Bracket, rank: jax.Array) -> tuple[jax.Array, ...]:
    """The end of a search: at most two patterns are inside, its smallest and its largest."""
    low, high = bracket.low, bracket.high
    top = np.iinfo(low.dtype).max

    def operands(p):
        return jnp.where(p < low, top, p), jnp.where(p > high, 0, p), jnp.where(p > high, p, top), p

    smallest, largest, beyond, last = _fold(population, operands, [_MIN, _MAX, _MIN, _MAX])
    found = jnp.where(rank == bracket.below, smallest, largest)
    above = jnp.where(rank + 1 < bracket.upto, largest, jnp.minimum(beyond, last))
    return found, above, last


# Reductions over arrays and devices.


class _Monoid(NamedTuple):
    combine: Callable
    total: Callable
    across: Callable
    identity: Callable


_SUM = _Monoid(lax.add, lax.reduce_sum, lax.psum, lambda dtype: 0)
_MIN = _Monoid(lax.min, lax.reduce_min, lax.pmin, lambda dtype: np.iinfo(dtype).max)
_MAX = _Monoid(lax.max, lax.reduce_max, lax.pmax, lambda dtype: np.iinfo(dtype).min)


def _across(collective: Callable, x: Any, axis_name: AxisName) -> Any:
    return x if axis_name is None else collective(x, axis_name)


def _fold(population: _Population, operands: Callable, monoids: list[_Monoid]) -> list[jax.Array]:
    """`operands(patterns)`, each reduced by its monoid over every array and device."""
    partial = [_reduce(leaf, operands, monoids) for leaf in population.leaves]
    folded = [
        functools.reduce(monoid.combine, column)
        for monoid, column in zip(monoids, zip(*partial, strict=True), strict=True)
    ]
    return [_across(monoid.across, value, population.axis_name) for monoid, value in zip(monoids, folded, strict=True)]


def _reduce(leaf: jax.Array, operands: Callable, monoids: list[_Monoid]) -> list[jax.Array]:
    values = operands(_patterns(leaf))
    if _is_local(leaf):
        return _one_pass(_one_pass(values, monoids, (1,)), monoids, (0,))
    axes = tuple(range(leaf.ndim))
    if _is_on_few_cpus(leaf):
        return _one_pass(values, monoids, axes)
    return [m.total(value, axes) for m, value in zip(monoids, values, strict=True)]


def _one_pass(values: Sequence[jax.Array], monoids: list[_Monoid], axes: tuple[int, ...]) -> list[jax.Array]:
    """One variadic reduction. XLA's CPU compiler turns separate ones into as many passes, each ten times slower."""

    def combine(left, right):
        return tuple(m.combine(a, b) for m, a, b in zip(monoids, left, right, strict=True))

    identities = tuple(np.asarray(m.identity(v.dtype), v.dtype) for m, v in zip(monoids, values, strict=True))
    return lax.reduce(tuple(values), identities, combine, axes)


def _is_local(x: jax.Array) -> bool:
    """Whether each device that computes with `x` is known to hold all of it, so that it may be reshaped and sampled."""
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    is_automatic = any(
        n > 1 and kind == AxisType.Auto for n, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    )
    return not is_automatic and all(axis is None for axis in sharding.spec)


def _is_on_few_cpus(x: jax.Array) -> bool:
    # The partitioner gathers the partial results of a variadic reduction, one per device, where it would add up those
    # of separate ones. Gathering suits the CPU while the devices are few; elsewhere separate reductions fuse anyway.
    return jax.default_backend() == "cpu" and jax.typeof(x).sharding.mesh.size <= 64
