"""Rotations of a layer's inputs and outputs: arrays in its basis and back, and losses of rotated parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from curvax.matrices import Matrices
from curvax.meshes import on_auto
from curvax.objective import Objective
from curvax.trees import is_hole, statistics_dtype


class Sides(NamedTuple):
    """What belongs to the rows of stacks of matrices, `(S, m, m)`, and to their columns, `(S, n, n)`.

    Attributes:
      rows: an array, or None for a side that stays in coordinates; in a state a tree of arrays.
      columns: the same.
    """

    rows: Any
    columns: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """The basis of one array: `U^T X V`, and back."""

    vectors: Sides
    matrices: Matrices | None = dataclasses.field(metadata={"static": True})

    def into(self, x: jax.Array) -> jax.Array:
        """An array in the basis, of the same shape."""
        return self._times(x, *self.vectors, transposed=True)

    def back(self, x: jax.Array) -> jax.Array:
        """An array of the basis in coordinates."""
        return self._times(x, *self.vectors, transposed=False)

    def _times(self, x: jax.Array, u: jax.Array | None, v: jax.Array | None, transposed: bool) -> jax.Array:
        if self.matrices is None or (u is None and v is None):
            return x
        dtype = statistics_dtype(x.dtype)
        turn = (lambda a: a.mT) if transposed else (lambda a: a)
        m = self.matrices.split(x.astype(dtype))
        m = m if u is None else turn(u).astype(dtype) @ m
        m = m if v is None else m @ turn(v).astype(dtype).mT
        return self.matrices.join(m)


def rotated_objective(objective: Any, params: Any, basis: Any) -> tuple[Any, Any]:
    """A loss as a function of the rotated parameters, and these: its Hessian is that of the loss in the basis.

    Args:
      objective: an `Objective` without other output, or a function `params -> scalar`.
      params: a tree of arrays, which may have holes.
      basis: a tree like it of `Rotation`.

    Returns:
      The objective and its argument.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax.rotations import Rotation, Sides, rotated_objective
      >>> from curvax.matrices import matrices_of
      >>> loss = lambda w: w[0, 0] * w[1, 0]
      >>> w, u = jnp.ones((2, 1)), jnp.array([[[1.0, 1.0], [1.0, -1.0]]]) / 2**0.5
      >>> rotated, q = rotated_objective(loss, w, Rotation(Sides(u, None), *matrices_of(w)))
      >>> print(jax.hessian(rotated)(q).reshape(2, 2).round(4) + 0.0)
      [[ 1.  0.]
       [ 0. -1.]]
    """
    back = lambda inside: rotated(inside, basis, Rotation.back)
    # Of the dtypes that the loss was written for.
    whole = lambda inside: jax.tree.map(lambda x, w: x.astype(w.dtype), back(inside), params)
    inside = rotated(params, basis)
    if not isinstance(objective, Objective):
        return lambda inside: objective(whole(inside)), inside
    predict, penalty = objective.predict, objective.penalty
    objective = dataclasses.replace(
        objective,
        predict=lambda inside, data: predict(whole(inside), data),
        penalty=None if penalty is None else lambda inside: penalty(whole(inside)),
    )
    return objective, inside


def rotated(tree: Any, basis: Any, way: Callable[[Rotation, jax.Array], jax.Array] = Rotation.into) -> Any:
    """The leaves of a tree in the basis, or back, divided between devices as they were."""
    turn = lambda x, rotation: on_auto(lambda x, rotation: way(rotation, x), x, rotation, like=x)
    return jax.tree.map(lambda x, rotation: x if is_hole(x) else turn(x, rotation), tree, basis, is_leaf=is_hole)
