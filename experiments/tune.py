"""Chooses one learning rate per method and problem, from grids of equal size.

A trial is judged by its accuracy on images held out of the training split, the mean over the seeds; between equals the
lower training loss decides. The test images are not looked at. The results are committed with the project, so that a
race gives the same learning rates to everyone.
"""

import dataclasses
import functools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.table import Table

from experiments import compare, data
from experiments.compare import Outcome
from experiments.console import console, training_bars
from experiments.methods import METHODS, TUNED_FILE
from experiments.problems import GRID_FACTOR, GRID_POINTS, PROBLEMS, RACERS, Problem
from experiments.step import Stepper


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """Find the learning rate of each method on a grid of the same size for all; write it to experiments/tuned.json."""

    problem: Literal[tuple(PROBLEMS)] = "digits"
    """What to tune on."""
    methods: tuple[Literal[tuple(METHODS)], ...] = RACERS
    """Whom to tune."""
    again: bool = False
    """Also repeat the trials that the file holds already."""
    data_dir: Path | None = None
    """Folder in which TFDS keeps, or has prepared, its data sets."""
    file: Path = TUNED_FILE
    """Where the results are read and written, after every trial."""


def tune(config: TuneConfig):
    """Runs the trials that are missing, writes each as it ends, and prints the grid."""
    problem = PROBLEMS[config.problem]
    fixed = dataclasses.replace(problem.config, holdout=problem.holdout, data_dir=config.data_dir)
    results = Results(config.file, config.problem, settings(fixed, problem), config.again)
    dataset = data.load(fixed)
    with training_bars() as bars:
        for method in config.methods:
            tune_method(method, dataclasses.replace(fixed, optimizer=method), problem, dataset, results, bars)
    console.print(table(problem, {method: results.trials(method) for method in config.methods}))
    console.print(f"results: {config.file}", soft_wrap=True)


def tune_method(method: str, config, problem: Problem, dataset, results: "Results", bars):
    """Runs the missing trials of one method, all with the same compiled step."""
    stepper = None
    steps = config.epochs * (len(dataset.train) // config.batch_size)
    for rate in problem.grid(method):
        if results.has(method, rate):
            continue
        stepper = stepper or Stepper(config, dataset)
        task, runs = bars.start(f"{method:>13} {rate:<8g}", steps), []
        for seed in range(problem.tune_seeds):
            runs.append(compare.run(stepper, rate, seed, problem.target, functools.partial(bars.see, task)))
        result = trial(rate, runs)
        results.add(method, result)
        console.print(f"{method} at {rate:g}: {result['accuracy']:.2%} of the held-out images right")


def trial(rate: float, runs: Sequence[Outcome]) -> dict:
    """What is kept of a trial: its seeds' mean accuracy and loss; null for the loss of one that diverged."""
    accuracy = statistics.fmean(run.test_accuracy for run in runs)
    loss = statistics.fmean(run.loss for run in runs)
    return {"learning_rate": rate, "accuracy": round(accuracy, 4), "loss": round(loss, 4) if loss < 1e30 else None}


def best(trials: Sequence[dict]) -> dict:
    """The trial with the highest accuracy; between equals, with the lowest training loss."""
    return max(trials, key=lambda trial: (trial["accuracy"], -(trial["loss"] or 0.0)))


def settings(config, problem: Problem) -> dict:
    """What a trial depends on, besides its method and learning rate."""
    fields = config.as_dict()
    for name in ("optimizer", "learning_rate", "data_dir", "out", "seed", "devices"):
        del fields[name]
    return {**fields, "seeds": problem.tune_seeds}


class Results:
    """The file of results: by problem, its settings and, by method, the trials and the best learning rate.

    Trials made under other settings are dropped: they would not be comparable.
    """

    def __init__(self, path: Path, problem: str, settings: dict, again: bool):
        self.path, self.problem = path, problem
        self.everything = json.loads(path.read_text()) if path.exists() else {}
        entry = self.everything.get(problem)
        if again or entry is None or entry["settings"] != settings:
            self.everything[problem] = {"settings": settings, "methods": {}}

    def trials(self, method: str) -> list[dict]:
        """The trials of a method, by learning rate."""
        entry = self.everything[self.problem]["methods"].get(method, {"trials": []})
        return sorted(entry["trials"], key=lambda trial: trial["learning_rate"])

    def has(self, method: str, rate: float) -> bool:
        """Whether a trial is in the file."""
        return any(trial["learning_rate"] == rate for trial in self.trials(method))

    def add(self, method: str, trial: dict):
        """Adds a trial, and writes the file whole or not at all."""
        trials = [*self.trials(method), trial]
        self.everything[self.problem]["methods"][method] = {"best": best(trials)["learning_rate"], "trials": trials}
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(self.everything, indent=1) + "\n")
        draft.replace(self.path)


def table(problem: Problem, trials: dict[str, list[dict]]) -> Table:
    """One row per method, one column per point of its grid: held-out accuracy, the best in brackets."""
    caption = (
        f"held-out accuracy (%) at the lowest learning rate times {GRID_FACTOR:g}^k; {problem.tune_seeds} seed(s);"
        " the best in brackets, with ! where it lies at the edge of the grid"
    )
    result = Table(caption=caption)
    for column in ("method", "lowest", *(f"k = {k}" for k in range(GRID_POINTS)), "best"):
        result.add_column(column, justify="left" if column == "method" else "right")
    for method, of_method in trials.items():
        on_grid = [trial for trial in of_method if trial["learning_rate"] in problem.grid(method)]
        chosen = best(of_method)
        cells = [f"{100 * t['accuracy']:.1f}" for t in on_grid]
        place = on_grid.index(chosen)
        edge = "!" if place in (0, GRID_POINTS - 1) else ""
        cells[place] = f"\\[{cells[place]}]{edge}"
        result.add_row(method, f"{problem.lowest[method]:g}", *cells, f"{chosen['learning_rate']:g}")
    return result
