"""Curvature outside of `jit`, compiled once.

The loops inside a method are compiled, and outside of `jit` they would be so in every step: seconds in place of
milliseconds. A compiled program may serve another step if the loss is the same computation on other arrays. The
identity of a Python function does not tell: a lambda is made anew in every step, and a function that stays may read
other variables. So the loss is traced in every step, with its gradient and a product with its Hessian, which between
them show all that a second derivative can see; and a program is found by what the trace says.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from curvax.curvature.scalar import aux_of, scalar_objective, select
from curvax.objective import Objective

#: The programs that are kept, those used last.
CAPACITY = 16
# Where the rules of `custom_jvp` and `custom_vjp` stand. Two derivatives of the loss have read them.
RULES = frozenset({"jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees"})
# Entries up to which a constant is compared by value.
SMALL = 16

_programs: collections.OrderedDict[Hashable, Callable[..., Any]] = collections.OrderedDict()


def once(
    compute: Callable[..., Any], method: Any, where: Any, has_aux: bool, objective: Any, params: Any, *others: Any
) -> Any:
    """`compute(method, where, has_aux, objective, params, *others)`, of known arrays by a program compiled once.

    Args:
      compute: a function that stays, and whose result follows from its arguments alone.
      method: a method, hashable or not.
      where: the leaves whose curvature is wanted, as in `hessian_diag`.
      has_aux: whether the objective returns other output too.
      objective: an `Objective`, or a function `params -> scalar`.
      params: a tree of arrays.
      *others: trees of arrays, such as a typed key.

    Returns:
      What `compute` returns.
    """
    data = objective.data if isinstance(objective, Objective) else ()
    if _is_traced((params, data, others)) or not _has_value(method):
        return compute(method, where, has_aux, objective, params, *others)
    try:
        said, arrays, function = _read(objective, params, data, where, has_aux)
    except Exception:
        # What cannot be traced, or not differentiated twice, may still be computed, or else says why not.
        return compute(method, where, has_aux, objective, params, *others)
    if _is_traced(arrays):
        return compute(method, where, has_aux, objective, params, *others)
    name = (compute, _value(method), jax.tree.structure(select(params, where)), has_aux, said)
    if name not in _programs:
        alone = lambda arrays, params, others: compute(method, where, has_aux, function(arrays), params, *others)
        _programs[name] = jax.jit(alone)
        if len(_programs) > CAPACITY:
            _programs.popitem(last=False)
    _programs.move_to_end(name)
    try:
        return _programs[name](arrays, params, others)
    except jax.errors.JAXTypeError:
        # A method of the caller's own may look at numbers, which a program does not have before it runs.
        return compute(method, where, has_aux, objective, params, *others)


def _is_traced(tree: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def _read(
    objective: Any, params: Any, data: Any, where: Any, has_aux: bool
) -> tuple[Hashable, Any, Callable[[Any], Any]]:
    """What the loss computes, the arrays that it computes it from, and the loss as a function of these."""

    def derivatives(params: Any, data: Any) -> Any:
        this = dataclasses.replace(objective, data=data) if isinstance(objective, Objective) else objective
        alone, chosen = scalar_objective(this, params, where, has_aux)
        outputs = alone.predict(chosen, alone.data) if isinstance(alone, Objective) else ()
        return outputs, aux_of(this, params, has_aux), jax.jvp(jax.grad(alone), (chosen,), (chosen,))

    twice, out = jax.make_jaxpr(derivatives, return_shape=True)(params, data)
    said = (jax.tree.structure((params, data)), jax.tree.structure(out), _jaxpr(twice.jaxpr))
    if isinstance(objective, Objective):
        # Its functions may be called on parts of the batch: they stay as they are, with all that they close over.
        if _is_traced(twice.consts):
            return said, twice.consts, objective
        without_data = dataclasses.replace(objective, data=None)
        whole = (*said, *map(_constant, twice.consts))
        return whole, data, lambda data: dataclasses.replace(without_data, data=data)
    closed, out = jax.make_jaxpr(lambda params: objective(params), return_shape=True)(params)
    known = {id(x) for x in closed.consts}
    # Of a derivative rule alone.
    others = [_constant(x) for x in twice.consts if id(x) not in known]
    treedef, jaxpr = jax.tree.structure(out), closed.jaxpr

    def function(consts: Any) -> Callable[[Any], Any]:
        call = jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))
        return lambda params: jax.tree.unflatten(treedef, call(*jax.tree.leaves(params)))

    return (*said, treedef, _jaxpr(jaxpr), *others), closed.consts, function


def _has_value(method: Any) -> bool:
    """Whether a method that is equal to another one does the same: of an object that may change, nothing is known."""
    kind: Any = type(method)
    return dataclasses.is_dataclass(method) and kind.__dataclass_params__.frozen and kind.__eq__ is not object.__eq__


def _constant(x: Any) -> Hashable:
    """An array that a program has in it; of one that may be changed in place the numbers count."""
    if isinstance(x, jax.Array):
        return Same(x)
    x = np.asarray(x)
    return str(x.dtype), x.shape, hashlib.blake2b(x.tobytes()).digest()


class Same:
    """A value that is equal to itself alone."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _jaxpr(jaxpr: Jaxpr) -> Hashable:
    """All that a jaxpr computes: equal for jaxprs that differ in the names of their variables alone."""
    names: dict[Any, int] = {}
    name = lambda var: (names.setdefault(var, len(names)), var.aval)
    read = lambda atom: (_value(atom.val), atom.aval) if isinstance(atom, Literal) else name(atom)
    inputs = tuple(map(name, (*jaxpr.constvars, *jaxpr.invars)))
    equations = tuple(
        (eqn.primitive, tuple(map(read, eqn.invars)), tuple(map(name, eqn.outvars)), _parameters(eqn), eqn.ctx)
        for eqn in jaxpr.eqns
    )
    return inputs, equations, tuple(map(read, jaxpr.outvars))


def _parameters(eqn: JaxprEqn) -> Hashable:
    left_out = RULES if eqn.primitive.name.startswith("custom_") else ()
    return tuple((name, _value(value)) for name, value in sorted(eqn.params.items()) if name not in left_out)


def _value(x: Any) -> Hashable:
    """What is equal for equal values; where equality would have to be believed, for identical ones."""
    if isinstance(x, ClosedJaxpr):
        return _jaxpr(x.jaxpr), tuple(map(_constant, x.consts))
    if isinstance(x, Jaxpr):
        return _jaxpr(x)
    if isinstance(x, tuple | list):
        return type(x), tuple(map(_value, x))
    if isinstance(x, np.ndarray | np.generic | jax.Array) and x.size <= SMALL and x.dtype.kind != "V":
        x = np.asarray(x)
        return str(x.dtype), x.shape, x.tobytes()
    if isinstance(x, int | float | complex):
        # Which of 1, 1.0 and True, of 0.0 and -0.0; and nan is one value.
        return type(x), repr(x)
    try:
        hash(x)
        value: Hashable = x
    except TypeError:
        value = Same(x)
    return value
