"""From a layer's operand back to the parameter it is made of: casts, reshapes, scales, or any linear function."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Var, jaxprs_in_params

from curvax.exact.dataflow import Flow
from curvax.exact.routes import Route
from curvax.exact.trace import apply, read
from curvax.trees import diag_dtype


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
            values = [varying[v] if isinstance(v, Var) and v in varying else read(env, v) for v in eqn.invars]
            varying |= zip(eqn.outvars, _apply_widely(eqn, values, dtype), strict=True)
        return varying[wanted]

    return function, env[parameter].astype(dtype)


def _apply_widely(eqn: JaxprEqn, values: Sequence[jax.Array], dtype) -> list[jax.Array]:
    """The results of an equation in `dtype`, casts to less than that left out."""
    if eqn.primitive.name == "reduce_precision":
        return [_widen(values[0], values[0].dtype, dtype)]
    if eqn.primitive.name == "convert_element_type":
        return [_widen(values[0], eqn.params["new_dtype"], dtype)]
    # Equations inside an equation keep their own dtypes.
    own = any(True for _ in jaxprs_in_params(eqn.params))
    kinds = [jnp.result_type(value) for value in values]
    wanted = [atom.aval.dtype if own else _wider(kind, dtype) for atom, kind in zip(eqn.invars, kinds, strict=True)]
    casts = zip(values, kinds, wanted, strict=True)
    results = apply(eqn, *(value if kind == to else jnp.asarray(value, to) for value, kind, to in casts))
    return [_widen(result, result.dtype, dtype) for result in results]


def _widen(value: jax.Array, kind, dtype) -> jax.Array:
    value = jnp.real(value) if jnp.iscomplexobj(value) and not jnp.issubdtype(kind, jnp.complexfloating) else value
    return value.astype(_wider(kind, dtype))


def _wider(kind, dtype):
    """`dtype`, or complex numbers of its precision; other numbers as they are."""
    if jnp.issubdtype(kind, jnp.complexfloating):
        return np.result_type(dtype, np.complex64)
    return dtype if jnp.issubdtype(kind, jnp.floating) else kind
