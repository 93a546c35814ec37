"""The command `figure`: runs what a figure needs, keeps its numbers, draws it and says how its claims came out."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from experiments import plots, records
from experiments.commands import FigureConfig, ReportConfig
from experiments.config import TrainConfig
from experiments.console import TrainingBars, say, show_table
from experiments.errors import RunError
from experiments.figures import (
    batch_gradient,
    batch_sweep,
    discard_ratio,
    discarding,
    first_epoch,
    layer_radii,
    median_rate,
    parabola,
    small_start,
)
from experiments.figures.base import Claim, Figure, Place, Row
from experiments.figures.dry_run import dry_run
from experiments.options import line
from experiments.runs import Runner

MODULES = (batch_sweep, layer_radii, batch_gradient, first_epoch, parabola, discard_ratio, discarding, small_start)
FIGURES: dict[int, Figure] = {figure.number: figure for module in (*MODULES, median_rate) for figure in module.FIGURES}


def make_figures(config: FigureConfig):
    """Makes figures; prints a table of their claims, and where they are."""
    chosen, place = [FIGURES[number] for number in config.numbers], Place(config.preset, config.data_dir, config.out)
    if config.dry_run:
        return dry_run(chosen, place)
    with records.folder(results_folder(config), "--results") as folder, compiled_once(config.out / "compiled"):
        for figure in chosen:
            make(figure, place, folder, again(figure, config))
    page = line("report", ReportConfig(config.preset, config.out, config.results))
    say(f"figures: {folder}; one page of them all: {page}")


def results_folder(config: FigureConfig | ReportConfig) -> Path:
    """Of the figures: what the user says, or one of this program's own."""
    if config.results:
        return config.results
    folder = config.out / f"figures-{config.preset}"
    records.refuse_links(folder)
    return folder


@contextlib.contextmanager
def compiled_once(folder: Path) -> Iterator[None]:
    """Keeps what is compiled, unless the user does: arms that differ in their rates or lengths compile the same."""
    records.refuse_links(folder)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before or str(folder))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def again(figure: Figure, config: FigureConfig | ReportConfig) -> str:
    """The command that makes a figure again."""
    data_dir = getattr(config, "data_dir", None)
    return line("figure", FigureConfig((str(figure.number),), config.preset, data_dir, config.out, config.results))


def make(figure: Figure, place: Place, folder: Path, again: str):
    """Makes one figure; its files are written once all of it is there."""
    start = time.perf_counter()
    with TrainingBars() as bars:
        run, numbers, total = Runner(bars, tell=True), itertools.count(1), len(figure.grid(place))
        task, rows = bars.begin(f"figure {figure.number:>2}", None), []

        def trained(config: TrainConfig) -> list[Row]:
            number = next(numbers)
            return run(config, f"figure {figure.number:>2}, run {number} of {max(number, total)}")

        for row in figure.rows(place, trained):
            rows.append(row)
            bars.update(task, said=f"{len(rows)} numbers")
        bars.remove_task(task)
    command = line("figure", FigureConfig((str(figure.number),), place.preset))
    about = {
        **{"kind": "figure", "number": figure.number, "preset": place.preset, "settings": figure.settings(place)},
        **{"command": command, "seconds": round(time.perf_counter() - start, 1)},
    }
    path = folder / f"{figure.name}.jsonl"
    records.write(path, "".join(map(records.line, (about, *rows))))
    show_table(Claim._fields, draw(figure, path, again)[1], text=range(3), title=title(figure))


def draw(figure: Figure, path: Path, again: str) -> tuple[Row, Sequence[Claim]]:
    """Draws a figure from its numbers, which a command makes; returns what is known of them, and the claims.

    Raises:
        RunError: if the file does not hold the numbers of this figure.
    """
    about, *rows = records.read(path) or [{}]
    try:
        if about["number"] != figure.number:
            raise ValueError(f"they are those of figure {about['number']}")
        claims = figure.judge(rows)
        plots.save(figure.draw, figure.panels, rows, title(figure), about["settings"], path.with_suffix(".png"))
        about = {name: about[name] for name in ("settings", "seconds", "command", "preset")}
        float(about["seconds"])
    # Numbers that are missing, or others than a figure has, show in whatever is done with them.
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise RunError(
            f"{path} does not hold the numbers of figure {figure.number} ({type(error).__name__}: {error}): {again}"
        ) from error
    return about, claims


def title(figure: Figure) -> str:
    """Of the plot."""
    return f"Figure {figure.number}. {figure.title}"
