"""The training loop.

It is a generator of records, plain dicts that go into the metrics file as they are. Whoever asks for them decides what
to show and to keep; nobody trains in its own way.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from experiments.errors import Diverged
from experiments.records import Record

if TYPE_CHECKING:
    from experiments.step import Stepper, TrainState

# One refresh of `cblr`'s curvature with its default interval falls into every window of this many steps.
WINDOW = 10


def train(
    stepper: "Stepper",
    seed: int,
    learning_rate: float | None,
    state: "TrainState | None" = None,
    past: Sequence[Record] = (),
    save: Callable[["TrainState", int, bool], None] = lambda state, step, last: None,
) -> Iterator[Record]:
    """Trains one network.

    Args:
        stepper: what to train, and how.
        seed: of all that is random.
        learning_rate: peak rate of the phases that do not state their own.
        state: where to go on; from the beginning if None.
        past: the records up to that state.
        save: called after every step, once its record has been dealt with, with the state, the number of steps and
            whether that was the last; it may read the state, which the next step consumes.

    Yields:
        A record of kind `step` after every step, and of kind `epoch` after every pass over the training images.

    Raises:
        Diverged: if the loss is not finite.
    """
    state = stepper.init(seed) if state is None else state
    epochs = list(stepper.config.plan(learning_rate).epochs(len(stepper.train)))
    total = sum(epoch.steps for epoch in epochs)
    judged = sum(record["kind"] == "epoch" for record in past)

    for epoch in epochs[judged:]:
        place = {"epoch": epoch.number + 1, "batch_size": epoch.batch_size}
        steps = [record for record in past if record["step"] > epoch.first_step]
        order = stepper.shuffle(state, epoch.number)
        for batch in range(len(steps), epoch.steps):
            before = time.perf_counter()
            # Waiting for each step costs little at batches this large, and makes its seconds and its loss its own.
            state, metrics = stepper.step(state, order, epoch, batch)
            metrics |= {"seconds": time.perf_counter() - before}
            step, rate = epoch.first_step + batch + 1, float(epoch.learning_rates[batch])
            record = {"kind": "step", "step": step, **place, "learning_rate": rate, **metrics}
            steps.append(record)
            yield record
            refuse_divergence(record)
            save(state, step, step == total)

        means = {name: statistics.fmean(record[name] for record in steps) for name in ("loss", "accuracy")}
        test_loss, test_accuracy = stepper.evaluate(state)
        last = {"step": steps[-1]["step"], **place, "learning_rate": steps[-1]["learning_rate"]}
        test = {"test_loss": test_loss, "test_accuracy": test_accuracy}
        speed = epoch.batch_size / step_seconds(steps)
        yield {"kind": "epoch", **last, **means, **test, "images_per_second": speed}


def step_seconds(steps: Sequence[Record]) -> float:
    """Median over windows of steps of their mean duration, without the steps that compiled.

    A plain median would never see the one step in ten that estimates curvature, and a plain mean sees every hiccup of
    the machine.

    Example:
        >>> steps = [{"seconds": 9.0, "compiled": True}] + [{"seconds": 0.1, "compiled": False}] * 19
        >>> round(step_seconds(steps + [{"seconds": 0.2, "compiled": False}]), 6)
        0.105
    """
    rest = [step["seconds"] for step in steps if not step["compiled"]] or [steps[-1]["seconds"]]
    windows = [rest[i : i + WINDOW] for i in range(0, len(rest) - WINDOW + 1, WINDOW)] or [rest]
    return statistics.median(statistics.fmean(window) for window in windows)


def is_record(record: Record) -> bool:
    """Whether a line of a file is one that `train` may have yielded."""
    names = {"step", "epoch", "batch_size", "learning_rate", "loss", "accuracy"}
    kinds = {"step": {"seconds", "compiled"}, "epoch": {"test_loss", "test_accuracy", "images_per_second"}}
    more = kinds.get(record.get("kind"))
    return more is not None and names | more <= record.keys() and isinstance(record["step"], int)


def refuse_divergence(record: Record):
    """Raises `Diverged` if the loss in a record, fresh or from a file, is not a finite number."""
    # JSON has no number that is not finite; a file says null.
    loss = math.nan if record["loss"] is None else record["loss"]
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} at step {record['step']}: try a smaller --learning-rate")


def outcome(records: Sequence[Record]) -> Record:
    """What a race keeps of a run; one that diverged ends with an infinite loss and an accuracy of 0.

    `curve` has the steps and the test accuracy at the end of every epoch, `compile_seconds` what the steps that
    compiled took longer than the others.
    """
    steps, epochs = ([record for record in records if record["kind"] == kind] for kind in ("step", "epoch"))
    last = epochs[-1] if records[-1]["kind"] == "epoch" else {"loss": math.inf, "test_accuracy": 0.0}
    typical = step_seconds(steps)
    compiling = sum(max(0.0, step["seconds"] - typical) for step in steps if step["compiled"])
    ends = {"loss": last["loss"], "test_accuracy": last["test_accuracy"]}
    times = {"step_seconds": round(typical, 5), "compile_seconds": round(compiling, 2)}
    return {**ends, **times, "curve": [[epoch["step"], epoch["test_accuracy"]] for epoch in epochs]}
