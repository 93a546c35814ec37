"""What is shown on screens of any width."""

import pytest
from rich.console import Console
from rich.text import Text
from test_command_line import terminal

from experiments import console, single

EPOCH = {"kind": "epoch", "step": 8, "epoch": 12, "batch_size": 1024, "loss": 1.2345, "accuracy": 0.5}
EPOCH |= {"test_loss": 2.3456, "test_accuracy": 0.4375, "images_per_second": 12345.6}
STEP = {"kind": "step", "compiled": False, "step": 8, "epoch": 12, "batch_size": 1024, "loss": 1.2345, "seconds": 0.1}


@pytest.fixture
def width(monkeypatch):
    def set_to(columns):
        monkeypatch.setattr(console, "console", Console(**console.PLAIN, width=columns))

    return set_to


@pytest.mark.parametrize(
    ("columns", "there", "gone"),
    [
        (120, ["batch 1024", "test loss", "12,346 images/s"], []),
        (80, ["loss 1.2345", "accuracy 50.00%"], ["images/s", "batch"]),
        (60, ["loss 1.2345"], ["images/s", "batch", "test loss"]),
        (20, [], ["loss"]),
    ],
)
def test_an_epoch_is_one_line_without_what_matters_least(columns, there, gone, width):
    width(columns)
    line = single.describe(EPOCH, 100)
    assert ("epoch  12/100" in line and "test accuracy 43.75%" in line) or columns == 20
    assert len(line) <= columns
    assert all(word in line for word in there) and not any(word in line for word in gone)


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("name", ["sgd", "percent_delta", "figure 13, run 12 of 40"])
def test_the_bar_keeps_its_name_its_length_and_the_accuracy(columns, name, width):
    with terminal(columns) as shown:
        width(columns)
        with console.TrainingBars() as bars:
            show = bars.follow(name, lambda: 10)
            show(EPOCH)
            show(STEP)
    last = Text.from_ansi(shown[0]).plain.splitlines()[-1].rstrip()
    assert len(last) <= columns
    assert name in last and "test  43.8%" in last and last.count("━") + last.count("╸") + last.count("╺") >= 10
    assert ("epoch  12 loss  1.23" in last) == (columns >= 80) and ("images/s" in last) == (columns >= 100)


@pytest.mark.parametrize("columns", [30, 60, 80, 120])
def test_no_number_of_a_table_is_lost(columns, width, capfd):
    width(columns)
    names = ("method", "learning rate", "final loss", "test accuracy (%)", "steps", "ms/step", "ratio", "compile (s)")
    row = ("percent_delta", "0.032", "0.254 ± 0.002", "95.4 ± 0.4", "not reached", "123456", "1.35", "10.0")
    console.show_table(names, [row], caption="over two seeds")
    out = capfd.readouterr().out
    assert all(word in out for cell in row for word in cell.split())
    assert all(len(line) <= columns for line in out.splitlines())


def test_paths_are_printed_as_they_are(width, capfd):
    width(40)
    path = "runs/my [old] :smile: [bold]folder[/bold]/" + "x" * 80
    console.say(path)
    console.show_table(("path",), [(path[:30],)])
    out = capfd.readouterr().out
    assert out.startswith(path + "\n") and path[:30] in out
