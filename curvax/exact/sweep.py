"""Cotangents of chosen variables, swept back from a cut through the equations in between.

`jax.vjp` would give them with respect to inputs; here they are wanted at variables in the middle of a computation that
has been evaluated already. So the sweep is done by hand, one equation at a time, each by its own `jax.vjp`; all that
depends on the operands alone (a mask, a transposed kernel) is computed once, for all columns.
"""

from collections.abc import Callable, Container, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Var

from curvax.exact.dataflow import Flow
from curvax.exact.pullbacks import special_pullback
from curvax.exact.trace import in_slots, read

Step = tuple[JaxprEqn, Sequence[int], Sequence[Var]]


def sweep(
    flow: Flow,
    env: Mapping[Var, jax.Array],
    sources: Sequence[Var],
    targets: Sequence[Var],
    skipped: Container[int] = (),
) -> Callable[[Sequence[jax.Array]], list[jax.Array]]:
    """The function that takes cotangents of `sources` back to every variable in `targets`.

    Args:
        flow: the program and its derivatives' paths.
        env: the value of every variable.
        sources: where the cotangents come from.
        targets: where they are wanted; a target that leads to no source has cotangent zero.
        skipped: equations that are left out, by their place: paths through them do not count.

    Returns:
        A linear function from cotangents of the sources to those of the targets; vmap it over columns.
    """
    steps = _steps_between(flow, targets, sources, skipped)
    pulls = [(eqn, slots, results, _pull(eqn, slots, results, env)) for eqn, slots, results in reversed(steps)]

    def pullback(given):
        cotangents = dict(zip(sources, given, strict=True))
        for eqn, slots, results, pull in pulls:
            wanted = [cotangents[var] if var in cotangents else jnp.zeros_like(env[var]) for var in results]
            for slot, value in zip(slots, pull(wanted), strict=True):
                var = eqn.invars[slot]
                cotangents[var] = cotangents[var] + value if var in cotangents else value
        return [cotangents[var] if var in cotangents else jnp.zeros_like(env[var]) for var in targets]

    return pullback


def _steps_between(flow: Flow, targets: Sequence[Var], sources: Sequence[Var], skipped: Container[int]) -> list[Step]:
    """The equations on a path from a target to a source, each with the operands and results on it."""
    downstream, upstream = set(targets), set(sources)
    forward, steps = [], []
    for index, eqn, slots, results in flow.equations:
        slots = [slot for slot in slots if eqn.invars[slot] in downstream]
        if slots and index not in skipped:
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
        out = in_slots(eqn, slots, values)(*varying)
        return [out[i] for i in wanted]

    return jax.vjp(function, *(values[slot] for slot in slots))[1]
