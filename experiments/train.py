"""The training loop.

It is a generator of records, plain dicts that go into the metrics file as they are. Whoever asks for them (the commands
`train`, `race` and `tune`) decides what to show and to keep; none of them trains in its own way.
"""

import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.errors import RunError
from experiments.step import Stepper, TrainState
from experiments.timing import step_seconds

Record = dict[str, Any]


class Diverged(RunError):
    """The loss is no longer a number."""


def train(stepper: Stepper, seed: int, learning_rate: float, state: TrainState | None = None) -> Iterator[Record]:
    """Trains one network.

    Args:
        stepper: what to train, and how.
        seed: of the initial parameters and of all that follows.
        learning_rate: peak rate of the phases that do not state their own.
        state: where to go on, at the end of an epoch; from the beginning if None.

    Yields:
        A record of kind `step` after every step, and of kind `epoch` after every pass over the training images.

    Raises:
        Diverged: if the loss is not finite.
    """
    config, num_images = stepper.config, len(stepper.train)
    state = stepper.init(seed) if state is None else state
    done = int(state.step)

    for epoch in config.plan(learning_rate).epochs(num_images):
        if epoch.first_step < done:
            continue
        place = {"epoch": epoch.number + 1, "batch_size": epoch.batch_size}

        ### Learn
        means, durations = [], []
        order = stepper.shuffle(state, epoch.number)
        for batch, rate in enumerate(epoch.learning_rates):
            before = time.perf_counter()
            state, metrics = stepper.step(state, order, epoch, batch)
            # Waiting for each step costs little at batches this large, and makes its seconds and its loss its own.
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            seconds = time.perf_counter() - before
            step = epoch.first_step + batch + 1
            yield {"kind": "step", "step": step, **place, "learning_rate": float(rate), **metrics, "seconds": seconds}
            if not np.isfinite(metrics["loss"]):
                raise Diverged(f"the loss is {metrics['loss']} at step {step}: try a smaller --learning-rate")
            means.append((metrics["loss"], metrics["accuracy"]))
            durations.append(seconds)

        ### Judge
        loss, accuracy = np.mean(means, axis=0).tolist()
        test_loss, test_accuracy = stepper.evaluate(state)
        results = {"loss": loss, "accuracy": accuracy, "test_loss": test_loss, "test_accuracy": test_accuracy}
        results["images_per_second"] = epoch.batch_size / step_seconds(durations)
        yield {"kind": "epoch", "step": step, **place, "learning_rate": float(rate), **results}
