"""Whether a batch may be split: which arrays of the data are divided, and that each part then computes its own losses.

The routes follow derivatives, and call whatever has none a constant: a `stop_gradient` of the batch's mean, say. Here
such constants count, for they change when the batch does. So every operand is followed, through every call. And since a
part is computed by the user's functions anew, the program that they are for a part is traced too and compared with that
for the batch: operation by operation the same, in shapes that differ along the axis of the examples alone.

What holds of the losses must hold of their derivatives, and a `custom_jvp` or `custom_vjp` has its own. Their rules
are therefore read as a part of the program: to what a call returns is added what its rule makes of tangents, for which
the operands themselves stand. A backward rule is transposed to be read so, and has to be linear: the parts send it
gradients of means over fewer examples, which are larger.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var

from curvax.exact.dataflow import ORDER, meet, operand_axes
from curvax.exact.equations import apply, callee, derivative, evaluate, in_slots, is_inexact, read
from curvax.exact.indices import counted_dimensions
from curvax.exact.loops import Unproved, rebuilt, seeds
from curvax.exact.loops import operand_axes as loop_axes
from curvax.exact.places import PLACE, depends_on_place, has_fixed_rows
from curvax.exact.primitives import Axis, Role, differentiable_slots, record
from curvax.exact.sameness import same_program
from curvax.exact.trace import flattened, leaf_paths, live, nonlinear_backward
from curvax.objective import Objective


def example_axes(objective: Objective, params: Any, parts: int) -> list[Axis | None] | str:
    """Along which axis each array of the data is divided when the batch is split into equal parts.

    Args:
        objective: network, loss and data.
        params: a pytree of arrays.
        parts: how many; they divide the number of examples.

    Returns:
        For each leaf of the data the axis of the examples, or None where every part has it whole; or a text that says
        why the batch cannot be split.
    """
    leaves, treedef = jax.tree.flatten((params, objective.data))
    closed = _losses(objective, treedef, leaves)
    try:
        program = _with_rules(closed)
        num_examples = closed.out_avals[0].shape[0]
        axes = _axes(program, {i: Axis(0) for i in range(len(program.jaxpr.outvars))}, num_examples)
    except Unproved as unproved:
        return str(unproved)
    jaxpr, num_params = program.jaxpr, len(jax.tree.leaves(params))
    found = [axes.get(var) for var in jaxpr.invars]
    if any(axis is not None for axis in found[:num_params]):
        return "a parameter has an entry for each example"
    if any(axes.get(var) is not None for var in jaxpr.constvars):
        return "the objective closes over an array with an entry for each example; pass it in data"
    reason = depends_on_place(program, axes)
    if reason:
        return reason
    part = [_shortened(leaf, axis, parts) for leaf, axis in zip(leaves, found, strict=True)]
    try:
        alike = same_program(program, _with_rules(_losses(objective, treedef, part)), axes, parts)
    except Exception:  # Whatever the user's code raises, on shapes that it was not written for.
        alike = False
    if not alike:
        paths = leaf_paths(objective.data)
        whole = [path for path, axis in zip(paths, found[num_params:], strict=True) if axis is None]
        seen = ", ".join(map(repr, filter(None, whole))) or "the batch"
        return f"examples are not proved to be independent of each other (each loss may read all of {seen})"
    if has_fixed_rows(program, axes):
        return PLACE
    return found[num_params:]


def _losses(objective: Objective, treedef: Any, leaves: Sequence[Any]) -> ClosedJaxpr:
    def losses(*leaves: Any) -> jax.Array:
        params, data = treedef.unflatten(leaves)
        return objective.example_losses(objective.predict(params, data), data)

    return jax.make_jaxpr(losses)(*leaves)


def _with_rules(closed: ClosedJaxpr) -> ClosedJaxpr:
    """A flat program that reads all that the losses and their derivatives read: it is not one to be run."""
    _check_backward(closed)
    read_too = jax.make_jaxpr(lambda *inputs: _read_rules(closed, inputs, ORDER))(*closed.in_avals)
    return live(flattened(read_too))


def _check_backward(closed: ClosedJaxpr) -> None:
    name = nonlinear_backward(closed.jaxpr)
    if name is not None:
        raise Unproved(f"the backward rule of {name!r} is not proved to be linear, and gradients of a part are larger")


def _read_rules(closed: ClosedJaxpr, inputs: Sequence[jax.Array], order: int) -> list[Any]:
    def apply_rule(eqn: JaxprEqn, *values: jax.Array) -> list[Any]:
        role = record(eqn).role
        if role is Role.LOOP:
            return rebuilt(eqn, values, functools.partial(_read_rules, order=order))
        if role not in (Role.CALL, Role.RULE):
            return apply(eqn, *values)
        results = _read_rules(callee(eqn), values, order)
        slots = differentiable_slots(eqn) if order and role is Role.RULE else ()
        if not slots:
            return results
        found = _read_rules(_rule(eqn, slots), [*values, *(values[slot] for slot in slots)], order - 1)
        ruled, tangents = found[: len(results)], found[len(results) :]
        return [value + x + t for value, x, t in zip(results, ruled, tangents, strict=True)]

    env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env |= zip(closed.jaxpr.invars, inputs, strict=True)
    env = evaluate(closed.jaxpr.eqns, env, apply_rule)
    return [read(env, atom) for atom in closed.jaxpr.outvars]


def _rule(eqn: JaxprEqn, slots: Sequence[int]) -> ClosedJaxpr:
    """What a call's own rule makes of its operands and the tangents of some: the results, and their tangents."""

    def pushed(operands: Any, tangents: Any) -> tuple[Any, ...]:
        results, pull = jax.vjp(in_slots(eqn, slots, operands), *(operands[slot] for slot in slots))
        return results, *jax.linear_transpose(pull, results)(tuple(tangents))

    forward = eqn.primitive.name == "custom_jvp_call"
    operands = [atom.aval for atom in eqn.invars]
    try:
        if eqn.params.get("symbolic_zeros"):
            raise TypeError("what the rule does depends on which operands are differentiated")
        if not all(map(is_inexact, (var.aval for var in eqn.outvars))):
            raise TypeError("results without a tangent")
        rule = derivative(eqn, slots) if forward else pushed
        closed = jax.make_jaxpr(rule)(operands, [operands[slot] for slot in slots])
    except Exception as error:  # Whatever a rule raises that is traced by itself.
        name = callee(eqn).jaxpr.debug_info.func_name
        raise Unproved(f"nothing is proved of the derivative rule of {name!r}") from error
    _check_backward(closed)
    return closed


def _shortened(leaf: Any, axis: Axis | None, parts: int) -> Any:
    shape = list(jnp.shape(leaf))
    if axis is not None:
        shape[axis.dim] //= parts
    return jax.typeof(leaf).update(shape=tuple(shape))


def _axes(program: ClosedJaxpr, results: Mapping[int, Axis | None], num_examples: int) -> dict[Var, Axis | None]:
    """For every variable from which a loss is computed, the axis along which each slice reaches one loss alone."""
    axes, counted = seeds(program, results), counted_dimensions(program.jaxpr, program.consts)
    inside: dict[Var, Axis | None] = {}
    walk = functools.partial(_axes, num_examples=num_examples)
    for index, eqn in reversed(list(enumerate(program.jaxpr.eqns))):
        found = {result: axes[var] for result, var in enumerate(eqn.outvars) if var in axes}
        if not found:
            continue
        if record(eqn).role is Role.LOOP:
            operands, inner = loop_axes(eqn, found, walk)
            # A body may be that of several loops.
            inside |= {var: meet(inside, var, axis) for var, axis in inner.items()}
        else:
            slots = [slot for slot, operand in enumerate(eqn.invars) if isinstance(operand, Var)]
            operands = operand_axes(eqn, slots, found, num_examples, counted.get(index, {}))
        for slot, axis in operands.items():
            operand = eqn.invars[slot]
            if isinstance(operand, Var):
                axes[operand] = meet(axes, operand, axis)
    return axes | inside
