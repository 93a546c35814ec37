"""The computation behind an objective, as one flat list of primitive operations.

A proof needs to see every operation between a parameter and the loss. Python hides them in functions, JAX in calls
(`jit`, `checkpoint`, ...); tracing `predict` and then `loss`, and inlining the calls, leaves a jaxpr of equations and
nothing else. Calls that carry their own derivative (`custom_jvp`, `custom_vjp`) stay closed: their body is not what JAX
differentiates.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxprs_in_params

from curvax.layers import names_of
from curvax.objective import Objective

_OUTPUT = "curvax.outputs"
INLINED = ("jit", "closed_call", "remat2")


@dataclasses.dataclass(frozen=True)
class Program:
    """`losses(predict(params, data), data)` as a flat jaxpr.

    Attributes:
        jaxpr: its inputs are the parameter leaves, then the data leaves; its results are those leaves of the outputs
            that are real or complex, and `losses`.
        consts: the values of `jaxpr.constvars`.
        paths: one readable path for each parameter leaf.
        inputs: the values of the inputs.
    """

    jaxpr: Jaxpr
    consts: Sequence[Any]
    paths: tuple[str, ...]
    inputs: tuple[Any, ...]

    @property
    def params(self) -> list[Var]:
        return self.jaxpr.invars[: len(self.paths)]

    @property
    def outputs(self) -> list[Var]:
        """The outputs of the network that are computed, each once: a constant has no derivative."""
        return list(dict.fromkeys(v for v in self.jaxpr.outvars[:-1] if isinstance(v, Var)))

    @property
    def begin_of_loss(self) -> int:
        """The place of the first equation after those that make the outputs: the loss is traced after the network."""
        outputs = set(self.outputs)
        return max((i + 1 for i, eqn in enumerate(self.jaxpr.eqns) if outputs & set(eqn.outvars)), default=0)

    @functools.cached_property
    def nonlinear_backward(self) -> str | None:
        """The name of a function whose backward rule is not proved to be linear, if there is one."""
        from curvax.exact.backward_rules import nonlinear_backward

        return nonlinear_backward(self.jaxpr)

    @property
    def losses(self) -> Var | Literal:
        return self.jaxpr.outvars[-1]

    @property
    def num_examples(self) -> int:
        return self.losses.aval.shape[0]

    def environment(self) -> dict[Var, jax.Array]:
        """The value of every variable, from one forward pass."""
        env = dict(zip(self.jaxpr.constvars, self.consts, strict=True))
        env |= zip(self.jaxpr.invars, self.inputs, strict=True)
        return evaluate(self.jaxpr.eqns, env)


def trace(objective: Objective, params: Any) -> Program:
    """Traces an objective, without its penalty, and inlines every call that JAX differentiates through.

    Args:
        objective: network, loss and data.
        params: a pytree of arrays.

    Returns:
        The program.

    Raises:
        ValueError: if the losses are not one value per example, or there are no examples.
    """

    def run(params, data):
        outputs = jax.tree.map(_end_of_network, objective.predict(params, data))
        return [x for x in jax.tree.leaves(outputs) if is_inexact(x)], objective.example_losses(outputs, data)

    return _program(run, params, objective.data)


def trace_loss(objective: Objective, outputs: Any) -> Program:
    """Traces the loss alone, as a function of the outputs, which take the place of the parameters.

    Args:
        objective: network, loss and data.
        outputs: what the network returned, any pytree.

    Returns:
        The program. Its parameters, and its outputs, are those leaves of `outputs` that are real or complex.

    Raises:
        ValueError: if the losses are not one value per example, or there are no examples.
    """
    leaves, treedef = jax.tree.flatten(outputs)
    floating = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]

    def run(varying, others):
        fixed, data = others
        merged = dict(zip(floating, varying, strict=True)) | fixed
        outputs = treedef.unflatten([merged[i] for i in range(len(leaves))])
        return varying, objective.example_losses(outputs, data)

    fixed = {i: leaf for i, leaf in enumerate(leaves) if i not in floating}
    return _program(run, [leaves[i] for i in floating], (fixed, objective.data))


def is_inexact(x: Any) -> bool:
    """Whether an array has real or complex numbers, which can be differentiated."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _end_of_network(output: Any) -> Any:
    """Marks an output, for what comes after it is the loss, even where it computes the same as the network."""
    return checkpoint_name(output, _OUTPUT) if isinstance(output, jax.Array) and is_inexact(output) else output


def _program(run: Callable, params: Any, data: Any) -> Program:
    closed = jax.make_jaxpr(run)(params, data)
    inputs = tuple(jnp.asarray(x) for x in jax.tree.leaves((params, data)))
    flat = jax.make_jaxpr(lambda *inputs: inline(closed, *inputs))(*inputs)
    return Program(flat.jaxpr, flat.consts, leaf_paths(params), inputs)


def leaf_paths(params: Any) -> tuple[str, ...]:
    """`("dense/kernel", ...)`: how curvax names the leaves of a tree."""
    return tuple(names_of([path for path, _ in jax.tree_util.tree_leaves_with_path(params)]))


def inline(closed: ClosedJaxpr, *inputs: jax.Array, also: Sequence[str] = (), seen: dict | None = None) -> list:
    """Evaluates a jaxpr call by call; traced, it leaves none of the calls in `INLINED`, and in `also`.

    What is computed twice is computed once: `seen` has the results of every operation on the same operands. Nothing is
    shared between network and loss, which must be a function of the outputs.
    """
    seen = {} if seen is None else seen
    env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env |= zip(closed.jaxpr.invars, inputs, strict=True)
    for eqn in closed.jaxpr.eqns:
        values = [read(env, atom) for atom in eqn.invars]
        if eqn.primitive.name == "name" and eqn.params["name"] == _OUTPUT:
            results = values
            seen.clear()
        elif eqn.primitive.name in (*INLINED, *also):
            results = inline(callee(eqn), *values, also=also, seen=seen)
        else:
            key = _identity(eqn, values)
            results = seen[key][0] if key in seen else apply(eqn, *values)
            if key is not None:
                # The operands are kept, lest another one get the place of one that is gone.
                seen[key] = results, values
        env |= zip(eqn.outvars, results, strict=True)
    return [read(env, atom) for atom in closed.jaxpr.outvars]


def _identity(eqn: JaxprEqn, values: Sequence[Any]) -> Any:
    """What tells an operation on these operands from all others; None where nothing does."""
    known = lambda x: id(x) if isinstance(x, jax.core.Tracer) else (np.asarray(x).tobytes(), jax.typeof(x))
    if eqn.effects or any(isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) for x in values):
        return None
    key = (eqn.primitive, tuple(map(known, values)), tuple(sorted(eqn.params.items(), key=lambda item: item[0])))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def evaluate(eqns: Sequence[JaxprEqn], env: dict[Var, jax.Array]) -> dict[Var, jax.Array]:
    """Extends `env` by the results of `eqns`."""
    for eqn in eqns:
        results = apply(eqn, *(read(env, atom) for atom in eqn.invars))
        env |= zip(eqn.outvars, results, strict=True)
    return env


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All equations, those of calls, loops and branches included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def apply(eqn: JaxprEqn, *values: jax.Array) -> list[jax.Array]:
    """The results of one equation."""
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def read(env: dict[Var, jax.Array], atom: Var | Literal) -> Any:
    """The value of a variable or a literal."""
    return atom.val if isinstance(atom, Literal) else env[atom]


def in_slots(eqn: JaxprEqn, slots: Sequence[int], operands: Sequence[Any]) -> Callable[..., list[jax.Array]]:
    """The results of one equation as a function of its operands in `slots`, the others as they are."""

    def results(*varying):
        values = list(operands)
        for slot, value in zip(slots, varying, strict=True):
            values[slot] = value
        return apply(eqn, *values)

    return results


def flattened(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program without the calls in `INLINED`."""
    return jax.make_jaxpr(lambda *inputs: inline(closed, *inputs))(*closed.in_avals)


def live(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program without what its results do not need."""
    needed, kept = {var for var in closed.jaxpr.outvars if isinstance(var, Var)}, []
    for eqn in reversed(closed.jaxpr.eqns):
        if needed.intersection(eqn.outvars) or eqn.effects:
            kept.append(eqn)
            needed.update(atom for atom in eqn.invars if isinstance(atom, Var))
    return ClosedJaxpr(closed.jaxpr.replace(eqns=kept[::-1]), closed.consts)


def derivative(eqn: JaxprEqn, slots: Sequence[int]) -> Callable[..., tuple[list[jax.Array], list[jax.Array]]]:
    """The results of one equation and their tangents, from all its operands and the tangents of those in `slots`."""

    def function(operands, tangents):
        return jax.jvp(in_slots(eqn, slots, operands), [operands[slot] for slot in slots], tangents)

    return function


def callee(eqn: JaxprEqn) -> ClosedJaxpr:
    """The body of a call."""
    callee = next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in eqn.params)
    return callee if isinstance(callee, ClosedJaxpr) else ClosedJaxpr(callee, ())
