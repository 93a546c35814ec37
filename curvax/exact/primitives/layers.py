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

from curvax.exact.equations import in_slots
from curvax.exact.primitives.record import Axis, LayerRule

# One window: the positions of the operand, and those of the result, that meet through one matrix.
Window = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear operation in which a parameter meets the examples.

    Attributes:
        operand: from the values of the operation's operands, what multiplies the parameter,
            `(B, positions, groups, inputs)`.
        windows: which positions of that and of the result share a matrix.
        fold: lays out a cotangent of the result as `(B, positions, groups, outputs)`.
        unfold: gives `(windows, groups, inputs, outputs)` the parameter's shape.
    """

    operand: Callable[[Sequence[jax.Array]], jax.Array]
    windows: Sequence[Window]
    fold: Callable[[jax.Array], jax.Array]
    unfold: Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Rows taken from a table.

    Attributes:
        operand: from the values of the operation's operands, which row each position takes, `(B, positions)`; a row
            outside the table has no derivative.
        fold: lays out a cotangent of the result as `(B, positions, outputs)`.
        unfold: gives `(rows, outputs)` the parameter's shape.
        num_rows: the length of the table.
    """

    operand: Callable[[Sequence[jax.Array]], jax.Array]
    fold: Callable[[jax.Array], jax.Array]
    unfold: Callable[[jax.Array], jax.Array]
    num_rows: int


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


def each_itself(shape: Sequence[int], axis: Axis, positions: Sequence[int]) -> list[Window]:
    """The one window in which every position, along some dimensions of a result, meets itself."""
    size = axis.outer * axis.inner * math.prod(shape[d] for d in positions)
    return [(np.arange(size),) * 2]


# A bias, a scale, a mask, a broadcast: whatever the operation is, its derivative is one factor per entry.


def _fits_entries(eqn: JaxprEqn, slot: int, axis: Axis, num_examples: int) -> bool:
    sizes = dict(zip(_dims_in_result(eqn, slot), eqn.invars[slot].aval.shape, strict=True))
    return sizes.get(axis.dim, 1) == 1


def _entries(eqn: JaxprEqn, slot: int, axis: Axis, num_examples: int) -> Layer:
    shape, out = eqn.invars[slot].aval.shape, eqn.outvars[0].aval
    own = [d for i, d in enumerate(_dims_in_result(eqn, slot)) if d != axis.dim and shape[i] == out.shape[d]]
    positions = [d for d in range(out.ndim) if d != axis.dim and d not in own]

    def operand(values):
        _, (factor,) = jax.jvp(in_slots(eqn, [slot], values), (values[slot],), (jnp.ones_like(values[slot]),))
        return fold(factor)

    def fold(cotangent):
        return examples_first(cotangent, axis, num_examples, positions, own, ())

    return Layer(operand, each_itself(out.shape, axis, positions), fold, lambda matrix: matrix.reshape(shape))


def _dims_in_result(eqn: JaxprEqn, slot: int) -> Sequence[int]:
    return eqn.params.get("broadcast_dimensions", range(eqn.invars[slot].aval.ndim))


ENTRIES = LayerRule(_fits_entries, _entries)
