"""From a layer's operand back to the parameter it is made of: casts, reshapes, scales, or any linear function."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from curvax.curvature.estimate import diag_dtype
from curvax.exact.dataflow import Flow
from curvax.exact.routes import Route
from curvax.exact.trace import apply, read


def undo_scaling(flow: Flow, route: Route, env: Mapping[Var, jax.Array], diagonal: jax.Array) -> jax.Array:
    """The parameter's diagonal from its operand's, where `operand[i] = scale[i] * parameter[place[i]] + constant`.

    Then `h_parameter[place[i]] = scale[i]^2 h_operand[i]`: the transpose, applied to `scale * h`.
    """
    function, x = _operand(flow, route, env, diagonal.dtype)
    _, scale = jax.jvp(function, (x,), (jnp.ones_like(x),))
    return jax.vjp(function, x)[1](scale * diagonal)[0]


def transposed(flow: Flow, route: Route, env: Mapping[Var, jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Takes a gradient of the operand to one of the parameter."""
    dtype = diag_dtype(flow.program.params[route.bit].aval.dtype)
    pull = jax.vjp(*_operand(flow, route, env, dtype))[1]
    return lambda gradient: pull(gradient.astype(dtype))[0]


def _operand(flow, route, env, dtype) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """The operand as a function of the parameter, in `dtype` throughout: a diagonal is worth more than bfloat16."""
    entry, parameter = route.entry, flow.program.params[route.bit]
    wanted = flow.program.jaxpr.eqns[entry.index].invars[entry.slot]

    def function(value):
        varying = {parameter: value}
        for eqn in (flow.program.jaxpr.eqns[index] for index in entry.chain):
            values = [
                varying[v] if isinstance(v, Var) and v in varying else _widen(read(env, v), dtype) for v in eqn.invars
            ]
            casts = eqn.primitive.name in ("convert_element_type", "reduce_precision")
            varying |= zip(eqn.outvars, values[:1] if casts else apply(eqn, *values), strict=True)
        return varying[wanted]

    return function, env[parameter].astype(dtype)


def _widen(value, dtype):
    return jnp.asarray(value, dtype) if jnp.issubdtype(jnp.result_type(value), jnp.inexact) else value
