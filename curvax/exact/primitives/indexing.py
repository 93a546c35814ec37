"""Operations by index: look-ups, and what is written to places."""

import jax
import jax.numpy as jnp
import numpy as np

from curvax.exact.primitives.layers import Lookup, examples_first
from curvax.exact.primitives.record import Entries, Form, LayerRule, Primitive, along, records


def _gather_form(eqn) -> Form:
    """What is filled in for indices out of range is no function of the operand."""
    fills = eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    return Form.PIECEWISE if fills and eqn.params["fill_value"] not in (None, 0) else Form.LINEAR


def _gather(eqn, slot, dim):
    numbers, operand = eqn.params["dimension_numbers"], eqn.invars[0].aval
    batch_dims = [d for d in range(eqn.outvars[0].aval.ndim) if d not in numbers.offset_dims]
    if slot == 1:
        return batch_dims.index(dim) if dim in batch_dims else None
    if dim in numbers.offset_dims:
        absent = numbers.collapsed_slice_dims + numbers.operand_batching_dims
        kept = [d for d in range(operand.ndim) if d not in absent]
        return kept[numbers.offset_dims.index(dim)]
    position = batch_dims.index(dim)
    if position in numbers.start_indices_batching_dims:
        return numbers.operand_batching_dims[numbers.start_indices_batching_dims.index(position)]
    return None


_gather_axis = along(_gather)


def _fits(eqn, slot, axis, num_examples) -> bool:
    table, indices = (_gather_axis(eqn, i, 0, axis, num_examples) for i in (0, 1))
    return slot == 0 and _takes_rows(eqn) and table is None and indices is not None


def _takes_rows(eqn) -> bool:
    numbers, table = eqn.params["dimension_numbers"], eqn.invars[0].aval
    rows = numbers.start_index_map
    sizes = tuple(1 if d in rows else size for d, size in enumerate(table.shape))
    by_rows = len(rows) == 1 and numbers.collapsed_slice_dims == rows and not numbers.operand_batching_dims
    return by_rows and eqn.params["slice_sizes"] == sizes


def _lookup(eqn, slot, axis, num_examples) -> Lookup:
    numbers, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    (row_dim,) = numbers.start_index_map
    num_rows = shape[row_dim]
    index_axis = _gather_axis(eqn, 1, 0, axis, num_examples)

    def operand(values):
        positions = [d for d in range(values[1].ndim) if d != index_axis.dim]
        rows = examples_first(_int32(values[1]), index_axis, num_examples, positions)
        clips = eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP
        return jnp.clip(rows, 0, num_rows - 1) if clips else rows

    def fold(cotangent):
        positions = [d for d in range(cotangent.ndim) if d != axis.dim and d not in numbers.offset_dims]
        return examples_first(cotangent, axis, num_examples, positions, numbers.offset_dims)

    def unfold(matrix):
        kept = [size for d, size in enumerate(shape) if d != row_dim]
        return jnp.moveaxis(matrix.reshape(num_rows, *kept), 0, row_dim)

    return Lookup(operand, fold, unfold, num_rows)


def _int32(indices: jax.Array) -> jax.Array:
    """Indices of a type that holds as many as a table has rows, which bytes need not."""
    own, wanted = np.iinfo(indices.dtype), np.iinfo(np.int32)
    least, most = (np.asarray(x, own.dtype) for x in (max(own.min, wanted.min), min(own.max, wanted.max)))
    return jnp.clip(indices, least, most).astype(jnp.int32)


def _scatter(eqn, slot, dim):
    """The result is the operand with some windows changed: those of one index, or, by batches, one index for each."""
    numbers, ndim = eqn.params["dimension_numbers"], eqn.outvars[0].aval.ndim
    if slot == 0:
        return dim
    batched = dim in numbers.operand_batching_dims
    index_dim = numbers.scatter_indices_batching_dims[numbers.operand_batching_dims.index(dim)] if batched else None
    if slot == 1:
        return index_dim
    if batched:
        return [d for d in range(eqn.invars[2].aval.ndim) if d not in numbers.update_window_dims][index_dim]
    absent = numbers.inserted_window_dims + numbers.operand_batching_dims
    kept = [d for d in range(ndim) if d not in absent]
    return numbers.update_window_dims[kept.index(dim)] if dim in kept else None


RECORDS = [
    Primitive("gather", _gather_form, Entries.MOVED, _gather_axis, LayerRule(_fits, _lookup)),
    *records(Form.LINEAR, "scatter scatter-add scatter-sub", axis=along(_scatter)),
]
