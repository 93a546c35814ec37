"""Figure 16: the median rule MCLR against LARS, on ResNet18 at batch 1024; and beyond, at larger batches.

The size of gamma does not carry over between rules, nor from one batch size to another, so each method is tuned on a
grid of its own at each batch size, which goes on while its best value is the last on a side: one seed, judged by its
final test accuracy, which is then not used again. The race is run by the other seeds at the best gamma. A tuned SGD
takes part, which is known to match LARS where both are tuned well (Nado et al. 2021). The paper says that MCLR falls
behind as the batch grows: the second panel.
"""

import itertools

from experiments.figures import statistics
from experiments.figures.base import Claim, Figure, Place, describe, last_epoch
from experiments.figures.rows import by_label, epoch_curves
from experiments.plots import batch_axis, curves, name_axes

BATCHES = {"smoke": (128, 256), "cpu": (1024, 2048), "paper": (1024, 2048, 4096, 8192, 16384)}
SEEDS = {"smoke": 2, "cpu": 8, "paper": 5}
# A factor of three apart; the full scale tries the points between them too.
GRIDS = {"sgd": (0.05, 0.15, 0.45), "lars": (0.01, 0.03, 0.09), "mclr": (0.002, 0.006, 0.018)}
# More points than this beyond a grid say that something else is wrong.
EXTENSIONS = {"smoke": 0, "cpu": 4, "paper": 4}
SCALES = {
    # ResNet18 takes longer to compile than all other networks of this scale to train.
    "smoke": {"model": "alexnet", "epochs": 2},
    "cpu": {"model": "resnet18", "dropout": None, "width": 0.0625, "image_size": 16, "epochs": 12},
    "paper": {"model": "resnet18", "width": 1.0, "epochs": 200},
}
# Training accuracies this close are "negligibly" apart.
NEGLIGIBLE = 0.02


def config(place: Place, method: str, batch: int, rate: float, seed: int):
    """One run: warm-up, then a cosine, as LARS is used."""
    scale = SCALES[place.preset]
    return place.config(
        optimizer=method,
        batch_size=batch,
        learning_rate=rate,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="cosine",
        warmup_epochs=0.1 * scale["epochs"],
        seed=seed,
        **scale,
    )


def grid(place: Place, method: str):
    """The learning rates that are tried."""
    rates = GRIDS[method]
    between = [float(f"{(a * b) ** 0.5:.2g}") for a, b in itertools.pairwise(rates)]
    return {"smoke": rates[:2], "cpu": rates, "paper": tuple(sorted([*rates, *between]))}[place.preset]


def entrants(place: Place, batch: int):
    """Who takes part: beyond the first batch size only the two that the paper compares."""
    return tuple(GRIDS) if batch == BATCHES[place.preset][0] else ("lars", "mclr")


def runs(place: Place):
    """Those of the tuning."""
    keys = [(m, b, rate) for b in BATCHES[place.preset] for m in entrants(place, b) for rate in grid(place, m)]
    return [config(place, *key, seed=0) for key in keys]


def tuned(place: Place, trained, method: str, batch: int) -> dict[float, float]:
    """The final test accuracy at each learning rate that was tried, in their order."""

    def accuracy(rate):
        return last_epoch(trained(config(place, method, batch, rate, 0)))["test_accuracy"]

    trials = {rate: accuracy(rate) for rate in grid(place, method)}
    for _ in range(EXTENSIONS[place.preset]):
        low, *_, high = rates = sorted(trials)
        best, step = max(trials, key=trials.get), rates[1] / rates[0]
        if low < best < high:
            break
        beyond = float(f"{high * step if best == high else low / step:.2g}")
        trials[beyond] = accuracy(beyond)
    return dict(sorted(trials.items()))


def rows(place: Place, trained):
    """One row per trial; then, per run of the race, one for each epoch and one for its end."""
    for batch in BATCHES[place.preset]:
        for method in entrants(place, batch):
            trials = tuned(place, trained, method, batch)
            for rate, accuracy in trials.items():
                row = {"kind": "trial", "method": method, "batch_size": batch, "learning_rate": rate}
                yield {**row, "test_accuracy": accuracy}
            best = max(trials, key=trials.get)
            for seed in range(1, 1 + SEEDS[place.preset]):
                records = trained(config(place, method, batch, best, seed))
                about = {"method": method, "batch_size": batch, "seed": seed, "learning_rate": best}
                yield from epoch_curves(records, {"kind": "epoch", **about})
                last = last_epoch(records)
                yield {"kind": "final", **about, **{name: last[name] for name in ("accuracy", "test_accuracy")}}


def final(rows, method: str, batch: int, name: str = "test_accuracy"):
    """A column at the end of the race, a value per seed."""
    chosen = [r for r in rows if (r["kind"], r["method"], r["batch_size"]) == ("final", method, batch)]
    return [row[name] for row in sorted(chosen, key=lambda row: row["seed"])]


def batches(rows):
    """Batch sizes, in order."""
    return sorted({row["batch_size"] for row in rows})


def best(rows, method: str, batch: int):
    """The learning rate of the race, and whether it lies at an edge of the grid."""
    [rate] = {r["learning_rate"] for r in rows if (r["kind"], r["method"], r["batch_size"]) == ("final", method, batch)}
    rates = sorted(
        r["learning_rate"] for r in rows if (r["kind"], r["method"], r["batch_size"]) == ("trial", method, batch)
    )
    return f"{rate:g}" + (" (edge of its grid)" if rate in (rates[0], rates[-1]) else "")


def judge(rows):
    """Is MCLR as good as LARS at the first batch size, and does it fall behind after?"""
    first, *larger = batches(rows)
    gap = {b: statistics.difference(final(rows, "mclr", b), final(rows, "lars", b)) for b in batches(rows)}
    training = statistics.difference(*(final(rows, method, first, "accuracy") for method in ("mclr", "lars")))
    levels = ", ".join(
        f"{m} {statistics.spread(final(rows, m, first), 100)} % at {best(rows, m, first)}" for m in GRIDS
    )
    claims = [
        Claim(
            f"At batch {first} the training accuracies of MCLR and LARS differ negligibly (by less than 2 points).",
            f"difference {training}; test accuracy: {levels}; difference {gap[first]}",
            training.within(-NEGLIGIBLE, NEGLIGIBLE),
        )
    ]
    for batch in larger[-1:]:
        pairs = [final(rows, method, size) for size in (batch, first) for method in ("mclr", "lars")]
        change = statistics.mean([a - b - (c - d) for a, b, c, d in zip(*pairs, strict=True)])
        tuned = ", ".join(f"{m} at {best(rows, m, batch)}" for m in ("mclr", "lars"))
        evidence = f"MCLR minus LARS: {gap[first]} at batch {first}, {gap[batch]} at {batch} ({tuned}); change {change}"
        claims.append(Claim("MCLR falls behind LARS as the batch grows.", evidence, change.below(0)))
    tuned = statistics.difference(final(rows, "lars", first), final(rows, "sgd", first))
    claims.append(
        Claim(f"LARS is more accurate than a tuned SGD at batch {first} (ours).", f"difference {tuned}", tuned.above(0))
    )
    return claims


def draw(axes, rows):
    """Training accuracy over epochs at the first batch size; final test accuracy at all."""
    first = batches(rows)[0]
    own = [row for row in rows if row["kind"] == "epoch" and row["batch_size"] == first]
    labels = {method: f"{method} ({best(rows, method, first).split()[0]})" for method in GRIDS}
    curves(axes[0], by_label(own, "method", labels, "accuracy", 100))
    axes[0].set_title(f"batch {first}", fontsize=10)
    name_axes(axes[0], "epoch", "training accuracy (%)")
    lines = {}
    for method in ("lars", "mclr"):
        values = [final(rows, method, batch) for batch in batches(rows)]
        lines[method] = [
            [(batch, 100 * value) for batch, value in zip(batches(rows), seed, strict=True)]
            for seed in zip(*values, strict=True)
        ]
    curves(axes[1], lines)
    batch_axis(axes[1], batches(rows))
    axes[1].set_title("each at its best gamma", fontsize=10)
    name_axes(axes[1], "batch size (images)", "final test accuracy (%)")


def settings(place: Place) -> str:
    """The small print."""
    example = config(place, "mclr", BATCHES[place.preset][0], 1.0, 0)
    tried = "; ".join(f"{method} {', '.join(map(str, grid(place, method)))}" for method in GRIDS)
    beyond = ", and on while the best was at an edge" if EXTENSIONS[place.preset] else ""
    return (
        f"{describe(example)} after {example.warmup_epochs:g} epochs of warm-up; {example.epochs} epochs; tuned by one"
        f" seed over {tried}{beyond}; raced by {SEEDS[place.preset]} others (mean and range)."
    )


FIGURES = (
    Figure(
        16,
        "MCLR, LARS and SGD on ResNet18",
        "The discrepancy of MCLR and LARS is negligibly small, and grows for large batches.",
        rows,
        judge,
        draw,
        settings,
        runs,
        panels=2,
    ),
)
