"""Cotangents of chosen variables, swept back from a cut through the equations in between.

`jax.vjp` would give them with respect to inputs; here they are wanted at variables in the middle of a computation that
has been evaluated already. So the sweep is done by hand, one equation at a time, each by its own `jax.vjp`; all that
depends on the operands alone (a mask, a transposed kernel) is computed once, for all columns.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Var

from curvax.exact.dataflow import Flow
from curvax.exact.pullbacks import special_pullback
from curvax.exact.trace import apply, read

Pullback = Callable[[jax.Array], list[jax.Array]]
Step = tuple[JaxprEqn, Sequence[int], Sequence[Var]]


def sweep(flow: Flow, env: Mapping[Var, jax.Array], cut: Var, targets: Sequence[Var]) -> Pullback:
    """The function that takes a cotangent of `cut` back to every variable in `targets`.

    Args:
        flow: the program and its derivatives' paths.
        env: the value of every variable.
        cut: where the cotangents come from.
        targets: where they are wanted; all of them lead to `cut`.

    Returns:
        A linear function from a cotangent of `cut` to those of the targets; vmap it over columns.
    """
    steps = _steps_between(flow, targets, cut)
    pulls = [(eqn, slots, results, _pull(eqn, slots, results, env)) for eqn, slots, results in reversed(steps)]

    def pullback(cotangent):
        cotangents = {cut: cotangent}
        for eqn, slots, results, pull in pulls:
            given = [cotangents.get(var, jnp.zeros(var.aval.shape, var.aval.dtype)) for var in results]
            for slot, value in zip(slots, pull(given), strict=True):
                var = eqn.invars[slot]
                cotangents[var] = cotangents[var] + value if var in cotangents else value
        return [cotangents[var] for var in targets]

    return pullback


def _steps_between(flow: Flow, targets: Sequence[Var], cut: Var) -> list[Step]:
    """The equations on a path from a target to the cut, each with the operands and results on it."""
    downstream, upstream = set(targets), {cut}
    forward, steps = [], []
    for _, eqn, slots, results in flow.equations:
        slots = [slot for slot in slots if eqn.invars[slot] in downstream]
        if slots:
            downstream.update(results)
            forward.append((eqn, slots, results))
    for eqn, slots, results in reversed(forward):
        results = [var for var in results if var in upstream]
        if results:
            upstream.update(eqn.invars[slot] for slot in slots)
            steps.append((eqn, slots, results))
    return steps[::-1]


def _pull(eqn: JaxprEqn, slots, results, env) -> Callable[[list[jax.Array]], Sequence[jax.Array]]:
    """The transposed derivative of one equation, from `results` to operands `slots`."""
    values = [read(env, atom) for atom in eqn.invars]
    special = special_pullback(eqn, slots, values)
    if special is not None:
        return lambda cotangents: [special(cotangents[0])]
    wanted = [eqn.outvars.index(var) for var in results]

    def function(*varying):
        operands = list(values)
        for slot, value in zip(slots, varying, strict=True):
            operands[slot] = value
        out = apply(eqn, *operands)
        return [out[i] for i in wanted]

    return jax.vjp(function, *(values[slot] for slot in slots))[1]
