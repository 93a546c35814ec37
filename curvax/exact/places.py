"""Whether a loss depends on its example's place in the batch, or on a draw for it: a split changes both.

A place shows where examples are counted; where rows are cut out of an array that holds no examples, or written at fixed
places of one that does; and in what is computed from these.
"""

from collections.abc import Mapping, Sequence

from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from curvax.exact.dataflow import Axes
from curvax.exact.equations import is_inexact
from curvax.exact.indices import counted_dimensions
from curvax.exact.loops import bodies
from curvax.exact.primitives import Role, record

PLACE = "a loss depends on its example's place in the batch"
DRAWN = "random numbers are drawn for each example; other parts would draw others"


def depends_on_place(program: ClosedJaxpr, axes: Axes) -> str | None:
    """Why a split changes the losses.

    Args:
      program: the losses, flat.
      axes: the example axis of its variables, those of loops included; None where a variable has none.

    Returns:
      A text, or None if no place and no draw is found.
    """
    return _places(program, axes)[0]


def _places(program: ClosedJaxpr, axes: Axes) -> tuple[str | None, set[Var]]:
    """The reason, and what holds places, for the loop of which the program is the body."""
    places: set[Var] = set()
    counted = counted_dimensions(program.jaxpr, program.consts)
    makers: dict[Var, JaxprEqn] = {}
    for index, eqn in enumerate(program.jaxpr.eqns):
        makers |= dict.fromkeys(eqn.outvars, eqn)
        known, name = record(eqn), eqn.primitive.name
        read = [atom for atom in eqn.invars if isinstance(atom, Var) and atom in places]
        results = [var for var in eqn.outvars if axes.get(var) is not None]
        for body in bodies(eqn) if known.role is Role.LOOP else ():
            reason, inside = _places(body, axes)
            if reason or inside.intersection(var for var in body.jaxpr.outvars if isinstance(var, Var)):
                return reason or PLACE, places
        if known.role is Role.RANDOM and results:
            return DRAWN, places
        if name == "iota" and results and eqn.params["dimension"] == axes[results[0]].dim:
            places.update(results)
        if not read or (name == "gather" and _takes_own_rows(eqn, counted.get(index, {}), places, makers)):
            continue
        folded = known.fold is not None and not any(is_inexact(var.aval) for var in eqn.outvars)
        if results and not (folded and len(read) == 1):
            return PLACE, places
        places.update(results)
    return None, places


def has_fixed_rows(program: ClosedJaxpr, axes: Axes) -> bool:
    """Whether rows are cut out of what holds no examples, or written at fixed places, with arguments as above."""
    for eqn in program.jaxpr.eqns:
        if record(eqn).role is Role.LOOP:
            found = any(has_fixed_rows(body, axes) for body in bodies(eqn))
        else:
            found = any(_is_of_place(eqn, var, axes) for var in eqn.outvars if axes.get(var) is not None)
        if found:
            return True
    return False


def _is_of_place(eqn: JaxprEqn, result: Var, axes: Axes) -> bool:
    """Whether a row of a result is that of a place, and not of an example."""
    name, axis = eqn.primitive.name, axes[result]
    if name in ("iota", "broadcast_in_dim"):
        return False  # Of the one the rows are places themselves, of the other they are all the same.
    if not any(isinstance(atom, Var) and axes.get(atom) is not None for atom in eqn.invars):
        return True
    if name == "dynamic_update_slice":
        return eqn.invars[1].aval.shape[axis.dim] != result.aval.shape[axis.dim]
    return name.startswith("scatter") and not _writes_all_rows(eqn, axis.dim)


def _writes_all_rows(eqn: JaxprEqn, dim: int) -> bool:
    """Whether a scatter writes all along a dimension, or apart for each place of it."""
    numbers, (operand, _, updates) = eqn.params["dimension_numbers"], (atom.aval for atom in eqn.invars)
    if dim in numbers.operand_batching_dims:
        return True
    apart = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    window = [d for d in range(operand.ndim) if d not in apart]
    return dim in window and updates.shape[numbers.update_window_dims[window.index(dim)]] == operand.shape[dim]


def _takes_own_rows(
    eqn: JaxprEqn, counted: Mapping[int, int], places: set[Var], makers: Mapping[Var, JaxprEqn]
) -> bool:
    """Whether a gather takes each example's own row, wherever it stands, as `logits[jnp.arange(B), labels]` does."""
    operand, indices = eqn.invars[:2]
    if operand in places or len(counted) != 1:
        return False
    return indices.aval.shape[-1] == 1 or sum(part in places for part in _components(indices, makers)) == 1


def _components(indices: Var | Literal, makers: Mapping[Var, JaxprEqn]) -> Sequence[Var | Literal]:
    """What an array of indices is put together from; itself twice where that is not known."""
    maker = makers.get(indices) if isinstance(indices, Var) else None
    if maker is not None and maker.primitive.name == "convert_element_type":
        return _components(maker.invars[0], makers)
    parts = maker.invars if maker is not None and maker.primitive.name == "concatenate" else [indices, indices]
    return [part for part in parts if isinstance(part, Var)]
