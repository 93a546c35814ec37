"""What a method is handed: a scalar function of the leaves whose curvature is wanted."""

import dataclasses
import inspect
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvax.layers import path_name
from curvax.objective import Objective, pair


def scalar_objective(objective: Any, params: Any, where: Any, has_aux: bool) -> tuple[Any, Any]:
    """The objective, without its other output, as a function of the leaves that `where` selects, and those leaves.

    Raises:
      ValueError: if `where` does not fit the parameters, or the data are no arrays; from the function that comes back,
        if its value is no scalar.
    """
    params = as_arrays("params", params)
    check_function("the objective", objective)
    if not isinstance(objective, Objective):
        return _restrict(_scalar(objective, "the objective", has_aux), params, where)
    _check_data(objective.data)
    if returns_aux(objective, has_aux):
        objective = _without_aux(objective)
    objective = _as_mean(objective, params)
    if objective.penalty is not None:
        objective = dataclasses.replace(objective, penalty=_scalar(objective.penalty, "penalty", False))
    return _restrict(objective, params, where)


def returns_aux(objective: Any, has_aux: bool) -> bool:
    """Whether an objective has other output: an `Objective` says so itself, of a function the caller does."""
    return has_aux or (isinstance(objective, Objective) and objective.has_aux)


def plain(objective: Any, params: Any) -> Any:
    """An `Objective` as a mean over examples without other output, and anything else as it is."""
    if not isinstance(objective, Objective):
        return objective
    return _as_mean(_without_aux(objective) if objective.has_aux else objective, params)


def _as_mean(objective: Objective, params: Any) -> Objective:
    def losses(params: Any, data: Any) -> jax.Array:
        return objective.losses(objective.predict(params, data), data)

    if objective.is_mean:
        return objective
    return objective.as_mean(jax.eval_shape(losses, params, objective.data).shape)


def aux_of(objective: Any, params: Any, has_aux: bool) -> Any:
    """The other output of an objective; under `jit` the forward pass that finds it is shared."""
    if not returns_aux(objective, has_aux):
        return None
    return (objective.predict(params, objective.data) if isinstance(objective, Objective) else objective(params))[1]


def select(params: Any, where: Any) -> Any:
    """The leaves that `where` selects (see `hessian_diag`), with `optax.MaskedNode()` in place of the others."""
    # `optax.tree.map_params` asks with a placeholder for the parameters, which has no leaves.
    if where is None or not jax.tree.leaves(params):
        return params
    mask = where(params) if callable(where) else where
    try:
        mask = jax.tree.broadcast(mask, params)
    except ValueError as error:
        raise ValueError(
            "where does not fit the parameters; pass a tree of booleans with their structure, or a prefix of it. "
            + str(error)
        ) from error
    for path, use in jax.tree_util.tree_leaves_with_path(mask):
        if not isinstance(use, bool | np.bool_):
            raise ValueError(f"where has {use!r} at '{path_name(path)}'; pass True or False.")
    return jax.tree.map(lambda use, x: x if use else optax.MaskedNode(), mask, params)


def _restrict(objective: Any, params: Any, where: Any) -> tuple[Any, Any]:
    if where is None:
        return objective, params
    chosen = select(params, where)

    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    merge = lambda chosen: jax.tree.map(lambda x, w: w if is_masked(x) else x, chosen, params, is_leaf=is_masked)

    if not isinstance(objective, Objective):
        return lambda chosen: objective(merge(chosen)), chosen
    penalty = objective.penalty
    restricted = dataclasses.replace(
        objective,
        predict=lambda chosen, data: objective.predict(merge(chosen), data),
        penalty=None if penalty is None else lambda chosen: penalty(merge(chosen)),
    )
    return restricted, chosen


def _without_aux(objective: Objective) -> Objective:
    predict = lambda params, data: pair("predict", objective.predict(params, data))[0]
    return dataclasses.replace(objective, predict=predict, has_aux=False)


def _scalar(function: Callable[[Any], Any], name: str, has_aux: bool) -> Callable[[Any], jax.Array]:
    """The function, which refuses to return anything but a real scalar."""

    def scalar(params: Any) -> Any:
        try:
            value = function(params)
        except (AttributeError, TypeError) as error:
            if not type(params).__module__.startswith("flax.nnx"):
                raise
            raise ValueError(
                f"{name} was called with the parameters, a flax.nnx State, and failed ({error}); if it takes a model,"
                " pass lambda params: loss(nnx.merge(nnx.graphdef(model), params)) in its place."
            ) from error
        value = pair(name, value)[0] if has_aux else value
        if isinstance(value, tuple):
            raise ValueError(
                f"{name} returned a tuple of {len(value)}; if it is (loss, other output), pass has_aux=True, or the"
                " loss alone to what has no such argument."
            )
        is_numeric = isinstance(value, jax.Array | np.ndarray | np.generic | numbers.Number)
        if not is_numeric:
            raise ValueError(f"{name} returned a {type(value).__name__}, in place of a real scalar; return the loss.")
        if jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise ValueError(
                f"{name} returned {jnp.result_type(value)} of shape {jnp.shape(value)}, in place of a real scalar; take"
                " its mean. The losses of single examples are for curvax.Objective."
            )
        return value

    return scalar


def as_arrays(name: str, tree: Any) -> Any:
    """The tree, with arrays in place of numbers of Python.

    Raises:
      ValueError: if a leaf is neither; it names the leaf.
    """

    def array(path: Any, x: Any) -> Any:
        try:
            x = x if hasattr(x, "dtype") else jnp.asarray(x)
        except TypeError:
            pass
        # A typed key is of no kind that NumPy knows. Those here are: objects, text and time.
        if not hasattr(x, "dtype") or getattr(x.dtype, "kind", None) in tuple("OSUMm"):
            raise ValueError(
                f"{name} has {x!r} at '{path_name(path)}', which is no array of numbers; close over it in the"
                " objective, and leave it out of the tree."
            )
        return x

    return jax.tree_util.tree_map_with_path(array, tree)


def check_function(name: str, function: Any) -> None:
    """Raises a ValueError unless this may be called with the parameters alone."""
    if not callable(function):
        raise ValueError(
            f"{name} is a {type(function).__name__}, which cannot be called; pass the loss function, not its value: an"
            " Objective, or a function params -> scalar."
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # Not every function of another language says what it takes.
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise ValueError(
            f"{name} takes {signature}, and is called with params alone ({error}); close over the rest, as in lambda"
            " params: loss(params, batch), or pass a curvax.Objective, which holds its data."
        ) from error


def _check_data(data: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if not (hasattr(leaf, "dtype") or isinstance(leaf, numbers.Number)):
            raise ValueError(
                f"the data of the Objective have {leaf!r} at '{path_name(path)}', which is no array; close over it in"
                " predict or loss, or leave it out."
            )
