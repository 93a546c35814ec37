"""From columns to the diagonals of the parameters before them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from curvax.exact.chain import transposed, undo_scaling
from curvax.exact.columns import Source
from curvax.exact.contract import Contraction, contraction
from curvax.exact.dataflow import Flow
from curvax.exact.layers import build_layer
from curvax.exact.routes import Route
from curvax.exact.sweep import sweep
from curvax.exact.trace import read

# Examples times columns at once, where the caller does not say: enough for a processor's matrix products.
ROWS = 128


def diagonals(
    flow: Flow, env: Mapping[Var, jax.Array], routes: Sequence[Route], source: Source, chunk_size: int | None
) -> list[jax.Array]:
    """The diagonals, summed over examples, of parameters that share columns.

    Args:
        flow: the program and what is known of it.
        env: the value of every variable.
        routes: of the parameters.
        source: the columns.
        chunk_size: columns swept back at once.

    Returns:
        One array for each route, at least float32.
    """
    results = [flow.program.jaxpr.eqns[route.entry.index].outvars[0] for route in routes]
    contractions = [_contraction(flow, env, route, source) for route in routes]
    pullback = sweep(flow, env, source.variables, results)

    def step(totals, indices):
        columns = source.at(indices)
        cotangents = jax.vmap(pullback)(columns.values)
        pieces = zip(contractions, totals, cotangents, strict=True)
        return [piece.update(total, cotangent, columns.signs) for piece, total, cotangent in pieces]

    chunk_size = chunk_size or max(1, ROWS // flow.program.num_examples)
    totals = fold(step, [piece.start() for piece in contractions], source.steps, chunk_size)
    totals = [piece.finish(total) for piece, total in zip(contractions, totals, strict=True)]
    return [
        undo_scaling(flow, route, env, total) if route.entry.monomial else total
        for route, total in zip(routes, totals, strict=True)
    ]


def _contraction(flow, env, route, source) -> Contraction:
    entry, eqn = route.entry, flow.program.jaxpr.eqns[route.entry.index]
    values = [read(env, atom) for atom in eqn.invars]
    layer = build_layer(eqn, entry.slot, values, flow.axes[eqn.outvars[0]], flow.program.num_examples)
    pull = None if entry.monomial else transposed(flow, route, env)
    return contraction(layer, eqn.outvars[0].aval, source.steps * source.width, pull)


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
