"""What the full scale would take: one step of each kind of run, here, and an estimate for an accelerator.

Runs that compile the same programs are of one kind: those that differ in seed, learning rate or initial parameters, and
those whose batches are so many micro-batches of one size. The smallest of these batches that has more than one is
compiled and stepped; what XLA counts of a micro-batch's floating-point operations is then multiplied by all the
micro-batches of all the runs. A figure that trains nothing takes so many gradients, each counted as a step.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments import runs
from experiments.config import TrainConfig
from experiments.console import TrainingBars, say, show_table
from experiments.figures.base import Figure, Place

# Two guesses: 40 % of the 156 TFLOP/s that an A100 has for float32 matrices (TF32), and that no step of a small batch
# is shorter than the launch of its kernels.
FLOPS_PER_SECOND = 6e13
SHORTEST_STEP = 2e-3
COLUMNS = ("runs", "steps", "micro-batches", "TFLOP each", "accelerator hours", "one step here")


class Kind(NamedTuple):
    """Runs that share what is compiled: its sizes, the steps at each size of a batch, and what only some kinds have."""

    config: TrainConfig
    micro: int
    name: str


def dry_run(figures: Sequence[Figure], place: Place):
    """Carries out one step of each kind of run of some figures, and prints what all would take."""
    kinds = grouped([config for figure in figures for config in figure.grid(place).values()])
    for figure in figures:
        if measured := figure.measurement(place):
            config, chunk, images = measured
            config = dataclasses.replace(config, augment=False, dropout=0.0)
            kinds[Kind(programs(config), chunk, f"figure {figure.number}")] = {chunk: -(-images // chunk)}
    rows, hours = [], 0.0
    with TrainingBars() as bars:
        task = bars.begin("one step of each", len(kinds))
        for kind, steps in kinds.items():
            row, more = one_step(kind, steps)
            bars.advance(task)
            rows, hours = [*rows, row], hours + more
            say(f"{row[0]}: one step in {row[-1]}")
    caption = (
        f"accelerator: {FLOPS_PER_SECOND / 1e12:g} TFLOP/s sustained, at least {1000 * SHORTEST_STEP:g} ms a"
        " micro-batch; evaluation not counted. One step here: with its compilation"
    )
    show_table(COLUMNS, [*rows, ["all", "", "", "", f"{hours:.3g}", ""]], caption=caption)


def grouped(configs: Sequence[TrainConfig]) -> dict[Kind, dict[int, int]]:
    """By kind: the steps at each size of a batch. Runs that figures share count once."""
    kinds = {}
    for config in {config.name: config for config in configs}.values():
        images = len(runs.stepper_of(config).train) if config.train_images is None else config.train_images
        out = f", {config.discard:.0%} left out by {config.discard_by}" if config.discard else ""
        for phase in config.plan(1.0).phases:
            kind = Kind(
                programs(config), config.micro_size(phase.batch_size), f"{config.model}, {config.optimizer}{out}"
            )
            steps = kinds.setdefault(kind, {})
            steps[phase.batch_size] = steps.get(phase.batch_size, 0) + phase.steps(images)
    return kinds


def programs(config: TrainConfig) -> TrainConfig:
    """The same for all configurations whose steps are compiled alike, up to the probes, which are added to all."""
    plan = {"phases": (), "epochs": 1, "batch_size": config.micro_batch_size or 1, "schedule": "constant"}
    start = {"seed": 0, "init": "he", "learning_rate": 0.01, "warmup_epochs": 0.0}
    return dataclasses.replace(config, **plan, **start, discard_epochs=None, probes=True)


def one_step(kind: Kind, steps: Mapping[int, int]) -> tuple[list[str], float]:
    """Compiles a step, and carries it out: a row of the table, and the hours of all steps on an accelerator."""
    sizes = sorted(steps)
    batch = next((size for size in sizes if size > kind.micro), sizes[0])
    stepper = runs.stepper_of(dataclasses.replace(kind.config, batch_size=batch, micro_batch_size=kind.micro))
    [epoch] = stepper.config.plan(0.01).epochs(len(stepper.train))
    state, start = stepper.init(0), time.perf_counter()
    order = stepper.shuffle(state, 0)
    state, _ = stepper.step(state, order, epoch, 0)
    seconds = time.perf_counter() - start

    zeros, zero = stepper.programs.zeros(state), np.int32(0)
    lowered = stepper.programs.gradient.lower(zeros, state, stepper.train, order, zero, zero, None, size=kind.micro)
    # The pass forward that finds the losses to leave out is a third of a gradient.
    flops = lowered.cost_analysis()["flops"] * (4 / 3 if kind.config.discard else 1)
    number = sum(number * size // kind.micro for size, number in steps.items())
    hours = number * max(flops / FLOPS_PER_SECOND, SHORTEST_STEP) / 3600
    name = f"{kind.name}, batch {sizes[0]:,}" + f" to {sizes[-1]:,}" * (len(sizes) > 1)
    here = f"{seconds:.3g} s" + f" ({batch // kind.micro} micro-batches)" * (batch > kind.micro)
    return [name, f"{sum(steps.values()):,}", f"{number:,}", f"{flops / 1e12:.3g}", f"{hours:.2g}", here], hours
