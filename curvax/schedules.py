"""When to use which batch size, and with which learning rate.

A batch size, unlike a learning rate, is a shape: it is compiled into the step, so it may change a few times in a run
but not in every step. A schedule is therefore a list of phases, each a number of epochs at one batch size and one peak
learning rate, and whatever varies within a phase (warm-up, decay) is a plain number per step, computed here on the host
and passed to the compiled step as an argument. The known schedules are instances: a small first batch, batches that
grow, in place of a learning rate that decays or beside one, and warm-ups, linear or longer with the batch (LEGW).
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvax.checks import check_number


@dataclasses.dataclass(frozen=True)
class Phase:
    """A number of epochs at one batch size and one peak learning rate.

    Attributes:
      epochs: passes over the examples, a whole number.
      batch_size: examples per optimizer step.
      learning_rate: peak, before warm-up and decay.

    Raises:
      ValueError: if one of them is not above 0, or epochs or batch size are no whole number.

    Example:
      >>> from curvax import BatchSchedule, Phase
      >>> paper = BatchSchedule((Phase(1, 512, 0.005), Phase(79, 8192, 0.05)))
      >>> [epoch.steps for epoch in paper.epochs(50_000)][:3]
      [97, 6, 6]
    """

    epochs: int
    batch_size: int
    learning_rate: float

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            # Small integers of NumPy overflow where they meet the number of examples.
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        check_number("learning_rate", self.learning_rate, "(0, inf)")


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One pass over the examples.

    Attributes:
      number: counted from 0.
      batch_size: examples per optimizer step.
      first_step: optimizer steps before it.
      learning_rates: of each of its steps, `(steps,)`, float64.
    """

    number: int
    batch_size: int
    first_step: int
    learning_rates: np.ndarray

    @property
    def steps(self) -> int:
        """Optimizer steps in this epoch."""
        return len(self.learning_rates)


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
    """Phases, one after the other, with a warm-up and a decay over all of them.

    Formula:
      The learning rate of a step that begins at `t` and ends at `t + d`, in epochs since the start, is
      `peak * min(1, (t + d) / warmup_epochs)`, and with `decay="cosine"` that times `(1 + cos(pi s)) / 2`, where
      `s = (t - warmup_epochs) / (total - warmup_epochs)`, cut to [0, 1].

    Attributes:
      phases: at least one.
      warmup_epochs: of linear rise from 0 (Goyal et al. 2017), from the start of the first phase. They may exceed all
        phases, as in a run that is cut short: the peak is not reached then.
      decay: `"constant"` or `"cosine"`, which falls to 0 at the end of the last phase.

    Raises:
      ValueError: if `phases` are not phases, `warmup_epochs` is no number of at least 0, or `decay` is neither.

    Example:
      >>> from curvax.schedules import BatchSchedule, Phase
      >>> schedule = BatchSchedule((Phase(1, 25, 0.4),), warmup_epochs=0.5)
      >>> [epoch.learning_rates.tolist() for epoch in schedule.epochs(100)]
      [[0.2, 0.4, 0.4, 0.4]]
    """

    phases: tuple[Phase, ...]
    warmup_epochs: float = 0.0
    decay: Literal["constant", "cosine"] = "constant"

    def __post_init__(self):
        phases = self.phases if isinstance(self.phases, tuple | list) else ()
        if not phases or not all(isinstance(phase, Phase) for phase in phases):
            raise ValueError(f"phases={self.phases!r} is no schedule; pass a tuple of at least one Phase.")
        if self.decay not in ("constant", "cosine"):
            raise ValueError(f"decay={self.decay!r} is unknown; pass 'constant' or 'cosine'.")
        check_number("warmup_epochs", self.warmup_epochs, "[0, inf)")

    def epochs(self, num_examples: int) -> Iterator[Epoch]:
        """Lays the phases out over epochs and steps.

        Args:
          num_examples: training examples; an epoch has `num_examples // batch_size` steps, so that all batches have one
            shape and the rest of the examples waits for the next epoch's order.

        Yields:
          Every epoch of the run, in order.

        Raises:
          ValueError: if a batch is larger than all examples together.
        """
        num_examples = _whole("num_examples", num_examples)
        total = sum(phase.epochs for phase in self.phases)
        number = first_step = 0
        for phase in self.phases:
            steps = num_examples // phase.batch_size
            if not steps:
                raise ValueError(f"a batch of {phase.batch_size} exceeds the {num_examples} examples; make it smaller.")
            for _ in range(phase.epochs):
                fractions = self._fractions(number + np.arange(steps) / steps, 1 / steps, total)
                yield Epoch(number, phase.batch_size, first_step, phase.learning_rate * fractions)
                number, first_step = number + 1, first_step + steps

    def learning_rate(self, num_examples: int) -> optax.Schedule:
        """The learning rate as optax wants it: a function of the number of steps taken, the last rate ever after.

        Args:
          num_examples: training examples, as in `epochs`.

        Returns:
          A schedule whose values are float32 scalars.
        """
        rates = jnp.asarray(np.concatenate([epoch.learning_rates for epoch in self.epochs(num_examples)]), jnp.float32)

        def schedule(count: jax.typing.ArrayLike) -> jax.Array:
            return rates[jnp.minimum(count, rates.size - 1)]

        return schedule

    def _fractions(self, start: np.ndarray, length: float, total: int) -> np.ndarray:
        """The fraction of the peak learning rate at steps that begin at `start` and last `length`, all in epochs."""
        # A step's share of the warm-up is counted at its end: the first step of a run should not have learning rate 0.
        warmup = np.minimum(1, (start + length) / self.warmup_epochs) if self.warmup_epochs else np.ones_like(start)
        if self.decay == "constant":
            return warmup
        decayed = np.clip((start - self.warmup_epochs) / max(total - self.warmup_epochs, length), 0, 1)
        return warmup * 0.5 * (1 + np.cos(np.pi * decayed))


def small_batch_start(
    epochs: int,
    batch_size: int = 8192,
    learning_rate: float = 0.05,
    *,
    first_epochs: int = 1,
    first_batch_size: int = 512,
    first_learning_rate: float = 0.005,
) -> BatchSchedule:
    """A first epoch of small batches, then large ones.

    Formula:
      Gao & Zhong, section 3.2: one epoch at batch 512 and learning rate 0.005, then 8192 and 0.05 (the defaults).

    Args:
      epochs: in all, the first ones included.
      batch_size: after the first epochs.
      learning_rate: after the first epochs.
      first_epochs: how many epochs the small batches last.
      first_batch_size: batch size in them.
      first_learning_rate: learning rate in them.

    Returns:
      A schedule of two phases.

    Raises:
      ValueError: if a number is not above 0, or no epoch is left after the first ones.

    Example:
      >>> from curvax.schedules import small_batch_start
      >>> [epoch.steps for epoch in small_batch_start(3).epochs(50_000)]
      [97, 6, 6]
    """
    first = Phase(first_epochs, first_batch_size, first_learning_rate)
    check_number("epochs", epochs, f"[{first.epochs + 1}, inf)", whole=True)
    return BatchSchedule((first, Phase(epochs - first_epochs, batch_size, learning_rate)))


def growing_batches(
    epochs: int,
    batch_size: int,
    learning_rate: float,
    *,
    every: int,
    batch_factor: int = 2,
    rate_factor: float = 1.0,
    max_batch_size: int | None = None,
) -> BatchSchedule:
    """Batches that grow by a factor every so many epochs, in place of a learning rate that decays.

    Formula:
      Phase k has the batch `B f^k` and the rate `gamma r^k`, so that the rate per example changes by `r / f` as under a
      decay by that factor at a fixed batch. `batch_factor=5, rate_factor=1` where the rate would have been divided by 5
      is Smith et al. 2018, "Don't decay the learning rate, increase the batch size"; `batch_factor=2` with
      `rate_factor=0.75`, instead of a decay by 0.375, is AdaBatch (Devarakonda et al. 2017). Once `max_batch_size` is
      reached the batch stays, and the rate takes the whole decay `r / f`, as Smith et al. do.

    Args:
      epochs: in all; the last phase may be shorter.
      batch_size: of the first phase.
      learning_rate: of the first phase.
      every: epochs from one growth to the next.
      batch_factor: by which the batch grows.
      rate_factor: by which the learning rate changes as the batch grows.
      max_batch_size: a batch that would exceed it does not grow any more; no limit if None.

    Returns:
      A schedule of constant phases.

    Raises:
      ValueError: if a number is not above 0, or one that counts epochs or examples, or the factor of the batch, is no
        whole number; or if `max_batch_size` is below the first batch.

    Example:
      >>> from curvax.schedules import growing_batches
      >>> schedule = growing_batches(6, 128, 0.1, every=2, batch_factor=5, max_batch_size=1000)
      >>> [(phase.epochs, phase.batch_size, round(phase.learning_rate, 6)) for phase in schedule.phases]
      [(2, 128, 0.1), (2, 640, 0.1), (2, 640, 0.02)]
    """
    epochs, every, batch_size = _whole("epochs", epochs), _whole("every", every), _whole("batch_size", batch_size)
    batch_factor = _whole("batch_factor", batch_factor)
    check_number("learning_rate", learning_rate, "(0, inf)")
    check_number("rate_factor", rate_factor, "(0, inf)")
    if max_batch_size is not None:
        check_number("max_batch_size", max_batch_size, f"[{batch_size}, inf)", whole=True)
    phases = []
    for start in range(0, epochs, every):
        phases.append(Phase(min(every, epochs - start), batch_size, learning_rate))
        if max_batch_size is not None and batch_size * batch_factor > max_batch_size:
            learning_rate *= rate_factor / batch_factor
        else:
            batch_size, learning_rate = batch_size * batch_factor, learning_rate * rate_factor
    return BatchSchedule(tuple(phases))


def legw(
    epochs: int,
    batch_size: int,
    *,
    base_batch_size: int,
    base_learning_rate: float,
    base_warmup_epochs: float,
    decay: Literal["constant", "cosine"] = "constant",
) -> BatchSchedule:
    """Linear-epoch gradual warm-up: settings that work at one batch size, carried over to another.

    Formula:
      At k times the batch, sqrt(k) times the learning rate and k times the warm-up epochs, which are as many steps; You
      et al. 2019, "Large-batch training for LSTM and beyond".

    Args:
      epochs: in all.
      batch_size: to train with.
      base_batch_size: for which the other settings are good.
      base_learning_rate: peak, at the base batch size.
      base_warmup_epochs: at the base batch size.
      decay: after the warm-up.

    Returns:
      A schedule of one phase with a warm-up.

    Raises:
      ValueError: if a size or a rate is not above 0, or the warm-up is below 0.

    Example:
      >>> from curvax.schedules import legw
      >>> legw(10, 1024, base_batch_size=256, base_learning_rate=0.1, base_warmup_epochs=0.5)
      BatchSchedule(phases=(Phase(epochs=10, batch_size=1024, learning_rate=0.2),), warmup_epochs=2.0, decay='constant')
    """
    times = _whole("batch_size", batch_size) / _whole("base_batch_size", base_batch_size)
    check_number("base_learning_rate", base_learning_rate, "(0, inf)")
    check_number("base_warmup_epochs", base_warmup_epochs, "[0, inf)")
    peak = Phase(epochs, batch_size, base_learning_rate * float(np.sqrt(times)))
    return BatchSchedule((peak,), base_warmup_epochs * times, decay)


def _whole(name: str, value: int) -> int:
    check_number(name, value, "[1, inf)", whole=True)
    return int(value)
