"""The diagonal of the Gauss-Newton matrix in expectation, for one backward pass a sample.

The Gauss-Newton matrix of a mean loss is `mean_b J_b^T H_b J_b`, with J_b the Jacobian of example b's outputs and H_b
the Hessian of its loss. Let v_b be a random column, with `E[v v^T] = H_b` and mean zero, independent for each example.
Then

    fine:      mean_b (J_b^T v_b)^2               squared example by example,
    coarse:    (sum_b J_b^T v_b)^2 / B            squared over a batch,

both have the diagonal wanted for their mean, at the price of the same backward pass. The coarse form needs nothing of
the network, and has the products of different examples for noise; that falls if the batch is split. The fine form has
none of it, and needs to follow each array to where it meets the examples (`curvax.exact`). The column comes from the
structure that the trace proves of the loss (`curvax.exact.atoms`); where there is none, or its atoms are made of
others, from eigenvectors of small slices. For other losses z * G z with random signs z takes the place of the square,
at the price of a product.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Var

from curvax.curvature.estimate import Estimate, add_samples, no_samples
from curvax.curvature.micro_batches import mean_over_micro_batches
from curvax.curvature.products import gauss_newton_product
from curvax.exact import factor
from curvax.exact.atoms import Separate, Softmax, Structure, find_atoms
from curvax.exact.backprop import diagonals
from curvax.exact.columns import Columns, RandomColumns, Source, evaluate_atoms, origin
from curvax.exact.dataflow import Flow, analyse, between
from curvax.exact.derivatives import hessian_product, without_derivative
from curvax.exact.diagonals import backward_reason, check_backward, zeros
from curvax.exact.equations import is_complex, is_inexact
from curvax.exact.explanation import Explanation, Row
from curvax.exact.routes import Route, UnitVectors, plan_gauss_newton
from curvax.exact.sweep import sweep
from curvax.exact.trace import trace, trace_loss
from curvax.objective import Objective
from curvax.trees import at_least_float32, like_diag

Squares = Literal["example", "batch"]
Random = RandomColumns | factor.RandomEigencolumns

# Into how many micro-batches a batch is split in the coarse form, or for its memory, where the caller does not say.
MICRO_BATCHES = 4
# Entries of an example's outputs above which a batch is split for its memory: a sample holds several arrays of their
# size, and such an example, as one of a language model, keeps a device busy.
LARGE_OUTPUTS = 2**14
# Entries of an example's outputs up to which a loss without structure is factored.
FACTORED = factor.FACTORED_TAIL

_KINDS = {Softmax: "a softmax", Separate: "functions of single numbers"}


class Sampling(NamedTuple):
    """How the diagonal of an objective is estimated, as its trace decides.

    Attributes:
        form: "example" or "batch", what is squared; "product" where no column is known; or "refused" where there is no
            Gauss-Newton matrix.
        reason: what was proved of the loss, or stood in the way.
        routes: of each array, as `curvax.exact` plans them; they tell which arrays are squared by batch.
    """

    form: Literal["example", "batch", "product", "refused"]
    reason: str
    routes: tuple[Route, ...]


def plan_sampling(objective: Objective, params: Any, squares: Squares | None = None) -> Sampling:
    """Chooses the form of the estimate: by example where every array can be followed, unless the caller says.

    Args:
        objective: an `Objective`.
        params: a pytree of arrays, or of their shapes.
        squares: what to square, "example" or "batch"; None for the proof to choose.

    Returns:
        The choice. In the form "example" the arrays whose route is "unit vectors" are squared by batch all the same.
    """
    return _plan(analyse(trace(objective, params)), squares)


def explain_sampling(objective: Objective, params: Any, num_samples: int, squares: Squares | None) -> Explanation:
    """What `sampled_gauss_newton` would do with each array, and why."""
    flow = analyse(trace(objective, params))
    check_backward(flow)
    form, proved, routes = _plan(flow, squares)
    rows: list[Row] = []
    for route, x in zip(routes, jax.tree.leaves(params), strict=True):
        count = num_samples if not rows else 0
        if form == "product":
            row = ("signs, Gauss-Newton products", proved, 0, count)
        elif form == "example" and not isinstance(route, UnitVectors):
            row = ("random column", f"{proved}; squares of each example's gradient", count, 0)
        else:
            why = f" ({route.reason})" if isinstance(route, UnitVectors) else ""
            row = (
                "random column",
                f"{proved}; squares over the batch, or parts of it where examples are independent{why}",
                count,
                0,
            )
        rows.append(Row(route.path, jnp.shape(x), *row))
    if objective.penalty is not None:
        rows.append(Row("penalty", (), "signs, products", "its own Hessian", 0, num_samples))
    return Explanation(tuple(rows))


def _plan(flow: Flow, squares: Squares | None) -> Sampling:
    routes = tuple(plan_gauss_newton(flow))
    if flow.program.nonlinear_backward is not None:
        return Sampling("refused", backward_reason(flow), routes)
    known, reason = _columns_of(flow)
    if not known:
        return Sampling("product", reason, routes)
    followed = not any(isinstance(route, UnitVectors) for route in routes)
    return Sampling(squares or ("example" if followed else "batch"), reason, routes)


def _columns_of(flow: Flow) -> tuple[bool, str]:
    """Whether random columns of the loss's Hessian are known, and what is known of it."""
    structure = find_atoms(flow)
    small = _is_small(flow)
    if isinstance(structure, str):
        return small, f"{structure}{'; few outputs for each example' if small else ''}"
    if _is_factored(flow, structure):
        return True, "the loss is curved by functions of curved functions; few outputs for each example"
    kinds = dict.fromkeys(_KINDS[type(atom)] for atom in structure.atoms)
    return True, f"the loss is curved by {' and '.join(kinds)}" if kinds else "the loss is not curved"


def _is_factored(flow: Flow, structure: Structure | str) -> bool:
    """Whether the Hessian of each example's loss is factored: atoms of atoms may cancel each other in large part."""
    return not (isinstance(structure, Structure) and structure.simple) and _is_small(flow)


def _is_small(flow: Flow) -> bool:
    """Whether the Hessian of each example's loss may be factored."""
    outputs = flow.program.outputs
    if len(outputs) != 1 or is_complex(outputs[0]) or flow.axes.get(outputs[0]) is None:
        return False
    return _size(outputs[0]) <= FACTORED * flow.program.num_examples


def _entries(flow: Flow) -> int:
    """How many numbers the network returns for an example."""
    return sum(map(_size, flow.program.outputs)) // flow.program.num_examples


def _size(x: Any) -> int:
    """How many numbers a variable of a trace holds."""
    return int(x.aval.size)


def sampled_gauss_newton(
    objective: Objective,
    params: Any,
    key: jax.Array,
    *,
    num_samples: int = 1,
    squares: Squares | None = None,
    micro_batches: int | None = None,
    chunk_size: int | None = None,
) -> Estimate:
    """An unbiased estimate of the Gauss-Newton diagonal; that of a penalty's Hessian is added.

    Args:
        objective: an `Objective`.
        params: a pytree of real arrays.
        key: a PRNG key.
        num_samples: independent samples to average, in each micro-batch.
        squares: what to square, see `plan_sampling`.
        micro_batches: into how many parts the batch is split; by default none, but as many as 4 in the coarse form
            and where an example has more than 16,384 outputs, if the examples are proved to be independent.
        chunk_size: samples in a pass.

    Returns:
        The estimate; its standard error is None for a single sample.
    """
    alone = dataclasses.replace(objective, penalty=None)
    flow = analyse(trace(alone, params))
    check_backward(flow)
    form = _plan(flow, squares).form
    sampler = {"example": _by_example, "batch": _by_batch, "product": _by_product}[form]

    def estimate(part: Objective, key: jax.Array) -> Estimate:
        value, grad, sample = sampler(part, params)
        sampled = lambda key: like_diag(sample(key), params)
        moments = add_samples(sampled, jax.random.split(key, num_samples), no_samples(params), chunk_size)
        # The chances by which columns are drawn depend on the parameters, and have derivatives that no draw shows.
        kept = (lambda x: x) if form == "product" else without_derivative
        return Estimate(value, grad, *kept((moments.mean, moments.standard_error())))

    parts = micro_batches or (MICRO_BATCHES if form == "batch" or _entries(flow) > LARGE_OUTPUTS else 1)
    penalty_key, key = jax.random.split(key)
    found = mean_over_micro_batches(estimate, alone, params, key, parts, optional=micro_batches is None)
    return (
        found if objective.penalty is None else _add_penalty(found, objective.penalty, params, penalty_key, num_samples)
    )


# The mean loss, its gradient, and a function from a key to an estimate of the diagonal.
Sampler = tuple[jax.Array, Any, Callable[[jax.Array], Any]]


def _by_batch(objective: Objective, params: Any) -> Sampler:
    _, pull, outputs = _linearised(objective, params)
    flow = analyse(trace_loss(objective, outputs))
    if not _columns_of(flow)[0]:  # A part of the batch may prove less than the whole: that of one example.
        return _by_product(objective, params)
    env, inputs, losses = flow.program.environment(), flow.program.params, flow.program.losses
    columns = random_columns(flow, env)
    if columns is None:
        return *jax.value_and_grad(objective)(params), lambda key: _no_curvature(params)
    assert isinstance(losses, Var), "losses that curve are no constant"
    size = flow.program.num_examples
    slopes = sweep(flow, env, [losses], inputs)([jnp.ones_like(env[losses]) / size])
    to_outputs = sweep(flow, env, columns.variables, inputs)

    def square(key: jax.Array) -> Any:
        drawn = columns.draw(key, by_example=False)
        (gradient,) = pull(to_outputs(drawn.values))
        signs = jnp.sum(drawn.signs[:1])
        return jax.tree.map(lambda g: signs.astype(g.dtype) * jnp.square(g) / size, _wide(gradient))

    return jnp.mean(env[losses]), pull(slopes)[0], square


def _linearised(objective: Objective, params: Any) -> tuple[list[jax.Array], Callable[..., Any], Any]:
    """The floating-point leaves of the outputs, their pullback, and the outputs."""

    def predict(params: Any) -> tuple[list[jax.Array], Any]:
        outputs = objective.predict(params, objective.data)
        return [x for x in jax.tree.leaves(outputs) if is_inexact(x)], outputs

    return jax.vjp(predict, params, has_aux=True)


def _by_example(objective: Objective, params: Any) -> Sampler:
    value, grad = jax.value_and_grad(objective)(params)
    flow = analyse(trace(objective, params))
    env, routes = flow.program.environment(), plan_gauss_newton(flow)
    columns = random_columns(flow, env)
    if columns is None:
        return value, grad, lambda key: _no_curvature(params)
    treedef, size = jax.tree.structure(params), flow.program.num_examples
    followed = [route for route in routes if route.origins]
    others = [route for route in routes if isinstance(route, UnitVectors)]

    def sample(key: jax.Array) -> Any:
        drawn = columns.draw(key, by_example=not others)
        found = zeros(flow, routes)
        if followed:
            one = Source(columns.variables, 1, 1, lambda _: jax.tree.map(lambda x: x[None], drawn))
            squares = diagonals(flow, env, followed, one, 1)
            found |= {route.bit: square for route, square in zip(followed, squares, strict=True)}
        if others:
            found |= _whole_batch(flow, env, others, columns, drawn)
        return jax.tree.unflatten(treedef, [found[bit] / size for bit in range(len(routes))])

    return value, grad, sample


def _whole_batch(
    flow: Flow, env: Mapping[Var, jax.Array], routes: Sequence[Route], columns: Random, drawn: Columns
) -> dict[int, jax.Array]:
    """Squares over the batch, of the arrays that are not followed."""
    variables = [flow.program.params[route.bit] for route in routes]
    pull = jax.vjp(between(flow, env, variables, columns.variables), *(env[var] for var in variables))[1]
    gradients = _wide(pull(list(drawn.values)))
    sign = jnp.sum(drawn.signs[:1])
    return {r.bit: sign.astype(g.dtype) * jnp.square(g) for r, g in zip(routes, gradients, strict=True)}


def _by_product(objective: Objective, params: Any) -> Sampler:
    value, grad, product = gauss_newton_product(objective, params)
    return value, grad, lambda key: _signs_times(product, params, key)


def random_columns(flow: Flow, env: Mapping[Var, jax.Array]) -> Random | None:
    """Random columns of the loss's Hessian; None where it has none."""
    structure = find_atoms(flow)
    if _is_factored(flow, structure):
        return factor.random_eigencolumns(flow, env, flow.program.outputs[0])
    assert isinstance(structure, Structure), "a loss whose columns are not known is not sampled"
    atoms = [atom for atom in structure.atoms if flow.depends.get(origin(atom))]
    return RandomColumns(flow, evaluate_atoms(flow, env, atoms)) if atoms else None


def _no_curvature(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros_like(at_least_float32(x)), params)


def _wide(tree: Any) -> Any:
    return jax.tree.map(at_least_float32, tree)


def _add_penalty(
    found: Estimate, penalty: Callable[[Any], jax.Array], params: Any, key: jax.Array, num_samples: int
) -> Estimate:
    """Adds a penalty's own Hessian, by as many random signs: exact where that is diagonal."""
    value, grad, product = hessian_product(penalty, params)
    sample = lambda key: _signs_times(product, params, key)
    moments = add_samples(sample, jax.random.split(key, num_samples), no_samples(params))
    add = lambda one, other: jax.tree.map(jnp.add, one, other)
    error = found.standard_error
    if error is not None:
        error = jax.tree.map(jnp.hypot, error, moments.standard_error())
    return Estimate(add(found.value, value), add(found.grad, grad), add(found.diag, moments.mean), error)


def _signs_times(product: Callable[[Any], Any], params: Any, key: jax.Array) -> Any:
    """`z * A z` for random signs z."""
    z = optax.tree.random_like(key, params, jax.random.rademacher)
    return jax.tree.map(jnp.multiply, _wide(z), _wide(product(z)))
