"""The command `train`: one run, shown as it goes and kept as JSON lines."""

import dataclasses

from experiments import data, records
from experiments.config import TrainConfig
from experiments.console import console, training_bars
from experiments.problems import default_learning_rate
from experiments.step import Stepper
from experiments.train import train


def run_single(config: TrainConfig):
    """Trains as configured; prints a line per epoch, and where the records are."""
    if config.learning_rate is None:
        rate, problem = default_learning_rate(config)
        config = dataclasses.replace(config, learning_rate=rate)
        console.print(
            f"learning rate {rate:g}, the best of {config.optimizer} on {problem}; --learning-rate sets another"
        )
    dataset = data.load(config)
    stepper = Stepper(config, dataset)
    folder = records.new_folder(config.out, f"train-{config.dataset}-{config.model}-{config.optimizer}")
    epochs = list(config.plan(config.learning_rate).epochs(len(dataset.train)))
    with records.Writer(folder / "metrics.jsonl") as writer, training_bars() as bars:
        writer.write({"kind": "config", **config.as_dict()})
        task = bars.start(config.optimizer, sum(epoch.steps for epoch in epochs))
        for record in train(stepper, config.seed, config.learning_rate):
            writer.write(record)
            bars.see(task, record)
            if record["kind"] == "epoch":
                console.print(describe(record, len(epochs)))
    console.print(f"records: {folder / 'metrics.jsonl'}", soft_wrap=True)


def describe(record: dict, epochs: int) -> str:
    """An epoch in one line."""
    return (
        f"epoch {record['epoch']:>3}/{epochs}  batch {record['batch_size']}  loss {record['loss']:.4f}"
        f"  accuracy {record['accuracy']:.2%}  test loss {record['test_loss']:.4f}"
        f"  test accuracy {record['test_accuracy']:.2%}  {record['images_per_second']:,.0f} images/s"
    )
