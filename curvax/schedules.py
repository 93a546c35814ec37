"""When to use which batch size, and with which learning rate.

A batch size, unlike a learning rate, is a shape: it is compiled into the step, so it may change a few times in a run
but not in every step. A schedule is therefore a list of phases, each so many epochs, steps or examples at one batch
size and one peak learning rate, and whatever varies within a phase (warm-up, decay) is a plain number per step,
computed here on the host and passed to the compiled step as an argument. The known schedules are instances: a small
first batch, batches that grow, in place of a learning rate that decays or beside one, and warm-ups, linear or longer
with the batch (LEGW).
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvax.checks import check_number

UNITS = ("epochs", "steps", "examples")


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training at one batch size and one peak learning rate.

    Attributes:
      length: how long it is, a whole number.
      batch_size: examples per optimizer step.
      learning_rate: peak, before warm-up and decay.
      unit: of the length: `"epochs"`, passes over the examples, `"steps"` or `"examples"`.

    Raises:
      ValueError: if a number is not above 0, length or batch size are no whole number, the unit is unknown, or not one
        batch fits into the examples.

    Example:
      >>> from curvax import BatchSchedule, Phase
      >>> paper = BatchSchedule((Phase(1, 512, 0.005), Phase(79, 8192, 0.05)))
      >>> [epoch.steps for epoch in paper.epochs(50_000)][:3]
      [97, 6, 6]
    """

    length: int
    batch_size: int
    learning_rate: float
    unit: Literal["epochs", "steps", "examples"] = "epochs"

    def __post_init__(self) -> None:
        for name in ("length", "batch_size"):
            # Small integers of NumPy overflow where they meet the number of examples.
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        check_number("learning_rate", self.learning_rate, "(0, inf)")
        if self.unit not in UNITS:
            raise ValueError(f"unit={self.unit!r} is unknown; pass 'epochs', 'steps' or 'examples'.")
        if self.unit == "examples" and self.length < self.batch_size:
            raise ValueError(f"a phase of {self.length} examples has no batch of {self.batch_size}; make it longer.")

    def steps(self, num_examples: int | None) -> int:
        """Optimizer steps in it: an epoch has as many as there are whole batches.

        Raises:
          ValueError: if the number of examples has to be known, or a batch is larger than all of them together.
        """
        if self.unit != "epochs":
            return self.length if self.unit == "steps" else self.length // self.batch_size
        num_examples = _given(num_examples)
        if num_examples < self.batch_size:
            raise ValueError(f"a batch of {self.batch_size} exceeds the {num_examples} examples; make it smaller.")
        return self.length * (num_examples // self.batch_size)


def _given(num_examples: int | None) -> int:
    if num_examples is None:
        raise ValueError("a phase in epochs has as many steps as there are batches; pass num_examples.")
    return num_examples


class Step(NamedTuple):
    """One optimizer step.

    Attributes:
      number: counted from 0.
      batch_size: its examples.
      learning_rate: its learning rate.
      examples: those of all steps before it.

    Example:
      >>> from curvax import BatchSchedule, Phase
      >>> next(BatchSchedule((Phase(4, 8, 0.1, "steps"),)).steps(first_step=2))
      Step(number=2, batch_size=8, learning_rate=0.1, examples=16)
    """

    number: int
    batch_size: int
    learning_rate: float
    examples: int


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
      `s = (t - warmup_epochs) / (total - warmup_epochs)`, cut to [0, 1]. Where a phase is in steps or examples, `t` and
      the total are counted in examples instead, and the warm-up in steps: `min(1, (k + 1) / warmup_steps)` at step k.

    Attributes:
      phases: at least one.
      warmup_epochs: of linear rise from 0 (Goyal et al. 2017), from the start of the first phase. They may exceed all
        phases, as in a run that is cut short: the peak is not reached then. For phases in epochs.
      decay: `"constant"` or `"cosine"`, which falls to 0 at the end of the last phase.
      warmup_steps: the same in steps, where a phase is not in epochs.

    Raises:
      ValueError: if `phases` are not phases, a warm-up is no number of at least 0 or in the other unit, or `decay` is
        neither.

    Example:
      >>> from curvax.schedules import BatchSchedule, Phase
      >>> schedule = BatchSchedule((Phase(1, 25, 0.4),), warmup_epochs=0.5)
      >>> [epoch.learning_rates.tolist() for epoch in schedule.epochs(100)]
      [[0.2, 0.4, 0.4, 0.4]]
      >>> schedule = BatchSchedule((Phase(2, 8, 0.1, "steps"), Phase(32, 16, 0.2, "examples")), warmup_steps=2)
      >>> [(step.batch_size, step.learning_rate) for step in schedule.steps()]
      [(8, 0.05), (8, 0.1), (16, 0.2), (16, 0.2)]
    """

    phases: tuple[Phase, ...]
    warmup_epochs: float = 0.0
    decay: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        phases = self.phases if isinstance(self.phases, tuple | list) else ()
        if not phases or not all(isinstance(phase, Phase) for phase in phases):
            raise ValueError(f"phases={self.phases!r} is no schedule; pass a tuple of at least one Phase.")
        if self.decay not in ("constant", "cosine"):
            raise ValueError(f"decay={self.decay!r} is unknown; pass 'constant' or 'cosine'.")
        check_number("warmup_epochs", self.warmup_epochs, "[0, inf)")
        check_number("warmup_steps", self.warmup_steps, "[0, inf)", whole=True)
        wrong, right = ("warmup_steps", "warmup_epochs") if self._in_epochs else ("warmup_epochs", "warmup_steps")
        if getattr(self, wrong):
            raise ValueError(f"{wrong} is in another unit than the phases; pass {right}.")

    @property
    def _in_epochs(self) -> bool:
        return all(phase.unit == "epochs" for phase in self.phases)

    def steps(self, num_examples: int | None = None, first_step: int = 0) -> Iterator[Step]:
        """Lays the phases out over steps, whatever their units.

        Args:
          num_examples: training examples; needed where a phase is in epochs.
          first_step: the step to begin with, as where a run goes on that was stopped before it.

        Yields:
          Every step from there on, in order.

        Raises:
          ValueError: if the number of examples is needed and missing, or a batch is larger than all of them together.
        """
        num_examples = None if num_examples is None else _whole("num_examples", num_examples)
        check_number("first_step", first_step, "[0, inf)", whole=True)
        steps = self._steps_of_epochs(num_examples) if self._in_epochs else self._steps_of_examples(num_examples)
        yield from itertools.islice(steps, int(first_step), None)

    def _steps_of_epochs(self, num_examples: int | None) -> Iterator[Step]:
        examples = 0
        for epoch in self.epochs(_given(num_examples)):
            for number, rate in enumerate(epoch.learning_rates.tolist(), epoch.first_step):
                yield Step(number, epoch.batch_size, rate, examples)
                examples += epoch.batch_size

    def _steps_of_examples(self, num_examples: int | None) -> Iterator[Step]:
        sizes = [[phase.batch_size] * phase.steps(num_examples) for phase in self.phases]
        ends = np.cumsum(np.concatenate(sizes))
        warm = ends[min(self.warmup_steps, len(ends)) - 1] if self.warmup_steps else 0
        number = 0
        for phase, batches in zip(self.phases, sizes, strict=True):
            for batch_size in batches:
                seen = int(ends[number]) - batch_size
                rate = min(1.0, (number + 1) / self.warmup_steps) if self.warmup_steps else 1.0
                if self.decay == "cosine":
                    past = np.clip((seen - warm) / max(ends[-1] - warm, batch_size), 0, 1)
                    rate *= 0.5 * (1 + float(np.cos(np.pi * past)))
                yield Step(number, batch_size, phase.learning_rate * rate, seen)
                number += 1

    def epochs(self, num_examples: int) -> Iterator[Epoch]:
        """Lays phases in epochs out over epochs and steps.

        Args:
          num_examples: training examples; an epoch has `num_examples // batch_size` steps, so that all batches have one
            shape and the rest of the examples waits for the next epoch's order.

        Yields:
          Every epoch of the run, in order.

        Raises:
          ValueError: if a batch is larger than all examples together, or a phase is not in epochs.
        """
        num_examples = _whole("num_examples", num_examples)
        if not self._in_epochs:
            raise ValueError("a phase in steps or examples has no epochs; call steps in place of epochs.")
        total = sum(phase.length for phase in self.phases)
        number = first_step = 0
        for phase in self.phases:
            steps = phase.steps(num_examples) // phase.length
            for _ in range(phase.length):
                fractions = self._fractions(number + np.arange(steps) / steps, 1 / steps, total)
                yield Epoch(number, phase.batch_size, first_step, phase.learning_rate * fractions)
                number, first_step = number + 1, first_step + steps

    def learning_rate(self, num_examples: int | None = None) -> optax.Schedule:
        """The learning rate as optax wants it: a function of the number of steps taken, the last rate ever after.

        Args:
          num_examples: training examples, as in `steps`.

        Returns:
          A schedule whose values are float32 scalars.
        """
        rates = jnp.asarray([step.learning_rate for step in self.steps(num_examples)], jnp.float32)

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
        found: np.ndarray = warmup * 0.5 * (1 + np.cos(np.pi * decayed))
        return found


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
    first = Phase(_whole("first_epochs", first_epochs), first_batch_size, first_learning_rate)
    check_number("epochs", epochs, f"[{first.length + 1}, inf)", whole=True)
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
      >>> [(phase.length, phase.batch_size, round(phase.learning_rate, 6)) for phase in schedule.phases]
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


def seesaw(
    examples: int,
    batch_size: int,
    learning_rate: float,
    *,
    decay: Literal["linear", "cosine"] = "cosine",
    max_batch_size: int | None = None,
    warmup_steps: int = 0,
) -> BatchSchedule:
    """Batches that grow while the learning rate decays: half of the decay is taken by each.

    Formula:
      Where the decay would have halved the learning rate, it is divided by sqrt(2), and the batch doubled: Seesaw
      (Meterez et al. 2025). That is at a share `arccos(2 / 2^k - 1) / pi` of the examples for the k-th halving of a
      cosine, and `1 - 2^-k` of a line.

    Args:
      examples: how many the run sees.
      batch_size: at first.
      learning_rate: at first.
      decay: which one it stands for, `"linear"` or `"cosine"` to 0.
      max_batch_size: the batch does not grow beyond; no limit if `None`, but that a phase has one step at least.
      warmup_steps: of linear rise, beside all this.

    Returns:
      A schedule of constant phases in examples.

    Raises:
      ValueError: if a number is out of range, or `decay` is neither.

    Example:
      >>> from curvax.schedules import seesaw
      >>> schedule = seesaw(4096, 64, 0.1, decay="linear", max_batch_size=256)
      >>> [(phase.length, phase.batch_size) for phase in schedule.phases]
      [(2048, 64), (1024, 128), (1024, 256)]
    """
    examples, batch_size = _whole("examples", examples), _whole("batch_size", batch_size)
    most = examples if max_batch_size is None else _whole("max_batch_size", max_batch_size)
    if decay not in ("linear", "cosine"):
        raise ValueError(f"decay={decay!r} is unknown; pass 'linear' or 'cosine'.")
    phases, start, halvings = [], 0, 0
    while start < examples:
        left, size = 0.5 ** (halvings + 1), batch_size * 2**halvings
        share = 1 - left if decay == "linear" else float(np.arccos(2 * left - 1) / np.pi)
        end = round(share * examples)
        if 2 * size > most or examples - end < 2 * size or end - start < size:
            end = examples
        phases.append(Phase(end - start, size, learning_rate * 2 ** (-halvings / 2), "examples"))
        start, halvings = end, halvings + 1
    return BatchSchedule(tuple(phases), warmup_steps=warmup_steps)


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
      BatchSchedule(phases=(Phase(length=10, ..., learning_rate=0.2, ...),), warmup_epochs=2.0, decay='constant', ...)
    """
    times = _whole("batch_size", batch_size) / _whole("base_batch_size", base_batch_size)
    check_number("base_learning_rate", base_learning_rate, "(0, inf)")
    check_number("base_warmup_epochs", base_warmup_epochs, "[0, inf)")
    peak = Phase(_whole("epochs", epochs), batch_size, base_learning_rate * float(np.sqrt(times)))
    return BatchSchedule((peak,), base_warmup_epochs * times, decay)


def _whole(name: str, value: int) -> int:
    check_number(name, value, "[1, inf)", whole=True)
    return int(value)
