"""What runs on the devices: a gradient, an update, an evaluation, each compiled once per batch size.

A step is `gradient` for each micro-batch and then `update`. The loop over micro-batches is Python's on purpose: XLA's
CPU kernels for convolutions are some ten times slower inside `lax.scan`, and where a micro-batch fills an accelerator
the dispatch is free. Every device has the parameters and all images, takes its share of each batch out of them, and
sums over the batch (the loss, its gradient, batch norm, the curvature) go over all devices: see `parallel.py`.
"""

import functools
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from curvax.schedules import Epoch
from experiments import data, methods, models
from experiments.config import CURVED, TrainConfig
from experiments.data import Dataset, Split
from experiments.errors import UsageError
from experiments.parallel import AXIS, Devices, own_share

EVAL_BATCH = 1024


class TrainState(NamedTuple):
    """All that changes during a run, in one pytree; with the configuration it determines everything that follows.

    Attributes:
        step: optimizer steps taken, int32: the position in the plan, and with `seed` the source of all randomness.
        seed: never changes, uint32.
        params: of the network.
        stats: statistics of its batch norms.
        opt_state: of the optimizer, its curvature included.
    """

    step: jax.Array
    seed: jax.Array
    params: Any
    stats: Any
    opt_state: Any

    def key(self, kind: str) -> jax.Array:
        """The key of one kind of randomness, so that more of one kind leaves the others as they are."""
        number = ("init", "order", "augment", "dropout", "probes", "discard").index(kind)
        return jax.random.fold_in(jax.random.key(self.seed), number)

    def step_key(self, kind: str) -> jax.Array:
        """The key of one kind of randomness in this step."""
        return jax.random.fold_in(self.key(kind), self.step)


class Sums(NamedTuple):
    """Over the micro-batches of a step so far: gradient, loss, right answers; the latest statistics of batch norm."""

    grads: Any
    loss: jax.Array
    correct: jax.Array
    stats: Any


class Stepper:
    """The compiled functions of one configuration on one data set.

    The learning rate and the seed are arguments of these functions: one `Stepper` serves all trials of a method. The
    images are copied to every device here.

    Raises:
        UsageError: if there are fewer devices than the configuration asks for, or they do not divide its batches.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset):
        self.config, self.num_classes, self.flips = config, dataset.num_classes, dataset.flips
        self.devices = devices = Devices(config.devices)
        for batch_size in config.batch_sizes:
            for size in (config.micro_size(batch_size), config.curvature_size(batch_size)):
                if size % len(devices.all):
                    raise UsageError(
                        f"{size} images cannot be split between {len(devices.all)} devices: choose multiples of it"
                    )
        self.train, self.test = devices.place((dataset.train, dataset.test))
        self.mean, self.std = data.channel_statistics(dataset.train.images)
        self.definition, *_ = models.build(config, dataset.num_classes, jax.random.key(0))
        self._mapped = None
        gradient = functools.partial(devices.jit, static_argnames="size", donate_argnums=0)
        if config.parallel == "pmap":
            gradient = devices.pmap
            self._mapped, *_ = models.build(config, dataset.num_classes, jax.random.key(0), axis_name=AXIS)
        self.programs = types.SimpleNamespace(
            shuffle=devices.jit(self._shuffle),
            zeros=devices.jit(self._zeros),
            losses=devices.jit(self._losses, static_argnames="size"),
            weights=devices.jit(self._weights),
            gradient=gradient(self._gradient),
            update=devices.jit(self._update, static_argnames=("batch_size", "refresh"), donate_argnums=0),
            evaluate=devices.jit(self._evaluate, static_argnames="size"),
        )
        self._kinds = set()

    # What the training loop calls, on whole batches.

    def init(self, seed: int) -> TrainState:
        """The state before the first step."""
        state = TrainState(np.int32(0), np.uint32(seed), None, None, None)
        _, params, stats = models.build(self.config, self.num_classes, state.key("init"))
        # No optimizer's initial state depends on its learning rate.
        opt_state = methods.make(self.config, 0.0, state.key("probes")).init(params)
        return self.devices.place(state._replace(params=params, stats=stats, opt_state=opt_state))

    def arrays(self, state: TrainState) -> dict[str, np.ndarray]:
        """A state in host memory, its arrays by their paths."""
        leaves = jax.tree_util.tree_leaves_with_path(state)
        return {jax.tree_util.keystr(path): np.asarray(leaf.addressable_data(0)) for path, leaf in leaves}

    def place(self, arrays: Mapping[str, np.ndarray], like: TrainState) -> TrainState:
        """The inverse of `arrays`; `like` is any state."""
        return self.devices.place(
            jax.tree_util.tree_map_with_path(lambda path, _: arrays[jax.tree_util.keystr(path)], like)
        )

    def shuffle(self, state: TrainState, epoch: int) -> jax.Array:
        """The order of an epoch, `(num_images,)`, int32."""
        return self.programs.shuffle(state, np.int32(epoch))

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
        size, rate = epoch.batch_size, np.float32(epoch.learning_rates[batch])
        discards = self.config.discards(epoch.number)
        # Whether curvature is due is decided here, since convolutions are as slow inside `lax.cond` as inside `scan`.
        due = self.config.optimizer in CURVED and (epoch.first_step + batch) % self.config.curvature_every == 0
        compiled = (size, discards, due) not in self._kinds
        self._kinds.add((size, discards, due))

        batch = state, self.train, order, np.int32(batch * size)
        # Which losses are the smallest is known once all are: one more pass forward.
        weights = self.programs.weights(state, self.losses(*batch, size)) if discards else None
        sums = self.gradient(*batch, size, weights)
        state, metrics = self.programs.update(*batch, sums, rate, batch_size=size, refresh=due)
        return state, {name: float(x) for name, x in jax.device_get(metrics).items()} | {"compiled": compiled}

    def losses(self, state, train, order, first, size: int) -> jax.Array:
        """Those of the images of a batch, `(size,)`, which begins at `first` in the order."""
        micro = self.config.micro_size(size)
        places = np.arange(0, size, micro, dtype=np.int32)
        return jnp.concatenate([self.programs.losses(state, train, order, first, p, size=micro) for p in places])

    def gradient(self, state, train, order, first, size: int, weights: jax.Array | None = None) -> Sums:
        """The sums over such a batch, in which each example's loss may have a weight."""
        micro, sums = self.config.micro_size(size), self.programs.zeros(state)
        for place in np.arange(0, size, micro, dtype=np.int32):
            sums = self.programs.gradient(sums, state, train, order, first, place, weights, size=micro)
        return sums

    def evaluate(self, state: TrainState) -> tuple[float, float]:
        """Mean plain cross-entropy and accuracy over the test images."""
        devices = len(self.devices.all)
        size = -(-min(EVAL_BATCH, len(self.test)) // devices) * devices
        starts = np.arange(0, len(self.test), size, dtype=np.int32)
        chunks = [self.programs.evaluate(state, self.test, start, size=size) for start in starts]
        loss, accuracy = np.sum(jax.device_get(chunks), axis=0, dtype=np.float64) / len(self.test)
        return float(loss), float(accuracy)

    # What is compiled.

    def _shuffle(self, state, epoch):
        return data.shuffle(jax.random.fold_in(state.key("order"), epoch), len(self.train))

    def _zeros(self, state):
        zero = jnp.zeros([], jnp.float32)
        return Sums(optax.tree.zeros_like(state.params), zero, zero, state.stats)

    def _losses(self, state, train, order, first, place, size):
        """The losses of one micro-batch, with the dropout that its gradient will see."""
        batch = self.batch(state, train, order, first, place, size)
        return cross_entropy(self.logits(state, state.params, batch, place, size)[0], batch)

    def _weights(self, state, losses):
        if self.config.discard_by == "loss":
            return curvax.discard_small_losses(losses, self.config.discard)
        return curvax.discard_random_losses(state.step_key("discard"), losses, self.config.discard)

    def _gradient(self, sums, state, train, order, first, place, weights, size):
        """Adds one micro-batch: `size` images from `place` in the batch that begins at `first` in the epoch."""
        share = own_share if self._mapped else self.devices.split
        batch = self.batch(state, train, order, first, place, size, share)
        weights = 1 if weights is None else share(jax.lax.dynamic_slice_in_dim(weights, place, size))

        def loss(params):
            before, network = state._replace(stats=sums.stats), self._mapped or self.definition
            logits, stats = self.logits(before, params, batch, place, size, share, network)
            losses = cross_entropy(logits, batch)
            return jnp.sum(weights * losses), (jnp.sum(losses), logits, stats)

        (_, (value, logits, stats)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        new = grads, value, jnp.sum(jnp.argmax(logits, -1) == batch["labels"])
        return Sums(*optax.tree.add(sums[:3], jax.lax.psum(new, AXIS) if self._mapped else new), stats)

    def _update(self, state, train, order, first, sums, learning_rate, batch_size, refresh):
        tx = methods.make(self.config, learning_rate, state.key("probes"))
        grads = optax.tree.scale(1 / batch_size, sums.grads)
        # Without the loss, the curvature that is stored is used again.
        curvature = {"obj_fn": self.objective(state, train, order, first, batch_size)} if refresh else {}
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **curvature)
        metrics = {"loss": sums.loss / batch_size, "accuracy": sums.correct / batch_size}
        if self.config.probes:
            # Such as `parameter_stride/linears/0/kernel`.
            for name in ("mean_abs_gradient", "parameter_stride", "loss_stride"):
                metrics |= {f"{name}/{layer}": x for layer, x in optax.tree.get(opt_state, name).items()}
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, state.seed, params, sums.stats, opt_state), metrics

    def _evaluate(self, state, test, start, size):
        places = self.devices.split(start + jnp.arange(size))
        # All chunks have one shape: the last one begins again at the first image, and what it repeats does not count.
        indices, counts = places % len(test), places < len(test)
        batch = {"images": data.normalise(test.images[indices], self.mean, self.std), "labels": test.labels[indices]}
        logits, _ = models.apply(self.definition, state.params, state.stats, batch["images"])
        correct = counts * (jnp.argmax(logits, -1) == batch["labels"])
        return jnp.sum(counts * cross_entropy(logits, batch)), jnp.sum(correct, dtype=jnp.float32)

    # Pieces of these.

    def objective(self, state, train, order, first, batch_size) -> curvax.Objective:
        """The loss of the step on the first images of its batch."""
        size = self.config.curvature_size(batch_size)
        predict = lambda params, batch: self.logits(state, params, batch, 0, size)[0]
        return curvax.Objective(predict, cross_entropy, self.batch(state, train, order, first, 0, size))

    def batch(self, state, train: Split, order, first, place, size, share=None) -> dict[str, jax.Array]:
        """Part of a batch: see `_gradient`."""
        places = (share or self.devices.split)(place + jnp.arange(size))
        indices = order[first + places]
        images = train.images[indices]
        if self.config.augment:
            images = data.augment(state.step_key("augment"), places, images, self.flips)
        return {"images": data.normalise(images, self.mean, self.std), "labels": train.labels[indices]}

    def logits(self, state, params, batch, place, size, share=None, network=None) -> tuple[jax.Array, Any]:
        """Those of training, and the statistics of batch norm after them."""

        def drop(layer, x):
            if not self.config.dropout:
                return x
            key, kept = jax.random.fold_in(state.step_key("dropout"), place), 1 - self.config.dropout
            # Drawn for the whole batch, of which this may be a share: the same features of an image in either case.
            mask = jax.random.bernoulli(jax.random.fold_in(key, layer), kept, (size, *x.shape[1:]))
            return jnp.where((share or self.devices.split)(mask), x / kept, 0)

        network = network or self.definition
        logits, stats = models.apply(network, params, state.stats, batch["images"], True, drop)
        return self.config.sharpness * logits, stats


def cross_entropy(logits: jax.Array, batch) -> jax.Array:
    """Softmax cross-entropy of each example, `(B,)`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
