"""The diagonal of the Gauss-Newton matrix, from labels which the model draws itself.

The Hessian of a mean loss is the Gauss-Newton matrix, `mean_b J_b^T (d^2 loss_b) J_b` with J_b the Jacobian of example
b's outputs, plus the curvature of the network itself. For a softmax cross-entropy `d^2 loss_b` is the variance of the
slope p - e_y when the label y is drawn from p. So the squared gradient for drawn labels, of mean zero, has the diagonal
wanted for its mean: Sophia's estimator, for one gradient of the whole batch. Splitting the batch leaves fewer examples
to interfere in each square, at the same price.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvax.curvature.estimate import Estimate, Options, add_samples, at_least_float32, no_samples
from curvax.curvature.hutchinson import hutchinson
from curvax.micro_batches import split
from curvax.objective import Objective

# Into how many micro-batches a batch is split, where the caller does not say.
MICRO_BATCHES = 4


def ggn_sampled(objective: Objective, params: Any, options: Options) -> Estimate:
    """The mean squared gradient, times its size, of micro-batches with labels drawn from the model's softmax."""
    _check_softmax_cross_entropy(objective, params)
    batches = split(objective.data, options.micro_batches or MICRO_BATCHES)
    keys = jax.random.split(options.key, (len(batches), options.num_samples))
    values, grads, moments = [], [], no_samples(params)
    for data, batch_keys in zip(batches, keys, strict=True):
        value, grad, square = _squared_gradients(objective, params, data)
        moments = add_samples(square, batch_keys, moments, options.chunk_size)
        values, grads = [*values, value], [*grads, grad]
    estimate = Estimate(_mean(values), _mean(grads), moments.mean, moments.standard_error())
    return estimate if objective.penalty is None else _add_penalty(estimate, objective.penalty, params, options)


def _squared_gradients(objective: Objective, params, data) -> tuple[jax.Array, Any, Callable[[jax.Array], Any]]:
    """A micro-batch's mean loss, its gradient, and a function from a key to the squared gradient for drawn labels."""
    outputs, pullback = jax.vjp(lambda p: objective.predict(p, data), params)
    total, slopes = jax.value_and_grad(lambda z: jnp.sum(objective.example_losses(z, data)))(outputs)
    size = outputs.shape[0]

    def square(key):
        (gradient,) = pullback(_drawn_slopes(objective, outputs, data, key) / size)
        return jax.tree.map(lambda g: size * jnp.square(at_least_float32(g)), gradient)

    (grad,) = pullback(slopes / size)
    return total / size, grad, square


def _drawn_slopes(objective: Objective, outputs, data, key):
    """The loss's slope in the outputs had the labels been drawn from the model: mean 0, the loss's Hessian as variance.

    An example's loss may be weighted, so the Hessian is `a (diag(p) - p p^T)`. `a` comes from one product of the
    Hessian with a random vector; where the softmax is saturated both vanish, and so does the slope.
    """
    direction_key, label_key = jax.random.split(key)
    direction = jax.random.normal(direction_key, outputs.shape, outputs.dtype)
    slope = jax.grad(lambda z: jnp.sum(objective.example_losses(z, data)))
    actual = jax.jvp(slope, (outputs,), (direction,))[1]
    p = jax.nn.softmax(outputs, axis=-1)
    expected = p * (direction - jnp.sum(p * direction, axis=-1, keepdims=True))
    overlap = jnp.sum(actual * expected, axis=-1, keepdims=True)
    weight = overlap / jnp.maximum(jnp.sum(jnp.square(expected), axis=-1, keepdims=True), jnp.finfo(p.dtype).tiny)
    labels = jax.random.categorical(label_key, outputs, axis=-1)
    return jnp.sqrt(jnp.maximum(weight, 0)) * (p - jax.nn.one_hot(labels, p.shape[-1], dtype=p.dtype))


def _add_penalty(estimate: Estimate, penalty, params, options: Options) -> Estimate:
    extra = hutchinson(penalty, params, jax.random.fold_in(options.key, 0), chunk_size=options.chunk_size)
    value, grad, diag = jax.tree.map(jnp.add, estimate[:3], extra[:3])
    return Estimate(value, grad, diag, estimate.standard_error)


def is_softmax_cross_entropy(objective: Callable[[Any], jax.Array], params: Any) -> bool:
    """Whether `"ggn_sampled"` allows this objective: an `Objective` with a softmax cross-entropy, weighted or not.

    Formula:
      The Hessian of a cross-entropy in the logits is `a (diag(p) - p p^T)` for some weight `a` per example. It is
      compared with the loss's own along random directions at random logits, on made-up data, while tracing: at no cost
      in the step.

    Args:
      objective: an `Objective`, or any function `params -> scalar`.
      params: a tree of arrays, or of their shapes.

    Returns:
      True or False.

    Raises:
      ValueError: if the loss cannot be evaluated on made-up data, as when it closes over arrays that are being traced.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from curvax import Objective, gauss_newton
      >>> objective = Objective(lambda w, x: x @ w, optax.squared_error, jnp.ones((4, 2)))
      >>> gauss_newton.is_softmax_cross_entropy(lambda w: w @ w, jnp.ones(2))
      False
    """
    if not isinstance(objective, Objective):
        return False
    outputs, data = jax.eval_shape(lambda p, d: (objective.predict(p, d), d), params, objective.data)
    if outputs.ndim < 2 or not jnp.issubdtype(outputs.dtype, jnp.floating):
        return False
    with jax.ensure_compile_time_eval():
        try:
            return _behaves_like_cross_entropy(objective.example_losses, outputs, data)
        except jax.errors.JAXTypeError as error:
            raise ValueError(
                "the loss of the Objective cannot be examined, because it closes over arrays that are being traced;"
                " pass them to it through data, or choose method='hutchinson'."
            ) from error


def _behaves_like_cross_entropy(loss, outputs: jax.ShapeDtypeStruct, data) -> bool:
    logits_key, direction_key, data_key = jax.random.split(jax.random.key(0), 3)
    examples = 4
    logits = jax.random.normal(logits_key, (examples, *outputs.shape[1:]))
    direction = jax.random.normal(direction_key, logits.shape)
    made_up = jax.tree.map(lambda x: _made_up(data_key, (examples, *x.shape[1:]), x.dtype), data)
    actual = jax.jvp(jax.grad(lambda z: jnp.sum(loss(z, made_up))), (logits,), (direction,))[1]
    p = jax.nn.softmax(logits, axis=-1)
    expected = p * (direction - jnp.sum(p * direction, axis=-1, keepdims=True))
    weight = jnp.sum(actual * expected, axis=-1, keepdims=True) / jnp.sum(jnp.square(expected), axis=-1, keepdims=True)
    return bool(jnp.all(weight >= 0)) and bool(jnp.allclose(actual, weight * expected, atol=1e-3))


def _made_up(key, shape, dtype):
    """Data on which any loss can be evaluated: positive reals, and integers that are valid labels."""
    if jnp.issubdtype(dtype, jnp.floating):
        return jax.random.uniform(key, shape).astype(dtype)
    return jnp.zeros(shape, dtype)


def _check_softmax_cross_entropy(objective, params):
    if not isinstance(objective, Objective):
        raise ValueError(
            "method='ggn_sampled' has to know where the network ends and the loss begins; pass a"
            " curvax.Objective(predict, loss, data) in place of the function, or choose method='hutchinson'."
        )
    if not is_softmax_cross_entropy(objective, params):
        raise ValueError(
            "method='ggn_sampled' draws labels from a softmax, but the loss of this Objective is not a softmax"
            " cross-entropy of outputs (B, ..., C); choose method='hutchinson'."
        )


def _mean(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)
