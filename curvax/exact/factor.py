"""The columns to send back: a signed factor of each example's Hessian with respect to a cut.

Beyond the cut lies the tail, a function of one example's slice of it alone. Its Hessian takes one product with a vector
for each of the `n` entries of a slice, shared by all the examples, since none sees another. Written as
`H_b = sum_c s_c v_c v_c^T`, its columns are what a network sends back to find `diag(J^T H J) = sum_c s_c (J^T v_c)^2`.
Three ways to write it so: by its eigenvectors; without ever holding it, as `e_j (H e_j)^T`, whose symmetric part is two
squares; and in expectation, by one random combination of eigenvectors.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from curvax.curvature.estimate import diag_dtype
from curvax.exact.dataflow import Flow, between
from curvax.exact.invariance import shift_invariant
from curvax.exact.layers import examples_first
from curvax.varying import varying_like

# Entries of a slice up to which eigenvectors are computed: their cost grows as the cube. Streamed columns are twice as
# many, which matters more where each must cross the whole network.
FACTORED_TAIL = 128
FACTORED_OUTPUTS = 1024
# Hessian-vector products at once, where the caller does not say.
PRODUCTS = 16


class Columns(NamedTuple):
    """Signed cotangents of a cut: `values (C, *cut)` and `signs (C, B)`."""

    values: jax.Array
    signs: jax.Array


@dataclasses.dataclass(frozen=True)
class Source:
    """Columns to be had a few at a time.

    Attributes:
        steps: how many indices there are.
        width: columns for each index.
        at: the columns for some indices; zero for an index past the last.
    """

    steps: int
    width: int
    at: Callable[[jax.Array], Columns]


class Plan(NamedTuple):
    """What a cut's columns cost: how many there are, and the Hessian-vector products behind them."""

    columns: int
    products: int
    factored: bool

    @property
    def price(self) -> int:
        """In backward passes; a Hessian-vector product is worth about two."""
        return self.columns + 2 * self.products


def plan_columns(flow: Flow, cut: Var) -> Plan:
    """How the columns at a cut will be found, decided by the size of a slice."""
    size = cut.aval.size // flow.program.num_examples
    at_outputs = cut is flow.program.outputs
    # The Hessian of the loss alone is not worth counting.
    products = 0 if at_outputs else size
    if size > (FACTORED_OUTPUTS if at_outputs else FACTORED_TAIL):
        return Plan(2 * size, products, factored=False)
    rank = size - 1 if size > 1 and shift_invariant(flow, cut) else size
    return Plan(rank, products, factored=True)


def source(flow: Flow, env: Mapping[Var, jax.Array], cut: Var, chunk_size: int | None) -> Source:
    """The columns of a cut."""
    plan = plan_columns(flow, cut)
    if not plan.factored:
        return _streamed(flow, env, cut)
    values, signs = _eigencolumns(flow, env, cut, plan.columns, chunk_size)
    _, unslice = _slicer(flow, cut)
    values = jax.vmap(unslice)(values.astype(cut.aval.dtype))
    return Source(plan.columns, 1, lambda indices: Columns(_rows(values, indices), _rows(signs, indices)))


def random_source(
    flow: Flow, env: Mapping[Var, jax.Array], cut: Var, key: jax.Array, num_samples: int, chunk_size: int | None
) -> Source:
    """Columns whose expected signed squares are those of all the columns: a random sign for each, then their sum.

    An indefinite Hessian has columns of both signs, which one square cannot combine: each example then takes the part
    of one sign, drawn in proportion to its trace. A convex loss has the one part, and nothing is drawn.
    """
    values, signs = _eigencolumns(flow, env, cut, plan_columns(flow, cut).columns, chunk_size)
    positive = jnp.sum(jnp.where((signs > 0)[:, :, None], values**2, 0), (0, 2))
    share = jnp.where(positive > 0, positive / jnp.maximum(jnp.sum(values**2, (0, 2)), positive), 0)
    _, unslice = _slicer(flow, cut)

    def sample(index):
        part_key, sign_key = jax.random.split(jax.random.fold_in(key, index))
        part = jnp.where(jax.random.uniform(part_key, share.shape, share.dtype) < share, 1, -1).astype(share.dtype)
        weight = jnp.where(signs == part[None], jax.lax.rsqrt(jnp.where(part > 0, share, 1 - share))[None], 0)
        weight *= jax.random.rademacher(sign_key, signs.shape, signs.dtype)
        return Columns(unslice(jnp.sum(weight[:, :, None] * values, 0).astype(cut.aval.dtype)), part)

    return Source(num_samples, 1, jax.vmap(sample))


def signed_values(flow: Flow, cut: Var, columns: Columns) -> jax.Array:
    """The values, each example's times its sign."""
    slices, unslice = _slicer(flow, cut)
    signed = lambda values, signs: unslice(slices(values) * signs.astype(values.dtype)[:, None])
    return jax.vmap(signed)(*columns)


def _eigencolumns(flow, env, cut, rank, chunk_size) -> tuple[jax.Array, jax.Array]:
    """Columns `(rank, B, n)` and signs `(rank, B)` with `H_b = sum_c s_cb v_cb v_cb^T`."""
    size = cut.aval.size // flow.program.num_examples
    rows = jax.lax.map(_hessian_row(flow, env, cut), jnp.arange(size), batch_size=min(chunk_size or PRODUCTS, size))
    matrices = jnp.moveaxis(rows, 0, 1)
    values, vectors = jnp.linalg.eigh((matrices + matrices.mT) / 2)
    if rank < size:
        largest = jnp.argsort(-jnp.abs(values), axis=-1)[:, :rank]
        values = jnp.take_along_axis(values, largest, -1)
        vectors = jnp.take_along_axis(vectors, largest[:, None, :], -1)
    columns = vectors * jnp.sqrt(jnp.abs(values))[:, None, :]
    return jnp.moveaxis(columns, -1, 0), jnp.sign(values).T


def _streamed(flow, env, cut) -> Source:
    """`sum_j e_j (H e_j)^T` is H, and `x y^T + y x^T = ((x + y) (x + y)^T - (x - y) (x - y)^T) / 2`."""
    row, (_, unslice) = _hessian_row(flow, env, cut), _slicer(flow, cut)
    size = cut.aval.size // flow.program.num_examples

    def pair(index):
        product = row(index)
        # Any scale will do: equal lengths lose least when the squares are subtracted.
        length = jnp.sqrt(jnp.linalg.norm(product, axis=1, keepdims=True))
        scale = jnp.where(length > 0, length, 1)
        unit = jax.nn.one_hot(index, size, dtype=product.dtype)[None] * scale
        columns = jnp.stack([unit + product / scale, unit - product / scale]) / 2
        signs = jnp.broadcast_to(jnp.array([[1], [-1]], product.dtype), (2, product.shape[0]))
        return Columns(jax.vmap(unslice)(columns.astype(cut.aval.dtype)), jnp.where(index < size, signs, 0))

    def at(indices):
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), jax.vmap(pair)(indices))

    return Source(size, 2, at)


def _hessian_row(flow, env, cut) -> Callable[[jax.Array], jax.Array]:
    """Row `index` of every example's Hessian, `(B, n)`."""
    slices, unslice = _slicer(flow, cut)
    losses = between(flow, env, cut, flow.program.losses)
    _, product = jax.linearize(jax.grad(lambda value: jnp.sum(losses(value))), env[cut])
    like = jax.eval_shape(slices, env[cut])

    def row(index):
        direction = jnp.broadcast_to(jax.nn.one_hot(index, like.shape[1], dtype=like.dtype)[None], like.shape)
        return slices(product(unslice(varying_like(direction, env[cut])))).astype(diag_dtype(like.dtype))

    return row


def _slicer(flow, cut) -> tuple[Callable, Callable]:
    """Lays an array like the cut out as `(B, n)`, and back."""
    axis = flow.axes[cut]
    dims = [d for d in range(cut.aval.ndim) if d != axis.dim]
    slices = lambda value: examples_first(value, axis, flow.program.num_examples, dims)
    return slices, lambda rows: jax.linear_transpose(slices, cut.aval)(rows)[0]


def _rows(array: jax.Array, indices: jax.Array) -> jax.Array:
    return array.at[indices].get(mode="fill", fill_value=0)
