"""When what is trained: a run is a list of phases, a phase a number of epochs at one batch size and learning rate.

A constant batch size is one phase; the paper's small-batch first epoch is two. Learning rates are plain numbers,
computed here for every step and passed to the compiled step as an argument, so that schedules and tuning recompile
nothing, and only a new batch size does.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Phase:
    """A number of epochs at one batch size and one peak learning rate."""

    epochs: int
    batch_size: int
    learning_rate: float

    @staticmethod
    def parse(text: str) -> "Phase":
        """A phase from `EPOCHS:BATCH:RATE`.

        Example:
            >>> Phase.parse("1:512:0.005")
            Phase(epochs=1, batch_size=512, learning_rate=0.005)
        """
        try:
            epochs, batch_size, learning_rate = text.split(":")
            phase = Phase(int(epochs), int(batch_size), float(learning_rate))
        except ValueError:
            phase = None
        if phase is None or min(dataclasses.astuple(phase)) <= 0:
            raise ValueError(f"--phases takes EPOCHS:BATCH:RATE, numbers above 0 such as 1:512:0.005, not {text!r}")
        return phase


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One pass over the images: its number, batch size, first step and the learning rate of each of its steps."""

    number: int
    batch_size: int
    first_step: int
    learning_rates: np.ndarray

    @property
    def steps(self) -> int:
        """Optimizer steps in this epoch."""
        return len(self.learning_rates)


def epochs(phases: Sequence[Phase], num_images: int, schedule: str, warmup_epochs: float) -> Iterator[Epoch]:
    """Lays the phases out over epochs and steps.

    Args:
        phases: at least one.
        num_images: training images; an epoch has `num_images // batch_size` steps.
        schedule: `"constant"` or `"cosine"`, which falls to 0 at the end of the last phase.
        warmup_epochs: epochs of linear rise from 0, counted from the start of the run.

    Yields:
        Every epoch of the run, in order.

    Example:
        >>> [epoch] = epochs([Phase(1, 25, 0.4)], num_images=100, schedule="constant", warmup_epochs=0.5)
        >>> epoch.learning_rates
        array([0.2, 0.4, 0.4, 0.4])
    """
    total = sum(phase.epochs for phase in phases)
    number = first_step = 0
    for phase in phases:
        steps = num_images // phase.batch_size
        for _ in range(phase.epochs):
            fraction = factor(number + np.arange(steps) / steps, 1 / steps, total, schedule, warmup_epochs)
            yield Epoch(number, phase.batch_size, first_step, phase.learning_rate * fraction)
            number, first_step = number + 1, first_step + steps


def factor(start: np.ndarray, length: float, total: int, schedule: str, warmup_epochs: float) -> np.ndarray:
    """The fraction of the peak learning rate at steps that begin at `start` and last `length`, all in epochs."""
    # A step's share of the warm-up is counted at its end: the first step of a run should not have learning rate 0.
    warmup = np.minimum(1, (start + length) / warmup_epochs) if warmup_epochs else np.ones_like(start)
    if schedule == "constant":
        return warmup
    decayed = np.clip((start - warmup_epochs) / max(total - warmup_epochs, length), 0, 1)
    return warmup * 0.5 * (1 + np.cos(np.pi * decayed))
