"""Chooses one learning rate per method and problem, from grids of equal size.

A trial is judged by its accuracy on images held out of the training split, the mean over the seeds; between equals the
lower training loss decides. The test images are not looked at. The results are committed with the project, so that a
race gives the same learning rates to everyone.
"""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments import problems, records
from experiments.commands import TuneConfig
from experiments.console import TrainingBars, say, show_table
from experiments.problems import GRID_FACTOR, GRID_POINTS, PROBLEMS, Problem
from experiments.runs import Runner
from experiments.train import Outcome, outcome


def tune(config: TuneConfig):
    """Runs the trials that are missing, writes each as it ends, and prints the grid."""
    problem = PROBLEMS[config.problem]
    problem = problem.change(holdout=problem.holdout, data_dir=config.data_dir, out=config.out)
    results = Results(config.file or problems.TUNED_FILE, config.problem, settings(problem), config.again)
    with records.folder(results.path.parent, "--file"), TrainingBars() as bars:
        run = Runner(bars)
        for method in config.methods:
            for rate in problem.grid(method):
                if all(trial["learning_rate"] != rate for trial in results.trials(method)):
                    one = dataclasses.replace(problem.config, optimizer=method, learning_rate=rate)
                    seeds = [dataclasses.replace(one, seed=seed) for seed in range(problem.tune_seeds)]
                    name = f"{method:>13} {rate:<8g}"
                    result = trial(rate, [outcome(seed, run(seed, name), problem.target) for seed in seeds])
                    results.add(method, result)
                    say(f"{method} at {rate:g}: {result['accuracy']:.2%} of the held-out images right")
    show(problem, {method: results.trials(method) for method in config.methods})
    say(f"results: {results.path}")


def trial(rate: float, outcomes: Sequence[Outcome]) -> dict:
    """What is kept of a trial: its seeds' mean accuracy and loss; null for the loss of one that diverged."""
    accuracy = statistics.fmean(run.test_accuracy for run in outcomes)
    loss = statistics.fmean(run.loss for run in outcomes)
    return {"learning_rate": rate, "accuracy": round(accuracy, 4), "loss": round(loss, 4) if loss < 1e30 else None}


def best(trials: Sequence[dict]) -> dict:
    """The trial with the highest accuracy; between equals, with the lowest training loss."""
    return max(trials, key=lambda trial: (trial["accuracy"], -(trial["loss"] or 0.0)))


def settings(problem: Problem) -> dict:
    """What a trial depends on, besides its method and learning rate: all that is not as usual."""
    return {**problem.config.changed, "seeds": problem.tune_seeds}


class Results:
    """The file of results: by problem, its settings and, by method, the trials and the best learning rate.

    Trials made under other settings are dropped: they would not be comparable.
    """

    def __init__(self, path: Path, problem: str, settings: dict, again: bool):
        self.path, self._everything = path, problems.load_tuned(path)
        entry = self._everything.get(problem)
        if again or entry is None or entry["settings"] != settings:
            entry = self._everything[problem] = {"settings": settings, "methods": {}}
        self._methods = entry["methods"]

    def trials(self, method: str) -> list[dict]:
        """The trials of a method, by learning rate."""
        trials = self._methods[method]["trials"] if method in self._methods else []
        return sorted(trials, key=lambda trial: trial["learning_rate"])

    def add(self, method: str, trial: dict):
        """Adds a trial, and writes the file whole or not at all."""
        trials = [*self.trials(method), trial]
        self._methods[method] = {"best": best(trials)["learning_rate"], "trials": trials}
        records.write(self.path, json.dumps(self._everything, indent=1) + "\n")


def show(problem: Problem, trials: dict[str, list[dict]]):
    """One row per method: held-out accuracy, the best in brackets."""
    seeds = f"{problem.tune_seeds} seed" + "s" * (problem.tune_seeds > 1)
    caption = (
        f"held-out accuracy (%) at the lowest learning rate times {GRID_FACTOR:g}^k; {seeds}; the best in brackets,"
        " with ! where it lies at the edge of the grid"
    )
    rows = []
    for method, of_method in trials.items():
        on_grid = [trial for trial in of_method if trial["learning_rate"] in problem.grid(method)]
        chosen = best(on_grid)
        cells = [f"{100 * t['accuracy']:.1f}" for t in on_grid]
        place = on_grid.index(chosen)
        cells[place] = f"[{cells[place]}]" + "!" * (place in (0, GRID_POINTS - 1))
        rows.append([method, f"{problem.lowest[method]:g}", *cells, f"{chosen['learning_rate']:g}"])
    show_table(("method", "lowest", *(f"k = {k}" for k in range(GRID_POINTS)), "best"), rows, caption=caption)
