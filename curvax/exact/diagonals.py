"""Hessian and Gauss-Newton diagonals, each array by the cheapest route that is proved exact."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from curvax.exact import factor, units
from curvax.exact.chain import transposed, undo_scaling
from curvax.exact.contract import Contraction
from curvax.exact.dataflow import Flow, analyse
from curvax.exact.factor import Columns
from curvax.exact.layers import build_layer
from curvax.exact.routes import Route, num_columns, plan
from curvax.exact.sweep import sweep
from curvax.exact.trace import Program, read, trace, wide
from curvax.objective import Objective

Diagonal = tuple[jax.Array, Any, Any]


def exact_diag(objective: Any, params: Any, *, chunk_size: int | None = None) -> Diagonal:
    value, grad = jax.value_and_grad(objective)(params)
    leaves, treedef = jax.tree.flatten(params)
    program = trace(objective, params)
    flow = analyse(program)
    env = program.environment()
    routes = plan(program, flow)
    diagonal = by_cuts(program, flow, env, routes, chunk_size)
    for route in routes:
        var = program.params[route.bit]
        if route.name == "unit vectors":
            total = units.second_derivatives(factor.tail(program, flow, env, var), env[var], chunk_size)
            diagonal[route.bit] = total / program.num_examples
        elif route.name == "zero":
            diagonal[route.bit] = jnp.zeros(var.aval.shape, wide(var.aval.dtype))
    return value, grad, jax.tree.unflatten(treedef, [diagonal[bit] for bit in range(len(leaves))])


def by_cuts(program: Program, flow: Flow, env: Mapping[Var, jax.Array], routes: Sequence[Route], chunk_size) -> dict:
    """The diagonals of the mean loss for all parameters that have a cut, one cut after the other."""
    diagonal = {}
    for cut in dict.fromkeys(route.cut for route in routes if route.cut is not None):
        sharing = [route for route in routes if route.cut is cut]
        columns = loss_columns(program, flow, env, cut, chunk_size)
        diagonal |= send_back(program, flow, env, cut, sharing, columns, chunk_size)
    return {bit: total / program.num_examples for bit, total in diagonal.items()}


def loss_columns(program, flow, env, cut, chunk_size) -> Columns:
    """A signed factor of the Hessian of what lies beyond a cut, as cotangents of the cut."""
    axis, value = flow.axes[cut], env[cut]
    matrices = factor.hessians(factor.tail(program, flow, env, cut), value, axis, program.num_examples, chunk_size or units.CHUNK)
    columns, signs = factor.signed_factor(matrices, num_columns(program, flow, cut))
    _, unslice = factor.slicer(value, axis, program.num_examples)
    return Columns(jax.vmap(unslice)(columns.astype(value.dtype)), signs)


def send_back(program, flow, env, cut, routes, columns: Columns, chunk_size) -> dict[int, jax.Array]:
    """Sweeps columns back from a cut to the layers of `routes`, a chunk at a time, and contracts them there."""
    num = len(columns.signs)
    eqns = program.jaxpr.eqns
    contractions, results = [], []
    for route in routes:
        entry, eqn = route.entry, eqns[route.entry.index]
        results.append(eqn.outvars[0])
        values = [read(env, atom) for atom in eqn.invars]
        layer = build_layer(eqn, entry.slot, values, flow.axes[eqn.outvars[0]], program.num_examples)
        pull = None if entry.monomial else transposed(program, route, env)
        contractions.append(Contraction(layer, eqn.outvars[0].aval, num, pull))
    pullback = sweep(eqns, flow.links, env, cut, results)

    def step(totals, chunk: Columns):
        cotangents = jax.vmap(pullback)(chunk.values)
        pieces = zip(contractions, totals, cotangents, strict=True)
        return [contraction.update(total, c, chunk.signs) for contraction, total, c in pieces], None

    totals = [contraction.start() for contraction in contractions]
    totals = in_chunks(step, totals, columns, chunk_size or max(1, 256 // program.num_examples))
    diagonal = {}
    for route, contraction, total in zip(routes, contractions, totals, strict=True):
        total = contraction.finish(total)
        diagonal[route.bit] = undo_scaling(program, route, env, total) if route.entry.monomial else total
    return diagonal


def in_chunks(step: Callable, totals: Any, columns: Columns, chunk_size: int) -> Any:
    """Folds `step` over the columns, `chunk_size` at a time; zero columns fill the last chunk."""
    num = len(columns.signs)
    num_chunks = -(-num // chunk_size)
    if num_chunks == 1:
        return step(totals, columns)[0]
    size = -(-num // num_chunks)
    missing = num_chunks * size - num

    def split(array):
        padded = jnp.concatenate([array, jnp.zeros((missing, *array.shape[1:]), array.dtype)])
        return padded.reshape(num_chunks, size, *array.shape[1:])

    return jax.lax.scan(step, totals, jax.tree.map(split, columns))[0]
