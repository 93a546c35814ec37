"""The command `train`: one run, shown as it goes, kept as JSON lines, and continued by the same command."""

from experiments import processes, runs
from experiments.config import TrainConfig
from experiments.console import TrainingBars, fit, say
from experiments.problems import default_learning_rate
from experiments.records import Record


def run_single(config: TrainConfig):
    """Trains as configured, or what is left of it; prints a line per epoch, and where the records are."""
    given, config = config, runs.settled(config)
    folder = runs.folder_of(config)
    with TrainingBars() as bars:
        bar = bars.follow(config.optimizer, lambda: runs.num_steps(config))

        def show(record: Record):
            if not bar.seen and config != given:
                rate, problem = default_learning_rate(given)
                say(
                    f"learning rate {rate:g}, the best of {config.optimizer} on {problem}; --learning-rate sets another"
                )
            bar(record)
            if record["kind"] == "epoch":
                say(describe(record, config.num_epochs))

        records = runs.run(config, folder, show)
    if processes.is_first():
        if not bar.seen:
            say(f"done before: {describe(records[-1], config.num_epochs)}")
        say(f"records: {folder / runs.METRICS}")


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
