"""Kernels as matrices: which axes of an array count the inputs of a layer, and which its outputs.

Said as `optax.contrib.muon` says it, by `MuonDimensionNumbers`: the reduction axes are the rows, the output axes the
columns, and every other axis counts matrices that have nothing to do with each other, such as experts, heads or the
layers of a scanned network.
"""

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from curvax.layers import group, path_name
from curvax.stacks import Stacked
from curvax.trees import is_hole

#: A tree like the parameters of `MuonDimensionNumbers`, with `None` for what is no matrix; a function from parameters
#: to such a tree; `curvax.Stacked`, which says what counts matrices; or `None` for the rule of `matrices_of`.
DimensionNumbers = Any | Callable[[optax.Params], Any] | Stacked | None


@dataclasses.dataclass(frozen=True)
class Matrices:
    """An array of shape `shape` as a stack of matrices.

    Attributes:
      shape: of the array.
      stack: the axes that count matrices.
      rows: the axes of the inputs; none of a vector.
      columns: the axes of the outputs.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def dims(self) -> tuple[int, int, int]:
        """How many matrices, rows and columns."""
        size = lambda axes: math.prod(self.shape[i] for i in axes)
        return size(self.stack), size(self.rows), size(self.columns)

    def split(self, x: jax.Array) -> jax.Array:
        """The array as `(matrices, rows, columns)`."""
        return x.transpose(self._order).reshape(self.dims)

    def join(self, x: jax.Array) -> jax.Array:
        """The matrices as an array of `shape`."""
        back = tuple(self._order.index(i) for i in range(len(self.shape)))
        return x.reshape([self.shape[i] for i in self._order]).transpose(back)

    @property
    def _order(self) -> tuple[int, ...]:
        return self.stack + self.rows + self.columns


def matrices_of(tree: Any, dimension_numbers: DimensionNumbers = None) -> list[Matrices | None]:
    """How each leaf of a tree is taken for matrices; None for what is empty.

    Formula:
      Without dimension numbers a kernel of `layers.group` has its last axis for columns and all axes before it for
      rows; the axes of a stack that count layers, as `scan` and `vmap` over modules make them, count matrices. A vector
      is a matrix without rows.

    Args:
      tree: a pytree of arrays.
      dimension_numbers: see `DimensionNumbers`.

    Returns:
      One entry for each leaf.

    Raises:
      ValueError: if dimension numbers do not fit the tree or an array.

    Example:
      >>> import jax.numpy as jnp
      >>> convolution, stack = jnp.ones((3, 3, 8, 16)), {"bias": jnp.ones((5, 9)), "kernel": jnp.ones((5, 8, 9))}
      >>> [found.dims for found in matrices_of({"a": convolution, "b": stack})]
      [(1, 72, 16), (5, 1, 9), (5, 8, 9)]
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if dimension_numbers is None or isinstance(dimension_numbers, Stacked):
        layers = group(leaves, "kernel" if dimension_numbers is None else dimension_numbers)
        kernels = {i for layer in layers for i in layer.measured}
        axes = {i: stack for layer in layers for i, stack in zip(layer.scaled, layer.axes, strict=True)}
        return [_by_layer(x.shape, axes[i], i in kernels) for i, (_, x) in enumerate(leaves)]
    numbers = dimension_numbers(tree) if callable(dimension_numbers) else dimension_numbers
    treedef: Any  # Of jaxlib, which says nothing of types.
    nodes, treedef = jax.tree.flatten(tree, is_leaf=is_hole)
    try:
        numbers = treedef.flatten_up_to(numbers)
    except ValueError as error:
        message = f"weight_dimension_numbers does not fit the parameters; pass a tree like them. {error}"
        raise ValueError(message) from error
    numbers = [said for said, node in zip(numbers, nodes, strict=True) if not is_hole(node)]
    found: list[Matrices | None] = []
    for (path, x), said in zip(leaves, numbers, strict=True):
        if said is not None and not isinstance(said, MuonDimensionNumbers):
            raise ValueError(
                f"the dimension numbers of '{path_name(path)}' are {said!r}; pass optax.contrib.MuonDimensionNumbers,"
                " or None for what is no matrix."
            )
        found.append(
            _by_layer(x.shape, (), False) if said is None else _matrices(path, x, said.reduction_axis, said.output_axis)
        )
    return found


def _by_layer(shape: tuple[int, ...], stack: tuple[int, ...], is_kernel: bool) -> Matrices | None:
    """The last axis of what is no stack for columns; of a vector all axes."""
    rest = tuple(i for i in range(len(shape)) if i not in stack)
    rows = rest[:-1] if is_kernel else ()
    return Matrices(shape, stack, rows, rest[len(rows) :]) if math.prod(shape) else None


def of_norm_one(m: jax.Array) -> jax.Array:
    """Matrices `(..., m, n)` over their Frobenius norms, none of which overflows or vanishes; zeros stay.

    Example:
      >>> import jax.numpy as jnp
      >>> print(of_norm_one(jnp.array([[3e30, 4e30]])))
      [[0.6 0.8]]
    """
    top = jnp.max(jnp.abs(m), axis=(-2, -1), keepdims=True, initial=0)
    m = m / jnp.where(top == 0, 1, top)
    norm = jnp.sqrt(jnp.sum(jnp.square(jnp.abs(m)), axis=(-2, -1), keepdims=True))
    return m / jnp.where(norm == 0, 1, norm)


def _matrices(path: Any, x: Any, rows: Any, columns: Any) -> Matrices | None:
    shape = x.shape
    try:
        given = tuple(tuple(operator.index(i) for i in np.ravel(np.array(axes, object))) for axes in (rows, columns))
    except TypeError:
        raise ValueError(
            f"'{path_name(path)}' has rows {rows!r} and columns {columns!r}; pass the number of an axis, or several."
        ) from None
    if any(not -len(shape) <= i < len(shape) for axes in given for i in axes):
        raise ValueError(
            f"'{path_name(path)}' has the shape {shape}, and no axes {given[0]} and {given[1]}; pass its own."
        )
    rows, columns = (tuple(i % len(shape) for i in axes) for axes in given)
    if len({*rows, *columns}) < len(rows) + len(columns) or not rows or not columns:
        raise ValueError(f"'{path_name(path)}' has rows {given[0]} and columns {given[1]}; each axis is one of them.")
    stack = tuple(i for i in range(len(shape)) if i not in rows + columns)
    return Matrices(shape, stack, rows, columns) if math.prod(shape) else None
