"""Figure 16: the median rule MCLR against LARS, on ResNet18 at batch 1024; and beyond, at larger batches.

The size of gamma does not carry over between rules, nor from one batch size to another, so each method is tuned on a
grid of its own at each batch size, which goes on while its best value is the last on a side: one seed, judged by its
final test accuracy, which is then not used again. The race is run by the other seeds at the best gamma. A tuned SGD
takes part, which is known to match LARS where both are tuned well (Nado et al. 2021). The paper says that MCLR falls
behind as the batch grows: the second panel.
"""

import itertools

from experiments import plots
from experiments.figures import statistics
from experiments.figures.base import Claim, Figure, Place, last_epoch, run_rows
from experiments.records import column, distinct, where

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
    usual = {"momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine", "warmup_epochs": 0.1 * scale["epochs"]}
    return place.config(optimizer=method, batch_size=batch, learning_rate=rate, seed=seed, **usual, **scale)


def grid(place: Place, method: str):
    """The learning rates that are tried."""
    rates = GRIDS[method]
    between = [float(f"{(a * b) ** 0.5:.2g}") for a, b in itertools.pairwise(rates)]
    return {"smoke": rates[:2], "cpu": rates, "paper": tuple(sorted([*rates, *between]))}[place.preset]


def entrants(place: Place, batch: int):
    """Who takes part: beyond the first batch size only the two that the paper compares."""
    return tuple(GRIDS) if batch == BATCHES[place.preset][0] else ("lars", "mclr")


def tuned(place: Place, trained, method: str, batch: int) -> dict[float, float]:
    """The final test accuracy at each learning rate that was tried, in their order."""
    accuracy = lambda rate: last_epoch(trained(config(place, method, batch, rate, 0)))["test_accuracy"]
    trials = {rate: accuracy(rate) for rate in grid(place, method)}
    for _ in range(EXTENSIONS[place.preset]):
        low, *_, high = rates = sorted(trials)
        best, step = max(trials, key=trials.get), rates[1] / rates[0]
        if low < best < high:
            break
        beyond = float(f"{high * step if best == high else low / step:.2g}")
        trials[beyond] = accuracy(beyond)
    return dict(sorted(trials.items()))


def final(rows, method: str, batch: int, name: str = "test_accuracy"):
    """A column at the end of the race, a value per seed."""
    return column(rows, name, final=True, method=method, batch_size=batch)


def best(rows, method: str, batch: int):
    """The learning rate of the race, and whether it lies at an edge of the grid."""
    rate = final(rows, method, batch, "learning_rate")[0]
    rates = column(rows, "learning_rate", trial=True, method=method, batch_size=batch)
    return f"{rate:g}" + " (edge of its grid)" * (rate in (min(rates), max(rates)))


class MedianRate(Figure):
    """Training accuracy over epochs at the first batch size; final test accuracy at all."""

    number, title, panels = 16, "MCLR, LARS and SGD on ResNet18", 2
    claim = "The discrepancy of MCLR and LARS is negligibly small, and grows for large batches."

    def grid(self, place):
        keys = [(m, b, rate) for b in BATCHES[place.preset] for m in entrants(place, b) for rate in grid(place, m)]
        return {key: config(place, *key, seed=0) for key in keys}

    def rows(self, place, trained):
        keys = [(batch, method) for batch in BATCHES[place.preset] for method in entrants(place, batch)]
        for batch, method in keys:
            about = {"method": method, "batch_size": batch}
            trials = tuned(place, trained, method, batch)
            for rate, accuracy in trials.items():
                yield {"trial": True, **about, "learning_rate": rate, "test_accuracy": accuracy}
            rate = max(trials, key=trials.get)
            for seed in range(1, 1 + SEEDS[place.preset]):
                one = {**about, "seed": seed, "learning_rate": rate}
                yield from run_rows(trained(config(place, method, batch, rate, seed)), one)

    def judge(self, rows):
        first, *larger = distinct(rows, "batch_size")
        gap = {b: statistics.difference(final(rows, "mclr", b), final(rows, "lars", b)) for b in (first, *larger)}
        training = statistics.difference(*(final(rows, method, first, "accuracy") for method in ("mclr", "lars")))
        spreads = {m: statistics.spread(final(rows, m, first), 100) for m in GRIDS}
        levels = ", ".join(f"{m} {spread} % at {best(rows, m, first)}" for m, spread in spreads.items())
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
            rates = ", ".join(f"{m} at {best(rows, m, batch)}" for m in ("mclr", "lars"))
            gaps = f"MCLR minus LARS: {gap[first]} at batch {first}, {gap[batch]} at {batch} ({rates}); change {change}"
            claims.append(Claim("MCLR falls behind LARS as the batch grows.", gaps, change.below(0)))
        ahead = statistics.difference(final(rows, "lars", first), final(rows, "sgd", first))
        ours = f"LARS is more accurate than a tuned SGD at batch {first} (ours)."
        return [*claims, Claim(ours, f"difference {ahead}", ahead.above(0))]

    def draw(self, axes, rows):
        first = distinct(rows, "batch_size")[0]
        labels = {method: f"{method} ({best(rows, method, first).split()[0]})" for method in GRIDS}
        own = where(rows, batch_size=first, final=None, trial=None)
        accuracy = "accuracy", "training accuracy (%)"
        plots.lines(axes[0], own, ("method", labels), "epoch", accuracy, 100, f"batch {first}")
        ends = sorted(where(rows, final=True), key=lambda row: row["batch_size"])
        both, accuracy = {method: method for method in ("lars", "mclr")}, ("test_accuracy", "final test accuracy (%)")
        plots.lines(axes[1], ends, ("method", both), "batch_size", accuracy, 100, "each at its best gamma")

    def settings(self, place):
        example = config(place, "mclr", BATCHES[place.preset][0], 1.0, 0)
        tried = "; ".join(f"{method} {', '.join(map(str, grid(place, method)))}" for method in GRIDS)
        beyond = ", and on while the best was at an edge" if EXTENSIONS[place.preset] else ""
        return (
            f"{example.describe()} after {example.warmup_epochs:g} epochs of warm-up; {example.epochs} epochs; tuned by"
            f" one seed over {tried}{beyond}; raced by {SEEDS[place.preset]} others (mean and range)."
        )


FIGURES = (MedianRate(),)
