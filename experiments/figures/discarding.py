"""Figure 10: accuracy with the 30 % of images with the smallest losses left out, in the first half of the training.

Two batch sizes, as in the paper; where its data set is cut down so are they, to about as many steps per epoch. The
control leaves out as many images at random. All three share their seeds, so that differences are taken seed by seed.
"""

from experiments import plots
from experiments.figures import statistics
from experiments.figures.base import TEST_ACCURACY, Claim, Figure, Place, count
from experiments.records import column, distinct, where

SIZES = {"smoke": (64, 256), "cpu": (512, 2048), "paper": (2000, 8000)}
SEEDS = {"smoke": 2, "cpu": 8, "paper": 8}
EPOCHS = {"smoke": 4, "cpu": 10, "paper": 200}
ARMS = {"baseline": "baseline", "loss": "30 % smallest losses left out", "chance": "30 % left out at random"}


def config(place: Place, arm: str, batch: int, seed: int):
    """One run; the learning rate is that of the paper's section 3.2."""
    changes, epochs = {}, EPOCHS[place.preset]
    if arm != "baseline":
        changes = {"discard": 0.3, "discard_by": arm, "discard_epochs": epochs // 2}
    # Micro-batches have to divide the batch: 2000 and 8000 are 2 and 8 thousands.
    if place.preset == "paper":
        changes["micro_batch_size"] = 1000
    return place.config(batch_size=batch, learning_rate=0.05, momentum=0.9, epochs=epochs, seed=seed, **changes)


class Discarding(Figure):
    """Test accuracy over epochs, a panel per batch size."""

    number, title, panels = 10, "Accuracy with 30 % of the images left out", 2
    claim = "Discarding the 30 % smallest losses in the first half of the training improves accuracy."
    keys = ("arm", "batch_size", "seed")

    def grid(self, place):
        keys = [(a, b, s) for b in SIZES[place.preset] for a in ARMS for s in range(SEEDS[place.preset])]
        return {key: config(place, *key) for key in keys}

    def judge(self, rows):
        claims = []
        for batch in distinct(rows, "batch_size"):
            values = {arm: column(rows, "test_accuracy", arm=arm, batch_size=batch, final=True) for arm in ARMS}
            levels = ", ".join(f"{arm} {statistics.spread(of_arm, 100)} %" for arm, of_arm in values.items())
            for other, words in (("baseline", "the baseline"), ("chance", "leaving out as many at random (ours)")):
                gain, said = statistics.gain(values["loss"], values[other])
                claim = f"At batch {batch} leaving out small losses is more accurate than {words}."
                claims.append(Claim(claim, f"final test accuracy: {levels}; difference {said}", gain.above(0)))
        return claims

    def draw(self, axes, rows):
        for panel, batch in zip(axes, distinct(rows, "batch_size"), strict=True):
            own = where(rows, batch_size=batch, final=None)
            plots.lines(panel, own, ("arm", ARMS), "epoch", TEST_ACCURACY, 100, f"batch {batch}")

    def settings(self, place):
        example = config(place, "loss", SIZES[place.preset][0], 0)
        return (
            f"{example.describe()}, 0.05; images are left out in the first {example.discard_epochs} of {example.epochs}"
            f" epochs; mean and range of {count(SEEDS[place.preset], 'seed')}."
        )


FIGURES = (Discarding(),)
