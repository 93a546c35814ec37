"""Figures 11 to 14: several runs at a large batch, without and with a first epoch of small batches.

The paper's first epoch at batch 512 and learning rate 0.005, before 8192 and 0.05, takes 97 steps where the baseline's
takes 6. So two controls, which it lacks: the baseline with as many steps in all (longer, at the large batch), and a
first epoch at the small learning rate but the large batch, a warm-up. Where the data set is cut down so are the
batches, to keep about the paper's steps per epoch and its ratio of 16.
"""

from experiments.figures import statistics
from experiments.figures.base import Claim, Figure, Place, count, describe, last_epoch
from experiments.figures.rows import by_label, epoch_curves, fluctuation
from experiments.plots import curves, name_axes

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
    changes = {
        BASELINE: {"epochs": epochs},
        START: {"phases": (f"1:{small}:0.005", f"{epochs - 1}:{large}:0.05")},
        MATCHED: {"epochs": epochs + extra},
        WARMUP: {"phases": (f"1:{large}:0.005", f"{epochs - 1}:{large}:0.05")},
    }[arm]
    # The phases hold batch sizes and rates; elsewhere these are those of the large batch.
    rest = {} if "phases" in changes else {"batch_size": large, "learning_rate": 0.05}
    return place.config(momentum=0.9, seed=seed, **changes, **rest)


def grid(place: Place, arms=ARMS):
    """The runs, by arm and seed."""
    return {(arm, seed): config(place, arm, seed) for arm in arms for seed in range(SEEDS[place.preset])}


def curves_of(arms):
    """Rows of these arms: one per epoch of each run, and one for its end."""

    def rows(place: Place, trained):
        for (arm, seed), configuration in grid(place, arms).items():
            records = trained(configuration)
            yield from epoch_curves(records, {"arm": arm, "seed": seed})
            last = last_epoch(records)
            ends = {name: last[name] for name in ("step", "loss", "test_loss", "test_accuracy")}
            yield {"arm": arm, "seed": seed, "final": True, **ends}

    return rows


def final(rows, arm: str, name: str):
    """A column at the end of the runs of an arm, a value per seed."""
    chosen = [row for row in rows if row.get("final") and row["arm"] == arm]
    return [row[name] for row in sorted(chosen, key=lambda row: row["seed"])]


def jumps(rows, arm: str, name: str):
    """How far each seed's curve fluctuates in its first 40 %, the paper's first 80 epochs of 200."""
    own = [row for row in rows if row["arm"] == arm and not row.get("final")]
    seeds = sorted({row["seed"] for row in own})
    runs = [[row[name] for row in own if row["seed"] == seed] for seed in seeds]
    return [fluctuation(run[: max(3, round(0.4 * len(run)))]) for run in runs]


def judge_loss(rows):
    """Is the loss lower with the first epoch, than each of the others?"""
    return [compare(rows, "test_loss", other, -1, "lower final test loss") for other in (BASELINE, MATCHED, WARMUP)]


def judge_accuracy(rows):
    """Is the accuracy higher with the first epoch, and are the curves calmer?"""
    claims = [compare(rows, "test_accuracy", o, 1, "higher final accuracy") for o in (BASELINE, MATCHED, WARMUP)]
    noise = {arm: jumps(rows, arm, "test_accuracy") for arm in (START, BASELINE)}
    calmer = statistics.difference(noise[BASELINE], noise[START])
    levels = ", ".join(f"{arm} {statistics.spread(values, 100)} points" for arm, values in noise.items())
    statement = "The curves of the baseline fluctuate more early on."
    return [*claims, Claim(statement, f"fluctuation: {levels}; difference {calmer}", calmer.above(0))]


def judge_baseline(name: str):
    """The baseline alone: how much its runs differ at the end, which the other two figures compare."""

    def judge(rows):
        values = final(rows, BASELINE, name)
        noise = statistics.mean(jumps(rows, BASELINE, name))
        evidence = f"{name.replace('_', ' ')} at the end {statistics.spread(values)}; early fluctuation {noise}"
        return [Claim("The curves of the baseline fluctuate (above 0.01) early on.", evidence, noise.above(0.01))]

    return judge


def compare(rows, name: str, other: str, sign: int, what: str) -> Claim:
    """The claim that the small-batch first epoch is better than another arm."""
    ours, theirs = final(rows, START, name), final(rows, other, name)
    gain = statistics.difference(*((ours, theirs) if sign > 0 else (theirs, ours)))
    error = statistics.standard_error([a - b for a, b in zip(ours, theirs, strict=True)])
    steps = [final(rows, arm, "step")[0] for arm in (START, other)]
    evidence = (
        f"{statistics.spread(ours)} after {steps[0]} steps against {statistics.spread(theirs)} after {steps[1]};"
        f" gain {gain}, standard error {error:.2g}"
    )
    own = "" if other == BASELINE else " (ours)"
    return Claim(f"A {START} gives a {what} than: {other}{own}.", evidence, gain.above(0))


def draw_each(arm: str, name: str, label: str, scale: float):
    """Draws every run of an arm."""

    def draw(axes, rows):
        [panel] = axes
        own = [row for row in rows if row["arm"] == arm and not row.get("final")]
        seeds = sorted({row["seed"] for row in own})
        curves(panel, by_label(own, "seed", {seed: f"seed {seed}" for seed in seeds}, name, scale))
        name_axes(panel, "epoch", label)

    return draw


def draw_both(name: str, label: str, scale: float):
    """Draws every run with the small-batch first epoch, and all arms beside it."""
    each = draw_each(START, name, label, scale)

    def draw(axes, rows):
        each(axes[:1], rows)
        own = [row for row in rows if not row.get("final")]
        curves(axes[1], by_label(own, "arm", {arm: arm for arm in ARMS}, name, scale, x="step"))
        axes[0].set_title(START, fontsize=10)
        axes[1].set_title("all arms, mean and range", fontsize=10)
        name_axes(axes[1], "optimizer steps", label)

    return draw


def settings(place: Place) -> str:
    """The small print."""
    large = LARGE[place.preset]
    return (
        f"{describe(config(place, BASELINE, 0))}; batch {large} at 0.05, first epoch {large // RATIO} (or {large}) at"
        f" 0.005; {EPOCHS[place.preset]} epochs, {count(SEEDS[place.preset], 'seed')}."
    )


LOSS, ACCURACY = ("test_loss", "test loss (nats per image)", 1.0), ("test_accuracy", "test accuracy (%)", 100.0)
BASELINE_CLAIM = "At a large batch training stumbles: curves fluctuate, and the runs end apart."
START_CLAIM = "A first epoch of small batches clearly improves {}."


def figure(number: int, title: str, claim: str, arms, judge, draw, panels: int) -> Figure:
    """One of the four."""
    return Figure(
        number,
        title,
        claim,
        curves_of(arms),
        judge,
        draw,
        settings,
        lambda place: list(grid(place, arms).values()),
        panels,
    )


FIGURES = (
    figure(
        11, "Loss, baseline", BASELINE_CLAIM, (BASELINE,), judge_baseline("test_loss"), draw_each(BASELINE, *LOSS), 1
    ),
    figure(
        12,
        "Accuracy, baseline",
        BASELINE_CLAIM,
        (BASELINE,),
        judge_baseline("test_accuracy"),
        draw_each(BASELINE, *ACCURACY),
        1,
    ),
    figure(13, "Loss, small-batch first epoch", START_CLAIM.format("the loss"), ARMS, judge_loss, draw_both(*LOSS), 2),
    figure(
        14,
        "Accuracy, small-batch first epoch",
        START_CLAIM.format("the accuracy"),
        ARMS,
        judge_accuracy,
        draw_both(*ACCURACY),
        2,
    ),
)
