"""Cotangents of chosen variables, swept back from a cut through the equations in between.

`jax.vjp` would give them with respect to inputs; here they are wanted at variables in the middle of a computation that
has been evaluated already. So the sweep is done by hand, one equation at a time, each by its own `jax.vjp`; all that
depends on the operands alone (a mask, a transposed kernel) is computed once, for all columns.
"""

from collections.abc import Callable, Container, Hashable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var

from curvax.exact.dataflow import Flow
from curvax.exact.equations import evaluate, form_of, in_slots, read, signature
from curvax.exact.primitives import Role, differentiable_slots, record

# The place of an equation, and the operands and results that are on a path.
Step = tuple[int, tuple[int, ...], tuple[Var, ...]]


def sweep(
    flow: Flow,
    env: Mapping[Var, jax.Array],
    sources: Sequence[Var],
    targets: Sequence[Var],
    skipped: Container[int] = (),
    pulls: dict[Hashable, Callable] | None = None,
) -> Callable[[Sequence[jax.Array]], list[jax.Array]]:
    """The function that takes cotangents of `sources` back to every variable in `targets`.

    Args:
        flow: the program and its derivatives' paths.
        env: the value of every variable.
        sources: where the cotangents come from.
        targets: where they are wanted; a target that leads to no source has cotangent zero.
        skipped: equations that are left out, by their place: paths through them do not count.
        pulls: the derivatives of equations that other sweeps have had; those of this one are added.

    Returns:
        A linear function from cotangents of the sources to those of the targets; vmap it over columns.
    """
    pulls, steps = {} if pulls is None else pulls, []
    for step in reversed(_steps_between(flow, targets, sources, skipped)):
        if step not in pulls:
            pulls[step] = _pull(flow, *step, env)
        steps.append((*step, pulls[step]))

    def pullback(given):
        cotangents = dict(zip(sources, given, strict=True))
        for index, slots, results, pull in steps:
            eqn = flow.program.jaxpr.eqns[index]
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
        slots = tuple(slot for slot in slots if eqn.invars[slot] in downstream)
        if slots and index not in skipped:
            downstream.update(results)
            forward.append((index, slots, results))
    for index, slots, results in reversed(forward):
        results = tuple(var for var in results if var in upstream)
        if results:
            upstream.update(flow.program.jaxpr.eqns[index].invars[slot] for slot in slots)
            steps.append((index, slots, results))
    return steps[::-1]


def _pull(flow: Flow, index: int, slots, results, env) -> Callable[[list[jax.Array]], Sequence[jax.Array]]:
    """The transposed derivative of one equation, from `results` to operands `slots`."""
    eqn = flow.program.jaxpr.eqns[index]
    values = [read(env, atom) for atom in eqn.invars]
    special = record(eqn).pullback if list(slots) == [0] and jax.default_backend() == "cpu" else None
    pull = special and special(eqn, values)
    if pull is not None:
        return lambda cotangents: [pull(cotangents[0])]
    wanted = [eqn.outvars.index(var) for var in results]
    rule = flow.rules.get(index)
    if rule is not None and rule.tangents is not None:
        linearise, form = _linearised_rule(eqn, slots, wanted, rule.tangents)
    else:
        # Each call of a rule is another.
        linearise, form = _linearised(eqn, slots, wanted), None if rule else signature(eqn)
    if form is None:
        return linearise(*values)
    # Operations that are alike are traced once.
    return flow.traced.setdefault((form, tuple(slots), tuple(wanted)), jax.jit(linearise))(*values)


def _linearised(eqn: JaxprEqn, slots: Sequence[int], wanted: Sequence[int]) -> Callable[..., Callable]:
    """The pullback of an equation, from the values of its operands."""

    def linearise(*values):
        apply = in_slots(eqn, slots, values)
        return jax.vjp(lambda *varying: [apply(*varying)[i] for i in wanted], *(values[slot] for slot in slots))[1]

    return linearise


def _linearised_rule(
    eqn: JaxprEqn, slots: Sequence[int], wanted: Sequence[int], tangents: ClosedJaxpr
) -> tuple[Callable[..., Callable], Hashable | None]:
    """The same by the rule of a `custom_jvp`, that has been read; and what the rule says, if that can be told."""
    jaxpr, with_tangent = tangents.jaxpr, differentiable_slots(eqn)

    def linearise(*values):
        def push(*varying):
            given = dict(zip(slots, varying, strict=True))
            moved = [given[slot] if slot in given else jnp.zeros_like(values[slot]) for slot in with_tangent]
            env = dict(zip(jaxpr.constvars, tangents.consts, strict=True))
            env |= zip(jaxpr.invars, (*values, *moved), strict=True)
            env = evaluate(jaxpr.eqns, env)
            return [read(env, jaxpr.outvars[i]) for i in wanted]

        return jax.vjp(push, *(jnp.zeros_like(values[slot]) for slot in slots))[1]

    calls = tangents.consts or any(record(inner).role is Role.RULE for inner in jaxpr.eqns)
    return linearise, None if calls else form_of(jaxpr.eqns, (*jaxpr.invars, *jaxpr.outvars))
