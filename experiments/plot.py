"""The picture of a race: test accuracy and training loss against steps, a line per method and a band over its seeds."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

# Told apart by dashes and markers too, so that the picture survives a grey printer and colour-blind eyes.
STYLES = {
    "sgd": ("#555555", "o", ":"),
    "lars": ("#0072b2", "s", "--"),
    "mclr": ("#d55e00", "^", "-"),
    "percent_delta": ("#009e73", "D", "-."),
    "cblr": ("#cc79a7", "*", "-"),
    "lamb": ("#e69f00", "v", "--"),
}


def plot_race(epochs: Mapping[str, Sequence[Sequence[dict]]], labels: Mapping[str, str], caption: str, path: Path):
    """Draws a race.

    Args:
        epochs: by method, for each seed, the epoch records.
        labels: of the methods, for the legend.
        caption: below the panels.
        path: of the PNG.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 5.2))
    axes = (("test_accuracy", "test accuracy (%)", 100), ("loss", "training loss (nats per image)", 1))
    for panel, (name, label, scale) in zip(panels, axes, strict=True):
        for place, (method, runs) in enumerate(epochs.items()):
            values = [[scale * record[name] for record in records] for records in runs]
            draw(panel, method, [record["step"] for record in runs[0]], values, labels[method], place)
        panel.set(xlabel="optimizer steps", ylabel=label)
        panel.grid(alpha=0.3)
    panels[0].set_ylim(0, 100)
    panels[1].set_yscale("log")
    panels[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[1].yaxis.set_major_formatter(FormatStrFormatter("%g"))
    panels[1].yaxis.set_minor_formatter(NullFormatter())
    panels[0].legend(loc="lower right", fontsize=9, title="method (learning rate)")
    figure.text(0.01, 0.01, textwrap.fill(caption, 150), fontsize=9, va="bottom")
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw(panel, method: str, steps: Sequence[int], values: Sequence[Sequence[float]], label: str, place: int):
    """A method's line, the mean over its seeds, and a band from the lowest to the highest.

    A run that diverged is shorter than the others: the line ends where the first of them does.
    """
    color, marker, dash = STYLES[method]
    length = min(map(len, values))
    values, steps = np.array([seed[:length] for seed in values]), steps[:length]
    # Each method's markers are a little later than the last one's: lines that coincide can still be told apart.
    every = max(1, length // 6)
    style = {"color": color, "marker": marker, "linestyle": dash, "markevery": (place * every // len(STYLES), every)}
    panel.plot(steps, values.mean(0), label=label, markersize=6, linewidth=1.6, **style)
    panel.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.12, linewidth=0)
