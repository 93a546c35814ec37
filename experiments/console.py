"""What the terminal shows: one console, one look for progress bars."""

from rich import progress
from rich.console import Console

console = Console(highlight=False)


def progress_bar(*columns: str) -> progress.Progress:
    """A progress bar with the given text columns (`"{task.fields[loss]}"`), and the time left.

    Where the output is not a terminal only its last state is drawn.
    """
    texts = [progress.TextColumn(column) for column in ("{task.description}", *columns)]
    bar = progress.BarColumn(bar_width=20)
    return progress.Progress(*texts, bar, progress.TimeRemainingColumn(compact=True), console=console)


def training_bar() -> progress.Progress:
    """A progress bar that shows, of each task, what `show` tells it."""
    return progress_bar("{task.fields[text]}")


def show(bar: progress.Progress, task: progress.TaskID, record: dict):
    """Moves a task to a record of `train`."""
    if record["kind"] == "step":
        speed = record["batch_size"] / record["seconds"]
        text = f"epoch {record['epoch']:>3}  loss {record['loss']:6.3f}  {speed:7,.0f} images/s"
        test = bar.tasks[bar.task_ids.index(task)].fields.get("test", "")
        bar.update(task, completed=record["step"], step_text=text, text=f"{text}  {test}")
    else:
        test = f"test accuracy {record['test_accuracy']:6.2%}"
        fields = bar.tasks[bar.task_ids.index(task)].fields
        bar.update(task, test=test, text=f"{fields['step_text']}  {test}")
