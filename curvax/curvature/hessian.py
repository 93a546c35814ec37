"""Second derivatives: Hessian-vector products, and the diagonal of the Hessian by several methods.

Everything rests on `H v = d/dt grad L(w + t v)`, forward over reverse: `jax.jvp` of `jax.grad`. `_METHODS` names the
ways to a diagonal; here is what they share: which leaves are wanted, what is refused, and what comes back.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvax.curvature.estimate import Estimate, Options, basis, check_real
from curvax.curvature.hutchinson import hutchinson
from curvax.curvature.xdiag import xdiag
from curvax.exact import BUDGET, exact_diag, ggn_diag, ggn_mc_diag
from curvax.gauss_newton import ggn_sampled
from curvax.meshes import on_auto_axes
from curvax.micro_batches import over_micro_batches
from curvax.objective import Objective


def _exact(objective, params, options: Options) -> Estimate:
    value, grad, diag = exact_diag(objective, params, budget=options.budget, chunk_size=options.chunk_size)
    return Estimate(value, grad, diag, jax.tree.map(jnp.zeros_like, diag))


def _ggn(objective, params, options: Options) -> Estimate:
    value, grad, diag = ggn_diag(objective, params, chunk_size=options.chunk_size)
    return Estimate(value, grad, diag, jax.tree.map(jnp.zeros_like, diag))


def _ggn_mc(objective, params, options: Options) -> Estimate:
    drawn = {"num_samples": options.num_samples, "chunk_size": options.chunk_size}
    return Estimate(*ggn_mc_diag(objective, params, options.key, **drawn))


_METHODS = {
    "exact": over_micro_batches(_exact),
    "basis": over_micro_batches(basis),
    "ggn": over_micro_batches(_ggn),
    "ggn_mc": over_micro_batches(_ggn_mc),
    "ggn_sampled": ggn_sampled,
    "hutchinson": over_micro_batches(hutchinson),
    "xdiag": over_micro_batches(xdiag),
}

#: The methods that need a key.
STOCHASTIC = frozenset({"ggn_mc", "ggn_sampled", "hutchinson", "xdiag"})


def hvp(objective: Callable[[Any], jax.Array], params: Any, v: Any) -> Any:
    """The Hessian of a scalar function times a vector.

    Formula:
      `H v = d/dt grad L(params + t v)` at `t = 0`: `jax.jvp` of `jax.grad` (Pearlmutter 1994), at the price of about
      two gradients.

    Args:
      objective: an `Objective`, or any function `params -> scalar`.
      params: a tree of real arrays.
      v: a tree like `params`.

    Returns:
      `H v`, a tree like `params`.

    Raises:
      ValueError: if a parameter is not real.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import hvp
      >>> hvp(lambda w: w[0] ** 2 * w[1], jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])).tolist()
      [4.0, 2.0]
    """
    check_real(params)
    return jax.jvp(jax.grad(objective), (params,), (v,))[1]


def hessian_diag(
    objective: Callable[[Any], jax.Array],
    params: Any,
    *,
    method: str,
    key: jax.Array | None = None,
    num_samples: int = 1,
    standard_error: bool = False,
    where: Any = None,
    micro_batches: int | None = None,
    chunk_size: int | None = None,
    budget: int | None = BUDGET,
    has_aux: bool = False,
) -> Any:
    """The diagonal of the Hessian of a loss.

    Formula:
      `diag_i = d^2 L / d params_i^2`, which eq. 9 of Gao & Zhong needs. By `method`:

      - `"exact"`: the exact diagonal by the cheapest route that the traced computation proves, array by array, for
        which `explain` gives the reasons and the cost; unit vectors where it proves none, and an error where those are
        too many;
      - `"basis"`: `e_i . H e_i` for every unit vector: exact, at one Hessian-vector product per parameter;
      - `"ggn"`: the exact diagonal of the Gauss-Newton matrix, which is H without the curvature of the network itself;
      - `"ggn_mc"`: the same in expectation, by one random column of the loss's Hessian per example and sample;
      - `"hutchinson"`: the mean of `z * H z` over random signs `z` (Bekas et al. 2007): unbiased, its standard error
        falls as `1 / sqrt(num_samples)`. Where the trace proves that the Gauss-Newton matrix has the same diagonal, as
        for a ReLU network, that matrix takes the place of H, at fewer operations;
      - `"xdiag"`: Hutchinson's estimate of what `k = num_samples` products leave unknown of H, each probe judged by the
        others (Epperly, Tropp and Webber 2024): `2 k` products, and memory for several copies of the parameters for
        each. Where the spectrum decays its error falls faster than Hutchinson's;
      - `"ggn_sampled"`: the Gauss-Newton diagonal for a softmax cross-entropy: labels are drawn from the model's own
        softmax, and the squares of the gradients of `micro_batches` micro-batches, each times its size, are averaged.
        Unbiased, never negative, and at the price of two gradients a far smaller variance than Hutchinson's. A
        `penalty` adds one Hutchinson probe of its own Hessian, exact where that is diagonal.

    Args:
      objective: an `Objective`, or any function `params -> scalar`; the `"ggn..."` methods need an `Objective`.
      params: a tree of real arrays.
      method: one of the seven.
      key: a `jax.random.key`; required by the stochastic methods.
      num_samples: number of independent samples over which a stochastic method averages.
      standard_error: whether to return the standard error of each entry as well. It is estimated from the samples, so
        there have to be two of them (counting micro-batches, which see different examples and so tell rather more).
      where: a tree of booleans like `params` (or a prefix of it), or a function from `params` to one: the leaves whose
        diagonal is wanted. Others are constants, cost nothing, and come back as `optax.MaskedNode()`.
      micro_batches: into how many parts the batch is split (the largest divisor of its size up to this), one after the
        other: memory falls in proportion, the result stays. By default 4 for `"ggn_sampled"`, whose variance falls too,
        and 1 elsewhere. The examples have to be independent, and `predict` and `loss` treat them alike.
      chunk_size: how many unit vectors, columns or probes share a pass. Memory grows with it, time falls. By default 16
        unit vectors, and one probe; of columns, so many as make 128 rows with the examples.
      budget: for `"exact"`, the most backward passes and Hessian-vector products to spend; `None` for no limit.
      has_aux: whether the objective (or the `predict` of an `Objective`) returns a pair, of which the second is other
        output, as for `jax.grad`.

    Returns:
      A tree like `params` of float32 (float64 for float64 parameters), or `(diag, standard_error)`; with `has_aux` a
      pair of that and the other output.

    Raises:
      ValueError: if `method` is unknown, `key` is missing, a parameter is not real, `num_samples` does not allow a
        standard error, the cost is above `budget`, or the objective is not what the method, or `micro_batches`, needs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax import hessian_diag
      >>> def loss(w):
      ...   return w[0] ** 2 * w[1] + w[1] ** 3
      >>> hessian_diag(loss, jnp.array([1.0, 2.0]), method="basis").tolist()
      [4.0, 12.0]
      >>> z = hessian_diag(loss, jnp.array([1.0, 2.0]), method="hutchinson", key=jax.random.key(0), num_samples=2)
      >>> z.shape
      (2,)
    """
    value, _, diag = value_grad_and_hessian_diag(
        objective,
        params,
        method=method,
        key=key,
        num_samples=num_samples,
        standard_error=standard_error,
        where=where,
        micro_batches=micro_batches,
        chunk_size=chunk_size,
        budget=budget,
        has_aux=has_aux,
    )
    return (diag, value[1]) if has_aux else diag


def value_grad_and_hessian_diag(
    objective: Callable[[Any], jax.Array],
    params: Any,
    *,
    method: str,
    key: jax.Array | None = None,
    num_samples: int = 1,
    standard_error: bool = False,
    where: Any = None,
    micro_batches: int | None = None,
    chunk_size: int | None = None,
    budget: int | None = BUDGET,
    has_aux: bool = False,
) -> tuple[jax.Array, Any, Any]:
    """The loss, its gradient and the diagonal of its Hessian, sharing the forward pass.

    Formula:
      As `hessian_diag`. The value and the gradient are those of the whole objective, penalty included.

    Args:
      objective: see `hessian_diag`, as for all arguments.
      params: a tree of real arrays.
      method: one of the seven.
      key: a `jax.random.key`; required by the stochastic methods.
      num_samples: number of independent samples.
      standard_error: whether to return the standard error of each entry as well.
      where: the leaves whose diagonal, and gradient, is wanted.
      micro_batches: into how many parts the batch is split.
      chunk_size: how many unit vectors, columns or probes share a pass.
      budget: for `"exact"`, the most backward passes and Hessian-vector products to spend.
      has_aux: whether the objective returns other output too.

    Returns:
      `(value, grad, diag)`, or `(value, grad, (diag, standard_error))`; with `has_aux` the value is a pair of the loss
      and the other output.

    Raises:
      ValueError: as `hessian_diag`.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import value_grad_and_hessian_diag
      >>> value, grad, diag = value_grad_and_hessian_diag(lambda w: w @ w, jnp.array([1.0, 2.0]), method="basis")
      >>> float(value), grad.tolist(), diag.tolist()
      (5.0, [2.0, 4.0], [2.0, 2.0])
    """
    if method not in _METHODS:
        raise ValueError(f"method={method!r} is unknown; pass one of {', '.join(map(repr, _METHODS))}.")
    if key is None and method in STOCHASTIC:
        raise ValueError(f"method={method!r} draws random numbers; pass key=jax.random.key(seed).")
    aux = None
    if has_aux:
        objective, aux = _without_aux(objective, params)
    objective, params = _restrict(objective, params, where)
    check_real(params)
    options = Options(key, num_samples, micro_batches, chunk_size, budget)
    estimate = on_auto_axes(_METHODS[method])(objective, params, options)
    if standard_error and estimate.standard_error is None:
        raise ValueError(f"a standard error takes two samples at least, {num_samples} given; raise num_samples.")
    diag = (estimate.diag, estimate.standard_error) if standard_error else estimate.diag
    return (estimate.value, aux) if has_aux else estimate.value, estimate.grad, diag


def select(params: Any, where: Any) -> Any:
    """The leaves that `where` selects (see `hessian_diag`), with `optax.MaskedNode()` in place of the others."""
    if where is None:
        return params
    mask = jax.tree.broadcast(where(params) if callable(where) else where, params)
    return jax.tree.map(lambda use, x: x if use else optax.MaskedNode(), mask, params)


def _without_aux(objective, params):
    """The objective alone, and its other output; under `jit` the forward pass that finds it is shared."""
    if not isinstance(objective, Objective):
        return lambda params: objective(params)[0], objective(params)[1]
    alone = dataclasses.replace(objective, predict=lambda params, data: objective.predict(params, data)[0])
    return alone, objective.predict(params, objective.data)[1]


def _restrict(objective, params, where):
    """The objective as a function of the leaves that `where` selects, and those leaves."""
    if where is None:
        return objective, params
    chosen = select(params, where)

    def is_hole(x):
        return isinstance(x, optax.MaskedNode)

    def merge(chosen):
        return jax.tree.map(lambda x, whole: whole if is_hole(x) else x, chosen, params, is_leaf=is_hole)

    if not isinstance(objective, Objective):
        return lambda chosen: objective(merge(chosen)), chosen
    penalty = objective.penalty
    restricted = dataclasses.replace(
        objective,
        predict=lambda chosen, data: objective.predict(merge(chosen), data),
        penalty=None if penalty is None else lambda chosen: penalty(merge(chosen)),
    )
    return restricted, chosen
