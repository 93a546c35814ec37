"""The rules: from the arrays of a layer to its radius.

Every rule estimates the radius of curvature of the loss along a parameter,

    R_i = (1 + g_i^2)^(3/2) / |h_i|         (Gao & Zhong, eq. 9),

from the parameters w, their gradient g and, if it has it, the diagonal h of the Hessian. Near the minimum of a parabola
centred at zero h_i = g_i / w_i, so without h it is |w_i / g_i| (eq. 17): useless entry by entry, where w_i or g_i is
near zero, but sound as an average over a layer. The layer rules differ in the average alone:

    LARS           norm2(w) / norm2(g)            eq. 23: the root of the mean of R_i^2, weighted by g_i^2
    PercentDelta   n / norm1(g / w)               eq. 24: the harmonic mean of R_i
    MCLR           median|w| / median|g|          eq. 20-22

Degenerate layers are dealt with here, once, in `_or_one`: a radius of 0, inf or 0/0 that comes of finite numbers
carries no information, and becomes 1 (after the trust coefficient, as in `optax.lars`), so that a layer of zeros can
leave zero. NaN is passed on: it is somebody's bug, and must be seen. An infinite gradient entry leaves an infinite or
NaN update.

A rule is a function `(measured, scaled) -> radii`: from the leaves on which the layer is measured and those which it
scales (see `layers`) to one radius for each scaled leaf, a scalar or an array. An entry whose gradient is exactly zero,
such as those of an embedding's rows that were not looked up and the weights of a dead unit, does not move, and is not
measured: a rule is given zeros in its place, and does not count it. All sums, counts and sizes run over `axis_name`
too, the mesh axes (of `shard_map` or `pmap`) that split parameters.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax import order_statistics

Arrays = Sequence[jax.Array]
Scalar = jax.typing.ArrayLike
AxisName = str | tuple[str, ...] | None


class Leaves(NamedTuple):
    """Some leaves of a layer, all of one dtype of at least float32.

    Attributes:
      w: the parameters.
      g: their gradients, or whatever came out of the transformation before.
      h: the diagonal of the Hessian at each; empty for the rules that do without.
    """

    w: Arrays
    g: Arrays
    h: Arrays


Rule = Callable[[Leaves, Leaves], list[jax.Array]]
#: A rule for all layers of a tree at once, where they bear on each other: it is given all measured leaves, too.
TreeRule = Callable[[Sequence[tuple[Leaves, Leaves]], Leaves], list[list[jax.Array]]]

#: A layer with less than this share of the tree's mean curvature has no more of it than float32 has rounding noise.
NOISE = 1e-4


def each(rule: Rule) -> TreeRule:
    """A rule that looks at every layer by itself."""
    return lambda layers, kernels: [rule(*layer) for layer in layers]


def curvature(damping: Scalar, max_radius: Scalar | None, slope_term: bool, axis_name: AxisName) -> TreeRule:
    """Eq. 9 per parameter: `(1 + g^2)^(3/2) / (|h| + damping * mean|h|)`, or `1 / ...` without the slope term.

    The mean is at least `NOISE` of that over all measured leaves, which is also that of a layer without any.
    """

    def one_leaf(g, h, mean):
        slope = 1 + jnp.square(jnp.abs(g)) if slope_term else jnp.ones_like(h)
        arc = slope * jnp.sqrt(slope)
        return _bounded(arc, jnp.abs(h) + _like(damping, h) * mean.astype(h.dtype), max_radius)

    def radii(layers: Sequence[tuple[Leaves, Leaves]], kernels: Leaves):
        # Without any measured leaf there is one layer.
        tree = _mean_curvature(kernels if kernels.h else layers[0][1], axis_name)
        own = [_mean_curvature(measured, axis_name) if measured.h else tree for measured, _ in layers]
        means = [jnp.maximum(mean, NOISE * tree.astype(mean.dtype)) for mean in own]
        return [
            [one_leaf(g, h, mean) for g, h in zip(scaled.g, scaled.h, strict=True)]
            for (_, scaled), mean in zip(layers, means, strict=True)
        ]

    return radii


def approximate(max_radius: Scalar | None) -> Rule:
    """Eq. 17 per parameter: `|w / g|`."""

    def radii(measured: Leaves, scaled: Leaves):
        del measured
        return [_bounded(jnp.abs(w), jnp.abs(g), max_radius) for w, g in zip(scaled.w, scaled.g, strict=True)]

    return radii


def lars(trust_coefficient: Scalar, eps: Scalar, axis_name: AxisName) -> Rule:
    """Eq. 23: `norm2(w) / (norm2(g) + eps)`."""

    def radius(w: Arrays, g: Arrays):
        return _ratio(norm(w, axis_name), norm(g, axis_name), trust_coefficient, eps)

    return _one_for_all(radius)


def percent_delta(trust_coefficient: Scalar, axis_name: AxisName) -> Rule:
    """Eq. 24: `n / norm1(g / w)`, where entries with `w = 0` are neither counted nor summed."""

    def radius(w: Arrays, g: Arrays):
        # Slopes are taken of w and g in units of their own, so that the largest is at most about 1.
        inverse = [jnp.where(x == 0, 0, 1 / jnp.where(x == 0, 1, jnp.abs(x))) for x in w]
        finest, steepest = _scale(inverse, axis_name), _scale(g, axis_name)
        slopes = [jnp.abs(y) / steepest * (x / finest) for x, y in zip(inverse, g, strict=True)]
        total = _sum([jnp.sum(slope) for slope in slopes], axis_name)
        count = _sum([jnp.sum(x != 0).astype(total.dtype) for x in w], axis_name)
        return _ratio(count, total, trust_coefficient, unit=1 / finest / steepest)

    return _one_for_all(radius)


def median(trust_coefficient: Scalar, of_ratios: bool, axis_name: AxisName) -> Rule:
    """Eq. 20-22: `median|w| / median|g|`, or the median of the ratios themselves."""

    def radius(w: Arrays, g: Arrays):
        unmeasured = order_statistics.zeros(g, axis_name)
        if not of_ratios:
            return _ratio(*order_statistics.medians(w, g, axis_name=axis_name, without=unmeasured), trust_coefficient)
        ratios = [jnp.where(y == 0, 0, jnp.abs(x) / jnp.abs(y)) for x, y in zip(w, g, strict=True)]
        middle = order_statistics.median(ratios, axis_name, unmeasured)
        return _ratio(middle, jnp.ones((), ratios[0].dtype), trust_coefficient)

    return _one_for_all(radius)


def _one_for_all(radius: Callable[[Arrays, Arrays], jax.Array]) -> Rule:
    """A rule that gives all scaled leaves the radius of the measured ones, and 1 where nothing is measured."""

    def radii(measured: Leaves, scaled: Leaves):
        value = radius(measured.w, measured.g) if measured.w else jnp.ones((), jnp.finfo(scaled.w[0].dtype).dtype)
        return [value] * len(scaled.w)

    return radii


def _mean_curvature(leaves: Leaves, axis_name: AxisName) -> jax.Array:
    total = _sum([jnp.sum(jnp.abs(h)) for h in leaves.h], axis_name)
    count = _sum([jnp.sum(g != 0).astype(total.dtype) for g in leaves.g], axis_name)
    return total / jnp.maximum(count, 1)


def norm(x: Arrays, axis_name: AxisName) -> jax.Array:
    """The norm of several arrays taken together, wherever that is a float: its squares need not be."""
    scale = _scale(x, axis_name)
    total = _sum([jnp.sum(jnp.square(jnp.abs(leaf) / scale)) for leaf in x], axis_name)
    # The root of zero has no derivative.
    return jnp.where(total == 0, 0, jnp.sqrt(jnp.where(total == 0, 1, total))) * scale


def _scale(x: Arrays, axis_name: AxisName) -> jax.Array:
    """A power of two next to the largest magnitude, by which division rounds nothing."""
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(leaf), initial=0) for leaf in x])
    largest = jax.lax.stop_gradient(largest)
    largest = largest if axis_name is None else jax.lax.pmax(largest, axis_name)
    ordinary = (largest > 0) & (largest < jnp.inf)
    _, exponent = jnp.frexp(jnp.where(ordinary, largest, 1))
    return jnp.ldexp(jnp.ones_like(largest), exponent - 1)


def _sum(parts: Sequence[jax.Array], axis_name: AxisName) -> jax.Array:
    total = functools.reduce(jnp.add, parts)
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def _ratio(
    numerator: jax.Array, denominator: jax.Array, trust_coefficient: Scalar, eps: Scalar = 0.0, unit: Scalar = 1.0
) -> jax.Array:
    # `eps` hides a vanishing denominator; the test for degenerate layers must see it, as that of optax.lars does.
    below = jnp.where(denominator == 0, 1, denominator + _like(eps, denominator))
    radius = _like(trust_coefficient, numerator) * numerator / below * _like(unit, numerator)
    return _or_one(radius, numerator, denominator)


def _bounded(numerator: jax.Array, denominator: jax.Array, max_radius: Scalar | None) -> jax.Array:
    radius = numerator / jnp.where(denominator == 0, 1, denominator)
    if max_radius is None:
        return _or_one(radius, numerator, denominator)
    # 0/0 is as flat as the loss can be along a parameter: it gets the largest radius, like 1/0.
    flat = (denominator == 0) & ~jnp.isnan(numerator)
    most = _like(max_radius, radius)
    return _or_one(jnp.where(flat, most, jnp.minimum(radius, most)), numerator, jnp.where(flat, 1, denominator), flat)


def _or_one(
    radius: jax.Array, numerator: jax.Array, denominator: jax.Array, known: jax.Array | bool = False
) -> jax.Array:
    """The policy for degenerate layers: see the head of this file.

    A radius of 0 or inf that comes of numbers which are neither has left the range of floats, and says nothing.
    """
    passed_on = jnp.isnan(numerator) | jnp.isnan(denominator)
    ordinary = [(x > 0) & (x < jnp.inf) for x in (numerator, denominator)]
    informative = (ordinary[0] & ordinary[1]) | known
    radius = jnp.minimum(radius, np.asarray(jnp.finfo(radius.dtype).max, radius.dtype))
    return jnp.where(passed_on, jnp.nan, jnp.where(informative, radius, 1))


def _like(value: Scalar, x: jax.Array) -> jax.Array:
    """A hyperparameter in the dtype of `x`, whether it comes as a number or, injected, as an array."""
    return jnp.asarray(value, x.dtype)
