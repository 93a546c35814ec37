"""Second derivatives: Hessian-vector products, and the diagonal of the Hessian by any method.

Everything rests on `H v = d/dt grad L(w + t v)`, forward over reverse: `jax.jvp` of `jax.grad`. The ways to a
diagonal are methods (see `method`); here is what they share: what is refused, and what comes back.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.curvature.eager import once
from curvax.curvature.estimate import Estimate
from curvax.curvature.scalar import as_arrays, aux_of, returns_aux, scalar_objective
from curvax.curvature.short_forms import as_method, needs_key
from curvax.exact import Explanation, explain_unknown
from curvax.exact.derivatives import hessian_product
from curvax.keys import Key, as_key, check_key
from curvax.layers import path_name
from curvax.meshes import on_auto_axes
from curvax.objective import Objective
from curvax.rotations import rotated_objective
from curvax.trees import at_least_float32, check_real, leaves_like, like_diag


def hvp(objective: Callable[[Any], jax.Array], params: Any, v: Any) -> Any:
    """The Hessian of a scalar function times a vector.

    Formula:
      `H v = d/dt grad L(params + t v)` at `t = 0`: `jax.jvp` of `jax.grad` (Pearlmutter 1994), at the price of about
      two gradients.

    Args:
      objective: an `Objective`, whose other output is left out, or any function `params -> scalar`.
      params: a tree of real arrays.
      v: a tree like `params`, of the same dtypes.

    Returns:
      `H v`, a tree like `params`.

    Raises:
      ValueError: if a parameter is not real, `v` is no tree like `params`, or the objective returns no scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import hvp
      >>> hvp(lambda w: w[0] ** 2 * w[1], jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])).tolist()
      [4.0, 2.0]
    """
    objective, params = scalar_objective(objective, params, None, False)
    check_real(params)
    v = as_arrays("v", v)
    leaves_like("v", v, params)
    _, _, product = hessian_product(objective, params)
    return product(jax.tree_util.tree_map_with_path(_tangent, v, params))


def _tangent(path: Any, v: Any, param: Any) -> jax.Array:
    x, dtype = jnp.asarray(v), jnp.result_type(param)
    if not jnp.issubdtype(x.dtype, jnp.floating) or (x.dtype != dtype and not jax.typeof(x).weak_type):
        name = path_name(path)
        raise ValueError(f"v is {x.dtype} at '{name}', where the parameter is {dtype}; cast it: v.astype({dtype}).")
    return x.astype(dtype)


def hessian_diag(
    objective: Callable[[Any], Any],
    params: Any,
    method: Any = "exact",
    *,
    key: Key | None = None,
    where: Any = None,
    has_aux: bool = False,
    standard_error: bool = False,
    **options: Any,
) -> Any:
    """The diagonal of the Hessian of a loss.

    Formula:
      `diag_i = d^2 L / d params_i^2`, which eq. 9 of Gao & Zhong needs, exactly or by an estimate:

      | method | what it is | needs |
      |---|---|---|
      | `"exact"`, `Exact` | exact, by the cheapest route that the trace proves | |
      | `"basis"`, `Basis` | exact, by unit vectors | |
      | `"ggn"`, `GaussNewton` | the Gauss-Newton matrix's diagonal, exactly | an `Objective` |
      | `"ggn_mc"`, `GaussNewton(num_samples=1)` | the same in expectation | an `Objective`, a key |
      | `"hutchinson"`, `Hutchinson` | the mean of `z * H z` over random signs z | a key |
      | `"xdiag"`, `XDiag` | Hutchinson's of what the products leave unknown | a key |
      | `None`, `Auto` | the estimate that the objective allows | a key |

      Outside of `jit` it is compiled as one program, which serves again for a loss that is the same computation on
      other arrays.

    Args:
      objective: an `Objective`, or any function `params -> scalar`.
      params: a tree of real arrays.
      method: a string of the table, or a method as a value, such as `Hutchinson(num_samples=4)` or one of your own: see
        `curvax.curvature.method`.
      key: a seed or a `jax.random.key`; required by the stochastic methods.
      where: a tree of booleans like `params` (or a prefix of it), or a function from `params` to one: the leaves whose
        diagonal is wanted. Others are constants, cost nothing, and come back as `optax.MaskedNode()`.
      has_aux: whether the function returns a pair, of which the second is other output, as for `jax.grad`. An
        `Objective` may say so itself, by its own `has_aux`.
      standard_error: whether to return the standard error of each entry as well. It is estimated from the samples of a
        micro-batch, of which there have to be two at least.
      **options: of the method that a string stands for, such as `num_samples=4`, `chunk_size` or `micro_batches`.

    Returns:
      A tree like `params` of float32 (float64 for float64 parameters), or `(diag, standard_error)`; with `has_aux`,
      wherever it is said, a pair of that and the other output.

    Raises:
      ValueError: if the method is unknown or takes no such option, `key` is missing, a parameter is not real, the
        method has no standard error, the cost is above the budget, or the objective is not what the method needs.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import hessian_diag
      >>> def loss(w):
      ...   return w[0] ** 2 * w[1] + w[1] ** 3
      >>> hessian_diag(loss, jnp.array([1.0, 2.0])).tolist()
      [4.0, 12.0]
      >>> hessian_diag(loss, jnp.array([1.0, 2.0]), "hutchinson", key=0, num_samples=2).shape
      (2,)
    """
    estimate = value_grad_and_hessian_diag(objective, params, method, key=key, where=where, has_aux=has_aux, **options)
    diag = estimate.diag
    if standard_error:
        if estimate.standard_error is None:
            raise ValueError(
                f"{as_method(method, options)!r} gave no standard error: that takes two samples at least,"
                " num_samples=2, or a method of your own that returns one."
            )
        diag = (diag, estimate.standard_error)
    return (diag, estimate.aux) if returns_aux(objective, has_aux) else diag


def value_grad_and_hessian_diag(
    objective: Callable[[Any], Any],
    params: Any,
    method: Any = "exact",
    *,
    key: Key | None = None,
    where: Any = None,
    has_aux: bool = False,
    **options: Any,
) -> Estimate:
    """The loss, its gradient and the diagonal of its Hessian, sharing the forward pass.

    Formula:
      As `hessian_diag`, whose arguments these are. The value and the gradient are those of the whole objective, penalty
      included.

    Args:
      objective: an `Objective`, or any function `params -> scalar`.
      params: a tree of real arrays.
      method: a string, or a method as a value.
      key: a seed or a `jax.random.key`.
      where: the leaves whose diagonal, and gradient, is wanted.
      has_aux: whether the function returns other output too; an `Objective` may say so itself.
      **options: of the method that a string stands for.

    Returns:
      An `Estimate`, with the fields `value`, `grad`, `diag`, `standard_error` and `aux`.

    Raises:
      ValueError: as `hessian_diag`.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import value_grad_and_hessian_diag
      >>> estimate = value_grad_and_hessian_diag(lambda w: w @ w, jnp.array([1.0, 2.0]), "basis")
      >>> float(estimate.value), estimate.grad.tolist(), estimate.diag.tolist()
      (5.0, [2.0, 4.0], [2.0, 2.0])
    """
    method = as_method(method, options)
    check_method_key(method, key)
    key = None if key is None else as_key(key)
    estimate: Estimate = once(_estimate, method, where, has_aux, objective, params, key)
    return estimate


def _estimate(method: Any, where: Any, has_aux: bool, objective: Any, params: Any, key: Any) -> Estimate:
    scalar, chosen = scalar_objective(objective, params, where, has_aux)
    return estimated(method, scalar, chosen, key)._replace(aux=aux_of(objective, params, has_aux))


def explain(
    objective: Callable[[Any], Any],
    params: Any,
    method: Any = "exact",
    *,
    where: Any = None,
    has_aux: bool = False,
    **options: Any,
) -> Explanation:
    """What a method would do with each parameter, why, and at what cost, before anything is computed.

    Formula:
      As the method documents; the objective is only traced. The methods differ in what they need: `"exact"` chooses a
      route for every array, and `None` chooses the method itself.

    Args:
      objective: an `Objective`, or any function `params -> scalar`.
      params: a tree of real arrays, or of `jax.ShapeDtypeStruct`; the data of an `Objective` may be such, too.
      method: see `hessian_diag`.
      where: the leaves whose diagonal is wanted.
      has_aux: whether the function returns other output too; an `Objective` may say so itself.
      **options: of the method that a string stands for.

    Returns:
      The explanation: its `rows`, its total `passes` and `products`; printed, a table.

    Raises:
      ValueError: if the method is unknown, or the objective is not what it needs.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import explain
      >>> print(explain(lambda params: jnp.sum(params["w"] ** 3), {"w": jnp.ones(2)}))
      parameter  shape  route         passes  HVPs  why
      w          (2,)   unit vectors  0       2     not an Objective: no examples to tell apart
      total                           0       2
    """
    method, params = as_method(method, options), as_arrays("params", params)
    found: list[Explanation] = []

    def look(traced: Any, params: Any) -> None:
        scalar, chosen = scalar_objective(objective if traced is None else traced, params, where, has_aux)
        if hasattr(method, "explain"):
            found.append(method.explain(scalar, chosen))
        else:
            found.append(explain_unknown(chosen, repr(method)))

    jax.eval_shape(look, objective if isinstance(objective, Objective) else None, params)
    return found[0]


def check_method_key(method: Any, key: Any) -> None:
    """Raises a ValueError if a stochastic method is without a key, or what is given is none."""
    if key is not None:
        check_key(key)
    elif needs_key(method):
        raise ValueError(f"method={method!r} draws random numbers; pass key=0 or another seed.")


def estimated(method: Any, objective: Any, params: Any, key: jax.Array | None, basis: Any = None) -> Estimate:
    """`method.estimate`, on any mesh, in a basis, and where nothing is wanted."""
    if any(jnp.size(x) for x in jax.tree.leaves(params)):
        return on_auto_axes(functools.partial(_checked, method))(objective, params, key, basis)
    diag = jax.tree.map(lambda x: jnp.zeros_like(at_least_float32(x)), params)
    return Estimate(*jax.value_and_grad(objective)(params), diag, diag)


def _checked(method: Any, objective: Any, params: Any, key: jax.Array | None, basis: Any) -> Estimate:
    """`method.estimate`, which may be a user's own."""
    if basis is not None:
        objective, params = rotated_objective(objective, params, basis)
    found = method.estimate(objective, params, key)
    if not isinstance(found, Estimate):
        raise ValueError(
            f"the estimate of {method!r} is a {type(found).__name__}; return curvax.Estimate(value, grad, diag)."
        )
    leaves_like(f"the diag of {method!r}", found.diag, params)
    for path, h in jax.tree_util.tree_leaves_with_path(found.diag):
        if not jnp.issubdtype(jnp.result_type(h), jnp.floating):
            raise ValueError(
                f"the diag of {method!r} is {jnp.result_type(h)} at '{path_name(path)}'; return real floating-point"
                " numbers."
            )
    return found._replace(diag=like_diag(jax.tree.map(jnp.asarray, found.diag), params))
