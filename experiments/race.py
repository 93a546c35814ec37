"""The race: one network, one set of images, batches, schedule, momentum and seeds; only the radius differs."""

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import curvax
from experiments import records
from experiments.commands import RaceConfig, TuneConfig
from experiments.compare import Outcome, outcome
from experiments.config import TrainConfig
from experiments.console import say, show_table, training_bars
from experiments.errors import UsageError
from experiments.figures.first_step import first_step
from experiments.options import line
from experiments.problems import GRID_POINTS, PROBLEMS, Problem, tuned_learning_rate
from experiments.records import Record
from experiments.runs import Runner

#: Examples of the report that comes before the race.
REPORTED = 128


def race(config: RaceConfig):
    """Runs a race, or what is left of it; prints the table, and where the records and the plot are."""
    rates = {method: learning_rate(config, method) for method in config.methods}
    changes = {"epochs": config.epochs} if config.epochs else {}
    problem = PROBLEMS[config.problem].change(data_dir=config.data_dir, out=config.out, **changes)
    seeds = range(config.seeds or problem.race_seeds)
    say(describe(problem, len(seeds)))
    print(look(problem.config))
    runs = {method: [] for method in rates}
    with training_bars() as bars:
        run = Runner(bars)
        for method, rate in rates.items():
            for seed in seeds:
                one = dataclasses.replace(problem.config, optimizer=method, learning_rate=rate, seed=seed)
                runs[method].append((one, run(one, f"{method:>13}")))
    outcomes = {method: [outcome(*one, problem.target) for one in some] for method, some in runs.items()}
    show(outcomes, problem.target)

    folder = records.new_folder(config.out, f"race-{config.problem}")
    with records.Writer(folder / "race.jsonl") as writer:
        writer.write({"kind": "config", "problem": config.problem, "learning_rates": rates, **problem.config.as_dict()})
        for method, some in runs.items():
            for one, rows in some:
                for row in rows:
                    writer.write({"method": method, "seed": one.seed, **row})
        for result in itertools.chain(*outcomes.values()):
            writer.write({"kind": "outcome", **result._asdict()})
    plot(runs, rates, describe(problem, len(seeds)), folder / "race.png")
    say(f"records: {folder / 'race.jsonl'}\nplot:    {folder / 'race.png'}")


def look(config: TrainConfig) -> curvax.Report:
    """The curvature of the network before it is trained, on a part of a batch."""
    step = first_step(config, REPORTED)
    return curvax.report(step.objective(0, REPORTED), step.params)


def learning_rate(config: RaceConfig, method: str) -> float:
    """The tuned learning rate of a method on a problem."""
    rate = tuned_learning_rate(config.problem, method)
    if rate is None:
        missing = tuple(name for name in config.methods if tuned_learning_rate(config.problem, name) is None)
        tune = line("tune", TuneConfig(config.problem, missing, data_dir=config.data_dir, out=config.out))
        raise UsageError(f"{method} has no learning rate for {config.problem}: {tune}")
    return rate


def show(outcomes: Mapping[str, Sequence[Outcome]], target: float):
    """One row per method: means over its seeds, and medians of its times."""
    first = "sgd" if "sgd" in outcomes else next(iter(outcomes))
    base = statistics.median(run.step_seconds for run in outcomes[first])
    columns = ("method", "learning rate", "final loss", "test accuracy (%)", f"steps to {target:.0%}")
    columns += ("ms/step", f"ratio to {first}", "compile (s)")
    rows = [row(method, runs, base) for method, runs in outcomes.items()]
    show_table(columns, rows, caption="mean ± half the range over the seeds; ms/step: median, compilation apart")


def row(method: str, runs: Sequence[Outcome], base: float) -> list[str]:
    """A method's line in the table; `base` is the seconds per step of the first."""
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
        f"{max(run.compile_seconds for run in runs):.1f}",
    ]


def spread(values: Sequence[float], form: str) -> str:
    """`mean ± half the range`, or the one value."""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:{form}}"


def plot(runs: Mapping[str, Sequence[tuple[object, Sequence[Record]]]], rates, caption: str, path: Path):
    """Test accuracy and training loss against steps, a line per method and a band over its seeds."""
    from experiments import plots

    def lines(name: str, scale: float = 1.0):
        epochs = lambda rows: [(r["step"], scale * r[name]) for r in rows if r["kind"] == "epoch"]
        return {f"{method} ({rates[method]:g})": [epochs(rows) for _, rows in some] for method, some in runs.items()}

    def draw(panels, _):
        plots.curves(panels[0], lines("test_accuracy", 100))
        plots.name_axes(panels[0], "optimizer steps", "test accuracy (%)")
        panels[0].set_ylim(0, 100)
        plots.curves(panels[1], lines("loss"))
        plots.name_axes(panels[1], "optimizer steps", "training loss (nats per image)")
        plots.plain_log(panels[1])

    plots.save(draw, 2, None, "The race, each method at its learning rate", caption, path)


def describe(problem: Problem, seeds: int) -> str:
    """The claim's small print: what all methods share."""
    c = problem.config
    over = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    return (
        f"{c.model} at width {c.width:g} on {c.dataset}, images of {c.image_size} pixels squared, batch {c.batch_size},"
        f" {c.epochs} epochs, warm-up {c.warmup_epochs:g} epochs then {c.schedule}, momentum {c.momentum:g}, weight"
        f" decay {c.weight_decay:g}, dropout {c.dropout:g}; {over}; every learning rate the best of {GRID_POINTS}."
    )
