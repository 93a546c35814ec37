"""How long a step takes, when some steps compile, some estimate curvature, and the machine has other things to do."""

import statistics
from collections.abc import Sequence

# One refresh of `cblr`'s curvature with its default interval falls into every window of this many steps.
WINDOW = 10
# A step with a refresh of curvature, and one without.
COMPILING = 2


def step_seconds(seconds: Sequence[float]) -> float:
    """Median over windows of steps of their mean duration; the first two, which compile, are left out.

    A plain median would never see the one step in ten that estimates curvature, and a plain mean sees every hiccup of
    the machine.

    Args:
        seconds: of each step from the start of a run or a phase.

    Returns:
        Seconds per step.

    Example:
        >>> round(step_seconds([9.0, 2.0] + [0.1] * 8 + [0.2] + [0.1] * 9 + [0.2] + [0.1]), 6)
        0.11
    """
    rest = list(seconds[COMPILING:]) or list(seconds[-1:])
    windows = [rest[i : i + WINDOW] for i in range(0, len(rest) - WINDOW + 1, WINDOW)] or [rest]
    return statistics.median(statistics.fmean(window) for window in windows)


def compile_seconds(seconds: Sequence[float]) -> float:
    """What the first two steps took longer than the others."""
    typical = step_seconds(seconds)
    return sum(max(0.0, first - typical) for first in seconds[:COMPILING])
