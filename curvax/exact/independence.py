"""Whether an example's loss is a function of that example alone, so that a batch may be split.

The routes follow derivatives, and call whatever has none a constant: a `stop_gradient` of the batch's mean, say. Here
such constants count, for they change when the batch does. So every operand is followed, through every call.
"""

from typing import Any

import jax
from jax.extend.core import Jaxpr, Var

from curvax.exact.dataflow import meet, operand_axes
from curvax.exact.indices import counted_dimensions
from curvax.exact.primitives import Axis
from curvax.exact.trace import inline
from curvax.objective import Objective

CALLS = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


def couples_examples(objective: Objective, params: Any) -> bool:
    """Whether some entry of the data is not proved to reach the loss of its own example alone."""
    leaves, treedef = jax.tree.flatten((params, objective.data))
    closed = jax.make_jaxpr(lambda *leaves: _losses(objective, *treedef.unflatten(leaves)))(*leaves)
    flat = jax.make_jaxpr(lambda *leaves: inline(closed, *leaves, also=CALLS))(*leaves)
    jaxpr, num_params = flat.jaxpr, len(jax.tree.leaves(params))
    axes = _example_axes(jaxpr, flat.consts, jaxpr.outvars[0].aval.shape[0])
    return any(axes.get(var, Axis(0)) != Axis(0) for var in jaxpr.invars[num_params:])


def _losses(objective, params, data):
    return objective.example_losses(objective.predict(params, data), data)


def _example_axes(jaxpr: Jaxpr, consts, num_examples: int) -> dict[Var, Axis | None]:
    """For every variable from which a loss is computed, the axis along which each slice reaches one loss alone."""
    counted = counted_dimensions(jaxpr, consts)
    axes = {var: Axis(0) for var in jaxpr.outvars if isinstance(var, Var)}
    for index, eqn in reversed(list(enumerate(jaxpr.eqns))):
        results = {result: axes[var] for result, var in enumerate(eqn.outvars) if var in axes}
        slots = [slot for slot, operand in enumerate(eqn.invars) if isinstance(operand, Var)]
        for slot, axis in operand_axes(eqn, slots, results, num_examples, counted.get(index, {})).items():
            axes[eqn.invars[slot]] = meet(axes, eqn.invars[slot], axis)
    return axes
