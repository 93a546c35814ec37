"""The columns to send back: a signed factor of each example's Hessian with respect to a cut.

Beyond the cut lies the tail, a function of one example's slice of it alone. Its Hessian takes one product with a vector
for each of the `n` entries of a slice, shared by all the examples, since none sees another. As
`H_b = sum_c s_c v_c v_c^T`, the columns `v` are what a network sends back to find `diag(J^T H J) = sum_c s_c (J^T v_c)^2`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from curvax.exact.dataflow import Flow
from curvax.exact.layers import examples_first
from curvax.exact.primitives import Axis
from curvax.exact.trace import Program, apply, read, wide


class Columns(NamedTuple):
    """Signed cotangents of a cut: `values (C, *cut)` and `signs (C, B)`."""

    values: jax.Array
    signs: jax.Array


def between(program: Program, flow: Flow, env: Mapping[Var, jax.Array], start: Var, stop: Var) -> Callable:
    """`stop` as a function of `start`, everything that does not depend on it held fixed."""

    def function(value):
        varying = {start: value}
        for eqn, (slots, results) in zip(program.jaxpr.eqns, flow.links, strict=True):
            if any(eqn.invars[slot] in varying for slot in slots):
                values = [varying[v] if isinstance(v, Var) and v in varying else read(env, v) for v in eqn.invars]
                out = dict(zip(eqn.outvars, apply(eqn, *values), strict=True))
                varying |= {var: out[var] for var in results}
        return varying[stop]

    return function


def tail(program: Program, flow: Flow, env: Mapping[Var, jax.Array], cut: Var) -> Callable[[jax.Array], jax.Array]:
    """The sum of the losses as a function of a cut."""
    losses = between(program, flow, env, cut, program.losses)
    return lambda value: jnp.sum(losses(value))


def hessians(function: Callable, value: jax.Array, axis: Axis, num_examples: int, chunk_size: int) -> jax.Array:
    """The Hessian of each example's share of `function`, `(B, n, n)`, by `n` Hessian-vector products."""
    slices, unslice = slicer(value, axis, num_examples)
    like = jax.eval_shape(slices, value)
    _, product = jax.linearize(jax.grad(function), value)

    def row(index):
        direction = jnp.broadcast_to(jax.nn.one_hot(index, like.shape[1], dtype=like.dtype), like.shape)
        return slices(product(unslice(direction)))

    rows = jax.lax.map(row, jnp.arange(like.shape[1]), batch_size=chunk_size)
    matrices = jnp.moveaxis(rows, 0, 1).astype(wide(rows.dtype))
    return (matrices + matrices.mT) / 2


def slicer(value: jax.Array, axis: Axis, num_examples: int) -> tuple[Callable, Callable]:
    """Lays an array like `value` out as `(B, n)`, and back."""
    dims = [d for d in range(value.ndim) if d != axis.dim]
    slices = lambda value: examples_first(value, axis, num_examples, dims)
    return slices, lambda rows: jax.linear_transpose(slices, value)(rows)[0]


def signed_factor(matrices: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Columns `(rank, B, n)` and signs `(rank, B)` with `H_b = sum_c s_cb v_cb v_cb^T`."""
    values, vectors = jnp.linalg.eigh(matrices)
    if rank < matrices.shape[-1]:
        largest = jnp.argsort(-jnp.abs(values), axis=-1)[:, :rank]
        values = jnp.take_along_axis(values, largest, -1)
        vectors = jnp.take_along_axis(vectors, largest[:, None, :], -1)
    columns = vectors * jnp.sqrt(jnp.abs(values))[:, None, :]
    return jnp.moveaxis(columns, -1, 0), jnp.sign(values).T
