"""The command `bench`: measures a table, shows its lines as they come, and keeps them as JSON lines."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Group
from rich.live import Live
from rich.spinner import Spinner

from experiments import records
from experiments.bench import curvature, estimators, measure, optimizers, table
from experiments.bench.table import Row
from experiments.config import TrainConfig
from experiments.console import console

# Each makes the lines of one table: `rows(say, repeats, quick)`; that of estimators needs images, too.
TABLES: dict[str, Callable[..., Iterator[Row]]] = {
    "optimizers": optimizers.rows,
    "curvature": curvature.rows,
    "estimators": estimators.rows,
}


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Measure ratios: what curvax costs beside what it replaces, each next to its bar."""

    table: tyro.conf.Positional[Literal[tuple(TABLES)]]
    """optimizers: medians, updates, and what moves between devices. curvature: exact diagonals. estimators: error
    against cost, beside optax's and matfree's, with a plot."""
    repeats: int = 5
    """Timed calls of each program, in turn; their median counts. Half as many compilations."""
    quick: bool = False
    """Everything a hundred times smaller, to see the command work: its figures mean nothing."""
    dataset: str = "digits"
    """estimators: the images, as for `train`."""
    data_dir: Path | None = None
    """estimators: folder in which TFDS keeps its data sets, as for `train`."""
    out: Path = Path("runs")
    """Folder in which a new folder with the records is made."""

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"--repeats must be above 0, not {self.repeats}")


def bench(config: BenchConfig):
    """Measures and shows one table."""
    folder = records.new_folder(config.out, f"bench-{config.table}")
    path = folder / "table.jsonl"
    # Where images and records lie on this machine is of no use on another.
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("out", "data_dir")}
    options = {"repeats": config.repeats, "quick": config.quick}
    points = []
    if config.table == "estimators":
        estimators.check_installed()
        options["images"] = TrainConfig(dataset=config.dataset, data_dir=config.data_dir, batch_size=128)
    with records.Writer(path) as writer, measure.without_compilation_cache(), live_table(title(config)) as (add, say):
        writer.write({"kind": "config", **fields, **table.machine()})
        for row in TABLES[config.table](say=say, **options):
            writer.write(row.record())
            points.append(row.data)
            add(row)
    if config.table == "estimators":
        picture = path.with_suffix(".png")
        estimators.plot(points, config.dataset, picture)
        console.print(f"\nplot: {picture}", soft_wrap=True)
    console.print(f"\nrecords: {path}", soft_wrap=True)


def title(config: BenchConfig) -> str:
    """What stands over the table."""
    return f"{config.table}: " + (
        "made small, the figures mean nothing" if config.quick else "medians of calls in turn"
    )


@contextlib.contextmanager
def live_table(title: str) -> Iterator[tuple[Callable[[Row], None], Callable[[str], None]]]:
    """A table on the terminal that grows, and below it what is measured now; in a log, the finished table."""
    shown = table.empty(title)
    spinner = Spinner("dots")
    with Live(Group(shown, spinner), console=console, refresh_per_second=4) as live:

        def say(what: str):
            spinner.update(text=f"measuring {what}")
            if not console.is_terminal:
                console.print(f"measuring {what}")

        yield (lambda row: shown.add_row(*table.cells(row))), say
        live.update(shown)
