"""Sums of terms of any size, which neither overflow nor vanish where the result does not.

The terms are summed three times: as they are, times a large power of two and times a small one. One of the three sums
is a float of full precision. Sums add up over arrays and devices, where the largest term, to scale by, would have to be
known before the first pass.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from curvax.magnitudes import SUM, is_local, one_pass
from curvax.varying import AxisName
from curvax.wide import Wide, power_of_two

#: `terms(half, *arrays)`: for each sum its terms, not negative, times `half**2`.
Terms = Callable[..., Sequence[jax.Array]]

# Up to this many numbers one variadic reduction is fastest, and adding one by one rounds no worse than anything else.
_FEW = 1024


def squares(half: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """Terms of the sum of squared magnitudes of each array."""
    return [jnp.square(_scaled(x, half)) for x in arrays]


def magnitudes(half: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """Terms of the sum of magnitudes of each array."""
    return [_scaled(_scaled(x, half), half) for x in arrays]


def slopes(half: jax.Array, w: jax.Array, g: jax.Array) -> list[jax.Array]:
    """Terms of the sum of `|g / w|`, where entries with `w = 0` count as 0."""
    is_zero = w == 0
    return [jnp.where(is_zero, 0, _slope(jnp.abs(g), jnp.where(is_zero, 1, jnp.abs(w)), half))]


def falls_and_rises(half: jax.Array, u: jax.Array, g: jax.Array) -> list[jax.Array]:
    """Terms of the sum of `-u g` where it is positive, and of that of `u g` where it is."""
    pairs = [(u, g)] if not jnp.iscomplexobj(g) else [(jnp.real(u), jnp.real(g)), (jnp.imag(u), jnp.imag(g))]
    sizes = [jnp.sign(x) * jnp.sign(y) * (_scaled(x, half) * _scaled(y, half)) for x, y in pairs]
    rise = functools.reduce(jnp.add, sizes)
    return [jnp.maximum(-rise, 0), jnp.maximum(rise, 0)]


@jax.custom_jvp
def _slope(g: jax.Array, w: jax.Array, half: jax.Array) -> jax.Array:
    # Where w vanishes at the scale for small terms, g is 0.
    return _scaled(g, half) / _scaled(w, 1 / half, jnp.finfo(w.dtype).tiny)


@_slope.defjvp
def _slope_jvp(primals, tangents):
    """Relative changes, which stay in range where `w**2` does not."""
    (g, w, _), (g_tangent, w_tangent, _) = primals, tangents
    slope = _slope(*primals)
    return slope, slope * (g_tangent / jnp.where(g == 0, 1, g)) - slope * (w_tangent / w)


def _scaled(x: jax.Array, half: jax.Array, least: np.ndarray | int = 0) -> jax.Array:
    # Without the maximum XLA would multiply the scales of two factors first, and find their product infinite.
    return jnp.maximum(jnp.abs(x) * half, least)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 2))
def totals(terms: Terms, leaves: Sequence[tuple[jax.Array, ...]], axis_name: AxisName) -> list[Wide]:
    """Sums over several arrays, and over the devices that hold parts of them.

    Args:
      terms: one of the functions above.
      leaves: the arrays over which it is taken, at least one.
      axis_name: mesh axes (of `shard_map` or `pmap`) that split every array.

    Returns:
      As many sums as there are terms. Their derivatives are those of the terms, at the scale that was chosen.
    """
    levels = _levels(terms, leaves)
    levels = levels if axis_name is None else lax.psum(levels, axis_name)
    return [_best(*sums) for sums in zip(*levels, strict=True)]


@totals.defjvp
def _totals_jvp(terms, axis_name, primals, tangents):
    sums = totals(terms, *primals, axis_name)

    def at_its_scale(leaves):
        # The terms of a sum of zeros have ordinary derivatives, which would not be so at the scale for small terms.
        exponents = [jnp.where(s.value == 0, 0, -s.exponent >> 1) for s in sums]
        halves = [power_of_two(e, s.value.dtype) for e, s in zip(exponents, sums, strict=True)]
        values = [sum(jnp.sum(terms(half, *arrays)[i]) for arrays in leaves) for i, half in enumerate(halves)]
        return values if axis_name is None else lax.psum(values, axis_name)

    _, slopes = jax.jvp(at_its_scale, primals, tangents)
    nothing = np.zeros((), jax.dtypes.float0)
    return sums, [Wide(slope, nothing) for slope in slopes]


def _levels(terms: Terms, leaves: Sequence[tuple[jax.Array, ...]]) -> list[list[jax.Array]]:
    """The sums at three scales: for large terms, for ordinary and for small ones."""
    dtype = jnp.finfo(leaves[0][0].dtype).dtype
    halves = [np.asarray(2.0 ** (sign * _half_exponent(dtype)), dtype) for sign in (-1, 0, 1)]
    if all(x.size <= _FEW and is_local(x) for arrays in leaves for x in arrays):
        return _added([_in_one_pass(terms, halves, arrays) for arrays in leaves])

    def at(half):
        return [sum(column) for column in zip(*([jnp.sum(t) for t in terms(half, *x)] for x in leaves), strict=True)]

    ordinary = at(halves[1])
    if jax.default_backend() != "cpu":
        return [at(halves[0]), ordinary, at(halves[2])]
    # On a CPU every sum is another pass, and an accelerator would wait for the answer. A sum that is ordinary here may
    # not be so after those of other devices: then it is what it is times the scale.
    fits = functools.reduce(jnp.logical_and, [(x >= 2.0 ** _low(dtype)) & (x <= 2.0 ** _high(dtype)) for x in ordinary])
    scaled = lambda half: magnitudes(half, *ordinary)
    large, small = lax.cond(
        fits, lambda: (scaled(halves[0]), scaled(halves[2])), lambda: (at(halves[0]), at(halves[2]))
    )
    return [large, ordinary, small]


def _in_one_pass(terms: Terms, halves: Sequence[np.ndarray], arrays: tuple[jax.Array, ...]) -> list[list[jax.Array]]:
    # The scales are an axis, since code that runs once a step takes as long as it takes to load.
    summands = terms(np.stack(halves)[:, None], *(x.reshape(1, -1) for x in arrays))
    sums = one_pass(summands, [SUM] * len(summands), (1,))
    return [[x[i] for x in sums] for i in range(len(halves))]


def _added(trees: Sequence) -> list[list[jax.Array]]:
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), trees)


def _best(large: jax.Array, ordinary: jax.Array, small: jax.Array) -> Wide:
    """The sum at the scale that suits it. NaN is neither large nor small."""
    dtype, scale = ordinary.dtype, 2 * _half_exponent(ordinary.dtype)
    is_large, is_small = ordinary > 2.0 ** _high(dtype), ordinary < 2.0 ** _low(dtype)
    value = jnp.where(is_large, large, jnp.where(is_small, small, ordinary))
    return Wide(value, jnp.where(is_large, scale, jnp.where(is_small, -scale, 0)).astype(jnp.int32))


# With E the largest exponent (128 in float32): below 2**-5E/8 squares that vanished may count, above 2**25E/32 some may
# be infinite. A scale of 2**+-5E/4 takes both, and the largest and smallest quotients, to the middle of the range.
def _half_exponent(dtype: np.dtype) -> int:
    return 5 * int(jnp.finfo(dtype).maxexp) // 8


def _low(dtype: np.dtype) -> int:
    return -5 * int(jnp.finfo(dtype).maxexp) // 8


def _high(dtype: np.dtype) -> int:
    return 25 * int(jnp.finfo(dtype).maxexp) // 32
