"""The race: one network, one set of images, batches, schedule, momentum and seeds; only the radius differs."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

import curvax
from experiments import plots, records
from experiments.commands import RaceConfig, TuneConfig
from experiments.console import TrainingBars, say, show_table
from experiments.errors import UsageError
from experiments.figures.base import count
from experiments.figures.first_step import first_step
from experiments.options import line
from experiments.problems import GRID_POINTS, PROBLEMS, tuned_learning_rate
from experiments.runs import Runner
from experiments.train import Outcome, outcome

#: Examples of the report that comes before the race.
REPORTED = 128


def race(config: RaceConfig):
    """Runs a race, or what is left of it; prints the table, and where the records and the plot are."""
    rates = {method: tuned_learning_rate(config.problem, method) for method in config.methods}
    if missing := tuple(method for method, rate in rates.items() if rate is None):
        tune = line("tune", TuneConfig(config.problem, missing, data_dir=config.data_dir, out=config.out))
        raise UsageError(f"{missing[0]} has no learning rate for {config.problem}: {tune}")
    changes = {"epochs": config.epochs} if config.epochs else {}
    problem = PROBLEMS[config.problem].change(data_dir=config.data_dir, out=config.out, **changes)
    seeds = range(config.seeds or problem.race_seeds)
    about = (
        f"{problem.config.describe()}; batch {problem.config.batch_size}, {problem.config.epochs} epochs, of which"
        f" {problem.config.warmup_epochs:g} of warm-up; {count(len(seeds), 'seed')} (mean and range); every learning"
        f" rate the best of {GRID_POINTS}."
    )
    say(about)
    # The curvature of the network before it is trained, on a part of a batch.
    step = first_step(problem.config, REPORTED)
    print(curvax.report(step.objective(0, REPORTED), step.params))
    runs = {method: [] for method in rates}
    with TrainingBars() as bars:
        run = Runner(bars)
        for method, rate in rates.items():
            for seed in seeds:
                one = dataclasses.replace(problem.config, optimizer=method, learning_rate=rate, seed=seed)
                runs[method].append((one, run(one, f"{method:>13}")))
    outcomes = {method: [outcome(*one, problem.target) for one in some] for method, some in runs.items()}
    show(outcomes, problem.target)

    folder = records.new_folder(config.out, f"race-{config.problem}")
    rows = [{"kind": "config", "problem": config.problem, "learning_rates": rates, **problem.config.as_dict()}]
    rows += [{"method": m, "seed": one.seed, **row} for m, some in runs.items() for one, own in some for row in own]
    rows += [{"kind": "outcome", **result._asdict()} for some in outcomes.values() for result in some]
    records.write(folder / "race.jsonl", "".join(map(records.line, rows)))
    epochs = [row for row in rows if row["kind"] == "epoch"]
    labels = {method: f"{method} ({rate:g})" for method, rate in rates.items()}

    def draw(panels, rows):
        accuracy, loss = ("test_accuracy", "test accuracy (%)"), ("loss", "training loss (nats per image)")
        plots.lines(panels[0], rows, ("method", labels), "step", accuracy, 100)
        panels[0].set_ylim(0, 100)
        plots.lines(panels[1], rows, ("method", labels), "step", loss)
        plots.plain_log(panels[1])

    plots.save(draw, 2, epochs, "The race, each method at its learning rate", about, folder / "race.png")
    say(f"records: {folder / 'race.jsonl'}\nplot:    {folder / 'race.png'}")


def show(outcomes: Mapping[str, Sequence[Outcome]], target: float):
    """One row per method: means over its seeds, and medians of its times."""
    first = "sgd" if "sgd" in outcomes else next(iter(outcomes))
    seconds = {method: statistics.median(run.step_seconds for run in runs) for method, runs in outcomes.items()}
    columns = ("method", "learning rate", "final loss", "test accuracy (%)", f"steps to {target:.0%}")
    columns += ("ms/step", f"ratio to {first}", "compile (s)")
    rows = []
    for method, runs in outcomes.items():
        steps = [run.steps_to_target for run in runs]
        results = [
            spread([run.loss for run in runs], ".3f"),
            spread([100 * run.test_accuracy for run in runs], ".1f"),
            "not reached" if None in steps else spread(steps, ".0f"),
        ]
        times = [f"{1000 * seconds[method]:.0f}", f"{seconds[method] / seconds[first]:.2f}"]
        compiling = f"{max(run.compile_seconds for run in runs):.1f}"
        rows.append([method, f"{runs[0].learning_rate:g}", *results, *times, compiling])
    show_table(columns, rows, caption="mean ± half the range over the seeds; ms/step: median, compilation apart")


def spread(values: Sequence[float], form: str) -> str:
    """`mean ± half the range`, or the one value."""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:{form}}"
