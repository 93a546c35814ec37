"""The rules in NumPy, in the widest floats there are, so that nothing overflows: what a radius is, and no more.

A rule is `rule(w, g, h) -> radii`, from the flat arrays of one layer to a radius for each entry. What is degenerate is
what is truly zero, and has radius 1.
"""

from collections.abc import Callable

import numpy as np

Wide = np.longdouble
Rule = Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]


def lars(trust_coefficient: float = 1.0, eps: float = 0.0) -> Rule:
    """`|w| / (|g| + eps)`."""

    def rule(w, g, h):
        return _ratio(_norm(w), _norm(g), trust_coefficient, eps, g)

    return rule


def percent_delta(trust_coefficient: float = 1.0) -> Rule:
    """The count of the parameters that are not zero over the sum of `|g / w|` over them."""

    def rule(w, g, h):
        there = w != 0
        return _ratio(Wide(there.sum()), np.sum(np.abs(g[there]) / np.abs(w[there])), trust_coefficient, 0.0, g)

    return rule


def median(weight_decay: float = 0.0, trust_coefficient: float = 1.0, of_ratios: bool = False) -> Rule:
    """`median|w| / median|g + weight_decay w|`, or the median of the ratios."""

    def rule(w, g, h):
        slope = g + Wide(weight_decay) * w
        if not of_ratios:
            return _ratio(_median(w), _median(slope), trust_coefficient, 0.0, g)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where((w == 0) & (slope == 0), 0, np.abs(w) / np.abs(slope))
        return _ratio(_median(ratios), Wide(1), trust_coefficient, 0.0, g)

    return rule


def approximate(max_radius: float | None = None) -> Rule:
    """`|w / g|`."""

    def rule(w, g, h):
        return _bounded(np.abs(w), np.abs(g), max_radius)

    return rule


def curvature(damping: float = 0.0, max_radius: float | None = None, slope_term: bool = True) -> Rule:
    """`(1 + g^2)^(3/2) / (|h| + damping mean|h|)`."""

    def rule(w, g, h):
        mean = np.mean(np.abs(h)) if h.size else Wide(0)
        arc = (1 + np.abs(g) ** 2) ** Wide(1.5) if slope_term else np.ones(g.shape, Wide)
        return _bounded(arc, np.abs(h) + Wide(damping) * mean, max_radius)

    return rule


def discard(fraction: float) -> Rule:
    """1, and 0 for the `floor(fraction n)` entries that are smallest; ties at the border stay."""

    def rule(w, g, h):
        if not g.size:
            return np.ones(g.shape, Wide)
        # The product in float64, as the library counts: the decimal fraction is not exactly its float.
        border = np.sort(np.abs(g))[int(np.floor(fraction * g.size + 1e-9))]
        return np.where(np.abs(g) < border, Wide(0), Wide(1))

    return rule


def _norm(x):
    return np.sqrt(np.sum(np.abs(x) ** 2, dtype=Wide))


def _median(x):
    return np.median(np.abs(x)) if x.size else Wide(0)


def _ratio(numerator, denominator, trust_coefficient, eps, like):
    degenerate = numerator == 0 or denominator == 0 or not np.isfinite(numerator / denominator)
    radius = Wide(1) if degenerate else Wide(trust_coefficient) * numerator / (denominator + Wide(eps))
    return np.full(like.shape, radius)


def _bounded(numerator, denominator, max_radius):
    with np.errstate(divide="ignore", invalid="ignore"):
        radius = np.where(denominator == 0, Wide(np.inf), numerator / denominator)
    radius = radius if max_radius is None else np.minimum(radius, Wide(max_radius))
    if max_radius is None:
        radius = np.where((denominator == 0) & (numerator == 0), 1, radius)
    return np.where((radius == 0) | np.isinf(radius), Wide(1), radius)
