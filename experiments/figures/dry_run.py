"""What the full scale would take: one step of each kind of run, here, and an estimate for an accelerator.

Runs that compile the same programs are of one kind: those that differ in seed, learning rate or initial parameters, and
those whose batches are so many micro-batches of one size. The smallest of these batches that has more than one is
compiled and stepped; what XLA counts of a micro-batch's floating-point operations is then multiplied by all the
micro-batches of all the runs.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from experiments import runs
from experiments.config import TrainConfig
from experiments.console import progress_bar, say, show_table
from experiments.figures.base import Figure, Measurement, Place
from experiments.figures.first_step import first_step

# Two guesses: 40 % of the 156 TFLOP/s that an A100 has for float32 matrices (TF32), and that no step of a small batch
# is shorter than the launch of its kernels.
FLOPS_PER_SECOND = 6e13
SHORTEST_STEP = 2e-3


class Kind(NamedTuple):
    """Runs that share what is compiled: steps and micro-batches of all; of one step here; FLOP of a micro-batch."""

    name: str
    steps: int
    micro_batches: int
    seconds_here: float
    micro_batches_here: int
    flops: float

    @property
    def hours(self) -> float:
        """Estimated, of all steps on one accelerator."""
        return self.micro_batches * max(self.flops / FLOPS_PER_SECOND, SHORTEST_STEP) / 3600

    def cells(self) -> list[str]:
        """Of the table."""
        several = f" ({self.micro_batches_here} micro-batches)" if self.micro_batches_here > 1 else ""
        here = f"{self.seconds_here:.3g} s{several}"
        numbers = (f"{self.steps:,}", f"{self.micro_batches:,}", f"{self.flops / 1e12:.3g}", f"{self.hours:.2g}")
        return [self.name, *numbers, here]


def dry_run(figures: Sequence[Figure], place: Place):
    """Carries out one step of each kind of run of some figures, and prints what all would take."""
    groups = grouped([config for figure in figures for config in figure.runs(place)])
    kinds = []
    with progress_bar() as bar:
        task = bar.add_task("one step of each", total=len(groups) + len(figures))
        for (config, micro), steps in groups.items():
            bar.update(task, description=f"{config.model}, {config.optimizer}, micro-batches of {micro}")
            kinds.append(one_step(config, micro, steps))
            say(f"{kinds[-1].name}: one step in {kinds[-1].seconds_here:.3g} s")
            bar.advance(task)
        for figure in figures:
            if measurement := figure.measurement(place):
                bar.update(task, description=f"figure {figure.number}")
                kinds.append(one_gradient(figure.number, measurement))
            bar.advance(task)
    caption = (
        f"accelerator: {FLOPS_PER_SECOND / 1e12:g} TFLOP/s sustained, at least {1000 * SHORTEST_STEP:g} ms a"
        " micro-batch; evaluation not counted. One step here: with its compilation"
    )
    columns = ("runs", "steps", "micro-batches", "TFLOP each", "accelerator hours", "one step here")
    total = ["all", "", "", "", f"{sum(kind.hours for kind in kinds):.3g}", ""]
    show_table(columns, [*(kind.cells() for kind in kinds), total], caption=caption)


def grouped(configs: Sequence[TrainConfig]) -> dict[tuple[TrainConfig, int], dict[int, int]]:
    """By what has to be compiled, configuration and size of the micro-batches: the steps at each size of a batch.

    Runs that figures share count once.
    """
    groups = {}
    for config in {config.name: config for config in configs}.values():
        images = len(runs.stepper_of(config).train) if config.train_images is None else config.train_images
        for phase in config.plan(1.0).phases:
            steps = groups.setdefault((programs(config), config.micro_size(phase.batch_size)), {})
            steps[phase.batch_size] = steps.get(phase.batch_size, 0) + phase.epochs * (images // phase.batch_size)
    return groups


def programs(config: TrainConfig) -> TrainConfig:
    """The same for all configurations whose steps are compiled alike, up to the probes, which are added to all."""
    plan = {"phases": (), "epochs": 1, "batch_size": config.micro_batch_size or 1, "schedule": "constant"}
    start = {"seed": 0, "init": "he", "learning_rate": 0.01, "warmup_epochs": 0.0}
    return dataclasses.replace(config, **plan, **start, discard_epochs=None, probes=True)


def one_step(config: TrainConfig, micro: int, steps: Mapping[int, int]) -> Kind:
    """Compiles a step, and carries it out."""
    sizes = sorted(steps)
    batch = next((size for size in sizes if size > micro), sizes[0])
    stepper = runs.stepper_of(dataclasses.replace(config, batch_size=batch))
    [epoch] = stepper.config.plan(0.01).epochs(len(stepper.train))
    state = stepper.init(0)
    order, start = stepper.shuffle(state, 0), time.perf_counter()
    state, _ = stepper.step(state, order, epoch, 0)
    seconds = time.perf_counter() - start

    sums, zero = stepper.programs.zeros(state), np.int32(0)
    lowered = stepper.programs.gradient.lower(sums, state, stepper.train, order, zero, zero, None, size=micro)
    # The pass forward that finds the losses to leave out is a third of a gradient.
    flops = lowered.cost_analysis()["flops"] * (4 / 3 if config.discard else 1)
    out = f", {config.discard:.0%} left out by {config.discard_by}" if config.discard else ""
    batches = f"batch {sizes[0]:,}" + f" to {sizes[-1]:,}" * (len(sizes) > 1)
    micro_batches = sum(number * size // micro for size, number in steps.items())
    name = f"{config.model}, {config.optimizer}{out}, {batches}"
    return Kind(name, sum(steps.values()), micro_batches, seconds, batch // micro, flops)


def one_gradient(number: int, measurement: Measurement) -> Kind:
    """Computes one chunk's gradient of a figure that trains nothing."""
    step = first_step(measurement.config, measurement.chunk)
    start = time.perf_counter()
    jax.block_until_ready(step.gradient(0, measurement.chunk))
    seconds = time.perf_counter() - start
    chunks = -(-measurement.images // measurement.chunk)
    name, flops = f"figure {number}, chunk of {measurement.chunk}", step.cost() * measurement.chunk
    return Kind(name, chunks, chunks, seconds, 1, flops)
