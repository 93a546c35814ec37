"""The command `figure`: runs what a figure needs, keeps its numbers, draws it and says how its claims came out."""

import contextlib
import dataclasses
import json
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from rich.table import Table

from experiments import records, runs
from experiments.config import TrainConfig
from experiments.console import TrainingBars, console, training_bars
from experiments.errors import RunError, UsageError
from experiments.figures import (
    batch_gradient,
    batch_sweep,
    discard_ratio,
    discarding,
    first_epoch,
    layer_radii,
    median_rate,
    parabola,
    render,
    small_start,
)
from experiments.figures.base import Claim, Figure, Place, Preset, Row
from experiments.figures.dry_run import dry_run
from experiments.train import Diverged

FIGURES = {
    figure.number: figure
    for figure in sorted(
        (
            *(batch_gradient.FIGURE, layer_radii.FIGURE, parabola.FIGURE_6, parabola.FIGURE_15, discard_ratio.FIGURE),
            *(discarding.FIGURE, median_rate.FIGURE, *batch_sweep.FIGURES, *first_epoch.FIGURES, *small_start.FIGURES),
        ),
        key=lambda figure: figure.number,
    )
}


@dataclasses.dataclass(frozen=True)
class FigureConfig:
    """Make figures of the paper: run what they need, draw them, and judge their claims."""

    figures: Annotated[tuple[Literal["all", *map(str, FIGURES)], ...], tyro.conf.Positional]
    """Their numbers in the paper, or all."""
    preset: Preset = "smoke"
    """smoke: generated images, seconds. cpu: CIFAR-10 with fewer images and narrow networks, all figures in about an
    hour and a half on two cores. paper: full scale, for an accelerator."""
    data_dir: Path | None = None
    """Folder in which TFDS keeps, or has prepared, its data sets."""
    out: Path = Path("runs")
    """Folder of the runs. Those that several figures need run once; those that were stopped go on."""
    results: Path | None = None
    """Folder of the figures and their numbers; OUT/figures-PRESET if not given."""
    dry_run: bool = False
    """Only compile and run one step of each kind of run, and estimate what all would cost on one accelerator."""

    def __post_init__(self):
        if not self.figures:
            raise ValueError(f"give the numbers of figures, or all: {', '.join(map(str, FIGURES))}")

    @property
    def chosen(self) -> list[Figure]:
        """The figures, each once, in order."""
        return [figure for number, figure in FIGURES.items() if {"all", str(number)} & set(self.figures)]

    @property
    def place(self) -> Place:
        """Where and at which scale."""
        return Place(self.preset, self.data_dir, self.out)

    @property
    def folder(self) -> Path:
        """Of the results."""
        return self.results or self.out / f"figures-{self.preset}"


def make_figures(config: FigureConfig):
    """Makes figures; prints a table of their claims, and where they are."""
    if config.dry_run:
        return dry_run(config.chosen, config.place)
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {config.folder} ({error.strerror}): give another --results") from error
    with compiled_once(config.out / "compiled"):
        for figure in config.chosen:
            make(figure, config)
    console.print(f"figures: {config.folder}; one page of them all: python -m experiments report", soft_wrap=True)


@contextlib.contextmanager
def compiled_once(folder: Path) -> Iterator[None]:
    """Keeps what is compiled, unless the user does: arms that differ in their rates or lengths compile the same."""
    before = jax.config.jax_compilation_cache_dir
    if before is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def make(figure: Figure, config: FigureConfig):
    """Makes one figure; its files are written once all of it is there."""
    start = time.perf_counter()
    with training_bars() as bars:
        task, rows = bars.count(f"figure {figure.number:>2}"), []
        for row in figure.rows(config.place, Trainer(figure, config.place, bars)):
            rows.append(row)
            bars.say(task, f"{len(rows)} numbers")
        bars.finish(task)
    about = {
        **{"kind": "figure", "number": figure.number, "preset": config.preset},
        **{"settings": figure.settings(config.place), "command": command(figure, config)},
        "seconds": round(time.perf_counter() - start, 1),
    }
    path = config.folder / f"{figure.name}.jsonl"
    draft = path.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    with records.Writer(draft) as writer:
        for row in (about, *rows):
            writer.write(row)
    draft.replace(path)
    about, rows = load(path)
    render.save(figure.draw, figure.panels, rows, title(figure), about["settings"], path.with_suffix(".png"))
    console.print(table(figure, figure.judge(rows)))


class Trainer:
    """Gives the records of runs, carrying out those that were not yet, and shows how far it is.

    Args:
        figure: for which.
        place: where.
        bars: the display.
    """

    def __init__(self, figure: Figure, place: Place, bars: TrainingBars):
        self._bars, self._done, self._total = bars, 0, len(figure.runs(place))
        self._name = f"figure {figure.number:>2}"

    def __call__(self, config: TrainConfig) -> list[Row]:
        """The records of a run. One that diverged has no last epoch."""
        self._done += 1
        task = None

        def show(record):
            nonlocal task
            if task is None:
                name = f"{self._name}, run {self._done} of {max(self._done, self._total)}"
                task = self._bars.start(name, runs.num_steps(config))
            self._bars.see(task, record)

        folder = runs.folder_of(config)
        try:
            return runs.run(config, folder, show)
        except Diverged:
            return records.read(folder / runs.METRICS)[1:]
        finally:
            if task is not None:
                self._bars.finish(task)
                console.print(f"{self._name}, run {self._done}: {folder}", soft_wrap=True)


def load(path: Path) -> tuple[Row, list[Row]]:
    """What is known of a figure, and its rows."""
    try:
        about, *rows = records.read(path)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} does not hold the numbers of a figure ({error})") from None
    return about, rows


def title(figure: Figure) -> str:
    """Of the plot."""
    return f"Figure {figure.number}. {figure.title}"


def command(figure: Figure, config: FigureConfig) -> str:
    """The command that makes a figure again, without the folders of one machine."""
    return shlex.join(["python", "-m", "experiments", "figure", str(figure.number), "--preset", config.preset])


def table(figure: Figure, claims: Sequence[Claim]) -> Table:
    """The claims of a figure and their verdicts."""
    result = Table(title=title(figure), title_justify="left")
    for column in ("claim", "evidence", "verdict"):
        result.add_column(column, overflow="fold")
    for claim in claims:
        result.add_row(claim.statement, claim.evidence.replace("[", "\\["), claim.verdict)
    return result
