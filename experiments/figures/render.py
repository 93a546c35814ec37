"""Plots that survive a grey printer: every line has its own marker and dashes beside its colour."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#555555", "#e69f00", "#56b4e9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "*", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)))


def style(place: int) -> dict:
    """Of the line of this number."""
    looks = {"color": COLORS, "marker": MARKS, "linestyle": DASHES}
    return {name: values[place % len(values)] for name, values in looks.items()}


def caption_axes(panel, x: str, y: str):
    """Names the axes with their units, and shows legend and grid."""
    panel.set(xlabel=x, ylabel=y)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def curves(panel, lines: Mapping[str, Sequence[Sequence[tuple[float, float]]]]):
    """A line per label: the mean over its seeds, and a band from the lowest to the highest.

    Args:
        panel: axes.
        lines: by label, for each seed, `(x, y)` points; a seed that diverged has fewer, and ends the line.
    """
    for place, (label, seeds) in enumerate(lines.items()):
        length = min(map(len, seeds))
        x = np.array([point[0] for point in seeds[0][:length]])
        y = np.array([[point[1] for point in seed[:length]] for seed in seeds])
        every = max(1, length // 6)
        look = {**style(place), "markevery": (place * every // 8, every), "markersize": 5, "linewidth": 1.4}
        panel.plot(x, y.mean(0), label=label, **look)
        panel.fill_between(x, y.min(0), y.max(0), color=look["color"], alpha=0.12, linewidth=0)


def save(draw, panels: int, rows, title: str, caption: str, path: Path):
    """Draws a figure into a PNG."""
    lines = textwrap.wrap(caption, 52 + 62 * panels)
    width, height = 2.4 + 4.4 * panels, 4.4 + 0.17 * len(lines)
    figure, axes = plt.subplots(1, panels, figsize=(width, height), squeeze=False)
    draw(list(axes[0]), rows)
    figure.suptitle(title, fontsize=11)
    bottom = (0.17 * len(lines) + 0.1) / height
    figure.text(0.01, 0.01, "\n".join(lines), fontsize=8, va="bottom")
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
