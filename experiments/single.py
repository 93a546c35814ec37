"""The command `train`: one run, shown as it goes, kept as JSON lines, and continued by the same command."""

from experiments import processes, runs
from experiments.config import TrainConfig
from experiments.console import TrainingBars, fit, say, training_bars
from experiments.problems import default_learning_rate
from experiments.records import Record


def run_single(config: TrainConfig):
    """Trains as configured, or what is left of it; prints a line per epoch, and where the records are."""
    note, given = "", config
    if (config := runs.settled(given)) != given:
        rate, problem = default_learning_rate(given)
        note = f"learning rate {rate:g}, the best of {config.optimizer} on {problem}; --learning-rate sets another"
    folder = runs.folder_of(config)
    with training_bars() as bars:
        display = Display(config, bars, note)
        records = runs.run(config, folder, display)
    if not processes.is_first():
        return
    if not display.seen:
        say(f"done before: {describe(records[-1], config.num_epochs)}")
    say(f"records: {folder / runs.METRICS}")


class Display:
    """Shows the new records of a run: each step on a bar, each epoch as a line; and a note before the first."""

    def __init__(self, config: TrainConfig, bars: TrainingBars, note: str):
        self.seen, self._config, self._bars, self._note, self._task = 0, config, bars, note, None

    def __call__(self, record: Record):
        # Images and compiled functions are there by now; a run that was done before needs neither, and no bar.
        if not self.seen:
            if self._note:
                say(self._note)
            self._task = self._bars.start(self._config.optimizer, runs.num_steps(self._config))
        self.seen += 1
        self._bars.see(self._task, record)
        if record["kind"] == "epoch":
            say(describe(record, self._config.num_epochs))


def describe(record: Record, epochs: int) -> str:
    """An epoch in one line, in fewer words on a narrow screen."""
    return fit(
        [
            (7, f"epoch {record['epoch']:>3}/{epochs}"),
            (2, f"batch {record['batch_size']}"),
            (5, f"loss {record['loss']:.4f}"),
            (4, f"accuracy {record['accuracy']:.2%}"),
            (3, f"test loss {record['test_loss']:.4f}"),
            (6, f"test accuracy {record['test_accuracy']:.2%}"),
            (1, f"{record['images_per_second']:,.0f} images/s"),
        ]
    )
