"""Trees of arrays: the dtypes in which they are measured, their holes, and what is refused of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvax.layers import path_name
from curvax.varying import AxisName


def statistics_dtype(*dtypes: Any) -> Any:
    """The dtype of statistics over arrays of these dtypes: float32 at least, whatever the rules for promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


def diag_dtype(dtype: Any) -> Any:
    """The dtype of a diagonal for parameters of this one: float32, or float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in the dtype of a diagonal."""
    return x.astype(diag_dtype(x.dtype))


def like_diag(diag: Any, params: Any) -> Any:
    """The same in the dtypes of a diagonal of `params`: data may be of wider ones."""
    return jax.tree.map(lambda h, x: h.astype(diag_dtype(x.dtype)), diag, params)


def is_hole(node: Any) -> bool:
    """Whether a place of a tree holds no array: it was masked, or never had one."""
    return node is None or isinstance(node, optax.MaskedNode)


def leaves_like(name: str, tree: Any, params: Any, like: str = "parameter") -> list[jax.Array]:
    """The leaves of `tree` at those of `params`, of the same shapes.

    Args:
      name: of the tree, for the message.
      tree: a pytree of arrays.
      params: a pytree of arrays, which may have holes in place of what `tree` has: inside of `masked` and `partition`.
      like: what its leaves are, for the message.

    Returns:
      The leaves, in order.

    Raises:
      ValueError: if the structures differ otherwise, or a shape does; it names the leaf.
    """
    wanted: Any = jax.tree.structure(params, is_leaf=is_hole)  # Of jaxlib, which says nothing of types.
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_hole)
    try:
        nodes = wanted.flatten_up_to(tree)
    except ValueError as error:
        given = jax.tree.structure(tree, is_leaf=is_hole)
        message = f"{name} is {given}, where the {like}s are {wanted}; make it a tree like params."
        raise ValueError(message) from error
    pairs = [(path, leaf, node) for (path, leaf), node in zip(leaves, nodes, strict=True) if not is_hole(leaf)]
    for path, leaf, node in pairs:
        shape = getattr(node, "shape", node)
        if shape != leaf.shape:
            raise ValueError(
                f"{name} has {shape} at '{path_name(path)}', where the {like} has the shape {leaf.shape}; make it a"
                " tree like params."
            )
    return [node for _, _, node in pairs]


def with_curvature(updates: Any, hessian_diag: Any) -> Any:
    """The updates, with holes where `hessian_diag` has holes: what `where` of `with_hessian_diag` left out.

    Where the structures differ otherwise they stay as they are, for the error that names the leaf.
    """
    keep = lambda g, h: optax.MaskedNode() if is_hole(h) else g
    try:
        return jax.tree.map(keep, updates, hessian_diag, is_leaf=is_hole)
    except ValueError:
        return updates


def all_finite(tree: Any, *axis_names: AxisName) -> jax.Array:
    """Whether every number is finite, on all devices along these axes."""
    finite = jnp.array(True)
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            finite = finite & jnp.all(jnp.isfinite(leaf))
    for name in axis_names:
        if name is not None:
            finite = jax.lax.pmin(finite.astype(jnp.int32), name) > 0
    return finite


def check_floats(updates: Any) -> None:
    """Raises a ValueError that names the first leaf that is no array of bfloat16, float16 or wider floats."""
    for path, g in jax.tree_util.tree_leaves_with_path(updates):
        dtype = getattr(g, "dtype", None)
        floats = dtype is not None and jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 16
        if not floats:
            raise ValueError(
                f"the update '{path_name(path)}' is {dtype or type(g).__name__}, and has no radius; pass arrays of"
                " bfloat16, float16 or wider, and leave others out by optax.masked or optax.partition."
            )


def check_real(params: Any) -> None:
    """Raises a ValueError that names the first leaf that is not real floating-point."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"the parameter '{path_name(path)}' is {jnp.result_type(leaf)}, and has no second derivative; leave it"
                " out with where=..., or split a complex one into real and imaginary parts."
            )


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same on parameters and gradients of at least float32: a state has their types, and halves lose averages."""

    def init_fn(params: Any) -> Any:
        # Of the parameters, which may be shapes alone, a state takes no more than the place.
        return inner.init(jax.tree.map(lambda x: jnp.zeros_like(x, statistics_dtype(x.dtype)), params))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        params = None if params is None else _widened(params)
        found, state = inner.update(_widened(updates), state, params, **extra_args)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), found, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _widened(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(statistics_dtype(x.dtype)), tree)
