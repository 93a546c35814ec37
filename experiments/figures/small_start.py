"""Figures 11 to 14: several runs at a large batch, without and with a first epoch of small batches.

The paper's first epoch at batch 512 and learning rate 0.005, before 8192 and 0.05, takes 97 steps where the baseline's
takes 6. So two controls, which it lacks: the baseline with as many steps in all (longer, at the large batch), and a
first epoch at the small learning rate but the large batch, a warm-up. Where the data set is cut down so are the
batches, to keep about the paper's steps per epoch and its ratio of 16.
"""

from experiments import plots
from experiments.figures import statistics
from experiments.figures.base import Claim, Figure, Place, count, describe
from experiments.figures.rows import column, distinct, epoch_curves, fluctuation, last_epoch, lines, where

LARGE = {"smoke": 256, "cpu": 2048, "paper": 8192}
RATIO = 16
IMAGES = {"smoke": 512, "cpu": 8192, "paper": 50_000}
SEEDS = {"smoke": 2, "cpu": 5, "paper": 8}
EPOCHS = {"smoke": 4, "cpu": 10, "paper": 200}
BASELINE, START = "baseline", "small-batch first epoch"
MATCHED, WARMUP = "baseline, as many steps", "small-rate first epoch"
ARMS = (BASELINE, START, MATCHED, WARMUP)
# By column: its axis, and by what it is multiplied there.
COLUMNS = {"test_loss": ("test loss (nats per image)", 1.0), "test_accuracy": ("test accuracy (%)", 100.0)}


def config(place: Place, arm: str, seed: int):
    """One run."""
    large, epochs, images = (of[place.preset] for of in (LARGE, EPOCHS, IMAGES))
    small = large // RATIO
    extra = round((images // small) / (images // large)) - 1
    if arm in (START, WARMUP):
        changes = {"phases": (f"1:{small if arm == START else large}:0.005", f"{epochs - 1}:{large}:0.05")}
    else:
        changes = {"batch_size": large, "learning_rate": 0.05, "epochs": epochs + extra * (arm == MATCHED)}
    return place.config(momentum=0.9, seed=seed, **changes)


class SmallStart(Figure):
    """A column of some arms: one row per epoch of each run, and one for its end."""

    def __init__(self, number: int, title: str, claim: str, name: str, arms: tuple[str, ...]):
        self.number, self.title, self.claim = number, title, claim
        self.column, self.arms, self.panels = name, arms, 2 if len(arms) > 1 else 1

    def grid(self, place):
        """The runs, by arm and seed."""
        return {(arm, seed): config(place, arm, seed) for arm in self.arms for seed in range(SEEDS[place.preset])}

    def runs(self, place):
        return list(self.grid(place).values())

    def rows(self, place, trained):
        for (arm, seed), configuration in self.grid(place).items():
            records, about = trained(configuration), {"arm": arm, "seed": seed}
            yield from epoch_curves(records, about)
            ends = {name: last_epoch(records)[name] for name in ("step", "loss", "test_loss", "test_accuracy")}
            yield {**about, "final": True, **ends}

    def judge(self, rows):
        if self.arms == (BASELINE,):
            # How much its runs differ at the end, which the other two figures compare.
            noise = statistics.mean(jumps(rows, BASELINE, self.column))
            ends = statistics.spread(column(rows, self.column, arm=BASELINE, final=True))
            evidence = f"{self.column.replace('_', ' ')} at the end {ends}; early fluctuation {noise}"
            statement = "The curves of the baseline fluctuate (above 0.01) early on."
            return [Claim(statement, evidence, noise.above(0.01))]
        sign, what = (-1, "lower final test loss") if self.column == "test_loss" else (1, "higher final accuracy")
        claims = [compare(rows, self.column, other, sign, what) for other in (BASELINE, MATCHED, WARMUP)]
        if self.column == "test_accuracy":
            noise = {arm: jumps(rows, arm, "test_accuracy") for arm in (START, BASELINE)}
            calmer = statistics.difference(noise[BASELINE], noise[START])
            levels = ", ".join(f"{arm} {statistics.spread(values, 100)} points" for arm, values in noise.items())
            statement = "The curves of the baseline fluctuate more early on."
            claims.append(Claim(statement, f"fluctuation: {levels}; difference {calmer}", calmer.above(0)))
        return claims

    def draw(self, axes, rows):
        arm, epochs = (BASELINE if self.arms == (BASELINE,) else START), where(rows, final=None)
        label, scale = COLUMNS[self.column]
        own = where(epochs, arm=arm)
        seeds = {seed: f"seed {seed}" for seed in distinct(own, "seed")}
        plots.curves(axes[0], lines(own, "seed", seeds, self.column, scale))
        plots.name_axes(axes[0], "epoch", label)
        if len(axes) > 1:
            plots.curves(axes[1], lines(epochs, "arm", {a: a for a in ARMS}, self.column, scale, x="step"))
            axes[0].set_title(START, fontsize=10)
            axes[1].set_title("all arms, mean and range", fontsize=10)
            plots.name_axes(axes[1], "optimizer steps", label)

    def settings(self, place):
        large = LARGE[place.preset]
        return (
            f"{describe(config(place, BASELINE, 0))}; batch {large} at 0.05, first epoch {large // RATIO} (or {large})"
            f" at 0.005; {EPOCHS[place.preset]} epochs, {count(SEEDS[place.preset], 'seed')}."
        )


def jumps(rows, arm: str, name: str):
    """How far each seed's curve fluctuates in its first 40 %, the paper's first 80 epochs of 200."""
    runs = [column(where(rows, arm=arm, final=None), name, seed=seed) for seed in distinct(rows, "seed")]
    return [fluctuation(run[: max(3, round(0.4 * len(run)))]) for run in runs]


def compare(rows, name: str, other: str, sign: int, what: str) -> Claim:
    """The claim that the small-batch first epoch is better than another arm."""
    ours, theirs = (column(rows, name, arm=arm, final=True) for arm in (START, other))
    gain = statistics.difference(*((ours, theirs) if sign > 0 else (theirs, ours)))
    error = statistics.standard_error([a - b for a, b in zip(ours, theirs, strict=True)])
    steps = [column(rows, "step", arm=arm, final=True)[0] for arm in (START, other)]
    evidence = (
        f"{statistics.spread(ours)} after {steps[0]} steps against {statistics.spread(theirs)} after {steps[1]};"
        f" gain {gain}, standard error {error:.2g}"
    )
    own = "" if other == BASELINE else " (ours)"
    return Claim(f"A {START} gives a {what} than: {other}{own}.", evidence, gain.above(0))


STUMBLES = "At a large batch training stumbles: curves fluctuate, and the runs end apart."
IMPROVES = "A first epoch of small batches clearly improves {}."
FIGURES = (
    SmallStart(11, "Loss, baseline", STUMBLES, "test_loss", (BASELINE,)),
    SmallStart(12, "Accuracy, baseline", STUMBLES, "test_accuracy", (BASELINE,)),
    SmallStart(13, "Loss, small-batch first epoch", IMPROVES.format("the loss"), "test_loss", ARMS),
    SmallStart(14, "Accuracy, small-batch first epoch", IMPROVES.format("the accuracy"), "test_accuracy", ARMS),
)
