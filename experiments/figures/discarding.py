"""Figure 10: accuracy with the 30 % of images with the smallest losses left out, in the first half of the training.

Two batch sizes, as in the paper; where its data set is cut down so are they, to about as many steps per epoch. The
control leaves out as many images at random. All three share their seeds, so that differences are taken seed by seed.
"""

from experiments.figures import statistics
from experiments.figures.base import Claim, Figure, Place, count, describe, last_epoch
from experiments.figures.rows import by_label, column, epoch_curves
from experiments.plots import curves, name_axes

SIZES = {"smoke": (64, 256), "cpu": (512, 2048), "paper": (2000, 8000)}
SEEDS = {"smoke": 2, "cpu": 8, "paper": 8}
EPOCHS = {"smoke": 4, "cpu": 10, "paper": 200}
ARMS = {
    "baseline": ("baseline", {}),
    "loss": ("30 % smallest losses left out", {"discard": 0.3, "discard_by": "loss"}),
    "chance": ("30 % left out at random", {"discard": 0.3, "discard_by": "chance"}),
}


def config(place: Place, arm: str, batch: int, seed: int):
    """One run; the learning rate is that of the paper's section 3.2."""
    changes, epochs = ARMS[arm][1], EPOCHS[place.preset]
    if changes:
        changes = {**changes, "discard_epochs": epochs // 2}
    # Micro-batches have to divide the batch: 2000 and 8000 are 2 and 8 thousands.
    if place.preset == "paper":
        changes = {**changes, "micro_batch_size": 1000}
    return place.config(batch_size=batch, learning_rate=0.05, momentum=0.9, epochs=epochs, seed=seed, **changes)


def grid(place: Place):
    """All runs, by arm, batch size and seed."""
    keys = [(a, b, s) for b in SIZES[place.preset] for a in ARMS for s in range(SEEDS[place.preset])]
    return {key: config(place, *key) for key in keys}


def rows(place: Place, trained):
    """One row per epoch of each run."""
    for (arm, batch, seed), configuration in grid(place).items():
        records = trained(configuration)
        about = {"arm": arm, "batch_size": batch, "seed": seed}
        yield from epoch_curves(records, about)
        yield {**about, "final": True, **{n: last_epoch(records)[n] for n in ("accuracy", "test_accuracy")}}


def judge(rows):
    """Is it better than the baseline, and better than chance?"""
    finals = [row for row in rows if row.get("final")]
    claims = []
    for batch in sorted({row["batch_size"] for row in finals}):
        values = {arm: column(finals, "test_accuracy", batch, arm=arm) for arm in ARMS}
        levels = ", ".join(f"{arm} {statistics.spread(of_arm, 100)} %" for arm, of_arm in values.items())
        for other, statement in (("baseline", "the baseline"), ("chance", "leaving out as many at random (ours)")):
            gain = statistics.difference(values["loss"], values[other])
            error = statistics.standard_error([a - b for a, b in zip(values["loss"], values[other], strict=True)])
            evidence = f"final test accuracy: {levels}; difference {gain}, standard error {error:.2g}"
            claim = f"At batch {batch} leaving out small losses is more accurate than {statement}."
            claims.append(Claim(claim, evidence, gain.above(0)))
    return claims


def draw(axes, rows):
    """Test accuracy over epochs, a panel per batch size."""
    epochs = [row for row in rows if not row.get("final")]
    for panel, batch in zip(axes, sorted({row["batch_size"] for row in epochs}), strict=True):
        own = [row for row in epochs if row["batch_size"] == batch]
        curves(panel, by_label(own, "arm", {arm: label for arm, (label, _) in ARMS.items()}, "test_accuracy", 100))
        panel.set_title(f"batch {batch}", fontsize=10)
        name_axes(panel, "epoch", "test accuracy (%)")


def settings(place: Place) -> str:
    """The small print."""
    example = config(place, "loss", SIZES[place.preset][0], 0)
    return (
        f"{describe(example)}, 0.05; images are left out in the first {example.discard_epochs} of {example.epochs}"
        f" epochs; mean and range of {count(SEEDS[place.preset], 'seed')}."
    )


FIGURES = (
    Figure(
        10,
        "Accuracy with 30 % of the images left out",
        "Discarding the 30 % smallest losses in the first half of the training improves accuracy.",
        rows,
        judge,
        draw,
        settings,
        lambda place: list(grid(place).values()),
        panels=2,
    ),
)
