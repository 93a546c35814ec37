"""Sums of terms of any size, which neither overflow nor vanish where the result does not.

The terms are summed three times in one pass: as they are, times a large power of two and times a small one. One of the
three sums is a float of full precision. Sums add up over arrays and devices, where the largest term, to scale by, would
have to be known before the first pass. The sums of all layers are vectors: what follows from them compiles once.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from curvax.magnitudes import SUM, is_local, one_pass, rows_of
from curvax.varying import AxisName
from curvax.wide import Wide, no_slope, power_of_two

#: `terms(half, *arrays)`: for each sum its terms, not negative, times `half**2`; or booleans, of which the true are
#: counted. All are zero or false where all arrays are zero.
Terms = Callable[..., Sequence[jax.Array]]
#: Tuples of arrays of one shape `(number, ...)`, over all but the first axis of which a sum is taken.
Layer = Sequence[tuple[jax.Array, ...]]

# As many numbers are added one by one: that rounds no worse than anything else.
_BLOCK = 256


def squares(half: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """Terms of the sum of squared magnitudes of each array."""
    return [jnp.square(_scaled(x, half)) for x in arrays]


def squares_and_moving(half: jax.Array, w: jax.Array, g: jax.Array) -> list[jax.Array]:
    """Terms of the sums of squared magnitudes, and which entries have a gradient."""
    return [*squares(half, w, g), g != 0]


def magnitudes(half: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """Terms of the sum of magnitudes of each array."""
    return [_scaled(_scaled(x, half), half) for x in arrays]


def magnitudes_and_moving(half: jax.Array, h: jax.Array, g: jax.Array) -> list[jax.Array]:
    """Terms of the sum of magnitudes, and which entries have a gradient."""
    return [*magnitudes(half, h), g != 0]


def slopes(half: jax.Array, w: jax.Array, g: jax.Array) -> list[jax.Array]:
    """Terms of the sum of `|g / w|` over the entries where w is not 0, and which these are."""
    is_zero = w == 0
    return [jnp.where(is_zero, 0, _slope(jnp.abs(g), jnp.where(is_zero, 1, jnp.abs(w)), half)), ~is_zero]


def falls_and_rises(half: jax.Array, u: jax.Array, g: jax.Array) -> list[jax.Array]:
    """Terms of the sum of `-u g` where it is positive, and of that of `u g` where it is."""
    pairs = [(u, g)] if not jnp.iscomplexobj(g) else [(jnp.real(u), jnp.real(g)), (jnp.imag(u), jnp.imag(g))]
    sizes = [jnp.sign(x) * jnp.sign(y) * (_scaled(x, half) * _scaled(y, half)) for x, y in pairs]
    rise = sum(sizes[1:], sizes[0])
    return [jnp.maximum(-rise, 0), jnp.maximum(rise, 0)]


@jax.custom_jvp
def _slope(g: jax.Array, w: jax.Array, half: jax.Array) -> jax.Array:
    # Where w vanishes at the scale for small terms, g is 0.
    return _scaled(g, half) / _scaled(w, 1 / half, jnp.finfo(w.dtype).tiny)


@_slope.defjvp
def _slope_jvp(primals: Sequence[jax.Array], tangents: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Relative changes, which stay in range where `w**2` does not."""
    (g, w, _), (g_tangent, w_tangent, _) = primals, tangents
    slope = _slope(*primals)
    return slope, slope * (g_tangent / jnp.where(g == 0, 1, g)) - slope * (w_tangent / w)


def _scaled(x: jax.Array, half: jax.Array, least: jax.typing.ArrayLike = 0) -> jax.Array:
    # Without the maximum XLA would multiply the scales of two factors first, and find their product infinite.
    return jnp.maximum(jnp.abs(x) * half, least)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 2))
def totals(terms: Terms, layers: Sequence[Layer], axis_name: AxisName) -> list[Wide]:
    """Sums over the arrays of each layer, and over the devices that hold parts of them.

    Args:
      terms: one of the functions above.
      layers: for each the arrays over which it is taken, at least one; all of one dtype. The first axis counts layers.
      axis_name: mesh axes (of `shard_map` or `pmap`) that split every array.

    Returns:
      For each of the terms a vector, with an entry for each layer. Their derivatives are those of the terms, at the
      scale that was chosen.
    """
    sums = _sums(terms, layers)
    sums = sums if axis_name is None else lax.psum(sums, axis_name)
    return [_best(*scales) for scales in sums]


@totals.defjvp
def _totals_jvp(terms: Terms, axis_name: AxisName, primals: Any, tangents: Any) -> tuple[list[Wide], list[Wide]]:
    sums = totals(terms, *primals, axis_name)

    def at_its_scale(layers: Sequence[Layer]) -> list[jax.Array]:
        # The terms of a sum of zeros have ordinary derivatives, which would not be so at the scale for small terms.
        exponents = [jnp.where(s.value == 0, 0, -s.exponent >> 1) for s in sums]
        halves = [power_of_two(e, s.value.dtype) for e, s in zip(exponents, sums, strict=True)]

        def of_layer(i: int, half: jax.Array, layer: Layer) -> jax.Array:
            along = lambda x: half.reshape(-1, *[1] * (x.ndim - 1))
            total = lambda x: jnp.sum(x.astype(half.dtype), tuple(range(1, x.ndim)))
            return functools.reduce(jnp.add, (total(terms(along(x[0]), *x)[i]) for x in layer))

        starts = np.cumsum([0, *(layer[0][0].shape[0] for layer in layers)])
        apart = lambda half: [half[a:b] for a, b in itertools.pairwise(starts)]
        values = [
            jnp.concatenate([of_layer(i, *x) for x in zip(apart(half), layers, strict=True)])
            for i, half in enumerate(halves)
        ]
        return values if axis_name is None else lax.psum(values, axis_name)

    _, slopes = jax.jvp(at_its_scale, primals, tangents)
    return sums, [Wide(slope, no_slope(slope)) for slope in slopes]


def _sums(terms: Terms, layers: Sequence[Layer]) -> list[list[jax.Array]]:
    """For each of the terms its sums, vectors over the layers: at the three scales, or of ones alone."""
    arrays = [x for layer in layers for x in layer]
    matrices, others, standing = rows_of([[[x] for x in columns] for columns in arrays])
    parts = [_one_pass(_values(terms, columns), (1,)) for columns in matrices]
    parts += [_added(_values(terms, arrays[i])) for i in others]
    # Each layer's arrays in the order in which they were summed, filled up with a zero.
    where = iter(standing)
    rows: list[tuple[int, ...]] = []
    for layer in layers:
        rows += zip(*([next(where) for _ in range(x[0].shape[0])] for x in layer), strict=True)
    width = max(map(len, rows))
    places = np.array([[*row, *[len(standing)] * (width - len(row))] for row in rows])
    of_layers = lambda *x: jnp.sum(jnp.concatenate([*x, jnp.zeros_like(x[0][:1])])[places], 1)
    sums: list[list[jax.Array]] = jax.tree.map(of_layers, *parts)
    return sums


def _values(terms: Terms, arrays: Sequence[jax.Array]) -> list[list[jax.Array]]:
    """The terms at three scales: for large ones, for ordinary and for small ones; booleans as ones and zeros."""
    dtype = jnp.finfo(arrays[0].dtype).dtype
    halves = [np.asarray(2.0 ** (sign * _half_exponent(dtype)), dtype) for sign in (-1, 0, 1)]
    scales = zip(*(terms(half, *arrays) for half in halves), strict=True)
    return [[x[1].astype(dtype)] if x[1].dtype == bool else list(x) for x in scales]


def _added(values: list[list[jax.Array]]) -> list[list[jax.Array]]:
    """The sums over all axes but the first."""
    first = values[0][0]
    if jax.default_backend() != "cpu" or not is_local(first):
        # Compilers of accelerators make one pass of these. Where devices hold parts, each adds up its own.
        added: list[list[jax.Array]] = jax.tree.map(lambda x: jnp.sum(x, tuple(range(1, x.ndim))), values)
        return added
    number, size = first.shape[0], math.prod(first.shape[1:])
    width = min(size, _BLOCK)
    rows = -(-size // width)
    filling = ((0, 0), (0, rows * width - size))
    in_rows = lambda x: jnp.pad(x.reshape(number, size), filling).reshape(number * rows, width)
    # XLA's CPU compiler would make a pass and copies of each sum. Rows also are what it divides between threads.
    sums = jax.tree.map(lambda x: x.reshape(number, rows), _one_pass(jax.tree.map(in_rows, values), (1,)))
    added = _added(sums) if rows > 1 else jax.tree.map(lambda x: x.reshape(number), sums)
    return added


def _one_pass(values: list[list[jax.Array]], axes: tuple[int, ...]) -> list[list[jax.Array]]:
    leaves, treedef = jax.tree.flatten(values)
    sums: list[list[jax.Array]] = jax.tree.unflatten(treedef, one_pass(leaves, [SUM] * len(leaves), axes))
    return sums


def _best(*sums: jax.Array) -> Wide:
    """The sum at the scale that suits it. NaN is neither large nor small."""
    if len(sums) == 1:
        return Wide(*sums, jnp.zeros(sums[0].shape, jnp.int32))
    large, ordinary, small = sums
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
