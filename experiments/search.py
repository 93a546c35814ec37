"""Tunes every method alike: the same number of runs over its learning rate and one more hyper-parameter of its choice.

A trial is judged by its accuracy on images held out of the training split, the mean over its seeds; between equals the
lower training loss decides. The test images are not looked at.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

Trial = dict[str, Any]

# Learning rates lie this factor apart; so many are tried before anything else.
OCTAVE, FIRST = 2.0, 3
# Accuracy within which a learning rate counts as as good as the best, a fraction.
CLOSE = 0.02


class Search(NamedTuple):
    """Where a method's search begins: its smallest learning rate, its second hyper-parameter and what that may be.

    What is in `also` is as its authors advise, and not searched.
    """

    rate: float
    other: str
    values: tuple[float, ...]
    also: Mapping[str, float] = MappingProxyType({})


SEARCHES = {
    "sgd": Search(0.02, "momentum", (0.9, 0.95)),
    "adamw": Search(0.002, "b2", (0.95, 0.999)),
    "lars": Search(0.01, "momentum", (0.9, 0.95)),
    "lamb": Search(0.01, "b2", (0.95, 0.999)),
    "muon": Search(0.01, "momentum", (0.9, 0.95)),
    "muon_lars": Search(0.02, "momentum", (0.9, 0.95)),
    "soap": Search(0.005, "curvature_every", (10, 2), {"b2": 0.95}),
    "sophia": Search(0.001, "damping", (0.1, 0.01)),
    "mclr": Search(0.001, "momentum", (0.9, 0.95)),
    "percent_delta": Search(0.005, "momentum", (0.9, 0.95)),
    "cblr": Search(0.02, "curvature_every", (10, 2)),
    "cblr_squares": Search(0.02, "curvature_every", (10, 2)),
}


def next_trial(search: Search, trials: Sequence[Trial], budget: int) -> tuple[float, float] | None:
    """The next learning rate and other value to try; None once so many were, and the best rate is not at an edge.

    First some rates at the first value; then, around the best so far, the rates on both sides, the other values, and
    rates further out as far as they are close to the best.
    """
    tried = {(trial["learning_rate"], trial[search.other]): trial["accuracy"] for trial in trials}
    start = [(search.rate * OCTAVE**k, search.values[0]) for k in range(FIRST)]
    if len(trials) < FIRST:
        return next(point for point in start if point not in tried)
    chosen = best(trials)
    rate, value = chosen["learning_rate"], chosen[search.other]
    beside = [(rate * OCTAVE, value), (rate / OCTAVE, value)]
    if chosen["accuracy"] > 0 and (missing := [point for point in beside if point not in tried]):
        return missing[0]
    if len(trials) >= budget:
        return None
    points = [(rate, other) for other in search.values]
    for k in range(2, budget):
        inner = [(rate * OCTAVE ** (side * (k - 1)), side) for side in (1, -1)]
        points += [(r * OCTAVE**side, value) for r, side in inner if near(tried.get((r, value)), chosen)]
    points += [(r, other) for other in search.values for r, _ in beside]
    points += [(rate * OCTAVE ** (side * k), value) for k in range(2, budget) for side in (1, -1)]
    return next(point for point in points if point not in tried)


def near(accuracy: float | None, chosen: Trial) -> bool:
    """Whether this is close to the best one."""
    return accuracy is not None and accuracy >= chosen["accuracy"] - CLOSE


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest accuracy; between equals, with the lowest training loss."""
    return max(trials, key=lambda trial: (trial["accuracy"], -(math.inf if trial["loss"] is None else trial["loss"])))


def octaves(search: Search, trials: Sequence[Trial]) -> float:
    """The width of the learning rates close to the best one, in factors of two, at its other value.

    Between two trials the accuracy is taken to be linear in the logarithm of the rate; beyond the last one nothing is.
    """
    chosen = best(trials)
    own = sorted((t["learning_rate"], t["accuracy"]) for t in trials if t[search.other] == chosen[search.other])
    place, width = own.index((chosen["learning_rate"], chosen["accuracy"])), 0.0
    for side in (own[place::-1], own[place:]):
        for (rate, accuracy), (further, lower) in itertools.pairwise(side):
            bar, distance = chosen["accuracy"] - CLOSE, abs(math.log2(further / rate))
            if lower < bar:
                width += distance * (accuracy - bar) / (accuracy - lower)
                break
            width += distance
    return width
