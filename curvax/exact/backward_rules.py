"""Backward rules that are no derivatives.

A `custom_vjp` may do anything to a cotangent: clip it, say, or reverse it. JAX's gradient then is what the rule makes
of it, and so is the derivative of that gradient. But the Gauss-Newton matrix `J^T H J` has no meaning where `J^T` is
not linear, nor has any sum over columns or examples. Whether a rule is linear is read off its trace; what is not proved
to be so is taken for not linear.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from curvax.exact.trace import equations, flattened, in_slots

# Linear in all operands together, and in one of them.
LINEAR = frozenset(
    "add_any broadcast_in_dim concatenate convert_element_type copy cumsum neg psum pvary real reduce_sum reshape"
    " reshard rev sharding_constraint slice split squeeze transpose".split()
)
BILINEAR = frozenset("conv_general_dilated dot_general mul".split())
# Linear in the first operand, where the others are known.
LINEAR_IN_FIRST = frozenset("div dynamic_slice gather".split())


def nonlinear_backward(jaxpr: Jaxpr) -> str | None:
    """The name of a function in a program whose backward rule is not proved to be linear, if there is one."""
    for eqn in equations(jaxpr):
        if eqn.primitive.name.startswith("custom_vjp_call") and not _is_linear(eqn):
            return eqn.params["call_jaxpr"].jaxpr.debug_info.func_name
    return None


def _is_linear(eqn: JaxprEqn) -> bool:
    operands, results = [atom.aval for atom in eqn.invars], [var.aval for var in eqn.outvars]
    slots = [i for i, aval in enumerate(operands) if jnp.issubdtype(aval.dtype, jnp.inexact)]
    if not all(jnp.issubdtype(aval.dtype, jnp.inexact) for aval in results):
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
    name, others = eqn.primitive.name, [atom for i, atom in enumerate(eqn.invars) if i not in slots]
    if name in ("add", "sub", "concatenate", "pad", "select_n"):
        values = others[1:] if name == "select_n" else others
        return 0 not in slots[: name == "select_n"] and all(map(is_zero, values))
    if name in BILINEAR:
        return len(slots) == 1
    return name in LINEAR or (name in LINEAR_IN_FIRST and list(slots) == [0])
