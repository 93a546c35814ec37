"""Figures 11 to 14: several runs at a large batch, without and with a first epoch of small batches.

The paper's first epoch at batch 512 and learning rate 0.005, before 8192 and 0.05, takes 97 steps where the baseline's
takes 6. So two controls, which it lacks: the baseline with as many steps in all (longer, at the large batch), and a
first epoch at the small learning rate but the large batch, a warm-up. Where the data set is cut down so are the
batches, to keep about the paper's steps per epoch and its ratio of 16.
"""

from experiments import plots
from experiments.figures import statistics
from experiments.figures.base import TEST_ACCURACY, TEST_LOSS, Claim, Figure, Place, count
from experiments.records import column, distinct, where

LARGE = {"smoke": 256, "cpu": 2048, "paper": 8192}
RATIO = 16
IMAGES = {"smoke": 512, "cpu": 8192, "paper": 50_000}
SEEDS = {"smoke": 2, "cpu": 5, "paper": 8}
EPOCHS = {"smoke": 4, "cpu": 10, "paper": 200}
BASELINE, START = "baseline", "small-batch first epoch"
MATCHED, WARMUP = "baseline, as many steps", "small-rate first epoch"
ARMS = (BASELINE, START, MATCHED, WARMUP)


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

    keys = ("arm", "seed")

    def __init__(self, number: int, title: str, claim: str, column: tuple[str, str], arms: tuple[str, ...]):
        self.number, self.title, self.claim = number, title, claim
        self.column, self.arms, self.panels = column, arms, 2 if len(arms) > 1 else 1

    def grid(self, place):
        keys = [(arm, seed) for arm in self.arms for seed in range(SEEDS[place.preset])]
        return {key: config(place, *key) for key in keys}

    def judge(self, rows):
        name, losses = self.column[0], self.column == TEST_LOSS
        noise = {arm: jumps(rows, arm, name) for arm in (BASELINE, START) if arm in self.arms}
        if self.arms == (BASELINE,):
            # How much its runs differ at the end, which the other two figures compare.
            early = statistics.mean(noise[BASELINE])
            ends = statistics.spread(column(rows, name, arm=BASELINE, final=True))
            evidence = f"{name.replace('_', ' ')} at the end {ends}; early fluctuation {early}"
            return [Claim("The curves of the baseline fluctuate (above 0.01) early on.", evidence, early.above(0.01))]
        claims, what = [], "lower final test loss" if losses else "higher final accuracy"
        for other in (BASELINE, MATCHED, WARMUP):
            ends = [column(rows, name, arm=arm, final=True) for arm in (START, other)]
            steps = [column(rows, "step", arm=arm, final=True)[0] for arm in (START, other)]
            gain, said = statistics.gain(*(ends[::-1] if losses else ends))
            levels = [f"{statistics.spread(values)} after {n}" for values, n in zip(ends, steps, strict=True)]
            evidence = f"{levels[0]} steps against {levels[1]}; gain {said}"
            claim = f"A {START} gives a {what} than: {other}{'' if other == BASELINE else ' (ours)'}."
            claims.append(Claim(claim, evidence, gain.above(0)))
        if not losses:
            calmer = statistics.difference(noise[BASELINE], noise[START])
            levels = ", ".join(f"{arm} {statistics.spread(noise[arm], 100)} points" for arm in (START, BASELINE))
            statement = "The curves of the baseline fluctuate more early on."
            claims.append(Claim(statement, f"fluctuation: {levels}; difference {calmer}", calmer.above(0)))
        return claims

    def draw(self, axes, rows):
        arm, epochs = (BASELINE if self.arms == (BASELINE,) else START), where(rows, final=None)
        scale, seeds = 100 if self.column == TEST_ACCURACY else 1, {s: f"seed {s}" for s in distinct(rows, "seed")}
        title = START if axes[1:] else None
        plots.lines(axes[0], where(epochs, arm=arm), ("seed", seeds), "epoch", self.column, scale, title)
        for panel in axes[1:]:
            arms = "arm", {arm: arm for arm in ARMS}
            plots.lines(panel, epochs, arms, "step", self.column, scale, "all arms, mean and range")

    def settings(self, place):
        large = LARGE[place.preset]
        return (
            f"{config(place, BASELINE, 0).describe()}; batch {large} at 0.05, first epoch {large // RATIO} (or {large})"
            f" at 0.005; {EPOCHS[place.preset]} epochs, {count(SEEDS[place.preset], 'seed')}."
        )


def jumps(rows, arm: str, name: str):
    """How far each seed's curve fluctuates in its first 40 %, the paper's first 80 epochs of 200."""
    runs = [column(where(rows, arm=arm, final=None), name, seed=seed) for seed in distinct(rows, "seed")]
    return [statistics.fluctuation(run[: max(3, round(0.4 * len(run)))]) for run in runs]


STUMBLES = "At a large batch training stumbles: curves fluctuate, and the runs end apart."
IMPROVES = "A first epoch of small batches clearly improves {}."
FIGURES = (
    SmallStart(11, "Loss, baseline", STUMBLES, TEST_LOSS, (BASELINE,)),
    SmallStart(12, "Accuracy, baseline", STUMBLES, TEST_ACCURACY, (BASELINE,)),
    SmallStart(13, "Loss, small-batch first epoch", IMPROVES.format("the loss"), TEST_LOSS, ARMS),
    SmallStart(14, "Accuracy, small-batch first epoch", IMPROVES.format("the accuracy"), TEST_ACCURACY, ARMS),
)
