"""The rules: from the arrays of a layer to its radius.

Every rule estimates the radius of curvature of the loss along a parameter,

    R_i = (1 + g_i^2)^(3/2) / |h_i|         (Gao & Zhong, eq. 9),

from the parameters w, their gradient g and, if it has it, the diagonal h of the Hessian. Near the minimum of a parabola
centred at zero h_i = g_i / w_i, so without h it is |w_i / g_i| (eq. 17): useless entry by entry, where w_i or g_i is
near zero, but sound as an average over a layer. The layer rules differ in the average alone:

    LARS           norm2(w) / norm2(g)            eq. 23: the root of the mean of R_i^2, weighted by g_i^2
    PercentDelta   n / norm1(g / w)               eq. 24: the harmonic mean of R_i
    MCLR           median|w| / median|g|          eq. 20-22

Degenerate layers are dealt with here, once, in `_ratio`: a radius of 0, inf or 0/0 carries no information, and becomes
1 (whatever the trust coefficient, as in `optax.lars`), so that a layer of zeros can leave zero. It is the arrays that
have to be zero or infinite: radii, and all that leads to them, are wide numbers (see `wide`), and do not overflow. The
derivative of this 1 is 0. NaN is passed on: it is somebody's bug, and must be seen.

A rule is a function from the leaves on which layers are measured to their radii: one vector for all, in which layers of
small arrays are measured together, so that many of them compile as one. Every array has one axis more in front, which
counts layers (`stacks`): 1, or more where slices are layers of their own. `one_for_all` makes of it a rule for a tree,
from `(measured, scaled)` leaves of each layer (see `layers`) to one radius for each scaled leaf, a scalar or an array.
An entry whose gradient is exactly zero, such as those of an embedding's rows that were not looked up and the weights of
a dead unit, does not move, and is not measured: a rule is given zeros in its place, and does not count it. All sums,
counts and sizes run over `axis_name` too, the mesh axes (of `shard_map` or `pmap`) that split parameters.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax import order_statistics
from curvax.magnitudes import rows_of
from curvax.selection import SAMPLE
from curvax.stacks import for_each
from curvax.sums import magnitudes_and_moving, slopes, squares, squares_and_moving, totals
from curvax.varying import AxisName, varies_over
from curvax.wide import (
    Factors,
    Wide,
    WideOrFactors,
    append,
    cast,
    concatenate,
    factors,
    greatest,
    normal,
    plus,
    plus_float,
    quotient,
    root,
    select,
    take,
    times,
    to_float,
    total,
    wide,
)

Arrays = Sequence[jax.Array]
Scalar = jax.typing.ArrayLike


class Leaves(NamedTuple):
    """Some leaves of a layer, or of as many layers as their first axis counts, of one dtype of at least float32.

    Attributes:
      w: the parameters.
      g: their gradients, or whatever came out of the transformation before.
      h: the diagonal of the Hessian at each; empty for the rules that do without.
    """

    w: Arrays
    g: Arrays
    h: Arrays


#: From layers of one dtype, with one leaf each at least, to the vector of the radii of all their slices.
Rule = Callable[[Sequence[Leaves]], Wide]
#: From the measured and scaled leaves of every layer to a radius for each scaled leaf.
TreeRule = Callable[[Sequence[tuple[Leaves, Leaves]]], Sequence[Sequence[Wide | Factors]]]

#: From parameters, gradients and mesh axes to two wide numbers, the quotient of which is a radius.
Middle = Callable[[Arrays, Arrays, AxisName], tuple[Wide, Wide]]

#: A layer with less than this share of the tree's mean curvature has no more of it than float32 has rounding noise.
NOISE = 1e-4


def each(rule: Callable[[Leaves, Leaves], list[Wide]]) -> TreeRule:
    """A rule that looks at every layer by itself, and gives each scaled leaf an array of radii."""
    return lambda layers: [rule(*layer) for layer in layers]


def one_for_all(rule: Rule) -> TreeRule:
    """A rule that gives all scaled leaves the radius of the measured ones, and 1 where nothing is measured."""

    def radii(layers: Sequence[tuple[Leaves, Leaves]]) -> list[list[Wide | Factors]]:
        found = iter(by_layer(rule, [measured for measured, _ in layers if measured.w]))
        one = lambda scaled: wide(jnp.ones((), jnp.finfo(scaled.w[0].dtype).dtype))
        return [_of_leaves(next(found) if measured.w else one(scaled), scaled) for measured, scaled in layers]

    def _of_leaves(radius: Wide | Factors, scaled: Leaves) -> list[Wide | Factors]:
        return [type(radius)(*(along(x, g) for x in radius)) for g in scaled.g]

    return radii


def by_layer(rule: Rule, layers: Sequence[Leaves]) -> list[Factors]:
    """The radius of each layer, in its own dtype, and varying over its own axes of a mesh only."""
    found: dict[int, Factors] = {}
    for members in _kinds(layers):
        radius = factors(rule([layers[i] for i in members]))
        found |= dict(zip(members, entries(radius, [layers[i] for i in members]), strict=True))
    return [found[i] for i in range(len(layers))]


def entries(vector: WideOrFactors, layers: Sequence[Leaves]) -> Iterator[WideOrFactors]:
    """A vector's entries for each layer: a scalar, or a vector where it is many."""
    start = 0
    for layer in layers:
        number = count(layer)
        yield take(vector, start if number == 1 else range(start, start + number))
        start += number


def count(layer: Leaves) -> int:
    """Of how many layers these are the leaves."""
    return next(x for column in layer for x in column).shape[0]


def along(of_layers: jax.Array, x: jax.Array) -> jax.Array:
    """An entry for each layer, as an array that multiplies `(number of layers, ...)`."""
    return of_layers.reshape(-1, *[1] * (x.ndim - 1)) if of_layers.ndim else of_layers


def together(rule: Callable[[Sequence[Leaves]], Sequence[Wide]], layers: Sequence[Leaves]) -> list[Wide]:
    """Vectors that a rule makes for all layers, of whatever dtypes, in the widest of these."""
    kinds = _kinds(layers)
    found = zip(*(rule([layers[i] for i in members]) for members in kinds), strict=True)
    places = np.argsort([i for members in kinds for i in members for _ in range(count(layers[i]))], kind="stable")
    return [take(concatenate(column), places) if len(kinds) > 1 else column[0] for column in found]


def squared_norms(groups: Sequence[Arrays], axis_name: AxisName) -> Wide:
    """The squared norm of the arrays of each group, `(number of layers, ...)` each."""
    of_kind = lambda layers: totals(squares, [[(x,) for x in layer.g] for layer in layers], axis_name)
    (found,) = together(of_kind, [Leaves((), group, ()) for group in groups])
    return found


def pairs(x: Arrays, y: Arrays) -> list[tuple[jax.Array, jax.Array]]:
    """Arrays of two kinds side by side."""
    return list(zip(x, y, strict=True))


def _kinds(layers: Sequence[Leaves]) -> list[list[int]]:
    """Which layers are alike in dtype and in the axes of a mesh over which they vary."""
    kinds: dict[tuple[Any, frozenset[str]], list[int]] = {}
    for i, layer in enumerate(layers):
        leaves = jax.tree.leaves(layer)
        kinds.setdefault((leaves[0].dtype, frozenset().union(*map(varies_over, leaves))), []).append(i)
    return list(kinds.values())


def curvature(damping: Scalar, max_radius: Scalar | None, slope_term: bool | None, axis_name: AxisName) -> TreeRule:
    """Eq. 9 per parameter: `(1 + g^2)^(3/2) / (|h| + damping * mean|h|)`, or `1 / ...` without the slope term.

    With `slope_term=None` it is there while `damping` is 0. The mean of a layer counts for no less than `NOISE` times
    that of the tree, which is also the mean of a layer without measured leaves.
    """

    def slope(g: jax.Array) -> jax.Array:
        if slope_term is False:
            return jnp.zeros((), g.dtype)
        return jnp.where(damping == 0 if slope_term is None else slope_term, g, 0)

    def radii(layers: Sequence[tuple[Leaves, Leaves]]) -> list[list[Wide]]:
        kernels = [Leaves((), measured.g, measured.h) for measured, _ in layers if measured.h]
        # Without any measured leaf all are one layer.
        together = lambda column: [jax.lax.expand_dims(x, (0,)) for x in column]
        _, alone = layers[0]
        means = _mean_curvatures(kernels or [Leaves((), together(alone.g), together(alone.h))], axis_name)
        least = normal(times(damping, means))
        own, of_tree = entries(least, kernels), take(least, -1)

        def of_leaf(g: jax.Array, h: jax.Array, least: Wide) -> Wide:
            found: Wide = _curvature(slope(g), h, cast(Wide(*(along(x, h) for x in least)), h.dtype), max_radius)
            return found

        least_of = [next(own) if measured.h else of_tree for measured, _ in layers]
        return [
            [of_leaf(g, h, least) for g, h in pairs(scaled.g, scaled.h)]
            for least, (_, scaled) in zip(least_of, layers, strict=True)
        ]

    return radii


@jax.jit
def _curvature(g: jax.Array, h: jax.Array, least: Wide, max_radius: Scalar | None) -> Wide:
    arc = wide(jnp.hypot(jnp.ones_like(g), g))
    return _bounded(Wide(arc.value**3, 3 * arc.exponent), plus(wide(jnp.abs(h)), least), max_radius)


@functools.partial(jax.jit, static_argnames="axis_name")
def _mean_curvatures(layers: Sequence[Leaves], axis_name: AxisName) -> Wide:
    """The mean of each layer, of no less than `NOISE` times that of the tree; and last that of the tree."""

    sums = lambda kernels: totals(magnitudes_and_moving, [pairs(x.h, x.g) for x in kernels], axis_name)
    found, count = together(sums, layers)
    mean = lambda a, count: Wide(a.value / jnp.maximum(count, 1), a.exponent)
    tree = mean(total(normal(found)), jnp.sum(count.value))
    return append(greatest(mean(found, count.value), times(NOISE, tree)), tree)


def approximate(max_radius: Scalar | None) -> Callable[[Leaves, Leaves], list[Wide]]:
    """Eq. 17 per parameter: `|w / g|`."""

    def radii(measured: Leaves, scaled: Leaves) -> list[Wide]:
        del measured
        return [_approximate(w, g, max_radius) for w, g in zip(scaled.w, scaled.g, strict=True)]

    return radii


@jax.jit
def _approximate(w: jax.Array, g: jax.Array, max_radius: Scalar | None) -> Wide:
    return _bounded(wide(jnp.abs(w)), wide(jnp.abs(g)), max_radius)


def lars(trust_coefficient: Scalar, eps: Scalar, axis_name: AxisName) -> Rule:
    """Eq. 23: `norm2(w) / (norm2(g) + eps)`."""
    is_zero = isinstance(eps, float | int) and eps == 0
    return functools.partial(_lars, trust=trust_coefficient, eps=None if is_zero else eps, axis_name=axis_name)


@functools.partial(jax.jit, static_argnames="axis_name")
def _lars(layers: Sequence[Leaves], trust: Scalar, eps: Scalar | None, axis_name: AxisName) -> Wide:
    w, g, _ = totals(squares_and_moving, [pairs(x.w, x.g) for x in layers], axis_name)
    return _ratio(_of_norms, w, g, trust, eps)


def _of_norms(squared_w: Wide, squared_g: Wide, eps: Scalar | None) -> Wide:
    norm_w, norm_g = root(squared_w), root(squared_g)
    return quotient(norm_w, norm_g if eps is None else normal(plus_float(norm_g, eps)))


def percent_delta(trust_coefficient: Scalar, axis_name: AxisName) -> Rule:
    """Eq. 24: `n / norm1(g / w)`, where entries with `w = 0` are neither counted nor summed."""
    return functools.partial(_percent_delta, trust=trust_coefficient, axis_name=axis_name)


@functools.partial(jax.jit, static_argnames="axis_name")
def _percent_delta(layers: Sequence[Leaves], trust: Scalar, axis_name: AxisName) -> Wide:
    found, count = totals(slopes, [pairs(x.w, x.g) for x in layers], axis_name)
    return _ratio(quotient, count, found, trust)


def median(trust_coefficient: Scalar, of_ratios: bool, axis_name: AxisName) -> Rule:
    """Eq. 20-22: `median|w| / median|g|`, or the median of the ratios themselves."""
    middle = _median_of_ratios if of_ratios else _two_medians
    return functools.partial(_median, trust=trust_coefficient, middle=middle, axis_name=axis_name)


@functools.partial(jax.jit, static_argnames=("middle", "axis_name"))
def _median(layers: Sequence[Leaves], trust: Scalar, middle: Middle, axis_name: AxisName) -> Wide:
    stacked, others, places = rows_of([(x.w, x.g) for x in layers], SAMPLE)
    found = [jax.vmap(lambda w, g: middle([w], [g], axis_name))(*columns) for columns in stacked]
    found += [for_each(lambda w, g: middle(w, g, axis_name), layers[i].w, layers[i].g) for i in others]
    return _ratio(quotient, *(take(concatenate(column), places) for column in zip(*found, strict=True)), trust)


def _two_medians(w: Arrays, g: Arrays, axis_name: AxisName) -> tuple[Wide, Wide]:
    unmeasured = order_statistics.zeros(g, axis_name)
    middle = lambda x: wide(order_statistics.median(x, axis_name, unmeasured))
    return middle(w), middle(g)


def _median_of_ratios(w: Arrays, g: Arrays, axis_name: AxisName) -> tuple[Wide, Wide]:
    middle = _middle_ratio(*([jnp.abs(x) for x in column] for column in (w, g)), axis_name)
    return middle, wide(jnp.ones_like(middle.value))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _middle_ratio(w: Arrays, g: Arrays, axis_name: AxisName) -> Wide:
    """The median of the ratios of magnitudes, which need not be floats."""
    ratios = [jnp.where(y == 0, 0, x / y) for x, y in zip(w, g, strict=True)]
    low, high = order_statistics.middles(ratios, axis_name, order_statistics.zeros(g, axis_name))
    are_floats = (low >= jnp.finfo(low.dtype).tiny) & (high < jnp.inf)
    mean = times(0.5, plus(wide(low), wide(high)))
    found: Wide = jax.lax.cond(are_floats, lambda: mean, lambda: _from_roots(w, g, axis_name))
    return found


@_middle_ratio.defjvp
def _middle_ratio_jvp(axis_name: AxisName, primals: Any, tangents: Any) -> tuple[Wide, Wide]:
    found = _middle_ratio(*primals, axis_name)
    rounded, slope = jax.jvp(functools.partial(_from_roots, axis_name=axis_name), primals, tangents)
    relative = slope.value / jnp.where(rounded.value == 0, 1, rounded.value)
    return found, Wide(found.value * relative, slope.exponent)


def _from_roots(w: Arrays, g: Arrays, axis_name: AxisName) -> Wide:
    """The same, but for rounding: the roots of ratios are floats in any case, and have their order."""
    roots = [_root_of_ratio(x, y) for x, y in zip(w, g, strict=True)]
    middles = order_statistics.middles(roots, axis_name, order_statistics.zeros(g, axis_name))
    low, high = (Wide(jnp.square(x.value), 2 * x.exponent) for x in map(wide, middles))
    return times(0.5, plus(low, high))


def _root_of_ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """`sqrt(x / y)`, and 0 where `y = 0`, which is not measured."""
    is_zero = (x == 0) | (y == 0)
    # NaN is not zero, and passed on.
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, x)) / jnp.sqrt(jnp.where(is_zero, 1, y)))


def _bounded(numerator: Wide, denominator: Wide, max_radius: Scalar | None) -> Wide:
    """The quotient, at most the largest radius."""
    radius = _ratio(quotient, numerator, denominator)
    if max_radius is None:
        return radius
    largest = _like(max_radius, radius.value)
    # 0/0 is as flat as the loss can be along a parameter: it gets the largest radius, like 1/0.
    flat = ((denominator.value == 0) | (numerator.value == jnp.inf)) & ~jnp.isnan(radius.value)
    above = flat | (to_float(radius) > largest)
    return select(above, Wide(largest, jnp.int32(0)), radius)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _ratio(
    radius: Callable[..., Wide], numerator: Wide, denominator: Wide, trust: Scalar = 1.0, *others: Scalar | None
) -> Wide:
    """`trust * radius(numerator, denominator)`, with the policy for degenerate layers: see the head of this file."""
    found = radius(numerator, denominator, *others)
    informs = (found.value > 0) & (found.value < jnp.inf)
    evidence = numerator.value + denominator.value
    otherwise = jnp.where(jnp.isnan(evidence), evidence, 1)
    value = jnp.where(informs, times(trust, found).value, otherwise)
    return Wide(value, jnp.where(informs, found.exponent, 0))


@_ratio.defjvp
def _ratio_jvp(radius: Callable[..., Wide], primals: Any, tangents: Any) -> tuple[Wide, Wide]:
    """Derivatives go through what is not selected, too: there it has to be harmless."""
    a, b = (x.value for x in primals[:2])
    informs = (jnp.minimum(a, b) > 0) & (jnp.maximum(a, b) < jnp.inf)

    def safe(numerator: Wide, denominator: Wide, trust: Scalar, *others: Scalar | None) -> Wide:
        parts = (Wide(jnp.where(informs, x.value, 1), x.exponent) for x in (numerator, denominator))
        found = radius(*parts, *others)
        return Wide(jnp.where(informs, times(trust, found).value, 0), found.exponent)

    return _ratio(radius, *primals), jax.jvp(safe, primals, tangents)[1]


def _like(value: Scalar, x: jax.Array) -> jax.Array:
    """A hyperparameter in the dtype of `x`, whether it comes as a number or, injected, as an array."""
    return jnp.asarray(value, x.dtype)
