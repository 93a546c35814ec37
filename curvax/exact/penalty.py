"""The Hessian diagonal of a penalty, which sees the parameters alone.

Most penalties are sums of a function of each entry: their Hessian is diagonal, and its product with a vector of ones
reads it off. The proof is on the penalty's jaxpr. An entry may pass through any operation that keeps entries apart, and
sums of such functions through any linear one; where entries or sums meet in anything else, the arrays they come from
are mixed, and fall back on unit vectors, through the penalty alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Var

from curvax.exact.derivatives import hessian_product, second_derivatives
from curvax.exact.primitives import Entries, is_linear, record
from curvax.exact.trace import flattened
from curvax.trees import at_least_float32


class Provenance(NamedTuple):
    """Where a variable comes from: which arrays, and where its entries are single entries of one, in which layout.

    Two variables of the same `layout` have the same entry in the same place; None stands for sums.
    """

    arrays: frozenset[int]
    layout: Var | None


def penalty_diagonal(
    penalty: Callable[[Any], jax.Array], params: Any, mixed: frozenset[int], chunk_size: int | None
) -> list[jax.Array]:
    """The Hessian diagonal of `penalty`, leaf by leaf.

    Args:
        penalty: `penalty(params) -> scalar`.
        params: where.
        mixed: the leaves that need unit vectors, as `mixed_arrays` says.
        chunk_size: unit vectors at once.

    Returns:
        One array for each leaf, at least float32.
    """
    leaves, treedef = jax.tree.flatten(params)
    ones = [jnp.full_like(leaf, bit not in mixed) for bit, leaf in enumerate(leaves)]
    product = hessian_product(penalty, params)[2](jax.tree.unflatten(treedef, ones))
    diagonal = [at_least_float32(row) for row in jax.tree.leaves(product)]
    for bit in mixed:
        alone = lambda leaf, bit=bit: penalty(jax.tree.unflatten(treedef, [*leaves[:bit], leaf, *leaves[bit + 1 :]]))
        diagonal[bit] = second_derivatives(alone, leaves[bit], chunk_size)
    return diagonal


def mixed_arrays(penalty: Callable[[Any], jax.Array], params: Any) -> frozenset[int]:
    """The leaves of which the penalty is not proved to be a sum of functions of single entries."""
    return _mixed(flattened(jax.make_jaxpr(penalty)(params)).jaxpr)


def _mixed(jaxpr: Jaxpr) -> frozenset[int]:
    known = {var: Provenance(frozenset({bit}), var) for bit, var in enumerate(jaxpr.invars)}
    mixed = frozenset()
    for eqn in jaxpr.eqns:
        operands = {slot: known[v] for slot, v in enumerate(eqn.invars) if isinstance(v, Var) and v in known}
        if operands:
            arrays = frozenset().union(*(operand.arrays for operand in operands.values()))
            layout = _layout(eqn, list(operands.values()))
            known |= dict.fromkeys(eqn.outvars, Provenance(arrays, layout))
            if layout is None and not is_linear(eqn, list(operands)):
                mixed |= arrays
    return mixed


def _layout(eqn: JaxprEqn, operands: Sequence[Provenance]) -> Var | None:
    layouts = {operand.layout for operand in operands}
    if len(layouts) > 1 or None in layouts:
        return None
    entries, (layout,) = record(eqn).entries, layouts
    if entries in (Entries.SAME, Entries.APART):
        return layout if layout.aval.shape == eqn.outvars[0].aval.shape else eqn.outvars[0]
    return eqn.outvars[0] if entries is Entries.MOVED else None
