"""A loss whose examples can be told apart.

A plain `params -> scalar` says nothing of the batch behind it. The Gauss-Newton methods, which factor the Hessian of
each example's loss, need to see where the network ends, where the loss begins, and which axis counts the examples.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from curvax.trees import statistics_dtype


def _check_arguments(name: str, function: Callable[..., Any], wanted: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # Not every function of another language says what it takes.
    try:
        signature.bind(*wanted.split(", "))
    except TypeError as error:
        raise ValueError(
            f"{name} takes {signature}, and is called as {name}({wanted}); close over the rest."
        ) from error


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """Both parts of what a function with other output returned.

    Raises:
      ValueError: if that is no tuple of two; an array may be unpacked, but has no parts.
    """
    if isinstance(value, tuple) and len(value) == 2:
        return value
    raise ValueError(f"has_aux=True, and {name} returned no pair; return (outputs, other output), or leave it out.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Objective:
    """A mean loss over examples, split into network, loss and data.

    Formula:
      `L(params) = mean_b loss(predict(params, data), data)_b + penalty(params)`, the L of Gao & Zhong, section 2; with
      `weights` the mean is `sum(weights * loss) / sum(weights)`, and with `reduction="sum"` it is not divided.

    An `Objective` is a pytree whose leaves are those of `data`, so it crosses `jax.jit` as an argument. `predict`,
    `loss` and `penalty` are compared by identity: define them once, outside the training loop, or each call retraces.

    Attributes:
      predict: `predict(params, data) -> outputs`, any pytree of arrays `(B, ...)`. Example `b` of the outputs should
        depend on example `b` of `data` alone. With `has_aux` it returns `(outputs, aux)`.
      loss: `loss(outputs, data) -> (B, ...)`, the losses of `B` examples: one each, or several, such as one for each
        token, whose mean is the example's. All dimensions count as equals in a weighted mean, and in a sum.
      data: a pytree of arrays whose first axis counts the `B` examples. Random keys, scalars and numbers of Python are
        the same for all examples, and so is what `predict` and `loss` close over.
      penalty: `penalty(params) -> scalar`, added to the mean loss; optional.
      has_aux: whether `predict` returns a pair, of which the second is other output, as for `jax.grad`.
      weights: `weights(data) -> (B, ...)`, as many as losses or one for each example, such as 0 for padding; optional.
        Where all are 0 the mean is NaN. Inside `shard_map` they are summed on each device alone.
      reduction: `"mean"`, or `"sum"` for the sum of all losses.

    Returns:
      Called with `params`: the scalar `L(params)`; with `has_aux` the pair `(L(params), aux)`.

    Raises:
      ValueError: if `loss` does not return an array of real losses whose first axis counts examples, or an empty one;
        with `has_aux`, if `predict` returns no pair; if the weights do not fit the losses.

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
      >>> data = {"x": jnp.eye(2), "y": jnp.array([1., 2.]), "mask": jnp.array([0., 1.])}
      >>> float(Objective(predict, loss, data, weights=lambda data: data["mask"])(jnp.zeros(2)))
      4.0
    """

    predict: Callable[[Any, Any], Any] = dataclasses.field(metadata={"static": True})
    loss: Callable[[Any, Any], jax.Array] = dataclasses.field(metadata={"static": True})
    data: Any
    penalty: Callable[[Any], jax.Array] | None = dataclasses.field(default=None, metadata={"static": True})
    has_aux: bool = dataclasses.field(default=False, metadata={"static": True})
    weights: Callable[[Any], jax.Array] | None = dataclasses.field(default=None, metadata={"static": True})
    reduction: Literal["mean", "sum"] = dataclasses.field(default="mean", metadata={"static": True})

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={self.reduction!r} is unknown; pass 'mean' or 'sum'.")
        arguments = {"predict": "params, data", "loss": "outputs, data", "penalty": "params", "weights": "data"}
        for name, wanted in arguments.items():
            function = getattr(self, name)
            if function is None and name in ("penalty", "weights"):
                continue
            if not callable(function):
                raise ValueError(f"{name}={function!r} is no function; pass {name}({wanted}).")
            _check_arguments(name, function, wanted)

    def __call__(self, params: Any) -> Any:
        outputs = self.predict(params, self.data)
        outputs, aux = pair("predict", outputs) if self.has_aux else (outputs, None)
        plain = self if self.is_mean else self.as_mean(jax.eval_shape(self.losses, outputs, self.data).shape)
        value = jnp.mean(plain.example_losses(outputs, plain.data))
        value = value if self.penalty is None else value + self.penalty(params)
        return (value, aux) if self.has_aux else value

    @property
    def is_mean(self) -> bool:
        """Whether the losses of all examples count alike, and their mean is taken."""
        return self.weights is None and self.reduction == "mean"

    def as_mean(self, shape: tuple[int, ...]) -> "Objective":
        """The same as a plain mean over examples of losses of this shape, which it stays on a part of the data.

        What the weights of all examples come to is in its data, and the number of examples in its loss.
        """
        factors = self._factors(shape)

        def predict(params: Any, data: _Weighted) -> Any:
            return self.predict(params, data.data)

        def loss(outputs: Any, data: _Weighted) -> jax.Array:
            losses = self.losses(outputs, data.data)
            losses = losses.astype(statistics_dtype(losses.dtype))
            weighted = losses * (shape[0] if data.factors is None else data.factors.astype(losses.dtype))
            return jnp.sum(weighted, axis=tuple(range(1, losses.ndim)))

        return Objective(predict, loss, _Weighted(self.data, factors), self.penalty, self.has_aux)

    def _factors(self, shape: tuple[int, ...]) -> jax.Array | None:
        """By what the losses are multiplied before the mean over examples, beside a number; None for nothing."""
        if self.weights is None:
            return None
        weights = self.weights(self.data)
        given = jnp.shape(weights)
        if given not in (shape, shape[:1]):
            raise ValueError(
                f"weights(data) returned an array of shape {given} for losses of shape {shape}; return one weight for"
                f" each loss, or one for each example, {shape[:1]}."
            )
        weights = jnp.asarray(weights)
        weights = weights.astype(statistics_dtype(weights.dtype))
        weights = jnp.broadcast_to(weights.reshape(given + (1,) * (len(shape) - len(given))), shape)
        return shape[0] * (weights if self.reduction == "sum" else weights / jnp.sum(weights))

    def example_losses(self, outputs: Any, data: Any) -> jax.Array:
        """The loss of each example, `(B,)`, without the penalty; their mean is that of a plain objective."""
        losses = self.losses(outputs, data)
        return losses if losses.ndim == 1 else jnp.mean(losses, axis=tuple(range(1, losses.ndim)))

    def losses(self, outputs: Any, data: Any) -> jax.Array:
        """What `loss` returns, of at least one dimension, which counts examples."""
        losses = self.loss(outputs, data)
        shape = getattr(losses, "shape", None)
        if not shape:
            returned = f"a {type(losses).__name__}" if shape is None else "a scalar, an array of shape ()"
            raise ValueError(
                f"loss(outputs, data) returned {returned}; it must return one loss per example, a vector (B,), or an"
                " array (B, ...) of which each example takes the mean. Objective takes the mean over examples: leave"
                " the last mean out of the loss."
            )
        if not jnp.issubdtype(losses.dtype, jnp.floating):
            raise ValueError(
                f"loss(outputs, data) returned {losses.dtype}; it must return real floating-point losses: take the real"
                " part of complex ones, and cast integers."
            )
        if 0 in shape:
            raise ValueError(
                f"loss(outputs, data) returned an array of shape {shape}: a batch without examples has no mean, nor has"
                " an example without losses; leave out batches and examples that are empty."
            )
        return losses


class _Weighted(NamedTuple):
    """Data, and by what each loss is multiplied."""

    data: Any
    factors: jax.Array | None
