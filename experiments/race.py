"""The race: every method is tuned alike on held-out images, then run by several seeds and judged on the test images.

What is known is one file of JSON lines, written whole after every run: the settings, the trials of the tuning, the
runs. The table, the page and the plot follow from it alone.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

import curvax
from experiments import data, methods, models, plots, problems, records
from experiments.commands import RUNS, RaceConfig
from experiments.config import TrainConfig
from experiments.console import TrainingBars, say, show_table
from experiments.errors import UsageError
from experiments.figures import statistics as intervals
from experiments.figures.base import count
from experiments.figures.first_step import first_step
from experiments.options import line
from experiments.problems import PROBLEMS
from experiments.records import Record, where
from experiments.runs import Runner
from experiments.search import CLOSE, SEARCHES, best, next_trial, octaves
from experiments.step import Stepper
from experiments.train import WINDOW, outcome

# Examples of the report that comes before the race.
REPORTED = 128
# Of a window of steps each.
TURNS = 3
COLUMNS = ("method", "rate; other", "trials", "test (%)", "loss", "steps", "seconds", "octaves", "ms/step")
COLUMNS += ("compile", "state")
NOTE = (
    "Rate: of learning. Test: accuracy at the end. Loss: of training, in the last epoch. Steps and seconds:"
    " until LARS's mean final accuracy is reached at the end of an epoch. Octaves: of learning rates within"
    f" {100 * CLOSE:g} points of the best trial. Seconds leave out compilation. State: its bytes over those of the"
    " parameters."
)


def race(config: RaceConfig):
    """Tunes and runs what is left of a race; shows the table, and writes it as a page with the plot."""
    problem = PROBLEMS[config.problem]
    entrants, seeds = config.methods or problem.methods, config.seeds or problem.seeds
    one, trial = configs(config)
    settings = {"dataset": one.dataset, "model": one.model, "race": one.changed}
    results = Results(config, settings | {"tuning": trial.changed, "tune_seeds": problem.tune_seeds})
    with records.folder(results.path.parent, "--results"), TrainingBars() as bars:
        run = Runner(bars)
        for method in () if config.like else entrants:
            while point := next_trial(SEARCHES[method], results.trials(method), problem.trials):
                tune(method, point, trial, problem.tune_seeds, results, run)
        chosen = {method: choice(method, results.trials(method)) for method in entrants}
        if not where(results.rows, kind="run"):
            # The curvature of the network before it is trained, on a part of a batch.
            step = first_step(one, REPORTED)
            print(curvax.report(step.objective(0, REPORTED), step.params))
        for method in entrants:
            for seed in range(seeds):
                if not where(results.rows, kind="run", method=method, seed=seed, **chosen[method]):
                    own = entry(one, method, chosen[method], seed)
                    row = outcome(run(own, f"{method:>13}, seed {seed}"))
                    results.add({"kind": "run", "method": method, "seed": seed, **chosen[method], **row, **memory(own)})
        if config.time:
            time_in_turns({method: entry(one, method, chosen[method]) for method in entrants}, results)
        show(config, results, entrants, seeds, about(one, trial, seeds, problem))


def configs(config: RaceConfig) -> tuple[TrainConfig, TrainConfig]:
    """Of the runs, and of the trials, which hold some training images out; both but for the method."""
    problem = PROBLEMS[config.problem]
    changes = {"dataset": config.dataset or problem.config.dataset, "data_dir": config.data_dir, "out": config.out}
    images = dataclasses.replace(problem.config, batch_size=1, **changes)
    number, kept = (len(data.load(dataclasses.replace(images, holdout=h)).train) for h in (0.0, problem.holdout))
    if config.batch_size and config.batch_size > number:
        raise UsageError(f"--batch-size {config.batch_size} exceeds the {number} training images of {images.dataset}")
    one = problem.settled(config.batch_size, config.epochs, number, **changes)
    epochs = config.tune_epochs or config.epochs
    return one, problem.settled(one.batch_size, epochs, kept, holdout=problem.holdout, **changes)


def entry(config: TrainConfig, method: str, chosen: Mapping[str, float], seed: int = 0) -> TrainConfig:
    """What a method runs with: its hyper-parameters, and what its authors advise."""
    return dataclasses.replace(config, optimizer=method, seed=seed, **chosen, **SEARCHES[method].also)


class Results:
    """The file of a race: its rows but for the settings, which must be those that are asked for."""

    def __init__(self, config: RaceConfig, settings: Record):
        self.path = (config.results or config.out / "race") / f"{name(config)}.jsonl"
        self._settings = {"kind": "settings", "command": command(config), "like": config.like, **settings}
        self.rows = read(self.path, self._settings) if self.path.exists() else []
        shared = problems.RESULTS / self.path.name
        if not self.path.exists() and shared.exists():
            # Who races for themselves need not tune anew.
            self.rows = [row for row in read(shared, self._settings, strict=False) if row["kind"] == "trial"]
        if config.like:
            self.rows = [row for row in self.rows if row["kind"] == "run"]
            others = problems.RESULTS / f"{config.like}.jsonl"
            self.rows += [row for row in records.read(others) if row["kind"] == "trial"]

    def trials(self, method: str) -> list[Record]:
        """Those of a method."""
        return where(self.rows, kind="trial", method=method)

    def add(self, row: Record):
        """Adds a row, and writes the file whole or not at all."""
        self.rows.append(row)
        records.write(self.path, "".join(map(records.line, (self._settings, *self.rows))))


def command(config: RaceConfig) -> str:
    """What to type, wherever the images and the runs are."""
    return line("race", dataclasses.replace(config, data_dir=None, out=RUNS))


def name(config: RaceConfig) -> str:
    """Of the files of a race."""
    problem = PROBLEMS[config.problem]
    dataset = config.dataset if config.dataset != problem.config.dataset else None
    return "-".join(filter(None, (config.problem, dataset, str(config.batch_size or problem.config.batch_size))))


def read(path: Path, settings: Record, strict: bool = True) -> list[Record]:
    """The rows of a file, if it is of a race with these settings; else none, or if `strict` a UsageError."""
    first, *rows = records.read(path) or [{}]
    if all(first.get(key) == settings[key] for key in settings.keys() - {"command"}):
        return rows
    if strict:
        raise UsageError(f"{path} is not of a race with these settings: remove it, or give another --results")
    return []


def tune(method: str, point: tuple[float, float], trial: TrainConfig, seeds: int, results: Results, run: Runner):
    """One trial."""
    chosen = dict(zip(("learning_rate", SEARCHES[method].other), point, strict=True))
    label = f"{method:>13} {point[0]:<8g}"
    ends = [outcome(run(entry(trial, method, chosen, seed), label)) for seed in range(seeds)]
    accuracy, loss = (statistics.fmean(end[key] for end in ends) for key in ("test_accuracy", "loss"))
    row = {**chosen, "accuracy": round(accuracy, 4), "loss": round(loss, 4) if loss < 1e30 else None}
    results.add({"kind": "trial", "method": method, **row})
    say(f"{method} at {said(chosen)}: {accuracy:.2%} of the held-out images right")


def time_in_turns(configs: Mapping[str, TrainConfig], results: Results):
    """Replaces the seconds of a step by those of methods that take turns, and so share what else the machine does."""
    steppers = {method: Stepper(config, data.load(config)) for method, config in configs.items()}
    states, seconds = {method: stepper.init(0) for method, stepper in steppers.items()}, {m: [] for m in steppers}
    for turn, method in itertools.product(range(1 + TURNS), steppers):
        stepper = steppers[method]
        epochs = stepper.config.plan(stepper.config.learning_rate).epochs(len(stepper.train))
        steps = itertools.islice(((e, b) for e in epochs for b in range(e.steps)), WINDOW)
        order, before = stepper.shuffle(states[method], 0), time.perf_counter()
        for epoch, batch in steps:
            states[method], _ = stepper.step(states[method], order, epoch, batch)
        # The first turn compiles.
        seconds[method] += [(time.perf_counter() - before) / WINDOW] * (turn > 0)
    results.rows = [row for row in results.rows if row["kind"] != "time" or row["method"] not in seconds]
    for method, some in seconds.items():
        results.add({"kind": "time", "method": method, "step_seconds": round(statistics.median(some), 5)})


def step_seconds(rows: Sequence[Record], method: str) -> float:
    """Of a method: timed in turns, else the median of its runs."""
    timed = where(rows, kind="time", method=method) or where(rows, kind="run", method=method)
    return statistics.median(row["step_seconds"] for row in timed)


def choice(method: str, trials: Sequence[Record]) -> Record:
    """The hyper-parameters that did best."""
    if not trials:
        raise UsageError(f"{method} was not tuned there: leave --like out")
    chosen = best(trials)
    return {key: chosen[key] for key in ("learning_rate", SEARCHES[method].other)}


def said(chosen: Record) -> str:
    """Hyper-parameters in words."""
    return ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in chosen.items())


def memory(config: TrainConfig) -> Record:
    """The bytes of an optimizer's state, as a multiple of those of the parameters."""
    classes = data.load(config).num_classes
    params = models.build(config, classes, jax.random.key(0))[1]
    state = jax.eval_shape(methods.make(config, 0.0, jax.random.key(0)).init, params)
    size = lambda tree: sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if np.issubdtype(x.dtype, np.number)
    )
    return {"state": round(size(state) / size(params), 3)}


def about(one: TrainConfig, trial: TrainConfig, seeds: int, problem: problems.Problem) -> str:
    """What was held fixed, in words."""
    return (
        f"{one.describe()}; batch {one.batch_size}, {one.epochs} epochs, of which {one.warmup_epochs:g} of warm-up;"
        f" {count(seeds, 'seed')} (mean, and 95 % interval of Student's t). Every method had {problem.trials} trials of"
        f" {trial.epochs} epochs over its learning rate and the other value shown, judged on {trial.holdout:.0%} of the"
        " training images, and more only while the best rate was at an edge."
    )


def table(rows: Sequence[Record], entrants: Sequence[str], seeds: int) -> list[list[str]]:
    """A row for each method."""
    of = {method: [run for run in where(rows, kind="run", method=method) if run["seed"] < seeds] for method in entrants}
    target = statistics.fmean(run["test_accuracy"] for run in of["lars"]) if "lars" in of else None
    cells = []
    for method, runs in of.items():
        trials, seconds = where(rows, kind="trial", method=method), step_seconds(rows, method)
        steps = [None if target is None else steps_to(run, target) for run in runs]
        reached = None if None in steps else statistics.fmean(steps)
        search = SEARCHES[method]
        cells.append(
            [
                method,
                f"{runs[0]['learning_rate']:g}; {said({search.other: runs[0][search.other]})}",
                str(len(trials)),
                spread([100 * run["test_accuracy"] for run in runs], ".1f"),
                spread([np.inf if run["loss"] is None else run["loss"] for run in runs], ".3f"),
                "-" if reached is None else f"{reached:.0f}",
                "-" if reached is None else f"{reached * seconds:.0f}",
                f"{octaves(search, trials):.1f}",
                f"{1000 * seconds:.0f}",
                f"{max(run['compile_seconds'] for run in runs):.0f}",
                f"{runs[0]['state']:.2f}",
            ]
        )
    return cells


def steps_to(run: Record, accuracy: float) -> int | None:
    """Steps until the end of the first epoch with this test accuracy."""
    return next((step for step, reached in run["curve"] if reached >= accuracy), None)


def spread(values: Sequence[float], form: str) -> str:
    """`mean ± half its 95 % interval`, as far as there is one."""
    mean = intervals.mean(values)
    half = (mean.high - mean.low) / 2
    return f"{mean.value:{form}}" + (f" ± {half:{form}}" if np.isfinite(half) else "")


def show(config: RaceConfig, results: Results, entrants: Sequence[str], seeds: int, about: str):
    """The table on the screen and on a page, beside the plot."""
    rows = table(results.rows, entrants, seeds)
    show_table(COLUMNS, rows, text=(0, 1), caption=f"{about} {NOTE}")
    curves, seconds = [], {method: step_seconds(results.rows, method) for method in entrants}
    for run in (run for run in where(results.rows, kind="run") if run["method"] in entrants):
        for step, accuracy in run["curve"] if run["seed"] < seeds else ():
            place = {"step": step, "seconds": step * seconds[run["method"]], "test_accuracy": accuracy}
            curves.append({"method": run["method"], "seed": run["seed"], **place})

    def draw(panels, rows):
        labels, accuracy = {method: method for method in entrants}, ("test_accuracy", "test accuracy (%)")
        for panel, below in zip(panels, ("step", "seconds"), strict=True):
            plots.lines(panel, rows, ("method", labels), below, accuracy, 100)

    title = f"The race: {name(config)}"
    picture, page = results.path.with_suffix(".png"), results.path.with_suffix(".md")
    plots.save(draw, 2, curves, title, about, picture)
    lines = [f"# {title}", "", f"`{command(config)}`", "", about, "", *markdown(COLUMNS, rows), "", NOTE, ""]
    lines += [
        f"![Accuracy against steps and seconds]({picture.name})",
        "",
        f"Numbers: [{results.path.name}]({results.path.name}).",
    ]
    records.write(page, "\n".join(lines) + "\n")
    say(f"records: {results.path}\npage:    {page}\nplot:    {picture}")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]
