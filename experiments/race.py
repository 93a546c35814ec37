"""The race: one network, one set of images, batches, schedule, momentum and seeds; only the radius differs."""

import collections
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from rich.table import Table

from experiments import compare, data, records
from experiments.compare import Outcome
from experiments.console import console, training_bars
from experiments.errors import UsageError
from experiments.methods import METHODS, tuned_learning_rate
from experiments.plot import plot_race
from experiments.problems import GRID_POINTS, PROBLEMS, RACERS, Problem
from experiments.step import Stepper


@dataclasses.dataclass(frozen=True)
class RaceConfig:
    """Race the methods against each other at a large batch, each at its tuned learning rate."""

    problem: Literal[tuple(PROBLEMS)] = "digits"
    """digits needs no download and a minute or two; cifar10 takes far longer."""
    methods: tuple[Literal[tuple(METHODS)], ...] = RACERS
    """Who takes part."""
    epochs: int | None = None
    """Passes over the training images, in place of the problem's."""
    seeds: int | None = None
    """Runs per method, in place of the problem's number."""
    data_dir: Path | None = None
    """Folder in which TFDS keeps, or has prepared, its data sets."""
    out: Path = Path("runs")
    """Folder in which a new folder with the metrics and the plot is made."""

    def __post_init__(self):
        for name in ("epochs", "seeds"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} must be above 0, not {value}")
        if not self.methods:
            raise ValueError(f"--methods must name some of {', '.join(METHODS)}")


def race(config: RaceConfig):
    """Runs a race; prints the table, and where the records and the plot are."""
    problem = PROBLEMS[config.problem]
    changes = {"data_dir": config.data_dir} | ({"epochs": config.epochs} if config.epochs else {})
    problem = dataclasses.replace(problem, config=dataclasses.replace(problem.config, **changes))
    rates = {method: learning_rate(config.problem, method) for method in config.methods}
    seeds = range(config.seeds or problem.race_seeds)
    dataset = data.load(problem.config)
    folder = records.new_folder(config.out, f"race-{config.problem}")

    console.print(describe(problem, len(dataset.train), len(seeds)))
    with records.Writer(folder / "race.jsonl") as writer, training_bars() as bars:
        writer.write({"kind": "config", "problem": config.problem, "learning_rates": rates, **problem.config.as_dict()})
        outcomes, epochs = run_all(problem, dataset, rates, seeds, writer, bars)
        for outcome in outcomes:
            writer.write({"kind": "outcome", **dataclasses.asdict(outcome)})
    console.print(table(outcomes, problem.target))
    labels = {method: f"{method} ({rate:g})" for method, rate in rates.items()}
    plot_race(epochs, labels, describe(problem, len(dataset.train), len(seeds)), folder / "race.png")
    console.print(f"records: {folder / 'race.jsonl'}\nplot:    {folder / 'race.png'}", soft_wrap=True)


def learning_rate(problem: str, method: str) -> float:
    """The tuned learning rate of a method on a problem."""
    rate = tuned_learning_rate(problem, method)
    if rate is None:
        raise UsageError(f"{method} has no learning rate for {problem}: python -m experiments tune --problem {problem}")
    return rate


def run_all(problem: Problem, dataset, rates: Mapping[str, float], seeds: Sequence[int], writer, bars):
    """Trains every method with every seed; returns the outcomes, and by method the epoch records of each seed."""
    outcomes, epochs = [], collections.defaultdict(list)
    total = problem.config.epochs * (len(dataset.train) // problem.config.batch_size)
    for method, config in compare.configs(problem, rates).items():
        stepper = Stepper(config, dataset)
        for seed in seeds:
            epochs[method].append([])
            task = bars.start(f"{method:>13}", total)

            def see(record, method=method, seed=seed, task=task):
                bars.see(task, record)
                writer.write({"method": method, "seed": seed, **record})
                if record["kind"] == "epoch":
                    epochs[method][-1].append(record)

            outcomes.append(compare.run(stepper, rates[method], seed, problem.target, see))
    return outcomes, epochs


def table(outcomes: Sequence[Outcome], target: float) -> Table:
    """One row per method: means over its seeds, and medians of its times."""
    by_method = collections.defaultdict(list)
    for outcome in outcomes:
        by_method[outcome.method].append(outcome)
    base = statistics.median(o.step_seconds for o in by_method.get("sgd") or next(iter(by_method.values())))
    result = Table(caption="mean ± half the range over the seeds; ms/step: median, compilation apart")
    for column in ("method", "learning rate", "final loss", "test accuracy (%)", f"steps to {target:.0%}"):
        result.add_column(column, justify="left" if column == "method" else "right")
    for column in ("ms/step", "ratio to " + ("SGD" if "sgd" in by_method else next(iter(by_method))), "compile (s)"):
        result.add_column(column, justify="right")
    for method, runs in by_method.items():
        result.add_row(*row(method, runs, base))
    return result


def row(method: str, runs: Sequence[Outcome], base: float) -> list[str]:
    """A method's line in the table; `base` is the seconds per step of SGD."""
    seconds = statistics.median(run.step_seconds for run in runs)
    steps = [run.steps_to_target for run in runs]
    return [
        method,
        f"{runs[0].learning_rate:g}",
        spread([run.loss for run in runs], ".3f"),
        spread([100 * run.test_accuracy for run in runs], ".1f"),
        "not reached" if None in steps else spread(steps, ".0f"),
        f"{1000 * seconds:.0f}",
        f"{seconds / base:.2f}",
        f"{runs[0].compile_seconds:.1f}",
    ]


def spread(values: Sequence[float], form: str) -> str:
    """`mean ± half the range`, or the one value."""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:{form}}"


def describe(problem: Problem, num_images: int, seeds: int) -> str:
    """The claim's small print: what all methods share."""
    c = problem.config
    steps = c.epochs * (num_images // c.batch_size)
    spread = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    return (
        f"{c.model} at width {c.width:g} on {c.dataset}, {num_images} training images of {c.image_size} pixels squared,"
        f" batch {c.batch_size}, {c.epochs} epochs = {steps} steps, warm-up {c.warmup_epochs:g} epochs then"
        f" {c.schedule}, momentum {c.momentum:g}, weight decay {c.weight_decay:g}, dropout {c.dropout:g};"
        f" {spread}; every learning rate the best of {GRID_POINTS}."
    )
