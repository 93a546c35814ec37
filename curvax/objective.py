"""A loss whose examples can be told apart.

A plain `params -> scalar` says nothing of the batch behind it. The Gauss-Newton methods, which factor the Hessian of
each example's loss, need to see where the network ends, where the loss begins, and which axis counts the examples.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Objective:
    """A mean loss over examples, split into network, loss and data.

    Formula:
      `L(params) = mean_b loss(predict(params, data), data)_b + penalty(params)`, the L of Gao & Zhong, section 2.

    An `Objective` is a pytree whose leaves are those of `data`, so it crosses `jax.jit` as an argument. `predict`,
    `loss` and `penalty` are compared by identity: define them once, outside the training loop, or each call retraces.

    Attributes:
      predict: `predict(params, data) -> outputs`, an array `(B, ...)`. Example `b` of the outputs should depend on
        example `b` of `data` alone.
      loss: `loss(outputs, data) -> (B,)`, one loss per example.
      data: a pytree of arrays whose first axis counts the `B` examples.
      penalty: `penalty(params) -> scalar`, added to the mean loss; optional.

    Returns:
      Called with `params`: the scalar `L(params)`.

    Raises:
      ValueError: if `loss` does not return one value per example, a vector `(B,)`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from curvax import Objective
      >>> def predict(params, data):
      ...   return data["x"] @ params
      >>> def loss(outputs, data):
      ...   return optax.squared_error(outputs, data["y"])
      >>> objective = Objective(predict, loss, {"x": jnp.eye(2), "y": jnp.array([1., 2.])})
      >>> float(objective(jnp.zeros(2)))
      2.5
    """

    predict: Callable[[Any, Any], jax.Array] = dataclasses.field(metadata={"static": True})
    loss: Callable[[jax.Array, Any], jax.Array] = dataclasses.field(metadata={"static": True})
    data: Any
    penalty: Callable[[Any], jax.Array] | None = dataclasses.field(default=None, metadata={"static": True})

    def __call__(self, params: Any) -> jax.Array:
        value = jnp.mean(self.losses(params))
        return value if self.penalty is None else value + self.penalty(params)

    def losses(self, params: Any) -> jax.Array:
        """The loss of each example, `(B,)`, without the penalty."""
        losses = self.loss(self.predict(params, self.data), self.data)
        if losses.ndim != 1:
            raise ValueError(
                f"loss(outputs, data) returned an array of shape {losses.shape}; it must return one loss per example,"
                " a vector (B,). Sum or average over all axes but the first; Objective takes the mean over examples."
            )
        return losses
