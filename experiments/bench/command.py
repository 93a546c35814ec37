"""The command `bench`: measures a table, shows its lines as they come, and keeps them as JSON lines."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from rich.console import Group
from rich.live import Live
from rich.spinner import Spinner

from experiments import data, records
from experiments.bench import curvature, estimators, losses, measure, optimizers, table
from experiments.bench.table import Row
from experiments.commands import BenchConfig
from experiments.config import TrainConfig
from experiments.console import console, say

# Each makes the lines of one table: `rows(say, repeats, quick)`; that of estimators needs images, too.
TABLES: dict[str, Callable[..., Iterator[Row]]] = {
    "optimizers": optimizers.rows,
    "curvature": curvature.rows,
    "losses": losses.rows,
    "estimators": estimators.rows,
}


def bench(config: BenchConfig):
    """Measures and shows one table."""
    # Where images and records lie on this machine is of no use on another.
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("out", "data_dir")}
    options = {"repeats": config.repeats, "quick": config.quick}
    if config.table == "estimators":
        estimators.check_installed()
        images = TrainConfig(dataset=config.dataset or "digits", data_dir=config.data_dir, batch_size=128)
        options["dataset"] = data.load(images)
    points, path = [], records.new_folder(config.out, f"bench-{config.table}") / "table.jsonl"
    records.write(path, records.line({"kind": "config", **fields, **table.machine()}))
    with measure.without_compilation_cache(), live_table(title(config)) as (add, tell):
        for row in TABLES[config.table](say=tell, **options):
            records.append(path, row.record())
            points.append(row.data)
            add(row)
    if config.table == "estimators":
        estimators.plot(points, config.dataset or "digits", path.with_suffix(".png"))
        say(f"plot: {path.with_suffix('.png')}")
    say(f"records: {path}")


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

        def tell(what: str):
            spinner.update(text=f"measuring {what}")
            if not console.is_terminal:
                say(f"measuring {what}")

        yield (lambda row: shown.add_row(*table.cells(row))), tell
        live.update(shown)
