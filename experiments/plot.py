"""The picture of a race: test accuracy and training loss against steps, a line per method and a band over its seeds."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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
        for method, runs in epochs.items():
            for seed, records in enumerate(runs):
                draw_line(panel, method, records, name, scale, labels[method] if seed == 0 else None)
        panel.set(xlabel="optimizer steps", ylabel=label)
        panel.grid(alpha=0.3)
    panels[0].set_ylim(0, 100)
    panels[1].set_yscale("log")
    panels[0].legend(loc="lower right", fontsize=9, title="method (learning rate)")
    figure.text(0.01, 0.01, textwrap.fill(caption, 160), fontsize=9, va="bottom")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_line(panel, method: str, records: Sequence[dict], name: str, scale: float, label: str | None):
    """One run; seeds after the first are fainter and have no label."""
    color, marker, dash = STYLES[method]
    steps, values = [r["step"] for r in records], [scale * r[name] for r in records]
    style = {"color": color, "marker": marker, "linestyle": dash, "markevery": max(1, len(steps) // 8)}
    panel.plot(steps, values, label=label, alpha=1.0 if label else 0.35, markersize=6, linewidth=1.6, **style)
