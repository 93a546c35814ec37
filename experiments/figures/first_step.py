"""Gradients at the initial parameters, for the figures that look at the first step only.

Dropout is off: the figures ask for the gradient of the loss, not for that of a draw. A batch is summed over chunks of
one shape, so that all batch sizes share one compilation and none needs more memory than a chunk.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from experiments import data, models
from experiments.config import TrainConfig
from experiments.step import cross_entropy


class FirstStep:
    """The network of a configuration at its initial parameters, and images in a random order, both from its seed."""

    def __init__(self, config: TrainConfig, chunk: int):
        dataset = data.load(config)
        self.chunk, self._train = chunk, dataset.train
        self._mean, self._std = data.channel_statistics(dataset.train.images)
        self._order = np.random.default_rng(config.seed).permutation(len(dataset.train))
        key = jax.random.key(config.seed)
        self._definition, self.params, self._stats = models.build(config, dataset.num_classes, key)
        self._sum = jax.jit(jax.grad(lambda *arguments, weights: jnp.sum(weights * self._each(*arguments))))
        self._losses = jax.jit(self._each)

    def __len__(self) -> int:
        return len(self._order)

    def batch(self, start: int, size: int) -> dict[str, jax.Array]:
        """Images from a place in the order on, normalised, and their labels."""
        chosen = self._order[start : start + size]
        images = data.normalise(jnp.asarray(self._train.images[chosen]), self._mean, self._std)
        return {"images": images, "labels": jnp.asarray(self._train.labels[chosen])}

    def gradient(self, start: int, size: int, weights: jax.Array | None = None):
        """The gradient of the mean loss of a batch, each example's loss multiplied by its weight."""
        weights = jnp.ones(size) if weights is None else weights
        total = optax.tree.zeros_like(self.params)
        for place, batch in self._chunks(start, size):
            part = self._sum(self.params, batch, weights=weights[place : place + len(batch["labels"])])
            total = optax.tree.add(total, part)
        return optax.tree.scale(1 / size, total)

    def losses(self, start: int, size: int) -> jax.Array:
        """The loss of each example of a batch, `(size,)`."""
        return jnp.concatenate([self._losses(self.params, batch) for _, batch in self._chunks(start, size)])

    def objective(self, start: int, size: int) -> curvax.Objective:
        """The loss of a batch, for its curvature."""
        return curvax.Objective(self._predict, cross_entropy, self.batch(start, size))

    def cost(self) -> float:
        """Floating-point operations of the gradient of one image."""
        lowered = self._sum.lower(self.params, self.batch(0, self.chunk), weights=jnp.ones(self.chunk))
        return lowered.cost_analysis()["flops"] / self.chunk

    def _chunks(self, start: int, size: int) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        for place in range(0, size, self.chunk):
            yield place, self.batch(start + place, min(self.chunk, size - place))

    def _predict(self, params, batch):
        return models.apply(self._definition, params, self._stats, batch["images"])[0]

    def _each(self, params, batch):
        return cross_entropy(self._predict(params, batch), batch)


def linear_kernel(grads, layer: int) -> jax.Array:
    """The kernel of AlexNet's fully connected layer of this number, counted from 0."""
    return grads["linears"][layer]["kernel"]


mean_abs = jax.jit(lambda x: jnp.mean(jnp.abs(x)))
# Shared between figures.
first_step = functools.cache(FirstStep)
