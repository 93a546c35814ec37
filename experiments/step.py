"""What runs on the devices: a gradient, an update, an evaluation, each compiled once per batch size.

A step is `gradient` for each micro-batch and then `update`. The loop over micro-batches is Python's on purpose: XLA's
CPU kernels for convolutions are some ten times slower inside `lax.scan`, and where a micro-batch fills an accelerator
the dispatch is free. Every device has the parameters and all images, takes its share of each batch out of them, and
sums over the batch (the loss, its gradient, batch norm, the curvature) go over all devices: see `parallel.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from curvax.schedules import Epoch
from experiments import data, methods, models, parallel
from experiments.config import CURVED, TrainConfig
from experiments.data import Dataset, Split
from experiments.errors import UsageError

EVAL_BATCH = 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes during a run, in one pytree; with the configuration it determines everything that follows.

    Attributes:
        step: optimizer steps taken, int32: the position in the plan, and with `key` the source of all randomness.
        key: never changes.
        params: of the network.
        stats: statistics of its batch norms.
        opt_state: of the optimizer, its curvature included.
    """

    step: jax.Array
    key: jax.Array
    params: Any
    stats: Any
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Over the micro-batches of a step so far: gradient, loss, right answers; the latest statistics of batch norm."""

    grads: Any
    loss: jax.Array
    correct: jax.Array
    stats: Any


class Programs(NamedTuple):
    """What is compiled for a configuration."""

    shuffle: Callable
    zeros: Callable
    weights: Callable
    losses: Callable
    gradient: Callable
    update: Callable
    evaluate: Callable


class Stepper:
    """The compiled functions of one configuration on one data set.

    The learning rate and the seed are arguments of these functions: one `Stepper` serves all trials of a method. The
    images are copied to every device here.

    Raises:
        UsageError: if there are fewer devices than the configuration asks for, or they do not divide its batches.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset):
        self.config, self.num_classes, self.flips = config, dataset.num_classes, dataset.flips
        self.ways = ways = parallel.WAYS[config.parallel](devices_of(config))
        self.train, self.test = ways.place((dataset.train, dataset.test))
        self.mean, self.std = data.channel_statistics(dataset.train.images)
        self.definition, *_ = models.build(config, dataset.num_classes, jax.random.key(0))
        self.programs = Programs(
            *(ways.compile_same(function) for function in (self._shuffle, self._zeros, self._weights)),
            losses=ways.compile(self._losses, static=("size",)),
            gradient=ways.compile(self._gradient, static=("size",), donate=True),
            update=ways.compile(self._update, static=("batch_size", "refresh"), donate=True),
            evaluate=ways.compile(self._evaluate, static=("size",)),
        )
        self._kinds = set()

    # What the training loop calls, on whole batches.

    def init(self, seed: int) -> TrainState:
        """The state before the first step."""
        key = jax.random.key(seed)
        _, params, stats = models.build(self.config, self.num_classes, stream(key, "init"))
        # No optimizer's initial state depends on its learning rate.
        opt_state = methods.make(self.config, 0.0, stream(key, "probes")).init(params)
        state = TrainState(jnp.zeros([], jnp.int32), key, params, stats, opt_state)
        return self.ways.place(state)

    def arrays(self, state: TrainState) -> dict[str, np.ndarray]:
        """A state in host memory, its arrays by their paths."""
        leaves = jax.tree_util.tree_leaves_with_path(state)
        return {jax.tree_util.keystr(path): np.asarray(raw(leaf).addressable_data(0)) for path, leaf in leaves}

    def place(self, arrays: Mapping[str, np.ndarray], like: TrainState) -> TrainState:
        """The inverse of `arrays`; `like` is any state."""
        put = lambda path, leaf: parallel.on_data(lambda _: arrays[jax.tree_util.keystr(path)], leaf)
        return self.ways.place(jax.tree_util.tree_map_with_path(put, like))

    def shuffle(self, state: TrainState, epoch: int) -> jax.Array:
        """The order of an epoch, `(num_images,)`, int32."""
        return self.programs.shuffle(state.key, np.int32(epoch))

    def step(self, state: TrainState, order: jax.Array, epoch: Epoch, batch: int) -> tuple[TrainState, dict[str, Any]]:
        """One optimizer step on one batch of an epoch; returns once it is done.

        Args:
            state: is consumed.
            order: of the images in this epoch.
            epoch: where in the plan; its batch size is compiled into the step.
            batch: which batch of it.

        Returns:
            The state after it, and numbers: `loss` and `accuracy`, means over the batch as it was trained on, those of
            the probes, and whether anything was `compiled`.
        """
        batch_size, rate = epoch.batch_size, np.float32(epoch.learning_rates[batch])
        first, micro = np.int32(batch * batch_size), self.config.micro_size(batch_size)
        discards = self.config.discards(epoch.number)
        # Whether curvature is due is decided here, since convolutions are as slow inside `lax.cond` as inside `scan`.
        due = self.config.optimizer in CURVED and (epoch.first_step + batch) % self.config.curvature_every == 0
        compiled = (batch_size, discards, due) not in self._kinds
        self._kinds.add((batch_size, discards, due))

        sums, weights = self.programs.zeros(state), None
        places = [np.int32(place) for place in range(0, batch_size, micro)]
        if discards:
            # Which losses are the smallest is known once all are: one more pass forward.
            losses = [self.programs.losses(state, self.train, order, first, place, size=micro) for place in places]
            weights = self.programs.weights(state, losses)
        for place in places:
            sums = self.programs.gradient(sums, state, self.train, order, first, place, weights, size=micro)
        state, metrics = self.programs.update(
            state, sums, self.train, order, first, rate, batch_size=batch_size, refresh=due
        )
        return state, {name: float(x) for name, x in jax.device_get(metrics).items()} | {"compiled": compiled}

    def evaluate(self, state: TrainState) -> tuple[float, float]:
        """Mean plain cross-entropy and accuracy over the test images."""
        devices = len(self.ways.devices)
        size = -(-min(EVAL_BATCH, len(self.test)) // devices) * devices
        starts = np.arange(0, len(self.test), size, dtype=np.int32)
        chunks = [self.programs.evaluate(state.params, state.stats, self.test, start, size=size) for start in starts]
        loss, accuracy = np.sum(jax.device_get(chunks), axis=0, dtype=np.float64) / len(self.test)
        return float(loss), float(accuracy)

    # What is compiled.

    def _shuffle(self, key, epoch):
        return data.shuffle(jax.random.fold_in(stream(key, "order"), epoch), len(self.train))

    def _zeros(self, state):
        zero = jnp.zeros([], jnp.float32)
        return Sums(optax.tree.zeros_like(state.params), zero, zero, state.stats)

    def _losses(self, state, train, order, first, place, size):
        """The losses of one micro-batch, with the dropout that its gradient will see."""
        batch = self.batch(state, train, order, first, place, size)
        logits, _ = self.logits(state.params, state.stats, batch, self._dropout_key(state, place))
        return self.ways.whole(cross_entropy(logits, batch))

    def _weights(self, state, losses):
        losses = jnp.concatenate(losses)
        if self.config.discard_by == "loss":
            return curvax.discard_small_losses(losses, self.config.discard)
        return curvax.discard_random_losses(self._step_key(state, "discard"), losses, self.config.discard)

    def _gradient(self, sums, state, train, order, first, place, weights, size):
        """Adds one micro-batch: `size` images from `place` in the batch that begins at `first` in the epoch."""
        batch = self.batch(state, train, order, first, place, size)
        weights = 1 if weights is None else self.ways.share(jax.lax.dynamic_slice_in_dim(weights, place, size))

        def loss(params):
            logits, stats = self.logits(params, sums.stats, batch, self._dropout_key(state, place))
            losses = cross_entropy(logits, batch)
            return jnp.sum(weights * losses), (jnp.sum(losses), logits, stats)

        (_, (value, logits, stats)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        correct = jnp.sum(jnp.argmax(logits, -1) == batch["labels"])
        grads, value, correct = self.ways.total((grads, value, correct))
        return Sums(optax.tree.add(sums.grads, grads), sums.loss + value, sums.correct + correct, stats)

    def _update(self, state, sums, train, order, first, learning_rate, batch_size, refresh):
        tx = methods.make(self.config, learning_rate, stream(state.key, "probes"), self.ways.axis_name)
        grads = jax.tree.map(lambda g: g / batch_size, sums.grads)
        # Without the loss, the curvature that is stored is used again.
        curvature = {"obj_fn": self._objective(state, train, order, first, batch_size)} if refresh else {}
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **curvature)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": sums.loss / batch_size, "accuracy": sums.correct / batch_size}
        if self.config.probes:
            metrics |= probe_metrics(opt_state)
        return TrainState(state.step + 1, state.key, params, sums.stats, opt_state), metrics

    def _objective(self, state, train, order, first, batch_size):
        """The loss of the step on the first images of its batch."""
        size = self.config.curvature_size(batch_size)
        key = self._dropout_key(state, 0)

        def predict(params, batch):
            return self.logits(params, state.stats, batch, key)[0]

        return curvax.Objective(predict, cross_entropy, self.batch(state, train, order, first, np.int32(0), size))

    def _evaluate(self, params, stats, test, start, size):
        places = self.ways.share(start + jnp.arange(size))
        # All chunks have one shape: the last one begins again at the first image, and what it repeats does not count.
        indices, counts = places % len(test), places < len(test)
        labels = test.labels[indices]
        images = data.normalise(test.images[indices], self.mean, self.std)
        logits, _ = models.apply(self.definition, params, stats, images)
        losses = cross_entropy(logits, {"labels": labels})
        correct = counts * (jnp.argmax(logits, -1) == labels)
        return self.ways.total((jnp.sum(counts * losses), jnp.sum(correct, dtype=jnp.float32)))

    # Pieces of these.

    def batch(self, state, train: Split, order, first, place, size):
        """This device's share of a part of a batch: see `_gradient`."""
        places = self.ways.share(place + jnp.arange(size))
        indices = order[first + places]
        images = train.images[indices]
        if self.config.augment:
            images = data.augment(self._step_key(state, "augment"), places, images, self.flips)
        return {"images": data.normalise(images, self.mean, self.std), "labels": train.labels[indices]}

    def logits(self, params, stats, batch, key):
        """Those of training, and the statistics of batch norm after them."""
        drop, axis_name = functools.partial(self._drop, key), self.ways.axis_name
        logits, stats = models.apply(self.definition, params, stats, batch["images"], True, drop, axis_name)
        return self.config.sharpness * logits, stats

    def _drop(self, key, layer, x):
        if not self.config.dropout:
            return x
        kept = 1 - self.config.dropout
        # Drawn for the whole batch, of which this may be a share: the same features of an image in either case.
        mask = jax.random.bernoulli(jax.random.fold_in(key, layer), kept, (len(x) * self.ways.shares, *x.shape[1:]))
        return jnp.where(self.ways.share(mask), x / kept, 0)

    def _dropout_key(self, state, place):
        return jax.random.fold_in(self._step_key(state, "dropout"), place)

    def _step_key(self, state, name):
        return jax.random.fold_in(stream(state.key, name), state.step)


def devices_of(config: TrainConfig) -> list[jax.Device]:
    """The devices that a configuration asks for, if they are there and divide its batches."""
    devices = parallel.devices_of_run(config.devices)
    for batch_size in config.batch_sizes:
        for size in (config.micro_size(batch_size), config.curvature_size(batch_size)):
            if size % len(devices):
                raise UsageError(
                    f"{size} images cannot be split between {len(devices)} devices: choose multiples of it"
                )
    return devices


def raw(leaf: jax.Array) -> jax.Array:
    """An array, or the numbers in an array of keys."""
    return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def cross_entropy(logits: jax.Array, batch) -> jax.Array:
    """Softmax cross-entropy of each example, `(B,)`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])


def probe_metrics(opt_state) -> dict[str, jax.Array]:
    """What `curvax.with_probes` measured in a step, such as `parameter_stride/linears/0/kernel`."""
    names = ("mean_abs_gradient", "parameter_stride", "loss_stride")
    return {f"{name}/{layer}": x for name in names for layer, x in optax.tree.get(opt_state, name).items()}


def stream(key: jax.Array, name: str) -> jax.Array:
    """The key of one kind of randomness, so that more of one kind leaves the others as they are."""
    return jax.random.fold_in(key, ("init", "order", "augment", "dropout", "probes", "discard").index(name))
