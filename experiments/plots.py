"""One look for all plots, which survives a grey printer: every line has its own marker and dashes beside its colour.

A method, or an estimator, looks the same wherever it is drawn.
"""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from experiments import records

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

# Colours told apart by colour-blind eyes too (Okabe & Ito).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#555555", "#e69f00", "#56b4e9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "*", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)))
# The second time round every colour has other marks and dashes.
PLACES = [(i % 8, (i + 3 * (i // 8)) % 8) for i in range(16)]
LOOKS = [{"color": COLORS[i], "marker": MARKS[j], "linestyle": DASHES[j]} for i, j in PLACES]
METHODS = (
    "lars",
    "mclr",
    "percent_delta",
    "cblr",
    "sgd",
    "lamb",
    "muon",
    "soap",
    "adamw",
    "muon_lars",
    "sophia",
    "cblr_squares",
)
METHODS = dict(zip(METHODS, LOOKS, strict=False))
ESTIMATORS = ("hutchinson", "ggn_mc_of_batches", "xdiag", "ggn_mc", "optax.contrib hutchinson", "matfree hutchinson")
ESTIMATORS = dict(zip((*ESTIMATORS, "matfree xdiag", "exact"), LOOKS, strict=False))
AXES = {
    "epoch": "epoch",
    "step": "optimizer steps",
    "seconds": "seconds, compilation apart",
    "batch_size": "batch size (images)",
}


def look(label: str, place: int = 0) -> dict:
    """The style of a line: of the method or estimator that its label begins with, else of the line of this number."""
    return (METHODS | ESTIMATORS).get(label.split(" (")[0], LOOKS[place % len(LOOKS)])


def name_axes(panel, x: str, y: str, title: str | None = None):
    """Names the axes with their units, and shows legend and grid."""
    panel.set(xlabel=x, ylabel=y)
    panel.set_title(title, fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def plain_log(panel, axis: str = "y"):
    """A logarithmic axis with 1, 2 and 5 of every decade written out."""
    panel.set(**{f"{axis}scale": "log"})
    chosen = getattr(panel, f"{axis}axis")
    chosen.set_major_locator(LogLocator(subs=(1, 2, 5)))
    chosen.set_major_formatter(FormatStrFormatter("%g"))
    chosen.set_minor_formatter(NullFormatter())


def batch_axis(panel, sizes: Sequence[int]):
    """A logarithmic axis of batch sizes, of which no more are written than there is room for."""
    panel.set_xscale("log", base=2)
    shown = sorted(sizes)[:: -(-len(sizes) // 8)]
    panel.set_xticks(shown, map(str, shown))
    panel.minorticks_off()


def lines(
    panel,
    rows: Sequence[records.Record],
    by: tuple[str, Mapping[Any, str]],
    x: str,
    y: tuple[str, str],
    scale: float = 1.0,
    title: str | None = None,
):
    """A line per label: the mean over its seeds, and a band from the lowest to the highest.

    Args:
        panel: where.
        rows: one per point. A seed that diverged has fewer, and ends its line.
        by: the column that tells lines apart, and from its values to labels, in order.
        x: the column below.
        y: the column to draw, and its name on the axis.
        scale: by which it is multiplied.
        title: of the panel.
    """
    for place, (value, label) in enumerate(by[1].items()):
        own = records.where(rows, **{by[0]: value})
        seeds = [records.where(own, seed=seed) for seed in records.distinct(own, "seed")]
        length = min(map(len, seeds))
        below = np.array([row[x] for row in seeds[0][:length]])
        above = scale * np.array([[row[y[0]] for row in seed[:length]] for seed in seeds])
        # Each line's markers are a little later than the last one's: lines that coincide can still be told apart.
        every = max(1, length // 6)
        style = {**look(label, place), "markevery": (place * every // len(LOOKS), every), "markersize": 5}
        panel.plot(below, above.mean(0), label=label, linewidth=1.4, **style)
        if len(seeds) > 1:
            panel.fill_between(below, above.min(0), above.max(0), color=style["color"], alpha=0.12, linewidth=0)
    if x == "batch_size":
        batch_axis(panel, records.distinct(rows, x))
    name_axes(panel, AXES.get(x, x), y[1], title)


def save(draw: Callable, panels: int, rows, title: str, caption: str, path: Path, size=(4.4, 4.4)):
    """Draws a figure into a PNG: `draw(panels, rows)` of so many panels, side by side, each of a size in inches."""
    text = textwrap.wrap(caption, round(52 + 14 * size[0] * panels))
    width, height = 2.4 + size[0] * panels, size[1] + 0.17 * len(text)
    figure, axes = plt.subplots(1, panels, figsize=(width, height), squeeze=False)
    draw(list(axes[0]), rows)
    figure.suptitle(title, fontsize=11)
    figure.text(0.01, 0.01, "\n".join(text), fontsize=8, va="bottom")
    figure.tight_layout(rect=(0, (0.17 * len(text) + 0.1) / height, 1, 1))
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    plt.close(figure)
    records.write(path, picture.getvalue())
