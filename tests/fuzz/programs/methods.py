"""The methods of `hessian_diag`, as the fuzzer calls them: what each stands for, and what each may refuse."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import curvax

# Calls of a stochastic method, each with a key of its own, and samples in each.
REPEATS, SAMPLES = 96, 2

#: The text of each method, and the matrices whose diagonal it may return.
METHODS = {
    "exact": ("curvax.Exact({})", ("hessian",)),
    "basis": ("curvax.Basis({})", ("hessian",)),
    "ggn": ("curvax.GaussNewton({})", ("gauss_newton",)),
    "ggn_mc": ("curvax.GaussNewton({}, {})", ("gauss_newton",)),
    "ggn_batch": ('curvax.GaussNewton({}, "batch", {})', ("gauss_newton",)),
    "hutchinson": ("curvax.Hutchinson({}, {})", ("hessian",)),
    "xdiag": ("curvax.XDiag({}, {})", ("hessian",)),
    "default": ("curvax.Auto({}, {})", ("gauss_newton", "hessian")),
}
DETERMINISTIC = ("exact", "basis", "ggn")

#: What a method may refuse, by the traits of programs; the rest it has promised.
MAY_REFUSE = {
    "exact": {"opaque"},
    "basis": {"opaque"},
    "hutchinson": {"opaque"},
    "xdiag": {"opaque"},
    "default": {"opaque"},
    "ggn": {"plain", "custom_vjp"},
    "ggn_mc": {"plain", "custom_vjp"},
    "ggn_batch": {"plain", "custom_vjp"},
}
# With micro-batches every method may say that a batch cannot be split.
NOT_SPLIT = {"plain", "coupled", "data coupled", "data without examples", "unproved"}


def text(name: str, options: Mapping[str, str], samples: int = SAMPLES) -> str:
    """The method as a value: the text of it."""
    chosen = ", ".join(f"{key}={value}" for key, value in options.items() if key in ("chunk_size", "micro_batches"))
    # XDiag learns from some probes what it judges with the others.
    samples = 3 if name == "xdiag" and samples == SAMPLES else samples
    written = METHODS[name][0].format(*([chosen] if name in DETERMINISTIC else [samples, chosen]))
    return written.replace(", )", ")")


def run(method: Any, objective: Any, params: Any, *, keys: jax.Array, options: Mapping[str, Any], wrapped: bool) -> Any:
    """An `Estimate`, each of whose parts has a leading axis: that of the calls.

    Args:
        method: a method as a value; a deterministic one is called once.
        objective: the objective.
        params: the parameters.
        keys: one for each call of a stochastic method.
        options: `where` and `has_aux`.
        wrapped: whether to read the diagonal from the state of `with_hessian_diag`.

    Returns:
        The estimates; what a method does not return is None.
    """
    once = functools.partial(_wrapped if wrapped else _estimate, method, objective, params, options)
    if not getattr(method, "stochastic", False):
        return jax.tree.map(lambda x: x[None], once(None))
    return jax.lax.map(once, keys)


def _estimate(method, objective, params, options: Mapping[str, Any], key) -> curvax.Estimate:
    estimate = curvax.value_grad_and_hessian_diag(objective, params, method, key=key, **options)
    return estimate._replace(aux=None)


def _wrapped(method, objective, params, options: Mapping[str, Any], key) -> curvax.Estimate:
    tx = curvax.with_hessian_diag(optax.identity(), method, key=key, **options)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, obj_fn=objective)
    return curvax.Estimate(None, None, optax.tree.get(state, "hessian_diag"))
