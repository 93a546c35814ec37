"""From columns of cotangents to a diagonal: sum the positions of an example, then square, then sum the examples.

For one layer, with columns c of signs s, and the positions p, q of one window,

    h[k, o] = sum_bc s_bc (sum_p x_bpk dy_cbpo)^2                            as products,
            = sum_bpq x_bpk x_bqk (sum_c s_bc dy_cbpo dy_cbqo)               as pairs of positions.

The products cost as many matrices as there are columns, the pairs one for every two positions: a dense layer has one
position, hence one pair, and costs a single product whatever the number of columns. Every form is a sum over columns,
so columns can arrive in chunks: `start`, then `update` by each chunk, then `finish`. A form knows shapes alone, and is
given the layer's operand each time: layers that are alike share one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from curvax.exact.primitives import Layer, Lookup
from curvax.trees import diag_dtype
from curvax.varying import varying_like

# Entries of a temporary array in one step of a loop: a few megabytes, so that it stays in a processor's cache.
BLOCK = 2**20
# Matrices from this size on are multiplied one example at a time on a CPU, where batches of them are several times
# slower (16x384 by 16x256, 128 examples: 0.25 s against 0.92 s).
MATRIX = 2**12
# Entries of the sums over columns that pairs of positions may hold at once (256 MB in float32).
PAIRS = 2**26
# A product of two matrices that share few positions is bound by writing it: worth this many multiplications.
OVERHEAD = 16


class Contraction(Protocol):
    """Accumulates one layer's part of a Hessian diagonal from signed columns of cotangents of its result."""

    def operand(self, values: Sequence[jax.Array]) -> jax.Array:
        """What the layer's operand is, from the values of the operation's operands."""

    def start(self, operand: jax.Array) -> Any:
        """Nothing yet."""

    def update(self, operand: jax.Array, total: Any, columns: jax.Array, signs: jax.Array) -> Any:
        """Adds columns `(C, *result)` with their `signs (C, B)`."""

    def finish(self, operand: jax.Array, total: Any) -> jax.Array:
        """The diagonal: of the layer's operand, or of the parameter if the contraction knows how to pull it back."""


class Shared(NamedTuple):
    """The parts of a `Contraction`, compiled or not."""

    operand: Callable
    start: Callable
    update: Callable
    finish: Callable


def contraction(
    layer: Layer | Lookup,
    operands: Sequence[jax.ShapeDtypeStruct],
    out: jax.ShapeDtypeStruct,
    num_columns: int,
    pull: Callable | None = None,
) -> Contraction:
    """The cheapest form for a layer.

    Args:
        layer: the layer.
        operands: shapes and dtypes of the operation's operands.
        out: shape and dtype of its result.
        num_columns: how many columns there will be in all, which decides between products and pairs.
        pull: where the layer's operand is a linear function of the parameter that mixes its entries, the transpose of
            that function: an example's gradient must then be taken back to the parameter before it is squared.
    """
    folded = jax.eval_shape(layer.fold, out)
    folded = jax.ShapeDtypeStruct(folded.shape, diag_dtype(folded.dtype))
    if pull is not None:
        return Pulled(layer, folded, pull)
    if isinstance(layer, Lookup):
        return Rows(layer, folded)
    inputs = jax.eval_shape(layer.operand, operands).shape[-1]
    return (Pairs if _prefers_pairs(layer, inputs, folded.shape, num_columns) else Products)(layer, folded)


def _prefers_pairs(layer: Layer, inputs: int, shape: Sequence[int], num_columns: int) -> bool:
    batch, positions, groups, outputs = shape
    matrix = inputs * outputs
    meeting = np.array([len(seen) for seen, _ in layer.windows])
    num_pairs = positions * (positions + 1) // 2
    products = num_columns * np.sum(meeting + OVERHEAD) * matrix
    pairs = np.sum(meeting * (meeting + 1) // 2) * matrix + num_pairs * num_columns * outputs
    return pairs <= products and batch * num_pairs * groups * outputs <= PAIRS


class Pairs:
    """Sums over columns of products of two positions, contracted with the operand once, at the end."""

    def __init__(self, layer: Layer, folded: jax.ShapeDtypeStruct):
        self.layer, self.folded = layer, folded
        self.first, self.second = np.triu_indices(folded.shape[1])

    def operand(self, values: Sequence[jax.Array]) -> jax.Array:
        return self.layer.operand(values).astype(self.folded.dtype)

    def start(self, operand: jax.Array) -> jax.Array:
        batch, _, groups, outputs = self.folded.shape
        return varying_like(jnp.zeros((batch, len(self.first), groups, outputs), self.folded.dtype), operand)

    def update(self, operand: jax.Array, total: jax.Array, columns: jax.Array, signs: jax.Array) -> jax.Array:
        def add(total, column_and_signs):
            column, signs = column_and_signs
            column = self.layer.fold(column).astype(self.folded.dtype)
            signed = column * signs.astype(column.dtype)[:, None, None, None]
            return total + take(signed, self.first, 1) * take(column, self.second, 1), None

        # Column by column: summed at once, the gathers would not be vectorised (0.128 s against 0.005 s).
        return jax.lax.scan(add, total, (columns, signs))[0]

    def finish(self, operand: jax.Array, total: jax.Array) -> jax.Array:
        matrices = lambda x, total: [self._matrix(window, x, total) for window in self.layer.windows]
        per_example = total.shape[1] * operand.shape[2] * operand.shape[3]
        return self.layer.unfold(jnp.stack(sum_over_examples(matrices, (operand, total), per_example)))

    def _matrix(self, window, x, total):
        seen, reached = window
        first, second = np.triu_indices(len(seen))
        low, high = np.minimum(reached[first], reached[second]), np.maximum(reached[first], reached[second])
        pair = np.zeros((self.folded.shape[1],) * 2, int)
        pair[self.first, self.second] = np.arange(len(self.first))
        # A pair of two different positions stands for both of its orders.
        weight = np.where(first == second, 1, 2).astype(x.dtype)[None, :, None, None]
        x = take(x, seen[first], 1) * take(x, seen[second], 1) * weight
        return jnp.einsum("bpgk,bpgo->gko", x, take(total, pair[low, high], 1))


class Products:
    """Every example's gradient for every column, squared as soon as it is there."""

    def __init__(self, layer: Layer, folded: jax.ShapeDtypeStruct):
        self.layer, self.folded = layer, folded

    def operand(self, values: Sequence[jax.Array]) -> jax.Array:
        return self.layer.operand(values).astype(self.folded.dtype)

    def start(self, operand: jax.Array) -> list[jax.Array]:
        shape = (self.folded.shape[2], operand.shape[3], self.folded.shape[3])
        return [varying_like(jnp.zeros(shape, self.folded.dtype), operand) for _ in self.layer.windows]

    def update(
        self, operand: jax.Array, total: list[jax.Array], columns: jax.Array, signs: jax.Array
    ) -> list[jax.Array]:
        columns = jax.vmap(self.layer.fold, out_axes=3)(columns).astype(self.folded.dtype)
        squares = _sums_squared if operand.shape[-1] * columns.shape[-1] == 1 else _products_squared

        def matrices(x, columns, signs):
            windows = self.layer.windows
            return [squares(take(x, seen, 1), take(columns, reached, 1), signs) for seen, reached in windows]

        matrix = operand.shape[3] * columns.shape[3] * columns.shape[4]
        together = matrix < MATRIX or jax.default_backend() != "cpu"
        per_example = matrix * columns.shape[2] if together else BLOCK
        parts = sum_over_examples(matrices, (operand, columns, signs.T.astype(self.folded.dtype)), per_example)
        return [t + part for t, part in zip(total, parts, strict=True)]

    def finish(self, operand: jax.Array, total: list[jax.Array]) -> jax.Array:
        return self.layer.unfold(jnp.stack(total))


def _products_squared(x, columns, signs):
    products = jnp.einsum("bpgk,bpgco->bgkco", x, columns)
    return jnp.sum(signs[:, None, None, :, None] * products**2, (0, 3))


def _sums_squared(x, columns, signs):
    """One input, one output: no matrix to speak of."""
    sums = jnp.sum(x[..., None] * columns, 1, keepdims=True)
    return jnp.moveaxis(jnp.sum(signs[:, None, None, :, None] * sums**2, (0, 3)), 0, 1)


class Rows:
    """A table's rows: the positions that take the same row are summed before squaring, and no others meet."""

    def __init__(self, layer: Lookup, folded: jax.ShapeDtypeStruct):
        self.layer, self.folded = layer, folded

    def operand(self, values: Sequence[jax.Array]) -> jax.Array:
        return self.layer.operand(values)

    def start(self, operand: jax.Array) -> jax.Array:
        return varying_like(jnp.zeros(self.folded.shape, self.folded.dtype), operand)

    def update(self, operand: jax.Array, total: jax.Array, columns: jax.Array, signs: jax.Array) -> jax.Array:
        columns = jax.vmap(self.layer.fold)(columns).astype(total.dtype)
        same = (operand[:, :, None] == operand[:, None, :]).astype(total.dtype)
        sums = jnp.einsum("bpq,cbqo->cbpo", same, columns)
        # Of the square of a row's sum, each of its positions adds its own share.
        return total + jnp.sum(signs.astype(total.dtype)[:, :, None, None] * columns * sums, 0)

    def finish(self, operand: jax.Array, total: jax.Array) -> jax.Array:
        num_rows = self.layer.num_rows
        rows = jnp.where(operand < 0, num_rows, operand).ravel()
        table = jnp.zeros((num_rows, total.shape[-1]), total.dtype)
        return self.layer.unfold(table.at[rows].add(total.reshape(-1, total.shape[-1]), mode="drop"))


class Pulled:
    """Every example's gradient, taken back to the parameter and squared: the one form that holds them whole."""

    def __init__(self, layer: Layer | Lookup, folded: jax.ShapeDtypeStruct, pull: Callable):
        self.layer, self.folded, self.pull = layer, folded, pull

    def operand(self, values: Sequence[jax.Array]) -> jax.Array:
        operand = self.layer.operand(values)
        return operand if isinstance(self.layer, Lookup) else operand.astype(self.folded.dtype)

    def start(self, operand: jax.Array) -> jax.Array:
        like = jax.eval_shape(self._gradients, operand, self.folded)
        return varying_like(jnp.zeros(like.shape[1:], self.folded.dtype), operand)

    def update(self, operand: jax.Array, total: jax.Array, columns: jax.Array, signs: jax.Array) -> jax.Array:
        columns = jax.vmap(self.layer.fold)(columns).astype(self.folded.dtype)

        def squares(operand, columns, signs):
            pulled = jax.vmap(self._gradients, (None, 1))(operand, columns)
            return jnp.einsum("cb...,bc->...", pulled**2, signs)

        per_example = columns.shape[0] * _matrix_size(self.layer, operand, columns.shape[-1])
        arrays = (operand, jnp.moveaxis(columns, 0, 1), signs.T.astype(total.dtype))
        return total + sum_over_examples(squares, arrays, per_example)

    def finish(self, operand: jax.Array, total: jax.Array) -> jax.Array:
        return total

    def _gradients(self, operand, column):
        """Each example's gradient of the parameter, `(B, *parameter)`."""
        if isinstance(self.layer, Lookup):
            taken = jax.nn.one_hot(operand, self.layer.num_rows, dtype=column.dtype)
            matrices = jnp.einsum("bpv,bpo->bvo", taken, column)
        else:
            meet = lambda seen, reached: (take(operand, seen, 1), take(column, reached, 1))
            windows = [jnp.einsum("bpgk,bpgo->bgko", *meet(*window)) for window in self.layer.windows]
            matrices = jnp.stack(windows, 1)
        return jax.vmap(lambda matrix: self.pull(self.layer.unfold(matrix)))(matrices)


def _matrix_size(layer: Layer | Lookup, operand: jax.Array, outputs: int) -> int:
    if isinstance(layer, Lookup):
        return layer.num_rows * outputs
    return len(layer.windows) * operand.shape[2] * operand.shape[3] * outputs


def sum_over_examples(function: Callable[..., Any], arrays: Sequence[jax.Array], per_example: int) -> Any:
    """Sums `function` over the examples, in blocks of which each needs about `BLOCK` entries of temporaries.

    A block takes every n-th example rather than consecutive ones: examples sharded over devices stay where they are.
    """
    num_examples, most = arrays[0].shape[0], max(BLOCK // max(per_example, 1), 1)
    block = next(size for size in range(min(most, num_examples), 0, -1) if num_examples % size == 0)
    if block == num_examples:
        return function(*arrays)
    blocks = [jnp.moveaxis(array.reshape(block, -1, *array.shape[1:]), 1, 0) for array in arrays]
    like = jax.eval_shape(function, *(some[0] for some in blocks))
    start = jax.tree.map(lambda total: varying_like(jnp.zeros(total.shape, total.dtype), arrays[0]), like)
    add = lambda total, some: (jax.tree.map(jnp.add, total, function(*some)), None)
    return jax.lax.scan(add, start, blocks)[0]


def take(array: jax.Array, indices: np.ndarray, dim: int) -> jax.Array:
    """`array` at fixed indices along one dimension; itself if they are all of them, in order."""
    if np.array_equal(indices, np.arange(array.shape[dim])):
        return array
    return jnp.take(array, indices, dim, mode="clip")
