"""What the terminal shows: one console, one look for progress bars and tables, on wide and on narrow screens."""

from collections.abc import Callable, Mapping, Sequence
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
    """One line of several texts: those of the lowest ranks are left out until the others fit on the screen."""
    parts = list(parts)
    while len(parts) > 1 and len("  ".join(text for _, text in parts)) > console.width:
        parts.remove(min(parts))
    return "  ".join(text for _, text in parts)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str | Text]], text: Sequence[int] = (0,), **about: Any):
    """Prints a table, or line by line what is in it where the screen is too narrow for its longest words.

    `text` says which columns hold words; numbers are aligned on the right. There may be a `title` and a `caption`.
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
        cells = [f"{name}: {cell}" for name, cell in zip(columns, row, strict=True) if str(cell)]
        console.print("\n".join(["", *cells]))


class TrainingBars(progress.Progress):
    """Progress bars, each with its name before it and what is `said` of it behind; in a log, their last state."""

    def __init__(self):
        text = lambda name: progress.TextColumn(f"{{task.{name}}}", markup=False)
        # The accuracy stays on any screen; the loss goes on one of less than 80 columns, and the speed before it.
        fields = [text(f"fields[{name}]") for name, least in FIELDS.items() if console.width >= least]
        bar = progress.BarColumn(bar_width=16 if console.width >= 80 else 10)
        time_left = progress.TimeRemainingColumn(compact=True)
        super().__init__(text("description"), bar, *fields, time_left, console=console)

    def begin(self, name: str, total: int | None, said: str = "") -> progress.TaskID:
        """A bar for so many steps, or for work of unknown length."""
        return self.add_task(name, total=total, **dict.fromkeys(FIELDS, "") | {"said": said})

    def follow(self, name: str, steps: Callable[[], int]) -> "Follower":
        """What shows the records of `train` on a bar; the number of steps is asked for with the first of them."""
        return Follower(self, name, steps)


FIELDS = {"accuracy": 0, "said": 80, "speed": 100}


class Follower:
    """Moves a bar to each record that it is called with."""

    def __init__(self, bars: TrainingBars, name: str, steps: Callable[[], int]):
        self.seen, self._bars, self._name, self._steps, self._task = 0, bars, name, steps, None

    def __call__(self, record: Mapping[str, Any]):
        # Images and compiled functions are there by now; a run that was done before needs neither, and no bar.
        if not self.seen:
            self._task = self._bars.begin(self._name, self._steps())
        self.seen += 1
        if record["kind"] == "epoch":
            self._bars.update(self._task, accuracy=f"test {record['test_accuracy']:6.1%}")
            return
        # What a step that compiles takes is no speed.
        speed = "" if record["compiled"] else f"{record['batch_size'] / record['seconds']:7,.0f} images/s"
        said = f"epoch {record['epoch']:>3} loss {record['loss']:6.3f}"
        self._bars.update(self._task, completed=record["step"], said=said, speed=speed)

    def finish(self):
        """Takes the bar away."""
        self._bars.remove_task(self._task)
