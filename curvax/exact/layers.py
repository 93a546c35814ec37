"""Every linear layer as one: a matrix applied at several positions, seen through several windows.

A parameter enters an example's computation through one linear operation. With the operand laid out as
`x (B, positions, groups, inputs)` and the result as `y (B, positions, groups, outputs)`, that operation is

    y[b, q, g] += x[b, p, g] @ weight[w, g]    for every pair (p, q) of window w,

so that an example's gradient is `sum over (p, q) of outer(x[b, p, g], dy[b, q, g])`. A dense layer has one window in
which every position meets itself; a convolution has one for each offset of its kernel, holding only the positions at
which that offset meets the image: stride, dilation and padding are which pairs there are, and zeros cost nothing. A
bias or a scale has a group for each of its entries and one input and output. A look-up has its own, sparse, form.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from curvax.exact.primitives import ELEMENTWISE, Axis, free_dims, is_complex, pull_axis
from curvax.exact.trace import in_slots
from curvax.exact.windows import convolution_lines, offsets

# One window: the positions of the operand, and those of the result, that meet through one matrix.
Window = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear operation in which a parameter meets the examples.

    Attributes:
        x: what multiplies the parameter, `(B, positions, groups, inputs)`.
        windows: which positions of `x` and of the result share a matrix.
        fold: lays out a cotangent of the result as `(B, positions, groups, outputs)`.
        unfold: gives `(windows, groups, inputs, outputs)` the parameter's shape.
    """

    x: jax.Array
    windows: Sequence[Window]
    fold: Callable[[jax.Array], jax.Array]
    unfold: Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Rows taken from a table.

    Attributes:
        rows: which row each position takes, `(B, positions)`; a row outside the table has no derivative.
        fold: lays out a cotangent of the result as `(B, positions, outputs)`.
        unfold: gives `(rows, outputs)` the parameter's shape.
        num_rows: the length of the table.
    """

    rows: jax.Array
    fold: Callable[[jax.Array], jax.Array]
    unfold: Callable[[jax.Array], jax.Array]
    num_rows: int


def supported(eqn: JaxprEqn, slot: int, axis: Axis, num_examples: int) -> bool:
    """Whether `build_layer` knows the operation, with these axes; a complex layer has no real columns.

    Args:
        eqn: the operation.
        slot: the operand that depends on the parameter.
        axis: the example axis of the result.
        num_examples: B.
    """
    name = eqn.primitive.name
    if is_complex(eqn.invars[slot]) or is_complex(eqn.outvars[0]):
        return False
    if name in ("dot_general", "conv_general_dilated", "gather"):
        kernel = {"dot_general": slot, "conv_general_dilated": 1, "gather": 0}[name]
        simple = {"conv_general_dilated": _convolves_each, "gather": _takes_rows}.get(name, lambda eqn: True)
        pulled = [pull_axis(eqn, i, 0, axis, num_examples) for i in (slot, 1 - slot)]
        return slot == kernel and simple(eqn) and pulled[0] is None and pulled[1] is not None
    return (name in ELEMENTWISE or name == "broadcast_in_dim") and _extent(eqn, slot, axis.dim) == 1


def build_layer(eqn: JaxprEqn, slot: int, values: Sequence[jax.Array], axis: Axis, num_examples: int) -> Layer | Lookup:
    """The layer that an equation is to one of its operands.

    Args:
        eqn: the operation, one of those `supported`.
        slot: the operand that depends on the parameter.
        values: the values of all operands.
        axis: the example axis of the result.
        num_examples: B.
    """
    build = {"dot_general": _dense, "conv_general_dilated": _convolution, "gather": _lookup}
    return build.get(eqn.primitive.name, _elementwise)(eqn, slot, values, axis, num_examples)


def _dense(eqn, slot, values, axis, num_examples) -> Layer:
    contracting, batch = eqn.params["dimension_numbers"]
    free = [free_dims(value.ndim, contracting[i], batch[i]) for i, value in enumerate(values)]
    first = len(batch[0])
    split = first + len(free[0])
    free_in_result = [range(first, split), range(split, split + len(free[1]))]
    other, other_axis = 1 - slot, pull_axis(eqn, 1 - slot, 0, axis, num_examples)

    def fold(cotangent):
        positions = [d for d in free_in_result[other] if d != axis.dim]
        return examples_first(cotangent, axis, num_examples, positions, range(first), free_in_result[slot])

    def unfold(matrix):
        order = [*batch[slot], *contracting[slot], *free[slot]]
        sizes = [values[slot].shape[d] for d in order]
        return matrix.reshape(sizes).transpose(np.argsort(order))

    positions = [d for d in free[other] if d != other_axis.dim]
    x = examples_first(values[other], other_axis, num_examples, positions, batch[other], contracting[other])
    return Layer(x, [(np.arange(x.shape[1]),) * 2], fold, unfold)


def _elementwise(eqn, slot, values, axis, num_examples) -> Layer:
    """A bias, a scale, a mask, a broadcast: whatever the operation is, its derivative is one factor per entry."""
    operand, out = values[slot], eqn.outvars[0].aval
    dims = _dims_in_result(eqn, slot)
    own = [d for i, d in enumerate(dims) if d != axis.dim and operand.shape[i] == out.shape[d]]
    positions = [d for d in range(out.ndim) if d != axis.dim and d not in own]

    def fold(cotangent):
        return examples_first(cotangent, axis, num_examples, positions, own, ())

    _, (factor,) = jax.jvp(in_slots(eqn, [slot], values), (operand,), (jnp.ones_like(operand),))
    x = fold(factor)
    return Layer(x, [(np.arange(x.shape[1]),) * 2], fold, lambda matrix: matrix.reshape(operand.shape))


def _dims_in_result(eqn, slot) -> Sequence[int]:
    ndim = eqn.invars[slot].aval.ndim
    return eqn.params.get("broadcast_dimensions", range(ndim))


def _extent(eqn, slot, dim) -> int:
    """The size of an operand along a dimension of the result."""
    sizes = dict(zip(_dims_in_result(eqn, slot), eqn.invars[slot].aval.shape, strict=True))
    return sizes.get(dim, 1)


def _convolves_each(eqn) -> bool:
    return eqn.params["batch_group_count"] == 1


def _convolution(eqn, slot, values, axis, num_examples) -> Layer:
    images, kernel = values
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    kernel_sizes = [kernel.shape[d] for d in numbers.rhs_spec[2:]]

    def layout(array, spec, batch_axis):
        channels = examples_first(array, batch_axis, num_examples, spec[2:], spec[1:2])
        return channels.reshape(*channels.shape[:2], groups, -1)

    def unfold(matrix):
        matrix = matrix.reshape(*kernel_sizes, *matrix.shape[1:])
        matrix = jnp.moveaxis(matrix, (-3, -1, -2), (0, 1, 2))
        matrix = matrix.reshape(-1, *matrix.shape[2:])
        return matrix.transpose(np.argsort(numbers.rhs_spec))

    image_axis = pull_axis(eqn, 0, 0, axis, num_examples)
    x = layout(images, numbers.lhs_spec, image_axis)
    windows = _kernel_windows(eqn, axis.outer * axis.inner)
    return Layer(x, windows, lambda cotangent: layout(cotangent, numbers.out_spec, axis), unfold)


def _kernel_windows(eqn, copies) -> list[Window]:
    """For each offset of the kernel, the pixels and the outputs that it connects."""
    lines = convolution_lines(eqn)

    def flat(places, sizes):
        # The examples' axis may hold further positions, before the spatial ones.
        grid = np.ix_(np.arange(copies), *places)
        return np.ravel_multi_index(np.broadcast_arrays(*grid), (copies, *sizes)).ravel()

    sizes = [line.pixels for line in lines], [line.outputs for line in lines]
    return [tuple(map(flat, meeting, sizes)) for _, meeting in offsets(lines)]


def _takes_rows(eqn) -> bool:
    numbers, table = eqn.params["dimension_numbers"], eqn.invars[0].aval
    rows = numbers.start_index_map
    sizes = tuple(1 if d in rows else size for d, size in enumerate(table.shape))
    by_rows = len(rows) == 1 and numbers.collapsed_slice_dims == rows and not numbers.operand_batching_dims
    return by_rows and eqn.params["slice_sizes"] == sizes


def _lookup(eqn, slot, values, axis, num_examples) -> Lookup:
    table, indices = values
    numbers = eqn.params["dimension_numbers"]
    (row_dim,) = numbers.start_index_map
    num_rows = table.shape[row_dim]
    index_axis = pull_axis(eqn, 1, 0, axis, num_examples)
    index_positions = [d for d in range(indices.ndim) if d != index_axis.dim]
    rows = examples_first(_int32(indices), index_axis, num_examples, index_positions)
    if eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP:
        rows = jnp.clip(rows, 0, num_rows - 1)

    def fold(cotangent):
        positions = [d for d in range(cotangent.ndim) if d != axis.dim and d not in numbers.offset_dims]
        return examples_first(cotangent, axis, num_examples, positions, numbers.offset_dims)

    def unfold(matrix):
        kept = [size for d, size in enumerate(table.shape) if d != row_dim]
        return jnp.moveaxis(matrix.reshape(num_rows, *kept), 0, row_dim)

    return Lookup(rows, fold, unfold, num_rows)


def _int32(indices: jax.Array) -> jax.Array:
    """Indices of a type that holds as many as a table has rows, which bytes need not."""
    own, wanted = np.iinfo(indices.dtype), np.iinfo(np.int32)
    least, most = (np.asarray(x, own.dtype) for x in (max(own.min, wanted.min), min(own.max, wanted.max)))
    return jnp.clip(indices, least, most).astype(jnp.int32)


def examples_first(array: jax.Array, axis: Axis, num_examples: int, *groups: Sequence[int]) -> jax.Array:
    """Lays an array out as `(B, *groups)`, each group of dimensions flattened into one.

    Whatever shares a dimension with the examples goes to the front of the first group.
    """
    before, after = array.shape[: axis.dim], array.shape[axis.dim + 1 :]
    split = array.reshape(*before, axis.outer, num_examples, axis.inner, *after)
    moved = [[d if d < axis.dim else d + 2 for d in group] for group in groups]
    order = [axis.dim + 1, axis.dim, axis.dim + 2, *(d for group in moved for d in group)]
    sizes = [math.prod(array.shape[d] for d in group) for group in groups]
    if sizes:
        sizes[0] *= axis.outer * axis.inner
    return split.transpose(order).reshape(num_examples, *sizes)
