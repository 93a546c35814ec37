"""Figure 2 of the paper for any network: the radius of curvature of each layer."""

from typing import Any

import numpy as np


def radii(report: Any) -> Any:
    """A matplotlib figure: the median radius of each layer and its quartiles, by curvature and by eq. 17."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("report.plot() needs matplotlib; install it with: pip install matplotlib") from error
    rows = report.layers
    figure = Figure(figsize=(min(4 + 0.3 * len(rows), 16), 4.5), layout="constrained")
    axes = figure.subplots()
    for shift, source, label, color in (
        (-0.2, "radius", f"curvature, by {report.method}", "#56b4e9"),
        (0.2, "approximate_radius", "|w / g|, eq. 17", "#e69f00"),
    ):
        low, middle, high = (np.array([row[f"{source}_{q}"] for row in rows], float) for q in (25, 50, 75))
        shown = np.isfinite(middle) & (middle > 0)
        infinite, low, middle, high = middle, low[shown], middle[shown], high[shown]
        reach = [middle - low, np.where(np.isfinite(high), high, middle) - middle]
        places = np.arange(len(rows))[shown] + shift
        axes.bar(places, middle, 0.4, yerr=reach, label=label, color=color, edgecolor="black", capsize=2)
        for place in np.flatnonzero(np.isinf(infinite)) + shift:
            axes.annotate("∞", (place, 0.98), xycoords=("data", "axes fraction"), ha="center", va="top", color=color)
    axes.set_yscale("log")
    axes.set_ylabel("radius: median, quartiles")
    axes.set_xticks(range(len(rows)), [row["layer"] or "all" for row in rows], rotation=45, ha="right", fontsize=8)
    figure.legend(loc="outside upper left", fontsize=8, ncols=2)
    return figure
