"""From columns to the diagonals of the parameters before them."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Var, jaxprs_in_params

from curvax.exact.columns import Source
from curvax.exact.contract import Contraction, Shared, contraction
from curvax.exact.dataflow import Flow
from curvax.exact.equations import apply, evaluate, form_of, read, signature
from curvax.exact.primitives import record
from curvax.exact.routes import Route
from curvax.exact.sweep import sweep
from curvax.trees import diag_dtype

# Examples times columns at once, where the caller does not say: enough for a processor's matrix products.
ROWS = 128


def diagonals(
    flow: Flow,
    env: Mapping[Var, jax.Array],
    routes: Sequence[Route],
    source: Source,
    chunk_size: int | None,
    pulls: dict | None = None,
) -> list[jax.Array]:
    """The diagonals, summed over examples, of parameters that share columns.

    Args:
        flow: the program and what is known of it.
        env: the value of every variable.
        routes: of the parameters.
        source: the columns.
        chunk_size: columns swept back at once.
        pulls: the derivatives of equations that other sweeps have had.

    Returns:
        One array for each route, at least float32.
    """
    eqns = [flow.program.jaxpr.eqns[route.entry.index] for route in routes]
    known: dict[Hashable, Contraction] = {}
    contractions = [_contraction(flow, env, route, source, known) for route in routes]
    operands = [
        piece.operand([read(env, atom) for atom in eqn.invars]) for piece, eqn in zip(contractions, eqns, strict=True)
    ]
    pullback = sweep(flow, env, source.variables, [eqn.outvars[0] for eqn in eqns], pulls=pulls)

    def step(totals, indices):
        columns = source.at(indices)
        cotangents = jax.vmap(pullback)(columns.values)
        pieces = zip(contractions, operands, totals, cotangents, strict=True)
        return [piece.update(x, total, cotangent, columns.signs) for piece, x, total, cotangent in pieces]

    chunk_size = chunk_size or max(1, ROWS // flow.program.num_examples)
    start = [piece.start(x) for piece, x in zip(contractions, operands, strict=True)]
    totals = fold(step, start, source.steps, chunk_size)
    totals = [piece.finish(x, total) for piece, x, total in zip(contractions, operands, totals, strict=True)]
    return [
        undo_scaling(flow, route, env, total) if route.entry.monomial else total
        for route, total in zip(routes, totals, strict=True)
    ]


def _contraction(flow, env, route, source, known: dict[Hashable, Contraction]) -> Contraction:
    """How a route's columns are contracted; layers that are alike share it, and each of its parts is traced once."""
    entry, eqn, examples = route.entry, flow.program.jaxpr.eqns[route.entry.index], flow.program.num_examples
    axis, avals = flow.axes[eqn.outvars[0]], [atom.aval for atom in eqn.invars]
    operation = signature(eqn) if entry.monomial else None
    key = None if operation is None else (operation, *avals, entry.slot, axis)
    if key not in known:
        layer = record(eqn).layer.build(eqn, entry.slot, axis, examples)
        pull = None if entry.monomial else transposed(flow, route, env)
        found = contraction(layer, avals, eqn.outvars[0].aval, source.steps * source.width, pull)
        if key is None:
            return found
        known[key] = Shared(*map(jax.jit, (found.operand, found.start, found.update, found.finish)))
    return known[key]


def fold(step: Callable[[Any, jax.Array], Any], totals: Any, num: int, chunk_size: int) -> Any:
    """Folds `step` over the indices below `num`, about `chunk_size` at a time; the last few may be past the end.

    A loop, not one long program: the time to compile must not grow with the number of classes.
    """
    num_chunks = -(-num // chunk_size)
    size = -(-num // num_chunks)
    indices = jnp.arange(num_chunks * size).reshape(num_chunks, size)
    if num_chunks == 1:
        return step(totals, indices[0])
    return jax.lax.scan(lambda totals, some: (step(totals, some), None), totals, indices)[0]


# From a layer's operand back to the parameter it is made of: casts, reshapes, scales, or any linear function.


def undo_scaling(flow: Flow, route: Route, env: Mapping[Var, jax.Array], diagonal: jax.Array) -> jax.Array:
    """The parameter's diagonal from its operand's, where `operand[i] = scale[i] * parameter[place[i]] + constant`.

    Then `h_parameter[place[i]] = scale[i]^2 h_operand[i]`: the transpose, applied to `scale * h`.
    """
    if not route.entry.chain:
        return diagonal
    operand, form, fixed = _operand(flow, route, env, diagonal.dtype)

    def undo(parameter, diagonal, *fixed):
        function = lambda value: operand(value, *fixed)
        _, scale = jax.jvp(function, (parameter,), (jnp.ones_like(parameter),))
        return jax.vjp(function, parameter)[1](scale * diagonal)[0]

    # Chains that are alike are traced once.
    undo = undo if form is None else flow.traced.setdefault((form, diagonal.dtype), jax.jit(undo))
    return undo(env[flow.program.params[route.bit]].astype(diagonal.dtype), diagonal, *fixed)


def transposed(flow: Flow, route: Route, env: Mapping[Var, jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Takes a gradient of the operand to one of the parameter."""
    parameter = flow.program.params[route.bit]
    dtype = diag_dtype(parameter.aval.dtype)
    operand, _, fixed = _operand(flow, route, env, dtype)
    pull = jax.vjp(lambda value: operand(value, *fixed), env[parameter].astype(dtype))[1]
    return lambda gradient: pull(gradient.astype(dtype))[0]


def _operand(flow, route: Route, env, dtype) -> tuple[Callable[..., jax.Array], Hashable | None, list[jax.Array]]:
    """The operand as a function of the parameter and of fixed values, in `dtype`; its form; and the fixed values.

    In `dtype` throughout: a diagonal is worth more than bfloat16.
    """
    program, entry = flow.program, route.entry
    parameter, eqns = program.params[route.bit], [program.jaxpr.eqns[index] for index in entry.chain]
    wanted = program.jaxpr.eqns[entry.index].invars[entry.slot]
    made = {parameter, *(var for eqn in eqns for var in eqn.outvars)}
    others = dict.fromkeys(atom for eqn in eqns for atom in eqn.invars if isinstance(atom, Var) and atom not in made)

    def function(value, *fixed):
        values = {parameter: value, **dict(zip(others, fixed, strict=True))}
        return evaluate(eqns, values, functools.partial(_apply_widely, dtype))[wanted]

    return function, form_of(eqns, (parameter, *others, wanted)), [env[var] for var in others]


def _apply_widely(dtype, eqn: JaxprEqn, *values: jax.Array) -> list[jax.Array]:
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
