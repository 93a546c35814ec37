"""Columns of a Hessian of no known structure: each example's, with respect to a cut, by products with vectors.

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

from curvax.exact.columns import Columns, Layout, Source, draw_part
from curvax.exact.dataflow import Flow, total_loss
from curvax.exact.derivatives import hessian_product
from curvax.trees import diag_dtype
from curvax.varying import varying_like

# Entries of a slice up to which eigenvectors are computed: their cost grows as the cube. Streamed columns are twice as
# many, which matters more where each must cross the whole network.
FACTORED_TAIL = 128
FACTORED_OUTPUTS = 1024
# Hessian-vector products at once, where the caller does not say.
PRODUCTS = 16


class Plan(NamedTuple):
    """What a cut's columns cost: how many there are, and the Hessian-vector products behind them."""

    columns: int
    products: int
    factored: bool


def plan_columns(flow: Flow, cut: Var) -> Plan:
    """How the columns at a cut will be found, decided by the size of a slice."""
    size = cut.aval.size // flow.program.num_examples
    at_outputs = flow.program.outputs == [cut]
    # The Hessian of the loss alone is not worth counting.
    products = 0 if at_outputs else size
    if size > (FACTORED_OUTPUTS if at_outputs else FACTORED_TAIL):
        return Plan(2 * size, products, factored=False)
    return Plan(size, products, factored=True)


def source(flow: Flow, env: Mapping[Var, jax.Array], cut: Var, chunk_size: int | None) -> Source:
    """The columns of a cut."""
    if not plan_columns(flow, cut).factored:
        return _streamed(flow, env, cut)
    values, signs = _eigencolumns(flow, env, cut, chunk_size)
    values = jax.vmap(_layout(flow, cut).unrows)(values).astype(cut.aval.dtype)
    return Source((cut,), len(values), 1, lambda indices: Columns((_rows(values, indices),), _rows(signs, indices)))


@dataclasses.dataclass(frozen=True)
class RandomEigencolumns:
    """The counterpart of `curvax.exact.columns.RandomColumns` for a cut, by the eigenvectors of small slices."""

    flow: Flow
    cut: Var
    values: jax.Array
    signs: jax.Array

    @property
    def variables(self) -> tuple[Var, ...]:
        """Of which the columns are cotangents."""
        return (self.cut,)

    def draw(self, key: jax.Array, by_example: bool) -> Columns:
        """See `RandomColumns.draw`."""
        part_key, sign_key = jax.random.split(key)
        squares = jnp.sum(self.values**2, 2)
        positive, everything = jnp.sum(jnp.where(self.signs > 0, squares, 0), 0), jnp.sum(squares, 0)
        if not by_example:
            positive, everything = jnp.sum(positive, keepdims=True), jnp.sum(everything, keepdims=True)
        part, scale = draw_part(part_key, positive, everything)
        weight = jnp.where(self.signs == -part[None], 0, scale[None])
        weight *= jax.random.rademacher(sign_key, self.signs.shape, weight.dtype)
        column = jnp.sum(weight[:, :, None] * self.values, 0)
        column = _layout(self.flow, self.cut).unrows(column).astype(self.cut.aval.dtype)
        return Columns((column,), jnp.broadcast_to(part, self.signs.shape[1:]))


def random_eigencolumns(flow: Flow, env: Mapping[Var, jax.Array], cut: Var) -> RandomEigencolumns:
    """Random columns of a cut of small slices."""
    return RandomEigencolumns(flow, cut, *_eigencolumns(flow, env, cut, None))


def _eigencolumns(flow, env, cut, chunk_size) -> tuple[jax.Array, jax.Array]:
    """Columns `(n, B, n)` and signs `(n, B)` with `H_b = sum_c s_cb v_cb v_cb^T`."""
    size = cut.aval.size // flow.program.num_examples
    rows = jax.lax.map(_hessian_row(flow, env, cut), jnp.arange(size), batch_size=min(chunk_size or PRODUCTS, size))
    matrices = jnp.moveaxis(rows, 0, 1)
    matrices = (matrices + matrices.mT) / 2
    # Eigenvectors err relative to the largest entry. Scaled to a diagonal of ones, none is small beside another, and
    # each keeps its own precision; so where no entry is large beside its two diagonal ones, as in any definite matrix.
    # Elsewhere, and where the diagonal is rounding noise, rows are scaled to largest entries of that order.
    diagonal = jnp.sqrt(jnp.abs(jnp.diagonal(matrices, axis1=1, axis2=2)))
    bounded = jnp.abs(matrices) <= 2 * diagonal[:, :, None] * diagonal[:, None, :]
    largest = jnp.sqrt(jnp.max(jnp.abs(matrices), 2))
    scale = jnp.where(jnp.all(bounded, (1, 2))[:, None], diagonal, largest)
    scale = jnp.where((scale > 0) & (scale < jnp.inf), scale, 1)
    values, vectors = jnp.linalg.eigh(matrices / scale[:, :, None] / scale[:, None, :])
    columns = scale[:, :, None] * vectors * jnp.sqrt(jnp.abs(values))[:, None, :]
    return jnp.moveaxis(columns, -1, 0), jnp.sign(values).T


def _streamed(flow, env, cut) -> Source:
    """`sum_j e_j (H e_j)^T` is H, and `x y^T + y x^T = ((x + y) (x + y)^T - (x - y) (x - y)^T) / 2`."""
    row, layout = _hessian_row(flow, env, cut), _layout(flow, cut)
    size = cut.aval.size // flow.program.num_examples

    def pair(index):
        product = row(index)
        # Any scale will do: equal lengths lose least when the squares are subtracted.
        length = jnp.sqrt(jnp.linalg.norm(product, axis=1, keepdims=True))
        scale = jnp.where(length > 0, length, 1)
        unit = jax.nn.one_hot(index, size, dtype=product.dtype)[None] * scale
        columns = jnp.stack([unit + product / scale, unit - product / scale]) / 2
        signs = jnp.broadcast_to(jnp.array([[1], [-1]], product.dtype), (2, product.shape[0]))
        return jax.vmap(layout.unrows)(columns).astype(cut.aval.dtype), jnp.where(index < size, signs, 0)

    def at(indices):
        values, signs = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), jax.vmap(pair)(indices))
        return Columns((values,), signs)

    return Source((cut,), size, 2, at)


def _hessian_row(flow, env, cut) -> Callable[[jax.Array], jax.Array]:
    """Row `index` of every example's Hessian, `(B, n)`."""
    layout = _layout(flow, cut)
    product = hessian_product(total_loss(flow, env, [cut]), env[cut])[2]
    like = jax.eval_shape(layout.rows, env[cut])

    def row(index):
        direction = jnp.broadcast_to(jax.nn.one_hot(index, like.shape[1], dtype=like.dtype)[None], like.shape)
        return layout.rows(product(layout.unrows(varying_like(direction, env[cut])))).astype(diag_dtype(like.dtype))

    return row


def _layout(flow: Flow, cut: Var) -> Layout:
    return Layout(flow.axes[cut], flow.program.num_examples, cut.aval.shape)


def _rows(array: jax.Array, indices: jax.Array) -> jax.Array:
    return array.at[indices].get(mode="fill", fill_value=0)
