"""How long a step takes, when some steps compile, some estimate curvature, and the machine has other things to do."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

# One refresh of `cblr`'s curvature with its default interval falls into every window of this many steps.
WINDOW = 10


def step_seconds(steps: Sequence[Mapping[str, Any]]) -> float:
    """Median over windows of steps of their mean duration, without the steps that compiled.

    A plain median would never see the one step in ten that estimates curvature, and a plain mean sees every hiccup of
    the machine.

    Example:
        >>> steps = [{"seconds": 9.0, "compiled": True}] + [{"seconds": 0.1, "compiled": False}] * 19
        >>> round(step_seconds(steps + [{"seconds": 0.2, "compiled": False}]), 6)
        0.105
    """
    rest = [step["seconds"] for step in steps if not step["compiled"]] or [steps[-1]["seconds"]]
    windows = [rest[i : i + WINDOW] for i in range(0, len(rest) - WINDOW + 1, WINDOW)] or [rest]
    return statistics.median(statistics.fmean(window) for window in windows)


def compile_seconds(steps: Sequence[Mapping[str, Any]]) -> float:
    """What the steps that compiled took longer than the others."""
    typical = step_seconds(steps)
    return sum(max(0.0, step["seconds"] - typical) for step in steps if step["compiled"])
