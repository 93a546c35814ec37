"""Exact Hessian diagonals, Gauss-Newton diagonals, and what they will cost."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Var

from curvax.exact import columns, factor
from curvax.exact.backprop import diagonals
from curvax.exact.columns import Source, evaluate_atoms
from curvax.exact.dataflow import Flow, analyse, between, total_loss
from curvax.exact.derivatives import (
    along_units,
    function_diag,
    hessian_product,
    jacobian_products,
    second_derivatives,
    without_derivative,
)
from curvax.exact.explanation import Explanation, explain_products, explain_routes
from curvax.exact.penalty import mixed_arrays, penalty_diagonal
from curvax.exact.routes import Route, UnitVectors, Zero, plan, plan_gauss_newton, variable
from curvax.exact.sweep import sweep
from curvax.exact.trace import trace
from curvax.objective import Objective
from curvax.trees import at_least_float32, check_real, diag_dtype, like_diag

# In backward passes and Hessian-vector products together.
BUDGET = 10_000
PLAIN = "not an Objective: no examples to tell apart"


def exact_diag(
    objective: Any, params: Any, *, budget: int | None = BUDGET, chunk_size: int | None = None
) -> tuple[jax.Array, Any, Any]:
    """The value, the gradient and the exact Hessian diagonal: array by array, by the cheapest route that is proved.

    Formula:
        `h_i = d^2 L / d params_i^2`: where the trace allows it `sum_bc s_bc (J_b^T v_bc)_i^2 / B`, with
        `H_b = sum_c s_bc v_bc v_bc^T` the Hessian of what follows (Dangel et al. 2020, "BackPACK", for the loss; here
        for any tail of the network); elsewhere by unit vectors.
    """
    check_real(params)
    if not isinstance(objective, Objective):
        _explain_units(params, PLAIN).check(budget)
        return function_diag(objective, params, chunk_size)
    flow = analyse(trace(objective, params))
    if flow.program.nonlinear_backward is not None:
        _explain_units(params, backward_reason(flow)).check(budget)
        return function_diag(objective, params, chunk_size)
    routes, mixed = plan(flow), _mixed(objective, params)
    explain_routes(flow, routes, sorted(mixed)).check(budget)
    unit_vectors = functools.partial(_hessian_units, chunk_size=chunk_size)
    return _by_routes(objective, params, flow, routes, unit_vectors, mixed, chunk_size)


def ggn_diag(objective: Objective, params: Any, *, chunk_size: int | None = None) -> tuple[jax.Array, Any, Any]:
    """The value, the gradient and the exact diagonal of the Gauss-Newton matrix, plus that of the penalty's Hessian.

    Formula:
        `diag(sum_b J_b^T H_b J_b) / B`, with `J_b` the Jacobian of the outputs and `H_b` the Hessian of the loss in
        them (Schraudolph 2002, "Fast curvature matrix-vector products").
    """
    check_objective(objective, "ggn")
    check_real(params)
    flow = analyse(trace(objective, params))
    check_backward(flow)
    routes, mixed = plan_gauss_newton(flow), _mixed(objective, params)
    unit_vectors = functools.partial(_gauss_newton_units, chunk_size=chunk_size)
    return _by_routes(objective, params, flow, routes, unit_vectors, mixed, chunk_size)


def explain(objective: Any, params: Any) -> Explanation:
    """What `exact_diag` would do with each parameter, why, and at what cost; nothing is computed, only traced."""
    check_real(params)
    if not isinstance(objective, Objective):
        return _explain_units(params, PLAIN)
    flow = analyse(trace(objective, params))
    if flow.program.nonlinear_backward is not None:
        return _explain_units(params, backward_reason(flow))
    return explain_routes(flow, plan(flow), sorted(_mixed(objective, params)))


def explain_ggn(objective: Objective, params: Any) -> Explanation:
    """What `ggn_diag` would do with each parameter, why, and at what cost."""
    check_objective(objective, "ggn")
    check_real(params)
    flow = analyse(trace(objective, params))
    check_backward(flow)
    return explain_routes(flow, plan_gauss_newton(flow), sorted(_mixed(objective, params)))


def check_backward(flow: Flow) -> None:
    """Raises a ValueError if a backward rule is no derivative, so that there is no Gauss-Newton matrix."""
    if flow.program.nonlinear_backward is not None:
        raise ValueError(
            f"the Gauss-Newton matrix has no meaning here: {backward_reason(flow)}. Choose method='basis' or"
            " 'hutchinson', which differentiate the gradient as it is, or give the function a backward rule that is"
            " linear in the cotangent."
        )


def backward_reason(flow: Flow) -> str:
    """What stands in the way of all that is linear."""
    name = flow.program.nonlinear_backward
    return f"the backward rule of the custom_vjp '{name}' is not proved to be linear"


def check_objective(objective: Any, method: str) -> None:
    """Raises a ValueError if there is no loss to tell from the network."""
    if not isinstance(objective, Objective):
        raise ValueError(
            f"method={method!r} needs to tell the network from the loss: pass a curvax.Objective(predict, loss, data),"
            f" not {type(objective).__name__}."
        )


def _by_routes(objective, params, flow: Flow, routes: Sequence[Route], unit_vectors, mixed, chunk_size):
    """Value, gradient and diagonal, by one forward pass and the derivatives of its operations."""
    env, pulls = flow.program.environment(), {}
    value, grad = _value_and_grad(objective, params, flow, env, pulls)
    total = zeros(flow, routes)
    total |= {route.bit: unit_vectors(flow, env, var) for route, var in _vars(flow, routes, UnitVectors)}
    for source in _sources(flow, env, routes, chunk_size, pulls):
        sharing = [route for route in routes if source.variables[0] in map(variable, route.origins)]
        found = diagonals(flow, env, sharing, source, chunk_size, pulls)
        for route, diagonal in zip(sharing, found, strict=True):
            diagonal = without_derivative(diagonal)
            total[route.bit] = total[route.bit] + diagonal if route.bit in total else diagonal
    return value, grad, assemble(objective, params, flow, total, mixed, chunk_size)


def _value_and_grad(objective: Objective, params, flow: Flow, env, pulls: dict) -> tuple[jax.Array, Any]:
    losses = flow.program.losses
    value, pull = jax.vjp(jnp.mean, env[losses])
    leaves = sweep(flow, env, [losses], flow.program.params, pulls=pulls)(pull(jnp.ones_like(value)))
    grad = jax.tree.unflatten(jax.tree.structure(params), leaves)
    if objective.penalty is None:
        return value, grad
    more = jax.value_and_grad(objective.penalty)(params)
    return jax.tree.map(jnp.add, (value, grad), more)


def _sources(flow: Flow, env, routes: Sequence[Route], chunk_size: int | None, pulls: dict) -> Iterator[Source]:
    """All columns that some routes need, origin by origin."""
    origins = list(dict.fromkeys(place for route in routes for place in route.origins))
    curved = evaluate_atoms(flow, env, [place for place in origins if not isinstance(place, Var)], pulls)
    yield from (columns.source(flow, atom) for atom in curved)
    yield from (factor.source(flow, env, cut, chunk_size) for cut in origins if isinstance(cut, Var))


def zeros(flow: Flow, routes: Sequence[Route]) -> dict[int, jax.Array]:
    """The diagonals of the parameters that no derivative reaches."""
    return {route.bit: jnp.zeros(v.aval.shape, diag_dtype(v.aval.dtype)) for route, v in _vars(flow, routes, Zero)}


def _vars(flow, routes, kind):
    return [(route, flow.program.params[route.bit]) for route in routes if isinstance(route, kind)]


def assemble(objective, params, flow: Flow, total: dict[int, jax.Array], mixed, chunk_size) -> Any:
    """The tree of diagonals: sums over the examples become means, and the penalty adds its own."""
    leaves = [total[bit] / flow.program.num_examples for bit in range(len(total))]
    if objective.penalty is not None:
        extra = penalty_diagonal(objective.penalty, params, mixed, chunk_size)
        leaves = [leaf + more for leaf, more in zip(leaves, extra, strict=True)]
    return like_diag(jax.tree.unflatten(jax.tree.structure(params), leaves), params)


def _mixed(objective: Objective, params: Any) -> frozenset[int]:
    return frozenset() if objective.penalty is None else mixed_arrays(objective.penalty, params)


def _hessian_units(flow, env, var, *, chunk_size) -> jax.Array:
    return second_derivatives(total_loss(flow, env, [var]), env[var], chunk_size)


def _gauss_newton_units(flow, env, var, *, chunk_size) -> jax.Array:
    outputs = flow.program.outputs
    values, loss = [env[output] for output in outputs], total_loss(flow, env, outputs)
    _, push, _ = jacobian_products(between(flow, env, [var], outputs), env[var])
    _, _, curvature = hessian_product(lambda u: loss(*u), values)

    def entry(unit, index):
        moved = push(unit)
        parts = jax.tree.map(lambda a, b: jnp.sum(at_least_float32(jnp.real(a * b))), moved, curvature(moved))
        return optax.tree.sum(parts)

    return along_units(entry, env[var], chunk_size)


def _explain_units(params, reason: str) -> Explanation:
    return explain_products(params, [x.size for x in jax.tree.leaves(params)], "unit vectors", reason)
