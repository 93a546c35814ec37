"""Updates beside optax's, and inside a training step."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

import curvax
from experiments import data, methods
from experiments.bench.measure import compile_in_turns, compiled, in_turns
from experiments.bench.table import Row, Say
from experiments.config import TrainConfig
from experiments.step import Stepper

SMALL_LAYERS = {
    "optax.lars": functools.partial(optax.lars, 0.1),
    "lars": functools.partial(curvax.lars, 0.1, layers="array"),
    "mclr": functools.partial(curvax.mclr, 0.1, layers="array"),
}
BARS = {"lars": (1.1,), "mclr": (1.5,)}


def small_layers(say: Say, repeats: int, quick: bool) -> Iterator[Row]:
    """Networks of a thousand small layers, vectors and matrices: the times to compile an update, and of one."""
    number = 10 if quick else 1000
    for shape in ((64,), (8, 8)):
        say(f"compilation, {number} leaves of shape {shape}")
        functions = {name: update_of(make(), number, shape) for name, make in SMALL_LAYERS.items()}
        calls, compiling = compile_in_turns(functions, max(1, repeats // 2))
        say(f"updates, {number} leaves of shape {shape}")
        bound = {name: functools.partial(calls[name], *arguments) for name, (_, arguments) in functions.items()}
        running = in_turns(bound, 4 * repeats)
        for name, bars in BARS.items():
            for what, times, unit in (("compile", compiling, 1), ("step", running, 1e3)):
                ours, theirs = times[name], times["optax.lars"]
                detail = f"{unit * ours:.1f} / {unit * theirs:.1f} {'ms' if unit > 1 else 's'}"
                yield Row(f"{what}, {number} leaves {shape}: {name} / optax.lars", ours / theirs, bars, detail)


def update_of(tx: optax.GradientTransformationExtraArgs, number: int, shape: tuple[int, ...]):
    """An update and its arguments, for so many arrays of random numbers."""
    rng = np.random.default_rng(0)
    w, g = (list(map(jax.numpy.asarray, rng.normal(size=(number, *shape)).astype(np.float32))) for _ in range(2))
    return tx.update, (g, tx.init(w), w)


def train_step(say: Say, repeats: int, quick: bool) -> Iterator[Row]:
    """AlexNet at batch 1024: a whole training step with `mclr` over the same with `lars`.

    As it was timed; and with the two updates timed alone, where the noise of a gradient that takes a hundred times as
    long does not drown their difference.
    """
    width, batch_size = (0.1, 64) if quick else (1.0, 1024)
    config = TrainConfig(dataset="generated", width=width, batch_size=batch_size, augment=False)
    dataset = data.generated(config.image_size, num_train=config.batch_size, num_test=10)
    say(f"AlexNet's training step at batch {batch_size}: compilation")
    runs = {name: Run(dataclasses.replace(config, optimizer=name), dataset) for name in ("lars", "mclr")}
    for run in runs.values():
        jax.block_until_ready(run.step())
    say(f"AlexNet's training step at batch {batch_size}")
    steps = in_turns({name: run.step for name, run in runs.items()}, min(repeats, 3), warm_up=False)
    say(f"AlexNet's update at batch {batch_size}")
    updates = in_turns({name: run.update() for name, run in runs.items()}, 2 * repeats)
    million = sum(x.size for x in jax.tree.leaves(runs["lars"].state.params)) / 1e6
    what = f"AlexNet ({million:.1f} M), batch {batch_size}: step of mclr / lars"
    yield Row(what, steps["mclr"] / steps["lars"], (1.05,), f"{steps['mclr']:.2f} / {steps['lars']:.2f} s")
    share = 1 + (updates["mclr"] - updates["lars"]) / steps["lars"]
    detail = f"1 + ({1e3 * updates['mclr']:.0f} - {1e3 * updates['lars']:.0f} ms) / {steps['lars']:.2f} s"
    yield Row("the same from updates timed alone", share, (1.05,), detail)


class Run:
    """A training run that takes the same batches over and over."""

    def __init__(self, config: TrainConfig, dataset: data.Dataset):
        self.config, self.stepper = config, Stepper(config, dataset)
        self.state = self.stepper.init(0)
        self.order = self.stepper.shuffle(self.state, 0)
        self.epoch = next(iter(config.plan(1e-3).epochs(len(dataset.train))))

    def step(self, batch: int = 0) -> float:
        """One step on a batch of the epoch; returns its loss."""
        self.state, metrics = self.stepper.step(self.state, self.order, self.epoch, batch)
        return metrics["loss"]

    def update(self) -> Callable[[], Any]:
        """The update alone, compiled."""
        tx = methods.make(self.config, 1e-3, jax.random.key(0))
        # The momentum is, layer by layer, a multiple of the gradients so far: it has their zeros and their tails.
        arguments = optax.tree.get(self.state.opt_state, "trace"), self.state.opt_state, self.state.params
        return functools.partial(compiled(tx.update, *arguments).call, *arguments)
