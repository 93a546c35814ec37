"""From columns of cotangents to a diagonal: sum the positions of an example, then square, then sum the examples.

For one layer, with columns c of signs s, and one window of positions p,

    h[k, o] = sum_bc s_bc (sum_p x_bpk dy_cbpo)^2                            as products,
            = sum_bpq x_bpk x_bqk (sum_c s_bc dy_cbpo dy_cbqo)               as pairs of positions.

The products cost as many matrices as there are columns, the pairs one for every two positions: a dense layer has one
position, hence one pair, and costs a single product whatever the number of columns. Both are sums over columns, so
columns can arrive in chunks: `start`, then `update` by each chunk, then `finish`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from curvax.exact.layers import Layer, Lookup
from curvax.exact.trace import wide

# Entries of a temporary array per step of a loop: a few megabytes, so that it stays in the processor's cache.
BLOCK = 2**20
# Entries of the sums over columns that pairs of positions may hold at once (256 MB in float32).
PAIRS = 2**26
# A product of two matrices that share few positions is bound by writing it: worth this many multiplications.
OVERHEAD = 16


class Contraction:
    """Accumulates one layer's part of a Hessian diagonal from signed columns of cotangents of its result.

    Args:
        layer: the layer.
        out: shape and dtype of its result.
        num_columns: how many columns there will be in all, which decides between products and pairs.
        pull: where the layer's operand is a linear function of the parameter that mixes its entries, the transpose of
            that function: an example's gradient must then be taken back to the parameter before it is squared.
    """

    def __init__(self, layer: Layer | Lookup, out: jax.ShapeDtypeStruct, num_columns: int, pull: Callable | None = None):
        folded = jax.eval_shape(layer.fold, out)
        self.layer, self.dtype = layer, wide(folded.dtype)
        if pull is not None:
            self._update, self._finish = functools.partial(_update_pulled, pull=pull), lambda layer, total: total
        elif isinstance(layer, Lookup):
            self._update, self._finish = _update_lookup, _finish_lookup
        elif _prefers_pairs(layer, folded.shape, num_columns):
            self._update, self._finish = _update_pairs, _finish_pairs
        else:
            self._update, self._finish = _update_products, lambda layer, total: layer.unfold(total)
        columns = jax.ShapeDtypeStruct((1, *folded.shape), self.dtype)
        signs = jax.ShapeDtypeStruct((1, folded.shape[0]), self.dtype)
        self._total = jax.eval_shape(functools.partial(self._update, layer), columns, signs)

    def start(self) -> jax.Array:
        """Nothing yet."""
        return jnp.zeros(self._total.shape, self._total.dtype)

    def update(self, total: jax.Array, cotangents: jax.Array, signs: jax.Array) -> jax.Array:
        """Adds columns `(C, *result)` with their `signs (C, B)`."""
        columns = jax.vmap(self.layer.fold)(cotangents).astype(self.dtype)
        return total + self._update(self.layer, columns, signs.astype(self.dtype))

    def finish(self, total: jax.Array) -> jax.Array:
        """The diagonal, in the shape of the layer's operand, or of the parameter if there was a `pull`."""
        return self._finish(self.layer, total)


def _prefers_pairs(layer: Layer, shape: Sequence[int], num_columns: int) -> bool:
    batch, positions, groups, outputs = shape
    matrix = layer.x.shape[-1] * outputs
    meeting = np.array([len(seen) for seen, _ in layer.windows])
    num_pairs = positions * (positions + 1) // 2
    products = num_columns * np.sum(meeting + OVERHEAD) * matrix
    pairs = np.sum(meeting * (meeting + 1) // 2) * matrix + num_pairs * num_columns * outputs
    return pairs <= products and batch * num_pairs * groups * outputs <= PAIRS


def _update_pairs(layer, columns, signs):
    first, second = np.triu_indices(columns.shape[2])
    signed = columns * signs[:, :, None, None, None]
    return jnp.sum(take(signed, first, 2) * take(columns, second, 2), 0)


def _finish_pairs(layer, gram):
    x = layer.x.astype(gram.dtype)
    positions = int(np.sqrt(2 * gram.shape[1]))  # of gram.shape[1] = positions * (positions + 1) / 2 pairs
    pair_index = np.zeros((positions, positions), int)
    pair_index[np.triu_indices(positions)] = np.arange(gram.shape[1])

    def matrix(window, x, gram):
        seen, reached = window
        first, second = np.triu_indices(len(seen))
        # A pair of two different positions stands for both of its orders.
        weight = np.where(first == second, 1, 2).astype(gram.dtype)[None, :, None, None]
        low, high = np.minimum(reached[first], reached[second]), np.maximum(reached[first], reached[second])
        pairs = take(x, seen[first], 1) * take(x, seen[second], 1) * weight
        return jnp.einsum("bpgk,bpgo->gko", pairs, take(gram, pair_index[low, high], 1))

    def matrices(x, gram):
        return jnp.stack([matrix(window, x, gram) for window in layer.windows])

    per_example = max(gram.shape[1] * layer.x.shape[3] * layer.x.shape[2], 1)
    return layer.unfold(sum_over_examples(matrices, (x, gram), BLOCK // per_example))


def _update_products(layer, columns, signs):
    squares = _sums_squared if layer.x.shape[-1] * columns.shape[-1] == 1 else _products_squared
    columns = jnp.moveaxis(columns, 0, 3)  # (B, positions, groups, C, outputs)

    def matrices(x, columns, signs):
        return jnp.stack(
            [squares(take(x, seen, 1), take(columns, reached, 1), signs) for seen, reached in layer.windows]
        )

    per_example = max(layer.x.shape[3] * int(np.prod(columns.shape[2:])), 1)
    x = layer.x.astype(columns.dtype)
    return sum_over_examples(matrices, (x, columns, signs.T), BLOCK // per_example)


def _products_squared(x, columns, signs):
    products = jnp.einsum("bpgk,bpgco->bgkco", x, columns)
    return jnp.sum(signs[:, None, None, :, None] * products**2, (0, 3))


def _sums_squared(x, columns, signs):
    """One input, one output: no matrix to speak of."""
    sums = jnp.sum(x[..., None] * columns, 1, keepdims=True)
    return jnp.moveaxis(jnp.sum(signs[:, None, None, :, None] * sums**2, (0, 3)), 0, 1)


def _update_lookup(layer, columns, signs):
    same = (layer.rows[:, :, None] == layer.rows[:, None, :]).astype(columns.dtype)
    sums = jnp.einsum("bpq,cbqo->cbpo", same, columns)
    return jnp.sum(signs[:, :, None, None] * columns * sums, 0)


def _finish_lookup(layer, total):
    inside = (layer.rows >= 0) & (layer.rows < layer.num_rows)
    matrix = jnp.zeros((layer.num_rows, total.shape[-1]), total.dtype)
    # Sums over the positions of one row were taken before squaring; each position adds its share of the square.
    rows = jnp.where(inside, layer.rows, layer.num_rows)
    return layer.unfold(matrix.at[rows.ravel()].add(total.reshape(-1, total.shape[-1]), mode="drop"))


def _update_pulled(layer, columns, signs, *, pull):
    """Every example's gradient, taken back to the parameter and squared: the one place where they are materialised."""
    operand = layer.rows if isinstance(layer, Lookup) else layer.x.astype(columns.dtype)

    def squares(operand, columns, signs):
        gradients = jax.vmap(lambda column: _gradients(layer, operand, column), 1)(columns)
        pulled = jax.vmap(jax.vmap(pull))(gradients)
        return jnp.einsum("cb...,bc->...", pulled**2, signs)

    per_example = columns.shape[0] * int(np.prod(jax.eval_shape(layer.unfold, _matrix(layer, columns)).shape))
    return sum_over_examples(squares, (operand, jnp.moveaxis(columns, 0, 1), signs.T), BLOCK // per_example)


def _matrix(layer, columns) -> jax.ShapeDtypeStruct:
    if isinstance(layer, Lookup):
        return jax.ShapeDtypeStruct((layer.num_rows, columns.shape[-1]), columns.dtype)
    shape = (len(layer.windows), layer.x.shape[2], layer.x.shape[3], columns.shape[-1])
    return jax.ShapeDtypeStruct(shape, columns.dtype)


def _gradients(layer, operand, column):
    """Each example's gradient of the layer's operand, `(B, *operand)`."""
    if isinstance(layer, Lookup):
        rows = jax.nn.one_hot(operand, layer.num_rows, dtype=column.dtype)
        return jax.vmap(layer.unfold)(jnp.einsum("bpv,bpo->bvo", rows, column))
    products = [
        jnp.einsum("bpgk,bpgo->bgko", take(operand, seen, 1), take(column, reached, 1)) for seen, reached in layer.windows
    ]
    return jax.vmap(layer.unfold)(jnp.stack(products, 1))


def sum_over_examples(function: Callable[..., jax.Array], arrays: Sequence[jax.Array], block: int) -> jax.Array:
    """Sums `function` over blocks of at most about `block` examples, one block at a time.

    A block takes every n-th example rather than consecutive ones: examples sharded over devices stay where they are.
    """
    num_examples = arrays[0].shape[0]
    block = next(size for size in range(min(max(block, 1), num_examples), 0, -1) if num_examples % size == 0)
    if block == num_examples:
        return function(*arrays)
    blocks = [jnp.moveaxis(a.reshape(block, -1, *a.shape[1:]), 1, 0) for a in arrays]
    start = jax.tree.map(lambda aval: jnp.zeros(aval.shape, aval.dtype), jax.eval_shape(function, *[b[0] for b in blocks]))
    return jax.lax.scan(lambda total, some: (total + function(*some), None), start, blocks)[0]


def take(array: jax.Array, indices: np.ndarray, dim: int) -> jax.Array:
    """`array` at fixed indices along one dimension; itself if they are all of them, in order."""
    if np.array_equal(indices, np.arange(array.shape[dim])):
        return array
    return jnp.take(array, indices, dim, mode="clip")
