"""`logits[jnp.arange(B), labels]`: the common way to say that every example takes an entry of its own row.

In the jaxpr it is a gather whose indices were computed, from a count and from data. Whatever depends on nothing is
folded into constants; where a component of the indices then turns out to count a dimension, the gather moves that
dimension whole.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from curvax.exact.primitives import ELEMENTWISE
from curvax.exact.trace import apply

# Larger constants are not worth folding: they would be data.
LARGEST = 2**20

# What says where values are, not which.
PLACEMENTS = frozenset("mesh_cast pcast pvary reshard sharding_constraint".split())
# What computes indices. Collectives are not among them: they mean nothing outside their mesh.
FOLDED = ELEMENTWISE | frozenset(
    "broadcast_in_dim concatenate cumsum dynamic_slice iota pad reduce_sum reshape rev slice squeeze transpose".split()
)

# For each gather, by its place: which dimension of the operand each dimension of the result counts.
Counted = dict[int, dict[int, int]]


def counted_dimensions(jaxpr: Jaxpr, consts: Sequence[Any]) -> Counted:
    """The dimensions that gathers move whole because their indices count them."""
    known = {var: np.asarray(c) for var, c in zip(jaxpr.constvars, consts, strict=True) if _is_concrete(c)}
    makers, counted = {}, {}
    for index, eqn in enumerate(jaxpr.eqns):
        makers |= dict.fromkeys(eqn.outvars, eqn)
        if eqn.primitive.name == "gather":
            counted[index] = _counted(eqn, known, makers)
        elif (
            eqn.primitive.name in FOLDED
            and all(_is_index(var) for var in eqn.outvars)
            and all(_is_known(atom, known) for atom in eqn.invars)
        ):
            values = _fold(eqn, [a.val if isinstance(a, Literal) else known[a] for a in eqn.invars])
            known |= {var: np.asarray(value) for var, value in zip(eqn.outvars, values, strict=True)}
    return counted


def _fold(eqn: JaxprEqn, values: Sequence[Any]) -> Sequence[Any]:
    """The results of an equation whose operands are constants."""
    if eqn.primitive.name in PLACEMENTS:
        return values
    with jax.ensure_compile_time_eval():
        return apply(eqn, *values)


def _counted(eqn: JaxprEqn, known, makers) -> dict[int, int]:
    numbers, operand = eqn.params["dimension_numbers"], eqn.invars[0].aval
    batch_dims = [d for d in range(eqn.outvars[0].aval.ndim) if d not in numbers.offset_dims]
    counted = {}
    for dim, component in zip(numbers.start_index_map, _components(eqn.invars[1], known, makers), strict=True):
        for place, out_dim in enumerate(batch_dims if component is not None else ()):
            shape = [-1 if d == place else 1 for d in range(component.ndim)]
            count = np.arange(operand.shape[dim]).reshape(shape)
            same_size = component.shape[place] == operand.shape[dim]
            if dim in numbers.collapsed_slice_dims and same_size and np.all(component == count):
                counted[out_dim] = dim
    return counted


def _components(indices: Var | Literal, known, makers) -> list[np.ndarray | None]:
    """Each component of an array of indices, along its last dimension, as far as it is known."""
    if _is_known(indices, known):
        return list(np.moveaxis(np.asarray(indices.val if isinstance(indices, Literal) else known[indices]), -1, 0))
    maker = makers.get(indices)
    last = indices.aval.ndim - 1
    if maker is None or maker.primitive.name != "concatenate" or maker.params["dimension"] != last:
        return [None] * indices.aval.shape[-1]
    parts = [_components(part, known, makers) for part in maker.invars]
    return [component for part in parts for component in part]


def _is_known(atom, known) -> bool:
    return isinstance(atom, Literal) or atom in known


def _is_index(var: Var) -> bool:
    exact = jnp.issubdtype(var.aval.dtype, jnp.integer) or jnp.issubdtype(var.aval.dtype, jnp.bool_)
    return exact and var.aval.size <= LARGEST


def _is_concrete(value) -> bool:
    return not isinstance(value, jax.core.Tracer) and jnp.result_type(value).kind in "iub"
