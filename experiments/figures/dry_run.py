"""What the full scale would take: one step of each kind of run, here, and an estimate for an accelerator.

Runs that differ only in seed or learning rate are of one kind. A step is compiled and carried out in full, in as many
micro-batches as it needs; what XLA counts of a micro-batch's floating-point operations is then multiplied by all the
micro-batches of all the runs.
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np
from rich.table import Table

from experiments import runs
from experiments.config import TrainConfig
from experiments.console import console, progress_bar
from experiments.figures.base import Figure, Measurement, Place
from experiments.figures.first_step import first_step
from experiments.step import Stepper

# Two guesses: 40 % of the 156 TFLOP/s that an A100 has for float32 matrices (TF32), and that no step of a small batch
# is shorter than the launch of its kernels.
FLOPS_PER_SECOND = 6e13
SHORTEST_STEP = 2e-3


@dataclasses.dataclass
class Kind:
    """Runs that share what is compiled.

    Attributes:
        name: for the table.
        steps: optimizer steps in all of them.
        here: seconds of one step on this machine, with its compilation.
        flops: of one step.
        micro_batches: of one step.
    """

    name: str
    steps: int
    here: float
    flops: float
    micro_batches: int = 1

    @property
    def hours(self) -> float:
        """Estimated, of all steps on one accelerator."""
        return self.steps * max(self.flops / FLOPS_PER_SECOND, SHORTEST_STEP * self.micro_batches) / 3600


def dry_run(figures: Sequence[Figure], place: Place):
    """Carries out one step of each kind of run of some figures, and prints what all would take."""
    groups = grouped([config for figure in figures for config in figure.runs(place)])
    kinds = []
    with progress_bar() as bar:
        task = bar.add_task("one step of each", total=len(groups) + len(figures))
        for (config, batch), steps in groups.items():
            bar.update(task, description=f"{config.model}, {config.optimizer}, batch {batch}")
            kinds.append(one_step(config, batch, steps))
            bar.advance(task)
        for figure in figures:
            if figure.measurement:
                bar.update(task, description=f"figure {figure.number}")
                kinds.append(one_gradient(figure.number, figure.measurement(place)))
            bar.advance(task)
    console.print(table(kinds))


def grouped(configs: Sequence[TrainConfig]) -> dict[tuple[TrainConfig, int], int]:
    """The steps of the runs at each batch size, by what has to be compiled; shared runs count once."""
    groups = {}
    for config in {config.name: config for config in configs}.values():
        images = len(runs.stepper_of(config).train) if config.train_images is None else config.train_images
        for phase in config.plan(1.0).phases:
            kind = dataclasses.replace(config, phases=(), seed=0, learning_rate=0.01, epochs=1, warmup_epochs=0.0)
            kind = dataclasses.replace(kind, batch_size=phase.batch_size, discard_epochs=None)
            key = (kind, phase.batch_size)
            groups[key] = groups.get(key, 0) + phase.epochs * (images // phase.batch_size)
    return groups


def one_step(config: TrainConfig, batch: int, steps: int) -> Kind:
    """Compiles a step, and carries it out."""
    stepper = runs.stepper_of(config)
    [epoch] = config.plan(0.01).epochs(len(stepper.train))
    state = stepper.init(0)
    order, start = stepper.shuffle(state, 0), time.perf_counter()
    state, metrics = stepper.step(state, order, epoch, 0)
    jax.block_until_ready(metrics)
    seconds = time.perf_counter() - start
    micro = config.micro_size(batch)
    name = f"{config.model}, {config.optimizer}" + (f", {config.discard_by} left out" if config.discard else "")
    # The pass forward that finds the losses to leave out is a third of a gradient.
    count = flops(stepper, state, micro) * batch / micro * (4 / 3 if config.discard else 1)
    return Kind(f"{name}, batch {batch}", steps, seconds, count, batch // micro)


def flops(stepper: Stepper, state, micro: int) -> float:
    """Floating-point operations of the gradient of one micro-batch, as XLA counts them."""
    sums, order, zero = stepper._zeros(state), stepper.shuffle(state, 0), np.int32(0)
    lowered = stepper._gradient.lower(sums, state, stepper.train, order, zero, zero, None, size=micro)
    return lowered.cost_analysis()["flops"]


def one_gradient(number: int, measurement: Measurement) -> Kind:
    """Computes one chunk's gradient of a figure that trains nothing."""
    step = first_step(measurement.config, measurement.chunk)
    start = time.perf_counter()
    jax.block_until_ready(step.gradient(0, measurement.chunk))
    seconds = time.perf_counter() - start
    chunks = -(-measurement.images // measurement.chunk)
    return Kind(f"figure {number}, chunk of {measurement.chunk}", chunks, seconds, step.cost() * measurement.chunk)


def table(kinds: Sequence[Kind]) -> Table:
    """One row per kind, and the sum."""
    caption = (
        f"accelerator: {FLOPS_PER_SECOND / 1e12:g} TFLOP/s sustained, at least {1000 * SHORTEST_STEP:g} ms a step;"
        " evaluation not counted"
    )
    result = Table(caption=caption)
    for column in ("runs", "steps", "micro-batches a step", "first step here (s)", "TFLOP a step", "accelerator hours"):
        result.add_column(column, justify="left" if column == "runs" else "right")
    for kind in kinds:
        cells = (f"{kind.steps:,}", f"{kind.micro_batches}", f"{kind.here:.3g}", f"{kind.flops / 1e12:.3g}")
        result.add_row(kind.name, *cells, f"{kind.hours:.2g}")
    result.add_section()
    result.add_row("all", *[""] * 4, f"{sum(kind.hours for kind in kinds):.3g}")
    return result
