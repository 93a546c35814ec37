"""The price of the rules: a median beside a norm, an update beside optax's, and what is moved between devices."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from experiments import data, methods
from experiments.bench import collectives
from experiments.bench.measure import Row, Say, in_turns, ratio, timed
from experiments.config import TrainConfig
from experiments.step import Stepper

# An L2 norm is the one pass that a median cannot go below.
MEDIANS = {"jnp": lambda x: jnp.median(jnp.abs(x)), "curvax": curvax.median, "norm": jnp.linalg.norm}
SMALL_LAYERS = {
    "optax.lars": functools.partial(optax.lars, 0.1),
    "lars": functools.partial(curvax.lars, 0.1, layers="array"),
    "mclr": functools.partial(curvax.mclr, 0.1, layers="array"),
}
BARS = {"lars": (1.1,), "mclr": (1.5,)}
KIBIBYTES = 64


def rows(say: Say, repeats: int, quick: bool) -> Iterator[Row]:
    """The table."""
    for part in (medians, train_step, small_layers, traffic):
        yield from part(say, repeats, quick)


def medians(say: Say, repeats: int, quick: bool) -> Iterator[Row]:
    """The median of four million normal numbers, and of the worst of six populations: ratios to the other two."""
    size, times, unequal = 40_000 if quick else 4_000_000, {}, []
    for kind, x in populations(size).items():
        say(f"medians: {kind}")
        calls, times[kind], _ = timed({name: (method, x) for name, method in MEDIANS.items()}, repeats)
        unequal += [kind] * bool(calls["jnp"]() != calls["curvax"]())
    for what, over, under, bars, at_least in (
        ("jnp.median / exact median", "jnp", "curvax", (20, 50), True),
        ("exact median / L2 norm", "curvax", "norm", (60, 20), False),
    ):
        worst = (min if at_least else max)(times, key=lambda kind: times[kind][over] / times[kind][under])
        for where, kind in (
            (f"{size:,} f32, normal", "normal"),
            (f"worst of {len(times)} populations: {worst}", worst),
        ):
            yield ratio(f"{what}, {where}", times[kind][over], times[kind][under], bars, at_least)
    yield Row("medians that differ from jnp.median's", len(unequal), (0,), ", ".join(unequal) or "not a bit")


def populations(size: int) -> dict[str, jax.Array]:
    """Arrays of several distributions: what gradients look like, and what a search by counting finds hard."""
    keys = jax.random.split(jax.random.key(0), 3)
    normal, uniform = jax.random.normal(keys[0], (size,)), jax.random.uniform(keys[2], (size,))
    return {
        "normal": normal,
        "log-normal": jnp.exp(3 * jax.random.normal(keys[1], (size,))),
        "40 % zeros": jnp.where(uniform < 0.4, 0, normal),
        "bfloat16 values": normal.astype(jnp.bfloat16).astype(jnp.float32),
        "powers of two": jnp.exp2(-jnp.floor(100 * uniform)),
        "constant": jnp.full(size, 0.3),
    }


def small_layers(say: Say, repeats: int, quick: bool) -> Iterator[Row]:
    """Networks of a thousand small layers, vectors and matrices: the times to compile an update, and of one."""
    number = 10 if quick else 1000
    for shape in ((64,), (8, 8)):
        say(f"updates, {number} leaves of shape {shape}, and their compilation")
        rng, functions = np.random.default_rng(0), {}
        w, g = (list(map(jnp.asarray, rng.normal(size=(number, *shape)).astype(np.float32))) for _ in range(2))
        for name, make in SMALL_LAYERS.items():
            tx = make()
            functions[name] = tx.update, g, tx.init(w), w
        _, running, compiling = timed(functions, 4 * repeats, compilations=max(1, repeats // 2))
        for name, bars in BARS.items():
            for what, times in (("compile", compiling), ("step", running)):
                line = f"{what}, {number} leaves {shape}: {name} / optax.lars"
                yield ratio(line, times[name], times["optax.lars"], bars)


def train_step(say: Say, repeats: int, quick: bool) -> Iterator[Row]:
    """AlexNet at batch 1024: a whole training step with `mclr` over the same with `lars`.

    As it was timed; and with the two updates timed alone, where the noise of a gradient that takes a hundred times as
    long does not drown their difference.
    """
    width, batch_size = (0.1, 64) if quick else (1.0, 1024)
    config = TrainConfig(dataset="generated", width=width, batch_size=batch_size, augment=False)
    dataset = data.generated(config.image_size, num_train=config.batch_size, num_test=10)
    say(f"AlexNet's training step at batch {batch_size}")
    runs = {name: Run(dataclasses.replace(config, optimizer=name), dataset) for name in ("lars", "mclr")}
    for run in runs.values():
        jax.block_until_ready(run.step())
    steps = in_turns({name: run.step for name, run in runs.items()}, min(repeats, 3), warm_up=False)
    say(f"AlexNet's update at batch {batch_size}")
    updates = timed({name: run.update() for name, run in runs.items()}, 2 * repeats).seconds
    million = sum(x.size for x in jax.tree.leaves(runs["lars"].state.params)) / 1e6
    what = f"AlexNet ({million:.1f} M), batch {batch_size}: step of mclr / lars"
    yield ratio(what, steps["mclr"], steps["lars"], (1.05,))
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

    def update(self) -> tuple[Callable, Any, Any, Any]:
        """The update alone, and its arguments."""
        tx = methods.make(self.config, 1e-3, jax.random.key(0))
        # The momentum is, layer by layer, a multiple of the gradients so far: it has their zeros and their tails.
        return tx.update, optax.tree.get(self.state.opt_state, "trace"), self.state.opt_state, self.state.params


def traffic(say: Say, repeats: int, quick: bool) -> Iterator[Row]:
    """What every rule moves between 8, 64 and 256 devices, for a hundred million sharded parameters; nothing is timed.

    For each rule, kibibytes per layer between as many devices as make it most, and the bytes of the largest collective;
    the bar of the latter is a layer's smallest array.
    """
    del repeats
    width, depth, meshes = (512, 2, (8,)) if quick else (2048, 24, (8, 64, 256))
    found = {}
    for devices in meshes:
        say(f"what moves between {devices} devices")
        for traffic in collectives.measure(devices, width, depth):
            found.setdefault(traffic.rule, {})[devices] = traffic
    for rule, by_devices in found.items():
        per_layer = {devices: t.bytes / 1024 / depth for devices, t in by_devices.items()}
        detail = ", ".join(f"{kib:.3g} on {devices}" for devices, kib in per_layer.items())
        what = f"KiB per layer in collectives, {depth * width * (width + 1) / 1e6:.0f} M parameters: {rule}"
        yield Row(what, max(per_layer.values()), (KIBIBYTES,), f"{detail} devices")
    largest = {rule: max(t.largest for t in by_devices.values()) for rule, by_devices in found.items()}
    rule = max(largest, key=largest.get)
    detail = f"{rule}; the smallest bias has {4 * width} bytes, a kernel {4 * width**2}"
    yield Row("bytes of the largest collective of any rule", largest[rule], (4 * width - 1,), detail)
