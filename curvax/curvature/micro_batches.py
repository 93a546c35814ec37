"""A diagonal of a large batch as the mean over micro-batches, so that memory holds one of them at a time.

A mean over examples is a mean of means over equal parts of them, and so are its derivatives, if no example sees
another. That is proved from the trace, or the split refused: batch norm in training mode, say, would silently become
that of the micro-batches.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.curvature.estimate import Estimate
from curvax.exact.equations import equations
from curvax.exact.independence import example_axes
from curvax.exact.primitives import Axis
from curvax.objective import Objective
from curvax.varying import varying_like


def mean_over_micro_batches(
    estimate: Callable[[Objective, Any], Estimate],
    objective: Objective,
    params: Any,
    key: jax.Array | None,
    micro_batches: int,
    *,
    optional: bool = False,
) -> Estimate:
    """The mean of `estimate(part, key)` over parts of a batch, each with a key of its own.

    Args:
        estimate: of an `Objective` on a part of the data; any estimate of a mean over examples.
        objective: on the whole batch.
        params: where, to trace.
        key: a PRNG key, or None.
        micro_batches: the most parts; the largest divisor of the number of examples up to this is taken that leaves
            two examples at least in a part: a program for one is another, where nothing is seen to be independent.
        optional: whether a batch that cannot be split is taken whole, or refused.

    Returns:
        The estimate for the whole batch.

    Raises:
        ValueError: if the examples are not proved to be independent, and the split is not optional.
    """
    parts = number_of_parts(objective, params, micro_batches)
    if parts == 1:
        return estimate(objective, key)
    axes = example_axes(objective, params, parts)
    if isinstance(axes, str):
        if optional:
            return estimate(objective, key)
        raise ValueError(f"micro_batches={micro_batches} would change this objective: {axes}; leave micro_batches out.")

    def part(index: jax.typing.ArrayLike) -> Estimate:
        drawn = None if key is None else jax.random.fold_in(key, index)
        return estimate(dataclasses.replace(objective, data=micro_batch(objective.data, axes, parts, index)), drawn)

    # XLA on CPU runs convolutions inside a loop many times slower. Written out, nothing keeps it from holding all parts
    # at once (`optimization_barrier` does not, on CPU): not where memory is what the split is for.
    unroll = optional and jax.default_backend() == "cpu" and _convolves(objective, params)
    return _mean(part, parts, parts if unroll else 1)


def micro_batch(data: Any, axes: list[Axis | None], parts: int, index: jax.typing.ArrayLike) -> Any:
    """Every `parts`-th example from `index` on, so that each device's share of a sharded batch is in all parts."""

    def pick(x: jax.Array, dim: int) -> jax.Array:
        split = x.reshape(*x.shape[:dim], x.shape[dim] // parts, parts, *x.shape[dim + 1 :])
        picked: jax.Array = jax.lax.dynamic_index_in_dim(split, index, dim + 1, keepdims=False)
        return picked

    return _of_examples(pick, data, axes)


def shuffled(data: Any, axes: list[Axis | None], key: jax.Array) -> Any:
    """The examples in a random order, the same in all arrays: parts of them are then alike, whatever order they had."""

    def shuffle(x: jax.Array, dim: int) -> jax.Array:
        return jnp.take(x, jax.random.permutation(key, x.shape[dim]), dim, mode="clip")

    return _of_examples(shuffle, data, axes)


def _of_examples(choose: Callable[[jax.Array, int], jax.Array], data: Any, axes: list[Axis | None]) -> Any:
    """The data with `choose(array, dim)` in place of each array that is divided: `dim` counts the examples alone."""

    def chosen(x: jax.Array, axis: Axis | None) -> jax.Array:
        if axis is None:
            return x
        before, after = x.shape[: axis.dim], x.shape[axis.dim + 1 :]
        size = x.shape[axis.dim] // (axis.outer * axis.inner)
        found = choose(jnp.reshape(x, (*before, axis.outer, size, axis.inner, *after)), axis.dim + 1)
        return found.reshape(*before, axis.outer * found.shape[axis.dim + 1] * axis.inner, *after)

    leaves, treedef = jax.tree.flatten(data)
    return jax.tree.unflatten(treedef, [chosen(x, axis) for x, axis in zip(leaves, axes, strict=True)])


def _losses(objective: Objective) -> Callable[[Any], jax.Array]:
    return lambda params: objective.example_losses(objective.predict(params, objective.data), objective.data)


def num_examples(objective: Objective, params: Any) -> int:
    """How many examples the batch has."""
    losses: jax.ShapeDtypeStruct = jax.eval_shape(_losses(objective), params)
    return int(losses.shape[0])


def number_of_parts(objective: Objective, params: Any, most: int) -> int:
    """The largest number of equal parts up to `most` that have two examples at least; else 1."""
    size = num_examples(objective, params) if most > 1 else 1
    return next((n for n in range(min(most, size // 2), 0, -1) if size % n == 0), 1)


def _convolves(objective: Objective, params: Any) -> bool:
    jaxpr = jax.make_jaxpr(_losses(objective))(params).jaxpr
    return any(eqn.primitive.name == "conv_general_dilated" for eqn in equations(jaxpr))


def _mean(part: Callable[[jax.typing.ArrayLike], Estimate], parts: int, unroll: int) -> Estimate:
    def add(total: Estimate, index: jax.Array) -> tuple[Estimate, None]:
        found = part(index)
        error = jax.tree.map(jnp.hypot, total.standard_error, found.standard_error)
        summed = jax.tree.map(jnp.add, total._replace(standard_error=None), found._replace(standard_error=None))
        return summed._replace(standard_error=error), None

    like = jax.eval_shape(part, jnp.zeros((), jnp.int32))
    nothing = jax.tree.map(lambda x: varying_like(jnp.zeros(x.shape, x.dtype), x), like)
    total, _ = jax.lax.scan(add, nothing, jnp.arange(parts), unroll=unroll)
    value, grad, diag = jax.tree.map(lambda x: x / parts, (total.value, total.grad, total.diag))
    error = jax.tree.map(lambda x: x / parts, total.standard_error)
    return Estimate(value, grad, diag, error)
