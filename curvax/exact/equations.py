"""The equations of a jaxpr: reading them, evaluating them, differentiating one of them."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxprs_in_params

Atom = Var | Literal


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All equations, those of calls, loops and branches included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def callee(eqn: JaxprEqn) -> ClosedJaxpr:
    """The body of a call."""
    callee = next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in eqn.params)
    return callee if isinstance(callee, ClosedJaxpr) else ClosedJaxpr(callee, ())


def is_inexact(x: Any) -> bool:
    """Whether an array, or a variable's type, has real or complex numbers, which can be differentiated."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def is_complex(atom: Atom) -> bool:
    """Whether a variable or literal is complex: it has no real cotangent, which is what columns are."""
    return jnp.issubdtype(getattr(atom.aval, "dtype", bool), jnp.complexfloating)


def signature(eqn: JaxprEqn) -> Hashable | None:
    """What tells an operation from all others but for its operands; None where nothing does."""
    if eqn.effects:
        return None
    key = (eqn.primitive, tuple(sorted(eqn.params.items(), key=lambda item: item[0])))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def form_of(eqns: Sequence[JaxprEqn], results: Sequence[Atom]) -> Hashable | None:
    """What equations compute, whatever their variables are called; None where nothing tells it."""
    numbers: dict[Var, int] = {}

    def known(atom):
        if isinstance(atom, Literal):
            return np.asarray(atom.val).tobytes(), atom.aval
        return numbers.setdefault(atom, len(numbers)), atom.aval

    said = [(signature(eqn), *map(known, (*eqn.invars, *eqn.outvars))) for eqn in eqns]
    return None if any(operation is None for operation, *_ in said) else (*said, *map(known, results))


def read(env: Mapping[Var, jax.Array], atom: Atom) -> Any:
    """The value of a variable or a literal."""
    return atom.val if isinstance(atom, Literal) else env[atom]


def apply(eqn: JaxprEqn, *values: jax.Array) -> list[jax.Array]:
    """The results of one equation."""
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def evaluate(
    eqns: Iterable[JaxprEqn], env: dict[Var, jax.Array], apply: Callable[..., Sequence[Any]] = apply
) -> dict[Var, jax.Array]:
    """Extends `env` by the results of `eqns`, which `apply(eqn, *values)` computes; what it has already it keeps."""
    for eqn in eqns:
        results = apply(eqn, *(read(env, atom) for atom in eqn.invars))
        for var, result in zip(eqn.outvars, results, strict=True):
            env.setdefault(var, result)
    return env


def in_slots(eqn: JaxprEqn, slots: Sequence[int], operands: Sequence[Any]) -> Callable[..., list[jax.Array]]:
    """The results of one equation as a function of its operands in `slots`, the others as they are."""

    def results(*varying):
        values = list(operands)
        for slot, value in zip(slots, varying, strict=True):
            values[slot] = value
        return apply(eqn, *values)

    return results


def derivative(eqn: JaxprEqn, slots: Sequence[int]) -> Callable[..., tuple[list[jax.Array], list[jax.Array]]]:
    """The results of one equation and their tangents, from all its operands and the tangents of those in `slots`."""

    def function(operands, tangents):
        return jax.jvp(in_slots(eqn, slots, operands), [operands[slot] for slot in slots], tangents)

    return function
