"""The rules in NumPy, in the widest floats there are, so that nothing overflows: what a radius is, and no more.

A rule is `rule(layers, w, g, h) -> radii`, with `layers` as `curvax.layers.group` gives them, `w`, `g` and `h` lists of
arrays, and a radius for each entry of each leaf. What is degenerate is what is truly zero, and has radius 1. Entries
whose gradient is exactly zero are not measured.
"""

from collections.abc import Callable, Sequence

import numpy as np

Wide = np.longdouble
Arrays = Sequence[np.ndarray]
Rule = Callable[[Sequence, Arrays, Arrays, Arrays], list[np.ndarray]]
# A layer whose curvature is less than this part of the tree's is damped by that.
NOISE = 1e-4
# How far an array of the layers of `"kernel"` goes, in multiples of its kernel's parameters.
LONGEST = 3
# A kernel counts for no smaller than this part of all kernels together.
SMALLEST = 0.1


def lars(trust_coefficient: float = 1.0, eps: float = 0.0) -> Rule:
    """`|w| / (|g| + eps)`."""
    return _ratios(lambda w, g: (_norm(w), _norm(g)), trust_coefficient, eps)


def percent_delta(trust_coefficient: float = 1.0) -> Rule:
    """The count of the parameters that are not zero over the sum of `|g / w|` over them."""

    def ratio(w, g):
        there = w != 0
        return Wide(np.sum(there)), np.sum(np.abs(g[there]) / np.abs(w[there]))

    return _ratios(ratio, trust_coefficient)


def median(median_of_ratios: bool = False, trust_coefficient: float = 1.0) -> Rule:
    """`median|w| / median|g|`, or the median of the ratios."""
    if median_of_ratios:
        return _ratios(lambda w, g: (_median(np.abs(w) / np.abs(g)), Wide(1)), trust_coefficient)
    return _ratios(lambda w, g: (_median(w), _median(g)), trust_coefficient)


def approximate(max_radius: float | None = None) -> Rule:
    """`|w / g|` for each entry."""
    return lambda layers, w, g, h: [_bounded(np.abs(x), np.abs(y), max_radius) for x, y in zip(w, g, strict=True)]


def curvature(damping: float = 0.0, max_radius: float | None = None, slope_term: bool | None = None) -> Rule:
    """`1 / (|h| + damping mean|h|)` for each entry, times `(1 + g^2)^(3/2)` with the slope term."""
    slope_term = damping == 0 if slope_term is None else slope_term

    def rule(layers, w, g, h):
        del w
        tree = _mean(g, h, [i for layer in layers for i in layer.measured] or range(len(g)))
        radii = [np.ones(x.shape, Wide) for x in g]
        for layer in layers:
            mean = max(_mean(g, h, layer.measured) if layer.measured else tree, Wide(NOISE) * tree)
            for i in layer.scaled:
                arc = (1 + np.abs(g[i]) ** 2) ** Wide(1.5) if slope_term else np.ones(g[i].shape, Wide)
                radii[i] = _bounded(arc, np.abs(h[i]) + Wide(damping) * mean, max_radius)
        return radii

    return rule


def discard(fraction: float) -> Rule:
    """1, and 0 for the `floor(fraction n)` entries of a layer that are smallest; ties at the border stay."""

    def rule(layers, w, g, h):
        del w, h
        radii = [np.ones(x.shape, Wide) for x in g]
        for layer in layers:
            sizes = np.sort(np.abs(_joined(g, layer.measured or layer.scaled)))
            # The decimal fraction is not exactly its float.
            border = sizes[int(np.floor(fraction * len(sizes) + 1e-9))] if len(sizes) else Wide(0)
            for i in layer.scaled:
                radii[i] = np.where(np.abs(g[i]) < border, Wide(0), Wide(1))
        return radii

    return rule


def bounded(layers, radii: Arrays, w: Arrays, g: Arrays, trust: float) -> list[np.ndarray]:
    """The radii, such that no leaf goes further than three times its kernel's parameters are large.

    A kernel that is nearly zero takes the step of a larger one. What has no kernel follows all as if they were one, of
    the norms that these and their steps have together.
    """
    radii, sizes = list(radii), {}
    kernels = [layer for layer in layers if layer.measured]
    alive = [i for layer in kernels if _root_mean_square(w, g, layer.measured) != 0 for i in layer.measured]
    moving = _joined(g, alive) != 0
    of_all = _norm(_joined(w, alive)[moving]) / np.sqrt(Wide(max(np.sum(moving), 1)))
    for layer in kernels:
        size, step = _root_mean_square(w, g, layer.measured), _root_mean_square(g, g, layer.measured)
        entries = _joined(g, layer.measured)
        least = Wide(SMALLEST) * of_all * np.sqrt(np.sum(entries != 0) / Wide(max(len(entries), 1)))
        if size < least and step != 0:
            size = least
            radii = [np.full(r.shape, trust * least / step) if i in layer.scaled else r for i, r in enumerate(radii)]
        sizes[id(layer)] = size
        for i in layer.scaled:
            if step != 0 and size != 0:
                # The kernel itself is shortened by what its leaves are together.
                radii[i] = np.minimum(radii[i], LONGEST * trust * size / step)
    alive = [layer for layer in kernels if sizes[id(layer)] != 0]
    everything = [i for layer in alive for i in layer.measured]
    counts = [sum(g[i].size for i in layer.measured) for layer in alive]
    squares = [sizes[id(layer)] ** 2 * count for layer, count in zip(alive, counts, strict=True)]
    size_of_all = np.sqrt(sum(squares, Wide(0)) / max(sum(counts), 1))
    steps = _norm(_joined([r * x for r, x in zip(radii, g, strict=True)], everything))
    slopes = _norm(_joined(g, everything))
    radius_of_all = steps / slopes if slopes != 0 else Wide(1)
    for layer in layers:
        alone = not layer.measured or sizes[id(layer)] == 0
        size = size_of_all if alone else sizes[id(layer)]
        for i in layer.scaled:
            radius = np.full(g[i].shape, radius_of_all) if alone else radii[i]
            step = _root_mean_square(g, g, [i])
            radii[i] = np.minimum(radius, (LONGEST * trust * size or Wide(1)) / step) if step != 0 else radius
    return radii


def _root_mean_square(x: Arrays, g: Arrays, indices: Sequence[int]) -> np.ndarray:
    """Of all entries, those without a gradient taken for zeros."""
    entries = _joined(x, indices)
    return _norm(entries[_joined(g, indices) != 0]) / np.sqrt(Wide(max(len(entries), 1)))


def _ratios(ratio, trust_coefficient: float, eps: float = 0.0) -> Rule:
    """One radius for all of a layer, from the entries that are measured; 1 where there are none."""

    def rule(layers, w, g, h):
        del h
        radii = [np.ones(x.shape, Wide) for x in g]
        for layer in layers:
            moving = _joined(g, layer.measured) != 0
            numerator, denominator = ratio(*(_joined(x, layer.measured)[moving] for x in (w, g)))
            known = numerator != 0 and denominator != 0
            radius = Wide(trust_coefficient) * numerator / (denominator + Wide(eps)) if known else Wide(1)
            for i in layer.scaled:
                radii[i] = np.full(g[i].shape, radius)
        return radii

    return rule


def _joined(arrays: Arrays, indices: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.zeros(0, Wide), *(arrays[i].ravel() for i in indices)])


def _norm(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(np.abs(x) ** 2, dtype=Wide))


def _median(x: np.ndarray) -> np.ndarray:
    return np.median(np.abs(x)) if x.size else Wide(0)


def _mean(g: Arrays, h: Arrays, indices: Sequence[int]) -> np.ndarray:
    moving = _joined(g, indices) != 0
    return np.sum(np.abs(_joined(h, indices)[moving])) / max(np.sum(moving), 1)


def _bounded(numerator: np.ndarray, denominator: np.ndarray, max_radius: float | None) -> np.ndarray:
    radius = np.where(denominator == 0, Wide(np.inf), numerator / np.where(denominator == 0, 1, denominator))
    if max_radius is not None:
        radius = np.minimum(radius, Wide(max_radius))
    elif np.ndim(radius):
        radius = np.where((denominator == 0) & (numerator == 0), Wide(1), radius)
    return np.where((radius == 0) | np.isinf(radius), Wide(1), radius)
