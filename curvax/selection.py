"""The pattern of a given rank, found by counting.

The k-th smallest pattern p has at most k patterns below it and more than k up to it, and one pass over the population
that counts at a few thresholds narrows the bracket [low, high] around p. Nothing is sorted: counts add up over arrays
and devices.

Three guesses make the passes few, and none can make the answer wrong, since every bracket is counted:

1. A strided sample, sorted, opens with a bracket of a few standard errors of its quantiles.
2. Inside a bracket, ranks are taken as uniform over patterns. The rank sought is then off by the standard deviation of
   a binomial, so that thresholds a few deviations around it leave about the square root of the population.
3. A pass that did not shrink the bracket fourfold (ties, gaps) is followed by one at equal steps, which shrinks it
   sixfold at least. It counts the ends of the bracket apart: they were sampled, and may be the ties.

With two patterns or fewer left in the bracket, a last pass reads them off. Four million normal floats take five passes;
without a sample, or with ties, about a dozen; no float32 more than 26, since every second pass gains a factor of six.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from curvax.magnitudes import MAX, MIN, SUM, Population, is_local, one_pass, patterns

# Up to this many magnitudes one sort compiles and runs faster than a search; beyond, it is the size of the sample.
SAMPLE = 4096
# Thresholds in standard errors of the sample's quantiles, and of an interpolated rank: denser where likelier.
_SAMPLE_ERRORS = np.array([-3.5, -1.2, 0.0, 1.2, 3.5], np.float32)
_RANK_ERRORS = np.array([-3.5, -1.6, -0.7, 0.0, 0.7, 1.6, 3.5], np.float32)
_STEPS = np.arange(7, dtype=np.float32)


def select(population: Population, rank: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pattern of that rank, its successor and the largest pattern.

    Args:
        population: the magnitudes.
        rank: at least 0 and below the size, of a dtype that holds the size.

    Returns:
        Three scalars; the successor of the largest is itself.
    """
    sample = _sorted_sample(population)
    if sample is not None and sample.size == population.size:
        return sample[rank], sample[jnp.minimum(rank + 1, sample.size - 1)], sample[-1]
    return _search(population, sample, rank)


class _Bracket(NamedTuple):
    """The pattern sought is in [low, high]; `below` patterns are < low, `upto` are <= high: below <= rank < upto."""

    low: jax.Array
    high: jax.Array
    below: jax.Array
    upto: jax.Array


def _search(
    population: Population, sample: jax.Array | None, rank: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pattern of that rank, its successor and the largest pattern."""

    def is_wide(state: tuple[_Bracket, jax.Array]) -> jax.Array:
        bracket, _ = state
        return (bracket.low < bracket.high) & (bracket.upto - bracket.below > 2)

    def narrow(state: tuple[_Bracket, jax.Array]) -> tuple[_Bracket, jax.Array]:
        bracket, thresholds = state
        # The barrier keeps the patterns, a copy of the whole population, from being computed once and stored.
        leaves, _ = lax.optimization_barrier((population.leaves, thresholds))
        below = lambda p: [(p < t).astype(rank.dtype) for t in thresholds]
        counts = population._replace(leaves=leaves).fold(below, [SUM] * len(thresholds))
        narrower = _narrowed(bracket, thresholds, jnp.stack(counts), rank)
        shrank = narrower.high - narrower.low <= (bracket.high - bracket.low) >> 2
        return narrower, _thresholds(narrower, shrank, rank)

    bracket = _everything(population, rank.dtype)
    thresholds = _thresholds(bracket, False, rank) if sample is None else _sample_thresholds(population, sample, rank)
    bracket, _ = lax.while_loop(is_wide, narrow, (bracket, thresholds))
    return _read_off(population, bracket, rank)


def _everything(population: Population, count_dtype: np.dtype) -> _Bracket:
    # Zeros that vary over the same device axes as the counts will: a loop's carry may not change its type.
    zero = sum(patterns(lax.full_like(leaf, 0, shape=())) for leaf in population.leaves)
    zero = population.across(lax.psum, zero)
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
    return _Bracket(*one_pass(ends, [MAX, MIN, MAX, MIN], (0,)))


def _thresholds(bracket: _Bracket, interpolate: jax.Array | bool, rank: jax.Array) -> jax.Array:
    """Seven thresholds in (low, high]: around the interpolated rank, or at both ends and equal steps between."""
    # Rounding to float32 only moves guesses.
    width = (bracket.high - bracket.low).astype(jnp.float32)
    inside = (bracket.upto - bracket.below).astype(jnp.float32)
    share = jnp.minimum(((rank - bracket.below).astype(jnp.float32) + 0.5) / inside, 1)
    error = jnp.sqrt(share * (1 - share) / inside)
    # Neighbouring patterns at the least, so that a narrow bracket is resolved at once.
    guesses = width * (share + error * _RANK_ERRORS) + (_STEPS - 3)
    offsets = jnp.where(interpolate, guesses, jnp.maximum(width / 6 * _STEPS, _STEPS + 1))
    return bracket.low + jnp.clip(offsets, 1, width).astype(bracket.low.dtype)


def _sorted_sample(population: Population) -> jax.Array | None:
    """All patterns if they are few, else evenly spaced ones; none if that might move them between devices."""
    leaves = population.leaves
    if not all(map(is_local, leaves)):
        return None
    # Odd, since an even stride would meet few columns of a matrix whose width is a power of two.
    stride = -(-sum(leaf.size for leaf in leaves) // SAMPLE) | 1
    return lax.sort(jnp.concatenate([patterns(leaf.reshape(-1)[::stride]) for leaf in leaves]), is_stable=False)


def _sample_thresholds(population: Population, sample: jax.Array, rank: jax.Array) -> jax.Array:
    error = max(1.0, math.sqrt(sample.size) / 2)
    position = rank.astype(jnp.float32) * (sample.size / population.size) + error * _SAMPLE_ERRORS
    guesses = sample[jnp.clip(jnp.round(position), 0, sample.size - 1).astype(jnp.int32)]
    # Each device has its own sample: the widest bracket of all is sure to suit them all.
    low = population.across(lax.pmin, guesses[:2])
    high = population.across(lax.pmax, guesses[2:])
    # v and v + 1 enclose the ties of a v that is sampled often, such as the zeros of a gradient.
    thresholds = jnp.stack([low[0], low[0] + 1, low[1], high[0], high[0] + 1, high[1], high[2] + 1])
    # A sampled NaN lies beyond infinity.
    return jnp.minimum(thresholds, population.infinity)


def _read_off(population: Population, bracket: _Bracket, rank: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The end of a search: at most two patterns are inside, its smallest and its largest."""
    low, high = bracket.low, bracket.high
    top = np.iinfo(low.dtype).max

    def operands(p: jax.Array) -> tuple[jax.Array, ...]:
        return jnp.where(p < low, top, p), jnp.where(p > high, 0, p), jnp.where(p > high, p, top), p

    smallest, largest, beyond, last = population.fold(operands, [MIN, MAX, MIN, MAX])
    found = jnp.where(rank == bracket.below, smallest, largest)
    above = jnp.where(rank + 1 < bracket.upto, largest, jnp.minimum(beyond, last))
    return found, above, last
