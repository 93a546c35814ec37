"""The command `bench`: measures a table, says its lines as they come, and keeps them as JSON lines."""

import dataclasses
import os
import platform
from collections.abc import Callable, Iterator

import jax
from rich.text import Text

from experiments import data, records
from experiments.bench import curvature, estimators, losses, optimizers
from experiments.bench.measure import Row, without_compilation_cache
from experiments.commands import BenchConfig
from experiments.config import TrainConfig
from experiments.console import TrainingBars, say, show_table

# Each makes the lines of one table; that of estimators needs images, too.
TABLES: dict[str, Callable[..., Iterator[Row]]] = {
    "optimizers": optimizers.rows,
    "curvature": curvature.rows,
    "losses": losses.rows,
    "estimators": estimators.rows,
}
COLORS = {"met": "green", "first met": "yellow", "missed": "red"}


def bench(config: BenchConfig):
    """Measures a table, says what it measures and what came out, and shows all of it in the end."""
    options = {"repeats": config.repeats, "quick": config.quick}
    if config.table == "estimators":
        estimators.check_installed()
        options["dataset"] = data.load(TrainConfig(dataset=config.dataset, data_dir=config.data_dir, batch_size=128))
    # Where images and records lie on this machine is of no use on another.
    about = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("out", "data_dir")}
    rows, here, path = [], machine(), records.new_folder(config.out, f"bench-{config.table}") / "table.jsonl"
    records.write(path, records.line({"kind": "config", **about, **here}))
    with without_compilation_cache(), TrainingBars() as bars:
        task = bars.begin("", None)
        tell = lambda what: bars.update(task, description=f"measuring {what}")
        for row in TABLES[config.table](say=tell, **options):
            records.append(path, {"kind": "row", **row._asdict(), "data": dict(row.data), "verdict": row.verdict()})
            rows.append(row)
            say(" ".join(filter(None, map(str, cells(row)))))
        bars.remove_task(task)
    title = "made small, the figures mean nothing" if config.quick else "medians of calls in turn"
    caption = f"{here['device']}, {here['cores']} cores, jax {here['jax']}, Python {here['python']}"
    columns = ("what", "reached", "bar", "", "detail")
    show_table(columns, list(map(cells, rows)), text=(0, 3, 4), title=f"{config.table}: {title}", caption=caption)
    if config.table == "estimators":
        estimators.plot([row.data for row in rows], config.dataset, path.with_suffix(".png"))
        say(f"plot: {path.with_suffix('.png')}")
    say(f"records: {path}")


def machine() -> dict[str, object]:
    """What the figures depend on."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}, {device.device_kind}" if device.platform != "cpu" else "cpu",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def cells(row: Row) -> list[str | Text]:
    """A line of the table as it is shown: three digits, and those before the point."""
    number = lambda x: f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"
    bars = ", ".join(map(number, row.bars))
    verdict = Text(row.verdict(), COLORS.get(row.verdict(), ""))
    return [row.what, number(row.reached), bars and f"{'≥' if row.at_least else '≤'} {bars}", verdict, row.detail]
