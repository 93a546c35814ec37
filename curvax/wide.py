"""Numbers whose exponent leaves the range of floats.

The square of a gradient of 1e20 is no float32, and its root is; the radius of a layer may be none, and its product with
the gradient is. What lies in between is kept here as `value * 2**exponent`. Scaling by powers of two rounds nothing, so
that within the range of floats every result is what plain arithmetic gives.

A number below the smallest normal one (1.2e-38 in float32) is 0 where the hardware takes it for 0, as XLA does on CPUs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Wide(NamedTuple):
    """A real number, or an array of them, as `value * 2**exponent`.

    Attributes:
      value: float32 or float64; neither large nor small, unless it is 0, infinite or NaN.
      exponent: int32.
    """

    value: jax.Array
    exponent: jax.Array


class Factors(NamedTuple):
    """A wide number as a power of two times the rest, both about its root, so that both are floats."""

    power: jax.Array
    rest: jax.Array


WideOrFactors = TypeVar("WideOrFactors", Wide, Factors)


def wide(x: jax.Array) -> Wide:
    """Real floats as wide numbers, whose values have a magnitude in [1, 4)."""
    exponent = jnp.clip(_exponent(x), _least(x.dtype), -_least(x.dtype))
    return Wide(x * power_of_two(-exponent, x.dtype), exponent)


def normal(a: Wide) -> Wide:
    """The same numbers, with values as `wide` gives them."""
    value, exponent = wide(a.value)
    return Wide(value, a.exponent + exponent)


def cast(a: Wide, dtype: np.dtype) -> Wide:
    """The same numbers in floats of another size."""
    if a.value.dtype == dtype:
        return a
    value, exponent = normal(a)
    return Wide(value.astype(dtype), exponent)


def times(x: jax.typing.ArrayLike, a: Wide) -> Wide:
    """`x * a`, where `x` is an ordinary number."""
    return Wide(jnp.asarray(x, a.value.dtype) * a.value, a.exponent)


def product_of(a: Wide, b: Wide) -> Wide:
    """`a * b`."""
    a, b = normal(a), normal(b)
    return Wide(a.value * b.value, a.exponent + b.exponent)


def least(a: Wide, b: Wide) -> Wide:
    """The smaller of two numbers that are not negative; NaN if one is."""
    return select((to_float(quotient(a, b)) > 1) | jnp.isnan(b.value), b, a)


def greatest(a: Wide, b: Wide) -> Wide:
    """The larger of two numbers that are not negative; NaN if one is."""
    return select((to_float(quotient(a, b)) < 1) | jnp.isnan(b.value), b, a)


def select(condition: jax.Array, a: Wide, b: Wide) -> Wide:
    """`a` where the condition holds, else `b`."""
    return Wide(jnp.where(condition, a.value, b.value), jnp.where(condition, a.exponent, b.exponent))


def concatenate(vectors: Sequence[Wide]) -> Wide:
    """One vector of several, in the widest of their floats."""
    dtype = max((x.value.dtype for x in vectors), key=lambda dtype: dtype.itemsize)
    return Wide(*map(jnp.concatenate, zip(*(cast(x, dtype) for x in vectors), strict=True)))


def append(a: Wide, scalar: Wide) -> Wide:
    """A vector with one more entry."""
    return Wide(*(jnp.append(x, y) for x, y in zip(a, cast(scalar, a.value.dtype), strict=True)))


def take(a: WideOrFactors, places: int | Sequence[int] | np.ndarray) -> WideOrFactors:
    """One entry of a vector, or several."""
    return type(a)(*(x[places] if isinstance(places, int) else x[np.asarray(places)] for x in a))


def plus(a: Wide, b: Wide) -> Wide:
    """`a + b`, of numbers whose values are those of `wide`."""
    # The exponent of a zero must not decide.
    exponents = [jnp.where(x.value == 0, 8 * _least(x.value.dtype), x.exponent) for x in (a, b)]
    exponent = jnp.maximum(*exponents)
    shifts = [jnp.maximum(e - exponent, _least(a.value.dtype)) for e in exponents]
    first, second = [x.value * power_of_two(e, x.value.dtype) for x, e in zip((a, b), shifts, strict=True)]
    return Wide(first + second, exponent)


def total(a: Wide) -> Wide:
    """The sum of a vector, whose values are those of `wide`."""
    least = _least(a.value.dtype)
    # The exponent of a zero must not decide.
    largest = jnp.max(jnp.where(a.value == 0, 8 * least, a.exponent))
    return Wide(jnp.sum(a.value * power_of_two(jnp.maximum(a.exponent - largest, least), a.value.dtype)), largest)


def norm(a: Wide) -> Wide:
    """The root of the sum of the squares of a vector."""
    value, exponent = normal(a)
    return root(total(Wide(jnp.square(value), 2 * exponent)))


def plus_float(a: Wide, x: jax.typing.ArrayLike) -> Wide:
    """`a + x`, where `x` is as ordinary as the value of `a`."""
    dtype = a.value.dtype
    return Wide(a.value + jnp.asarray(x, dtype) * power_of_two(-a.exponent, dtype), a.exponent)


@jax.custom_jvp
def quotient(a: Wide, b: Wide) -> Wide:
    """`a / b`."""
    # Without the maximum XLA would compute the reciprocal root of a sum in a kernel of its own.
    return Wide(a.value / jnp.maximum(b.value, 0), a.exponent - b.exponent)


@quotient.defjvp
def _quotient_jvp(primals: tuple[Wide, Wide], tangents: tuple[Wide, Wide]) -> tuple[Wide, Wide]:
    """Without the square of the denominator, which may overflow."""
    (a, b), (slope_a, slope_b) = primals, tangents
    found = quotient(a, b)
    slope = quotient(Wide(slope_a.value - found.value * slope_b.value, found.exponent), b).value
    return found, Wide(slope, no_slope(found.exponent))


def no_slope(x: jax.Array) -> Any:
    """The tangent of integers of this shape: an array of NumPy without content."""
    return np.zeros(x.shape, jax.dtypes.float0)


@jax.custom_jvp
def root(a: Wide) -> Wide:
    """The square root of a number with an even exponent. That of 0 has the derivative 0, as a norm should."""
    return Wide(jnp.sqrt(a.value), a.exponent >> 1)


@root.defjvp
def _root_jvp(primals: tuple[Wide], tangents: tuple[Wide]) -> tuple[Wide, Wide]:
    found = root(*primals)
    slope = jnp.where(found.value == 0, 0, 0.5 / jnp.where(found.value == 0, 1, found.value))
    return found, Wide(slope * tangents[0].value, no_slope(found.exponent))


def factors(a: Wide) -> Factors:
    """Floats whose product is the number."""
    value, exponent = a
    least = _least(value.dtype)
    half = jnp.clip((_exponent(value) + exponent) >> 1, least, 1 - least)
    others = jnp.clip(exponent - half, least, 1 - least)
    # Divisions, since XLA's CPU compiler repeats anything cheaper in every loop that needs an entry of a vector.
    return Factors(2 / power_of_two(1 - half, value.dtype), 2 * value / power_of_two(1 - others, value.dtype))


@jax.jit
def product(a: Wide | Factors, x: jax.Array) -> jax.Array:
    """`a * x`, right wherever it is a float: `a` itself need be none."""
    power, rest = a if isinstance(a, Factors) else factors(a)
    return (x * power.astype(x.dtype)) * rest.astype(x.dtype)


def to_float(a: Wide) -> jax.Array:
    """The nearest float; 0 or infinite where there is none."""
    x: jax.Array = product(a, jnp.ones((), a.value.dtype))
    return x


def _exponent(x: jax.Array) -> jax.Array:
    """The integer part of log2 of the magnitudes, from their bits; of 0 the one below the smallest."""
    word, bits = _word(x.dtype)
    biased = (lax.bitcast_convert_type(x, word) & _exponent_bits(x.dtype)) >> bits
    return biased.astype(jnp.int32) - (1 - _least(x.dtype))


def power_of_two(exponent: jax.Array, dtype: np.dtype) -> jax.Array:
    """`2**exponent`, of a normal number."""
    word, bits = _word(dtype)
    return lax.bitcast_convert_type((exponent + (1 - _least(dtype))).astype(word) << bits, dtype)


def _least(dtype: np.dtype) -> int:
    """The exponent of the smallest normal number."""
    return int(jnp.finfo(dtype).minexp)


def _word(dtype: np.dtype) -> tuple[np.dtype, int]:
    """The integers of as many bits, and how many of these belong to the mantissa."""
    return np.dtype(f"int{jnp.finfo(dtype).bits}"), jnp.finfo(dtype).nmant


def _exponent_bits(dtype: np.dtype) -> int:
    return int(np.asarray(np.inf, dtype).view(_word(dtype)[0]))
