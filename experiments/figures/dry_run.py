"""What the full scale would take: one step of each kind of run, here, and an estimate for an accelerator.

Runs that compile the same programs are of one kind: those that differ in seed, learning rate or initial parameters, and
those whose batches are so many micro-batches of one size. The smallest of these batches that has more than one is
compiled and stepped; what XLA counts of a micro-batch's floating-point operations is then multiplied by all the
micro-batches of all the runs.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from experiments import runs
from experiments.config import TrainConfig
from experiments.console import progress_bar, say, show_table
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
        micro_batches: in all these steps.
        here: seconds of one step on this machine, with its compilation.
        micro_batches_here: of that step.
        flops: of one micro-batch.
    """

    name: str
    steps: int
    micro_batches: int
    here: float
    micro_batches_here: int
    flops: float

    @property
    def hours(self) -> float:
        """Estimated, of all steps on one accelerator."""
        return self.micro_batches * max(self.flops / FLOPS_PER_SECOND, SHORTEST_STEP) / 3600


def dry_run(figures: Sequence[Figure], place: Place):
    """Carries out one step of each kind of run of some figures, and prints what all would take."""
    groups = grouped([config for figure in figures for config in figure.runs(place)])
    kinds = []
    with progress_bar() as bar:
        task = bar.add_task("one step of each", total=len(groups) + len(figures))
        for (config, micro), steps in groups.items():
            bar.update(task, description=f"{config.model}, {config.optimizer}, micro-batches of {micro}")
            kinds.append(one_step(config, micro, steps))
            say(f"{kinds[-1].name}: one step in {kinds[-1].here:.3g} s")
            bar.advance(task)
        for figure in figures:
            if figure.measurement:
                bar.update(task, description=f"figure {figure.number}")
                kinds.append(one_gradient(figure.number, figure.measurement(place)))
            bar.advance(task)
    show(kinds)


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
    config = dataclasses.replace(config, batch_size=batch)
    stepper = runs.stepper_of(config)
    [epoch] = config.plan(0.01).epochs(len(stepper.train))
    state = stepper.init(0)
    order, start = stepper.shuffle(state, 0), time.perf_counter()
    state, metrics = stepper.step(state, order, epoch, 0)
    jax.block_until_ready(metrics)
    seconds = time.perf_counter() - start
    # The pass forward that finds the losses to leave out is a third of a gradient.
    count = flops(stepper, state, micro) * (4 / 3 if config.discard else 1)
    micro_batches = sum(number * size // micro for size, number in steps.items())
    return Kind(title(config, sizes), sum(steps.values()), micro_batches, seconds, batch // micro, count)


def title(config: TrainConfig, sizes: Sequence[int]) -> str:
    """Of a kind of run."""
    out = f", {config.discard:.0%} left out by {config.discard_by}" if config.discard else ""
    batches = f"batch {sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
    return f"{config.model}, {config.optimizer}{out}, {batches}"


def flops(stepper: Stepper, state, micro: int) -> float:
    """Floating-point operations of the gradient of one micro-batch, as XLA counts them."""
    sums, order, zero = stepper.programs.zeros(state), stepper.shuffle(state, 0), np.int32(0)
    lowered = stepper.programs.gradient.lower(sums, state, stepper.train, order, zero, zero, None, size=micro)
    return lowered.cost_analysis()["flops"]


def one_gradient(number: int, measurement: Measurement) -> Kind:
    """Computes one chunk's gradient of a figure that trains nothing."""
    step = first_step(measurement.config, measurement.chunk)
    start = time.perf_counter()
    jax.block_until_ready(step.gradient(0, measurement.chunk))
    seconds = time.perf_counter() - start
    chunks = -(-measurement.images // measurement.chunk)
    name, cost = f"figure {number}, chunk of {measurement.chunk}", step.cost() * measurement.chunk
    return Kind(name, chunks, chunks, seconds, 1, cost)


def show(kinds: Sequence[Kind]):
    """One row per kind, and the sum."""
    caption = (
        f"accelerator: {FLOPS_PER_SECOND / 1e12:g} TFLOP/s sustained, at least {1000 * SHORTEST_STEP:g} ms a"
        " micro-batch; evaluation not counted. One step here: with its compilation"
    )
    rows = []
    for kind in kinds:
        several = f" ({kind.micro_batches_here} micro-batches)" if kind.micro_batches_here > 1 else ""
        counts = (f"{kind.steps:,}", f"{kind.micro_batches:,}", f"{kind.flops / 1e12:.3g}")
        rows.append((kind.name, *counts, f"{kind.hours:.2g}", f"{kind.here:.3g} s{several}"))
    rows.append(("all", *[""] * 3, f"{sum(kind.hours for kind in kinds):.3g}", ""))
    columns = ("runs", "steps", "micro-batches", "TFLOP each", "accelerator hours", "one step here")
    show_table(columns, rows, caption=caption)
