"""A diagonal of a large batch as the mean over micro-batches, so that memory holds one of them at a time.

A mean over examples is a mean of means over equal parts of them, and so are its derivatives, if no example sees
another. That is proved from the trace, or the split refused: batch norm in training mode, say, would silently become
that of the micro-batches.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvax.curvature.estimate import Estimate, Options
from curvax.exact import couples_examples
from curvax.objective import Objective
from curvax.varying import varying_like

Method = Callable[[Any, Any, Options], Estimate]


def over_micro_batches(method: Method) -> Method:
    """`method` over the whole batch in `options.micro_batches` parts, each with a key of its own."""

    def parted(objective, params, options: Options) -> Estimate:
        if (options.micro_batches or 1) == 1:
            return method(objective, params, options)
        _check_splittable(objective, params)

        def part(data, index):
            key = None if options.key is None else jax.random.fold_in(options.key, index)
            return method(dataclasses.replace(objective, data=data), params, options._replace(key=key))

        return _mean_estimate(part, split(objective.data, options.micro_batches))

    return parted


def _mean_estimate(part: Callable[[Any, jax.Array], Estimate], parts: Sequence[Any]) -> Estimate:
    """The mean of the parts' estimates, which are independent.

    In a loop, although XLA on CPU is slow at convolutions there: written out, nothing keeps it from holding all parts
    at once (`optimization_barrier` does not, on CPU).
    """

    def squared(data, index) -> Estimate:
        estimate = part(data, index)
        return estimate._replace(standard_error=jax.tree.map(jnp.square, estimate.standard_error))

    def add(total, step):
        return jax.tree.map(jnp.add, total, squared(*step)), None

    steps = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts), jnp.arange(len(parts))
    like = jax.eval_shape(squared, parts[0], steps[1][0])
    nothing = jax.tree.map(lambda x: varying_like(jnp.zeros(x.shape, x.dtype), x), like)
    total, _ = jax.lax.scan(add, nothing, steps)
    value, grad, diag = jax.tree.map(lambda x: x / len(parts), total[:3])
    error = jax.tree.map(lambda square: jnp.sqrt(square) / len(parts), total.standard_error)
    return Estimate(value, grad, diag, error)


def split(data: Any, micro_batches: int) -> list[Any]:
    """Equal micro-batches of strided examples, so that each device's share of a sharded batch is in all of them.

    Their number is the largest divisor of the batch's size up to `micro_batches`.
    """
    size = jax.tree.leaves(data)[0].shape[0]
    count = next(n for n in range(min(micro_batches, size), 0, -1) if size % n == 0)
    rows = jax.tree.map(lambda x: x.reshape(size // count, count, *x.shape[1:]), data)
    return [jax.tree.map(lambda x, i=i: x[:, i], rows) for i in range(count)]


def _check_splittable(objective: Any, params: Any) -> None:
    if not isinstance(objective, Objective):
        raise ValueError(
            "micro_batches splits a batch, which a plain function does not show; pass a curvax.Objective, or leave"
            " micro_batches out."
        )
    if couples_examples(objective, params):
        raise ValueError(
            "micro_batches would change this objective: its examples are not proved to be independent of each other"
            " (batch norm in training mode is the usual reason); leave micro_batches out."
        )
