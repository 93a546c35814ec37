"""Loops and branches, whose bodies are programs of their own: how what is known of results reaches operands.

Nothing is unrolled: a body is read until what is known of its carry no longer changes, which takes a few times whatever
the number of steps.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from curvax.exact.dataflow import Axes, meet
from curvax.exact.primitives import Axis

#: From a body, and the axes of some of its results by place, to those of its variables.
Walk = Callable[[ClosedJaxpr, Mapping[int, Axis | None]], Axes]
#: The axes of the operands of an equation, by place, and those of the variables of its bodies.
Found = tuple[dict[int, Axis | None], Axes]


class Unproved(Exception):
    """Says of what nothing is proved."""


def operand_axes(eqn: JaxprEqn, results: Mapping[int, Axis | None], walk: Walk) -> Found:
    """The axes along which each slice of an operand reaches one example alone, from those of the results.

    Args:
      eqn: a loop or a branch.
      results: the axes of its results, by place.
      walk: does the same for a body.

    Returns:
      For each operand that reaches a result its axis; and for each variable of the bodies.

    Raises:
      Unproved: if an example is found to read others by what steps leave.
    """
    return {"scan": _scan, "while": _while, "cond": _cond}[eqn.primitive.name](eqn, results, walk)


def over_examples(eqn: JaxprEqn, results: Mapping[int, Axis | None]) -> bool:
    """Whether the steps of a scan are examples, for one of its results at least."""
    _, carried = scan_numbers(eqn)
    return any(axis and axis.dim == 0 for i, axis in results.items() if i >= carried)


def scan_numbers(eqn: JaxprEqn) -> tuple[int, int]:
    """How many operands of a scan are the same in all steps, and how many are carried."""
    params = eqn.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carried, _ = (len(list(part)) for part in params["ft_in"].update(eqn.invars).unpack())
    return consts, carried


def bodies(eqn: JaxprEqn) -> list[ClosedJaxpr]:
    """The programs inside of a loop or a branch."""
    params = eqn.params
    of = {"scan": ["jaxpr"], "while": ["cond_jaxpr", "body_jaxpr"], "cond": []}[eqn.primitive.name]
    found = [params[name] for name in of] or params["branches"]
    return [body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ()) for body in found]


def rebuilt(
    eqn: JaxprEqn, operands: Sequence[jax.Array], inner: Callable[[ClosedJaxpr, Sequence[Any]], list[Any]]
) -> list[Any]:
    """The results of a loop or a branch, with what `inner` makes of a body and its operands in the body's place."""
    params, name = eqn.params, eqn.primitive.name
    if name == "cond":
        index, *operands = operands
        return list(lax.switch(index, [lambda *x, body=body: inner(body, x) for body in bodies(eqn)], *operands))
    if name == "while":
        condition, body = bodies(eqn)
        own, consts, carry = _parted(operands, params["cond_nconsts"], params["body_nconsts"])
        # Under `vmap` an entry for each example may decide: the loop goes on while any does.
        keeps_on = lambda carry: jnp.any(inner(condition, [*own, *carry])[0])
        return list(lax.while_loop(keeps_on, lambda carry: inner(body, [*consts, *carry]), carry))
    consts, carry, xs = _parted(operands, *scan_numbers(eqn))
    (body,) = bodies(eqn)

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        results = inner(body, [*consts, *carry, *xs])
        return results[: len(carry)], results[len(carry) :]

    carry, ys = lax.scan(step, carry, xs, params["length"], params["reverse"])
    return [*carry, *ys]


def _parted(values: Sequence[Any], first: int, second: int) -> tuple[list[Any], list[Any], list[Any]]:
    return list(values[:first]), list(values[first : first + second]), list(values[first + second :])


def _scan(eqn: JaxprEqn, results: Mapping[int, Axis | None], walk: Walk) -> Found:
    (body,), (consts, carried) = bodies(eqn), scan_numbers(eqn)
    if over_examples(eqn, results) and all(i >= carried and axis == Axis(0) for i, axis in results.items()):
        # Step by step the examples themselves, unless a step reads what another one left.
        inside = walk(body, dict.fromkeys(results))
        if not any(var in inside for var in body.jaxpr.invars[consts : consts + carried]):
            xs = range(consts + carried, len(eqn.invars))
            reached = _reached(body, inside)
            return {slot: Axis(0) if slot in xs else axis for slot, axis in reached.items()}, inside
    if over_examples(eqn, results):
        raise Unproved("a loop goes from example to example, and a step reads what others left")
    steps = {i: axis if i < carried else _moved(axis, -1) for i, axis in results.items()}
    inside = _settled(body, steps, range(consts, consts + carried), walk)
    reached = _reached(body, inside)
    return {slot: axis if slot < consts + carried else _moved(axis, 1) for slot, axis in reached.items()}, inside


def _while(eqn: JaxprEqn, results: Mapping[int, Axis | None], walk: Walk) -> Found:
    condition, body = bodies(eqn)
    for_condition, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    # What decides on a further step reaches everything.
    deciding = walk(condition, {0: None})
    decides = _reached(condition, deciding)
    operands: dict[int, Axis | None] = {slot: None for slot in decides if slot < for_condition}
    results = {**results, **{slot - for_condition: None for slot in decides if slot >= for_condition}}
    inside = _settled(body, results, range(consts, len(body.jaxpr.invars)), walk)
    operands |= {for_condition + slot: axis for slot, axis in _reached(body, inside).items()}
    # A loop of no steps returns what it was given.
    for i, axis in results.items():
        slot = for_condition + consts + i
        operands[slot] = meet(operands, slot, axis)
    return operands, {**deciding, **inside}


def _cond(eqn: JaxprEqn, results: Mapping[int, Axis | None], walk: Walk) -> Found:
    operands: dict[int, Axis | None] = {0: None}
    inside: dict[Var, Axis | None] = {}
    for branch in bodies(eqn):
        found = walk(branch, results)
        for slot, axis in _reached(branch, found).items():
            operands[slot + 1] = meet(operands, slot + 1, axis)
        inside |= {var: meet(inside, var, axis) for var, axis in found.items()}
    return operands, inside


def _settled(body: ClosedJaxpr, results: Mapping[int, Axis | None], carry: range, walk: Walk) -> Axes:
    """The axes inside of a body whose carry comes back to it."""
    known = dict(results)
    while True:
        inside = walk(body, known)
        before = dict(known)
        for i, slot in enumerate(carry):
            var = body.jaxpr.invars[slot]
            if var in inside:
                known[i] = meet(known, i, inside[var])
        if known == before:
            return inside


def _reached(body: ClosedJaxpr, inside: Axes) -> dict[int, Axis | None]:
    """The axes of those operands of a body that reach a result."""
    return {slot: inside[var] for slot, var in enumerate(body.jaxpr.invars) if var in inside}


def _moved(axis: Axis | None, by: int) -> Axis | None:
    """The axis in one step, or in all, which are stacked along the first one."""
    return None if axis is None else axis._replace(dim=axis.dim + by)


def seeds(body: ClosedJaxpr, results: Mapping[int, Axis | None]) -> dict[Var, Axis | None]:
    """The axes of the variables that are the results of a body."""
    axes: dict[Var, Axis | None] = {}
    for i, axis in results.items():
        var = body.jaxpr.outvars[i]
        if not isinstance(var, Literal):
            axes[var] = meet(axes, var, axis)
    return axes
