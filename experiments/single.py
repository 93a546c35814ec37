"""The command `train`: one run, shown as it goes, kept as JSON lines, and continued by the same command."""

from experiments import processes, runs
from experiments.config import TrainConfig
from experiments.console import TrainingBars, console, training_bars
from experiments.problems import default_learning_rate
from experiments.train import Record


def run_single(config: TrainConfig):
    """Trains as configured, or what is left of it; prints a line per epoch, and where the records are."""
    if config != runs.settled(config):
        rate, problem = default_learning_rate(config)
        console.print(
            f"learning rate {rate:g}, the best of {config.optimizer} on {problem}; --learning-rate sets another"
        )
        config = runs.settled(config)
    folder = runs.folder_of(config)
    with training_bars() as bars:
        display = Display(config, bars)
        records = runs.run(config, folder, display)
    if not processes.is_first():
        return
    if not display.seen:
        console.print(f"done before: {describe(records[-1], runs.num_epochs(config))}")
    console.print(f"records: {folder / runs.METRICS}", soft_wrap=True)


class Display:
    """Shows the new records of a run: each step on a bar, each epoch as a line."""

    def __init__(self, config: TrainConfig, bars: TrainingBars):
        self.seen, self._config, self._bars, self._task = 0, config, bars, None

    def __call__(self, record: Record):
        # Images and compiled functions are there by now; a run that was done before needs neither, and no bar.
        if not self.seen:
            self._task = self._bars.start(self._config.optimizer, runs.num_steps(self._config))
        self.seen += 1
        self._bars.see(self._task, record)
        if record["kind"] == "epoch":
            console.print(describe(record, runs.num_epochs(self._config)))


def describe(record: Record, epochs: int) -> str:
    """An epoch in one line."""
    return (
        f"epoch {record['epoch']:>3}/{epochs}  batch {record['batch_size']}  loss {record['loss']:.4f}"
        f"  accuracy {record['accuracy']:.2%}  test loss {record['test_loss']:.4f}"
        f"  test accuracy {record['test_accuracy']:.2%}  {record['images_per_second']:,.0f} images/s"
    )
