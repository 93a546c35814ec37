"""The Gauss-Newton diagonal in expectation: one random column instead of one for each class."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from curvax.curvature.estimate import add_samples, at_least_float32, check_real, no_samples
from curvax.exact.backprop import diagonals
from curvax.exact.dataflow import Flow, analyse, between
from curvax.exact.diagonals import assemble, check_objective, zeros
from curvax.exact.factor import Source, random_source, signed_values
from curvax.exact.penalty import mixed_arrays
from curvax.exact.routes import plan_gauss_newton
from curvax.exact.trace import trace
from curvax.objective import Objective


def ggn_mc_diag(
    objective: Objective, params: Any, key: jax.Array, *, num_samples: int = 1, chunk_size: int | None = None
) -> tuple[jax.Array, Any, Any, Any]:
    """An unbiased estimate of the Gauss-Newton diagonal, one backward pass for each sample.

    Formula:
        `sum_b (J_b^T sum_c e_bc v_bc)^2 / B`, with random signs `e` for the columns of the factor `H_b = sum_c v_bc
        v_bc^T` of each example's loss: squared example by example, so that only the classes are noise.

    Args:
        objective: an `Objective` whose loss tells the examples apart.
        params: a pytree of floating-point arrays.
        key: a PRNG key.
        num_samples: independent samples to average.
        chunk_size: rows of the loss's Hessian at once.

    Returns:
        The value, the gradient, the estimate, and its standard error, which is None for a single sample. An array that
        enters more than one operation is estimated by squares over the whole batch: unbiased, with more noise.

    Raises:
        ValueError: if `objective` is not an `Objective`, or its loss couples the examples, and so has no factor for
            each.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from curvax import Objective
        >>> from curvax.exact import ggn_mc_diag
        >>> objective = Objective(lambda w, x: x @ w, lambda out, x: out**2, jnp.array([[1.0, 2.0], [3.0, 0.0]]))
        >>> ggn_mc_diag(objective, jnp.zeros(2), jax.random.key(0))[2].round(4).tolist()
        [10.0, 4.0]
    """
    check_objective(objective, "ggn_mc")
    check_real(params)
    value, grad = jax.value_and_grad(objective)(params)
    flow = analyse(trace(objective, params))
    mixed = frozenset() if objective.penalty is None else mixed_arrays(objective.penalty, params)
    leaves, treedef = jax.tree.flatten(params)
    sample = _sampler(flow, key, num_samples, chunk_size)
    moments = add_samples(sample, jnp.arange(num_samples), no_samples(dict(enumerate(leaves))))
    estimate = assemble(objective, params, flow, moments.mean, mixed, chunk_size)
    errors = moments.standard_error()
    if errors is not None:
        errors = treedef.unflatten([errors[bit] / flow.program.num_examples for bit in range(len(leaves))])
    return value, grad, estimate, errors


def _sampler(flow: Flow, key: jax.Array, num_samples: int, chunk_size) -> Callable[[jax.Array], dict[int, jax.Array]]:
    """The function from a sample's number to its estimate, summed over examples."""
    env, outputs, routes = flow.program.environment(), flow.program.outputs, plan_gauss_newton(flow)
    params, constant = flow.program.params, zeros(flow, routes)
    if len(constant) == len(routes):
        return lambda index: constant
    if flow.axes[outputs] is None:
        raise ValueError("ggn_mc needs a loss whose every value depends on one example alone; this one couples them.")
    columns = random_source(flow, env, outputs, key, num_samples, chunk_size)
    by_example = [route for route in routes if route.cut is not None]

    def sample(index):
        one = Source(1, 1, lambda indices: columns.at(indices + index))
        found = dict(constant)
        if by_example:
            squares = diagonals(flow, env, by_example, one, 1)
            found |= {route.bit: square for route, square in zip(by_example, squares, strict=True)}
        for route in routes:
            if route.name == "unit vectors":
                found[route.bit] = _whole_batch(flow, env, params[route.bit], one)
        return found

    return sample


def _whole_batch(flow: Flow, env, var: Var, one: Source) -> jax.Array:
    """Examples have independent signs, so their products vanish on average: no need to tell them apart."""
    outputs = flow.program.outputs
    columns = one.at(jnp.zeros(1, int))
    pull = jax.vjp(between(flow, env, var, outputs), env[var])[1]
    plain, signed = pull(columns.values[0])[0], pull(signed_values(flow, outputs, columns)[0])[0]
    return at_least_float32(plain * signed)
