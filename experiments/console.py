"""What the terminal shows: one console, one look for progress bars."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from rich import progress
from rich.console import Console

console = Console(highlight=False)
if not console.is_terminal:
    # A log file has no width, and what rich assumes breaks tables.
    console = Console(highlight=False, width=120)


def progress_bar(*columns: str) -> progress.Progress:
    """A progress bar with the given text columns (`"{task.fields[loss]}"`), and the time left.

    Where the output is not a terminal only its last state is drawn.
    """
    texts = [progress.TextColumn(column) for column in ("{task.description}", *columns)]
    bar = progress.BarColumn(bar_width=20)
    return progress.Progress(*texts, bar, progress.TimeRemainingColumn(compact=True), console=console)


class TrainingBars:
    """Progress bars that follow the records of `train`, one bar per run.

    Args:
        bars: a progress bar display with the columns `step` and `test`.
    """

    def __init__(self, bars: progress.Progress):
        self._bars = bars

    def start(self, name: str, steps: int) -> progress.TaskID:
        """A bar for a run of so many optimizer steps."""
        return self._bars.add_task(name, total=steps, step="compiling", test="")

    def count(self, name: str) -> progress.TaskID:
        """A bar for work of unknown length."""
        return self._bars.add_task(name, total=None, step="", test="")

    def say(self, task: progress.TaskID, text: str):
        """Puts a text on a bar."""
        self._bars.update(task, step=text)

    def finish(self, task: progress.TaskID):
        """Takes a bar away."""
        self._bars.remove_task(task)

    def see(self, task: progress.TaskID, record: Mapping[str, Any]):
        """Moves a bar to a record."""
        if record["kind"] == "epoch":
            self._bars.update(task, test=f"test accuracy {record['test_accuracy']:6.2%}")
            return
        speed = record["batch_size"] / record["seconds"]
        step = f"epoch {record['epoch']:>3}  loss {record['loss']:6.3f}  {speed:7,.0f} images/s"
        self._bars.update(task, completed=record["step"], step=step)


@contextlib.contextmanager
def training_bars() -> Iterator[TrainingBars]:
    """Shows progress bars for training runs while the context lasts."""
    with progress_bar("{task.fields[step]}", "{task.fields[test]}") as bars:
        yield TrainingBars(bars)
