"""Gradients at the initial parameters, for the figures that look at the first step only.

They are those of the training loop, without augmentation and dropout: the figures ask for the gradient of the loss,
not for that of a draw. A batch is summed over chunks of one shape, so that all batch sizes share one compilation and
none needs more memory than a chunk.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from experiments import models, runs
from experiments.config import TrainConfig


class FirstStep:
    """The network of a configuration at its initial parameters, and images in a random order, both from its seed.

    What it gives is of the `size` images from a place in that order on.
    """

    def __init__(self, config: TrainConfig, chunk: int):
        config = dataclasses.replace(config, augment=False, dropout=0.0, micro_batch_size=chunk)
        self.chunk, self._stepper = chunk, runs.stepper_of(config)
        _, self.params, _ = models.build(config, self._stepper.num_classes, jax.random.key(config.seed))
        state = self._stepper.init(config.seed)._replace(params=self.params)
        order = np.random.default_rng(config.seed).permutation(len(self._stepper.train))
        self._whole = state, self._stepper.train, jnp.asarray(order, jnp.int32)

    def __len__(self) -> int:
        return len(self._stepper.train)

    def gradient(self, start: int, size: int, weights: jax.Array | None = None) -> Any:
        """The gradient of the mean loss, each example's loss multiplied by its weight."""
        sums = self._stepper.gradient(*self._whole, np.int32(start), size, weights)
        return optax.tree.scale(1 / size, sums.grads)

    def losses(self, start: int, size: int) -> jax.Array:
        """The loss of each example, `(size,)`."""
        return self._stepper.losses(*self._whole, np.int32(start), size)

    def labels(self, start: int, size: int) -> jax.Array:
        """The class of each example, `(size,)`."""
        return self._whole[1].labels[self._whole[2][start : start + size]]

    def objective(self, start: int, size: int) -> curvax.Objective:
        """The mean loss, for its curvature."""
        return self._stepper.objective(*self._whole, start, size)


def linear_kernel(grads: Any, layer: int) -> jax.Array:
    """The kernel of AlexNet's fully connected layer of this number, counted from 0."""
    return grads["linears"][layer]["kernel"]


mean_abs = jax.jit(lambda x: jnp.mean(jnp.abs(x)))
# Shared between figures.
first_step = functools.cache(FirstStep)
