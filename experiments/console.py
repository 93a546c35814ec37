"""What the terminal shows: one console, one look for progress bars and tables, on wide and on narrow screens."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box, progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Paths may hold anything, what looks like markup too.
PLAIN = {"highlight": False, "markup": False, "emoji": False}
console = Console(**PLAIN)
if not console.is_terminal:
    # A log file has no width, and what rich assumes breaks tables.
    console = Console(**PLAIN, width=120)


def say(text: object):
    """Prints a line, however long: a path that is broken in two cannot be copied."""
    console.print(str(text), soft_wrap=True)


def fit(parts: Sequence[tuple[int, str]]) -> str:
    """One line of several texts: those of the lowest ranks are left out until the others fit on the screen.

    Example:
        >>> fit([(3, "epoch 1"), (1, "much detail " * 20), (2, "loss 0.5")])
        'epoch 1  loss 0.5'
    """
    parts = list(parts)
    while len(parts) > 1 and len("  ".join(text for _, text in parts)) > console.width:
        parts.remove(min(parts))
    return "  ".join(text for _, text in parts)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str | Text]], text: Sequence[int] = (0,), **about):
    """Prints a table, or line by line what is in it where the screen is too narrow for its longest words.

    Args:
        columns: their names.
        rows: the cells.
        text: which columns hold words; numbers are aligned on the right.
        about: `title` and `caption`.
    """
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left", pad_edge=False, **about)
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place in text else "right")
    for row in rows:
        table.add_row(*row)
    if console.measure(table, options=console.options.update(width=10_000)).minimum <= console.width:
        console.print(table)
        return
    for heading in filter(None, (about.get("title"), about.get("caption"))):
        console.print(heading)
    for row in rows:
        console.print(
            "\n".join(["", *(f"{name}: {cell}" for name, cell in zip(columns, row, strict=True) if str(cell))])
        )


class Wide(progress.TextColumn):
    """A text on a progress bar that gives way where the screen has fewer columns than this."""

    def __init__(self, text: str, columns: int = 0):
        super().__init__(text, markup=False)
        self._columns = columns

    def render(self, task: progress.Task) -> Text:
        """The text, or nothing."""
        return super().render(task) if console.width >= self._columns else Text()


def progress_bar(*columns: progress.ProgressColumn) -> progress.Progress:
    """A bar with its name before it, these columns behind it, and the time left.

    Where the output is not a terminal only its last state is drawn.
    """
    bar = progress.BarColumn(bar_width=16 if console.width >= 80 else 10)
    return progress.Progress(
        Wide("{task.description}"), bar, *columns, progress.TimeRemainingColumn(compact=True), console=console
    )


class TrainingBars:
    """Progress bars that follow the records of `train`, one per run, on a display with `step`, `test` and `speed`."""

    def __init__(self, bars: progress.Progress):
        self._bars = bars

    def start(self, name: str, steps: int | None) -> progress.TaskID:
        """A bar for a run of so many optimizer steps, or for work of unknown length."""
        return self._bars.add_task(name, total=steps, step="compiling" if steps else "", test="", speed="")

    def say(self, task: progress.TaskID, text: str):
        """Puts a text on a bar."""
        self._bars.update(task, step=text)

    def finish(self, task: progress.TaskID):
        """Takes a bar away."""
        self._bars.remove_task(task)

    def see(self, task: progress.TaskID, record: Mapping[str, Any]):
        """Moves a bar to a record."""
        if record["kind"] == "epoch":
            self._bars.update(task, test=f"test {record['test_accuracy']:6.1%}")
            return
        # What a step that compiles takes is no speed.
        speed = "" if record["compiled"] else f"{record['batch_size'] / record['seconds']:7,.0f} images/s"
        step = f"epoch {record['epoch']:>3} loss {record['loss']:6.3f}"
        self._bars.update(task, completed=record["step"], step=step, speed=speed)


@contextlib.contextmanager
def training_bars() -> Iterator[TrainingBars]:
    """Shows progress bars for training runs while the context lasts."""
    # The accuracy stays on any screen; the loss goes on one of less than 80 columns, and the speed before it.
    columns = (Wide("{task.fields[test]}"), Wide("{task.fields[step]}", 80), Wide("{task.fields[speed]}", 100))
    with progress_bar(*columns) as bars:
        yield TrainingBars(bars)
