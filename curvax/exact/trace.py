"""The computation behind an objective, as one flat list of primitive operations.

A proof needs to see every operation between a parameter and the loss. Python hides them in functions, JAX in calls
(`jit`, `checkpoint`, ...); tracing `predict` and then `loss`, and inlining the calls, leaves a jaxpr of equations and
nothing else. Calls that carry their own derivative (`custom_jvp`, `custom_vjp`) stay closed: their body is not what JAX
differentiates.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from curvax.exact.equations import Atom, callee, equations, evaluate, in_slots, is_inexact, signature
from curvax.exact.primitives import Form, Role, form, is_linear, record
from curvax.layers import names_of
from curvax.objective import Objective

_OUTPUT = "curvax.outputs"


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

    @functools.cached_property
    def makers(self) -> dict[Var, int]:
        """The place of the equation that computes each variable."""
        return {var: index for index, eqn in enumerate(self.jaxpr.eqns) for var in eqn.outvars}

    @property
    def begin_of_loss(self) -> int:
        """The place of the first equation after those that make the outputs: the loss is traced after the network."""
        return max((self.makers[var] + 1 for var in self.outputs if var in self.makers), default=0)

    @functools.cached_property
    def nonlinear_backward(self) -> str | None:
        """The name of a function whose backward rule is not proved to be linear, if there is one."""
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


def _end_of_network(output: Any) -> Any:
    """Marks an output, for what comes after it is the loss, even where it computes the same as the network."""
    return checkpoint_name(output, _OUTPUT) if isinstance(output, jax.Array) and is_inexact(output) else output


def _program(run: Callable, params: Any, data: Any) -> Program:
    closed = jax.make_jaxpr(run)(params, data)
    inputs = tuple(jnp.asarray(x) for x in jax.tree.leaves((params, data)))
    flat = live(flattened(closed))
    return Program(flat.jaxpr, flat.consts, leaf_paths(params), inputs)


def leaf_paths(params: Any) -> tuple[str, ...]:
    """`("dense/kernel", ...)`: how curvax names the leaves of a tree."""
    return tuple(names_of([path for path, _ in jax.tree_util.tree_leaves_with_path(params)]))


def flattened(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program without its calls, where what is computed twice is computed once.

    Nothing is shared between network and loss, which must be a function of the outputs.
    """
    flat = _Flat()
    results = flat.inline(closed, closed.jaxpr.invars)
    constvars, consts = ([const[i] for const in flat.consts.values()] for i in (0, 1))
    return ClosedJaxpr(closed.jaxpr.replace(constvars=constvars, eqns=flat.eqns, outvars=results), consts)


class _Flat:
    """The equations of a program and of its calls, one after the other.

    They are copied, not bound again: that takes a tenth of the time, and what repeats stays the same object.
    """

    def __init__(self):
        self.eqns: list[JaxprEqn] = []
        self.consts: dict[int, tuple[Var, Any]] = {}
        self._seen: dict[Any, Sequence[Var]] = {}

    def inline(self, closed: ClosedJaxpr, operands: Sequence[Atom]) -> list[Atom]:
        """Adds the equations of a jaxpr applied to some atoms; the atoms that are its results."""
        env: dict[Var, Atom] = dict(zip(closed.jaxpr.invars, operands, strict=True))
        for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            env[var], _ = self.consts.setdefault(id(value), (Var(var.aval), value))
        read = lambda atom: atom if isinstance(atom, Literal) else env[atom]
        for eqn in closed.jaxpr.eqns:
            env |= zip(eqn.outvars, self._add(eqn, [read(atom) for atom in eqn.invars]), strict=True)
        return [read(atom) for atom in closed.jaxpr.outvars]

    def _add(self, eqn: JaxprEqn, operands: list[Atom]) -> Sequence[Atom]:
        if eqn.primitive.name == "name" and eqn.params["name"] == _OUTPUT:
            self._seen.clear()
            return operands
        if record(eqn).role is Role.CALL:
            return self.inline(callee(eqn), operands)
        key = _identity(eqn, operands)
        if key is None or key not in self._seen:
            results = [Var(var.aval) for var in eqn.outvars]
            self.eqns.append(eqn.replace(invars=operands, outvars=results))
            self._seen[key] = results
            return results
        return self._seen[key]


def _identity(eqn: JaxprEqn, operands: Sequence[Atom]) -> Hashable | None:
    """What tells an operation on these operands from all others; None where nothing does."""
    operation = signature(eqn)
    known = lambda x: (np.asarray(x.val).tobytes(), x.aval) if isinstance(x, Literal) else x
    return None if operation is None else (operation, *map(known, operands))


def live(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program without what its results do not need."""
    needed, kept = {var for var in closed.jaxpr.outvars if isinstance(var, Var)}, []
    for eqn in reversed(closed.jaxpr.eqns):
        if needed.intersection(eqn.outvars) or eqn.effects:
            kept.append(eqn)
            needed.update(atom for atom in eqn.invars if isinstance(atom, Var))
    return ClosedJaxpr(closed.jaxpr.replace(eqns=kept[::-1]), closed.consts)


# Backward rules that are no derivatives. A `custom_vjp` may do anything to a cotangent: clip it, say, or reverse it.
# JAX's gradient then is what the rule makes of it, and so is the derivative of that gradient. But the Gauss-Newton
# matrix `J^T H J` has no meaning where `J^T` is not linear, nor has any sum over columns or examples. Whether a rule is
# linear is read off its trace; what is not proved to be so is taken for not linear.


def nonlinear_backward(jaxpr: Jaxpr) -> str | None:
    """The name of a function in a program whose backward rule is not proved to be linear, if there is one."""
    for eqn in equations(jaxpr):
        if eqn.primitive.name.startswith("custom_vjp_call") and not _is_linear(eqn):
            return eqn.params["call_jaxpr"].jaxpr.debug_info.func_name
    return None


def _is_linear(eqn: JaxprEqn) -> bool:
    operands, results = [atom.aval for atom in eqn.invars], [var.aval for var in eqn.outvars]
    slots = [i for i, aval in enumerate(operands) if is_inexact(aval)]
    if not all(is_inexact(aval) for aval in results):
        return False

    def pull(cotangents, values):
        return jax.vjp(in_slots(eqn, slots, values), *(values[i] for i in slots))[1](cotangents)

    try:
        closed = jax.make_jaxpr(pull)(results, operands)
        flat = flattened(closed).jaxpr
    except Exception:  # A rule that cannot be traced by itself is not proved to be linear.
        return False
    return _linear_in(flat, flat.invars[: len(results)])


def _linear_in(jaxpr: Jaxpr, inputs: Sequence[Var]) -> bool:
    varying, zeros = set(inputs), set()
    is_zero = lambda atom: bool(np.all(atom.val == 0)) if isinstance(atom, Literal) else atom in zeros
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("broadcast_in_dim", "convert_element_type") and is_zero(eqn.invars[0]):
            zeros.update(eqn.outvars)
        slots = [i for i, atom in enumerate(eqn.invars) if isinstance(atom, Var) and atom in varying]
        if not slots:
            continue
        if not _linear(eqn, slots, is_zero):
            return False
        varying.update(eqn.outvars)
    return True


def _linear(eqn: JaxprEqn, slots: Sequence[int], is_zero: Callable[[Var | Literal], bool]) -> bool:
    # Numbers that are rounded to integers do not add up.
    if not is_linear(eqn, slots) or not all(is_inexact(var.aval) for var in eqn.outvars):
        return False
    others = [atom for slot, atom in enumerate(eqn.invars) if slot not in slots and is_inexact(atom.aval)]
    return form(eqn) not in (Form.LINEAR, Form.COLLECTIVE) or all(map(is_zero, others))
