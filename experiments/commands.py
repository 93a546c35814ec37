"""The commands: what each can be told, and where its code is. Nothing here imports what a command works with."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from experiments.config import METHODS, MOST_EPOCHS, TrainConfig
from experiments.errors import UsageError
from experiments.options import flag, option
from experiments.problems import PROBLEMS, RACERS

FIGURES = tuple(map(str, range(1, 17)))
TABLES = ("optimizers", "curvature", "losses", "estimators")
Preset = Literal["smoke", "cpu", "paper"]
MISSING: Any = dataclasses.MISSING


def data_dir() -> Any:
    """The option, alike in all commands."""
    return option(None, "Folder in which TFDS keeps, or has prepared, its data sets.")


def check_within(config: Any, **highest: int):
    """Raises a UsageError if a number is below 1 or above the highest."""
    for name, most in highest.items():
        value = getattr(config, name)
        if value is not None and not 1 <= value <= most:
            raise UsageError(f"{flag(name)} must be above 0 and at most {most}, not {value}")


def check_once(values: tuple[str, ...], what: str):
    """Raises a UsageError if a value is given twice."""
    for value in values:
        if values.count(value) > 1:
            raise UsageError(f"{what}: {value} is given more than once")


@dataclasses.dataclass(frozen=True)
class RaceConfig:
    """Race the methods against each other at a large batch, each at its tuned learning rate.

    The same command goes on where it was stopped.
    """

    problem: Literal[tuple(PROBLEMS)] = option("digits", "digits needs no download; cifar10 takes far longer.")
    methods: tuple[Literal[METHODS], ...] = option(RACERS, "Who takes part.")
    epochs: int | None = option(None, "Passes over the training images, in place of the problem's.")
    seeds: int | None = option(None, "Runs per method, in place of the problem's number.")
    data_dir: Path | None = data_dir()
    out: Path = option(Path("runs"), "Folder of the runs, and of a new folder with their records and the plot.")

    def __post_init__(self):
        check_within(self, epochs=MOST_EPOCHS, seeds=1000)
        check_once(self.methods, "--methods")


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """Find the learning rate of each method on a grid of the same size for all; write it to experiments/tuned.json.

    The same command goes on where it was stopped.
    """

    problem: Literal[tuple(PROBLEMS)] = option("digits", "What to tune on.")
    methods: tuple[Literal[METHODS], ...] = option(RACERS, "Whom to tune.")
    again: bool = option(False, "Also count anew the trials that the file holds already.")
    data_dir: Path | None = data_dir()
    file: Path | None = option(
        None, "Where the results are read and written, after every trial; else experiments/tuned.json."
    )
    out: Path = option(Path("runs"), "Folder of the runs.")

    def __post_init__(self):
        check_once(self.methods, "--methods")


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Measure ratios: what curvax costs beside what it replaces, each next to its bar."""

    table: Literal[TABLES] = option(
        MISSING,
        "optimizers: medians, updates, and what moves between devices. curvature: exact diagonals. losses: what is"
        " taken by default. estimators: error against cost, beside optax's and matfree's, with a plot.",
    )
    repeats: int = option(5, "Timed calls of each program, in turn; their median counts. Half as many compilations.")
    quick: bool = option(
        False, "Everything a hundred times smaller, to see the command work: its figures mean nothing."
    )
    dataset: str | None = option(None, "estimators: the images, as for `train`.", usual="digits")
    data_dir: Path | None = option(None, "estimators: folder in which TFDS keeps its data sets, as for `train`.")
    out: Path = option(Path("runs"), "Folder in which a new folder with the records is made.")

    def __post_init__(self):
        check_within(self, repeats=10_000)
        for name in ("dataset", "data_dir"):
            if self.table != "estimators" and getattr(self, name) is not None:
                raise UsageError(f"{flag(name)} is for estimators: {self.table} takes no images")
        if self.table == "estimators":
            # The names of data sets are checked in one place.
            TrainConfig(dataset=self.dataset or "digits")


@dataclasses.dataclass(frozen=True)
class FigureConfig:
    """Make figures of the paper: run what they need, draw them, and judge their claims.

    The same command goes on where it was stopped.
    """

    figures: tuple[Literal["all", *FIGURES], ...] = option(
        MISSING, "Their numbers in the paper, or all.", metavar="FIGURE"
    )
    preset: Preset = option(
        "smoke",
        "smoke: generated images, seconds. cpu: CIFAR-10 with fewer images and narrow networks, all figures in about an"
        " hour and a half on two cores. paper: full scale, for an accelerator.",
    )
    data_dir: Path | None = data_dir()
    out: Path = option(
        Path("runs"), "Folder of the runs. Those that several figures need run once; those that were stopped go on."
    )
    results: Path | None = option(None, "Folder of the figures and their numbers; else OUT/figures-PRESET.")
    dry_run: bool = option(
        False, "Only compile and run one step of each kind of run, and estimate what all would cost on one accelerator."
    )

    def __post_init__(self):
        check_once(self.figures, "figure")
        if "all" in self.figures and len(self.figures) > 1:
            raise UsageError("figure: all holds every other number, leave those out")
        if self.dry_run and self.results is not None:
            raise UsageError("--dry-run has no --results: leave one of them out")

    @property
    def numbers(self) -> list[int]:
        """The chosen ones, in order."""
        return sorted(map(int, FIGURES if self.figures == ("all",) else self.figures))


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Write one page, Markdown and HTML, of the figures that were made."""

    preset: Preset = option("smoke", "Of the figures.")
    out: Path = option(Path("runs"), "The --out of the figures.")
    results: Path | None = option(None, "Folder of the figures, and of the page; else OUT/figures-PRESET.")


# The options of each command, and the function that carries it out.
COMMANDS = {
    "race": (RaceConfig, "experiments.race:race"),
    "tune": (TuneConfig, "experiments.tune:tune"),
    "train": (TrainConfig, "experiments.single:run_single"),
    "bench": (BenchConfig, "experiments.bench.command:bench"),
    "figure": (FigureConfig, "experiments.figures.command:make_figures"),
    "report": (ReportConfig, "experiments.figures.report:report"),
}
