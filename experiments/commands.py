"""The commands: what each can be told, and where its code is. Nothing here imports what a command works with."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from experiments.config import METHODS, MOST_EPOCHS, TrainConfig
from experiments.errors import UsageError
from experiments.options import ABOVE_0, Options, Rule, option, up_to
from experiments.problems import PROBLEMS

FIGURES = tuple(map(str, range(1, 17)))
TABLES = ("optimizers", "curvature", "losses", "estimators")
Preset = Literal["smoke", "cpu", "paper"]
MISSING: Any = dataclasses.MISSING
RUNS = Path("runs")
DATA_DIR = "Folder in which TFDS keeps, or has prepared, its data sets."
IMAGES = Rule("is for estimators, the one table of images", lambda config: config.table == "estimators")


@dataclasses.dataclass(frozen=True)
class RaceConfig(Options):
    """Tune the methods alike, race them against each other at a large batch, and write a page of the results.

    The same command goes on where it was stopped. What docs/race holds of the tuning is not done anew.
    """

    problem: Literal[tuple(PROBLEMS)] = option(
        MISSING, "digits needs no download; alexnet and resnet18, narrow and at 16 pixels, are of CIFAR-10."
    )
    methods: tuple[Literal[METHODS], ...] = option((), "Who takes part; else all that the problem names.")
    dataset: str | None = option(None, "Other images, as for `train`.")
    batch_size: int | None = option(None, "Images per step, in place of the problem's.", ABOVE_0)
    epochs: int | None = option(None, "Passes over the images, in place of the problem's.", up_to(MOST_EPOCHS))
    tune_epochs: int | None = option(None, "The same of the trials; else as many.", up_to(MOST_EPOCHS))
    seeds: int | None = option(None, "Runs per method, in place of the problem's number.", up_to(1000))
    like: str | None = option(None, "Take hyper-parameters from these results in docs/race, such as alexnet-8192.")
    time: bool = option(False, "Time steps again at the end, methods in turns: fairer where a machine has other work.")
    data_dir: Path | None = option(None, DATA_DIR)
    out: Path = option(RUNS, "Folder of the runs.")
    results: Path | None = option(None, "Folder of the numbers, the page and the plot; else OUT/race.")

    def __post_init__(self):
        super().__post_init__()
        if self.dataset:
            # The names of data sets are checked in one place.
            TrainConfig(dataset=self.dataset)


@dataclasses.dataclass(frozen=True)
class BenchConfig(Options):
    """Measure ratios: what curvax costs beside what it replaces, each next to its bar."""

    table: Literal[TABLES] = option(
        MISSING,
        "optimizers: medians, updates, and what moves between devices. curvature: exact diagonals. losses: what is"
        " taken by default. estimators: error against cost, beside optax's and matfree's, with a plot.",
    )
    repeats: int = option(5, "Timed calls of each program, half as many compilations; medians count.", up_to(10_000))
    quick: bool = option(False, "All a hundred times smaller, to see the command work: its figures mean nothing.")
    dataset: str | None = option(None, "The images, as for `train`.", where=IMAGES, usual="digits")
    data_dir: Path | None = option(None, DATA_DIR, where=IMAGES)
    out: Path = option(RUNS, "Folder in which a new folder with the records is made.")

    def __post_init__(self):
        super().__post_init__()
        if self.dataset:
            # The names of data sets are checked in one place.
            TrainConfig(dataset=self.dataset)


@dataclasses.dataclass(frozen=True)
class FigureConfig(Options):
    """Make figures of the paper: run what they need, draw them, and judge their claims.

    The same command goes on where it was stopped.
    """

    figures: tuple[Literal["all", *FIGURES], ...] = option(MISSING, "Their numbers in the paper.", metavar="FIGURE")
    preset: Preset = option(
        "smoke",
        "smoke: generated images, seconds. cpu: CIFAR-10 with fewer images and narrow networks, all figures in about an"
        " hour and a half on two cores. paper: full scale, for an accelerator.",
    )
    data_dir: Path | None = option(None, DATA_DIR)
    out: Path = option(RUNS, "Folder of the runs. Those that several figures need run once.")
    results: Path | None = option(None, "Folder of the figures and their numbers; else OUT/figures-PRESET.")
    dry_run: bool = option(False, "Only run a step of each kind of run, and estimate the cost on one accelerator.")

    def __post_init__(self):
        super().__post_init__()
        if "all" in self.figures and len(self.figures) > 1:
            raise UsageError("FIGURES: all holds every other number, leave those out")
        if self.dry_run and self.results is not None:
            raise UsageError("--dry-run has no --results: leave one of them out")

    @property
    def numbers(self) -> list[int]:
        """The chosen ones, in order."""
        return sorted(map(int, FIGURES if self.figures == ("all",) else self.figures))


@dataclasses.dataclass(frozen=True)
class ReportConfig(Options):
    """Write one page, Markdown and HTML, of the figures that were made."""

    preset: Preset = option("smoke", "Of the figures.")
    out: Path = option(RUNS, "The --out of the figures.")
    results: Path | None = option(None, "Folder of the figures, and of the page; else OUT/figures-PRESET.")


# The options of each command, and the function that carries it out.
COMMANDS = {
    "race": (RaceConfig, "experiments.race:race"),
    "train": (TrainConfig, "experiments.single:run_single"),
    "bench": (BenchConfig, "experiments.bench.command:bench"),
    "figure": (FigureConfig, "experiments.figures.command:make_figures"),
    "report": (ReportConfig, "experiments.figures.report:report"),
}
