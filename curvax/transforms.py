"""Gradient transformations that multiply each layer's update by its radius.

    update = radius(layer) * gradient

`_scale_by_radius` is the one place that multiplies. The public functions choose the rule; `layers` chooses the
grouping; whoever calls `update` provides the curvature, as the keyword `hessian_diag` (see `with_hessian_diag`). Sign
and learning rate, momentum and weight decay are left to optax.

Statistics are float32 (float64 for float64 parameters) whatever the dtype of the parameters; updates keep theirs.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvax import order_statistics, radii
from curvax.layers import Layer, Layers, checked, group, path_name


def scale_by_curvature_radius(
    damping: jax.typing.ArrayLike = 0.0,
    max_radius: jax.typing.ArrayLike | None = None,
    *,
    slope_term: bool = False,
    layers: Layers = "array",
    axis_name: radii.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale each parameter's update by the radius of curvature of the loss along it.

    Formula:
      `R_i = 1 / (|h_i| + damping * mean|h|)`, with the mean over the layer: damped diagonal Newton, which does not
      depend on the scale of the loss. With the slope term `(1 + g_i^2)^(3/2)` as a factor it does, and is exactly eq.
      9-11 of Gao & Zhong; where slopes are steep that step overshoots by orders of magnitude. `h` is the Hessian
      diagonal, and its absolute value is taken here, so that averages of `h` over time keep their sign.

    Args:
      damping: dimensionless, as a fraction of the layer's mean absolute curvature.
      max_radius: the largest radius, in units of parameter^2 / loss; `None` for no bound.
      slope_term: whether to keep the factor `(1 + g^2)^(3/2)`, the arc length over the slope.
      layers: the groups over which `mean|h|` is taken; `"array"`, `"module"`, `"kernel"` or rules from path regex to
        layer name, see `layers.group`.
      axis_name: mesh axes (of `shard_map` or `pmap`) that split parameters.

    Returns:
      A transformation whose `update` takes `params` and `hessian_diag`: a real tree with the structure of `params`,
      read only where `updates` has leaves. A radius of 0 or inf becomes 1 if there is no `max_radius`; so is the radius
      where `hessian_diag` has `optax.MaskedNode()` or `None` in place of a leaf.

    Raises:
      ValueError: from `update`, without `params` or `hessian_diag`, or where a parameter is complex or the shape of its
        `hessian_diag` differs.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import scale_by_curvature_radius
      >>> tx = scale_by_curvature_radius(slope_term=True)
      >>> w, g, h = jnp.array([1.0, 1.0]), jnp.array([0.0, 0.75]), jnp.array([2.0, -4.0])
      >>> updates, _ = tx.update(g, tx.init(w), w, hessian_diag=h)
      >>> print(updates.round(4))
      [0.     0.3662]
    """
    rule = radii.curvature(damping, max_radius, slope_term, axis_name)
    return _scale_by_radius(rule, layers, needs_curvature=True)


def scale_by_approximate_radius(
    max_radius: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale each parameter's update by the radius it would have if the nearest minimum were at zero.

    Formula:
      `R_i = |w_i / g_i|`, Gao & Zhong, eq. 17. With eq. 11 the update is `|w_i| sign(g_i)`. The paper warns of
      `w_i -> 0` and `g_i -> 0` (eq. 18 and 19): there the radius is 0 or infinite, and becomes 1, so that a parameter
      that starts at zero moves.

    Args:
      max_radius: the largest radius, in units of parameter^2 / loss; `None` for no bound.

    Returns:
      A transformation whose `update` takes `params`.

    Raises:
      ValueError: from `update`, without `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import scale_by_approximate_radius
      >>> tx = scale_by_approximate_radius()
      >>> w, g = jnp.array([2.0, 0.0]), jnp.array([-0.5, 3.0])
      >>> tx.update(g, tx.init(w), w)[0].tolist()
      [-2.0, 3.0]
    """
    return _scale_by_radius(radii.approximate(max_radius), "array")


def scale_by_median_curvature(
    weight_decay: jax.typing.ArrayLike = 0.0,
    *,
    trust_coefficient: jax.typing.ArrayLike = 1.0,
    median_of_ratios: bool = False,
    layers: Layers = "kernel",
    axis_name: radii.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale each layer's update by the ratio of its median parameter to its median gradient, in magnitude.

    Formula:
      `R = trust_coefficient * median|w| / median|g + weight_decay * w|`, Gao & Zhong, eq. 20-22. The paper writes
      medians of signed values, which are near 0/0 in any symmetric layer; magnitudes are meant.

    Args:
      weight_decay: beta of eq. 22, in units of loss / parameter^2. It enters the radius only: decay itself is
        `optax.add_decayed_weights`. Leave it at 0 where that stands before this transformation.
      trust_coefficient: dimensionless factor inside the radius; a degenerate layer has radius 1 without it.
      median_of_ratios: whether to take `median(|w / (g + weight_decay * w)|)` instead.
      layers: `"array"`, `"module"`, `"kernel"` or rules from path regex to layer name, see `layers.group`.
      axis_name: mesh axes (of `shard_map` or `pmap`) that split parameters.

    Returns:
      A transformation whose `update` takes `params`. Where over half of a layer's gradients are zero (units that are
      dead, embeddings that were not looked up) the radius is infinite, and becomes 1.

    Raises:
      ValueError: from `update`, without `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import scale_by_median_curvature
      >>> tx = scale_by_median_curvature(layers="array")
      >>> w, g = jnp.array([1.0, -4.0, 9.0]), jnp.array([-1.0, 2.0, 3.0])
      >>> tx.update(g, tx.init(w), w)[0].tolist()
      [-2.0, 4.0, 6.0]
    """
    rule = radii.median(weight_decay, trust_coefficient, median_of_ratios, axis_name)
    return _scale_by_radius(rule, layers)


def scale_by_lars(
    *,
    trust_coefficient: jax.typing.ArrayLike = 1.0,
    eps: jax.typing.ArrayLike = 0.0,
    layers: Layers = "array",
    axis_name: radii.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale each layer's update by the ratio of its parameters' norm to its gradient's.

    Formula:
      `R = trust_coefficient * norm2(w) / (norm2(g) + eps)`, Gao & Zhong, eq. 23; You et al. 2017. It equals
      `optax.scale_by_trust_ratio` but for its statistics, which here are float32 at least.

    Args:
      trust_coefficient: dimensionless factor inside the radius; a degenerate layer has radius 1 without it.
      eps: added to the gradient's norm, in its units.
      layers: `"array"`, `"module"`, `"kernel"` or rules from path regex to layer name, see `layers.group`.
      axis_name: mesh axes (of `shard_map` or `pmap`) that split parameters.

    Returns:
      A transformation whose `update` takes `params`. A zero norm gives radius 1.

    Raises:
      ValueError: from `update`, without `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import scale_by_lars
      >>> tx = scale_by_lars()
      >>> w, g = jnp.array([3.0, 4.0]), jnp.array([0.0, 0.5])
      >>> tx.update(g, tx.init(w), w)[0].tolist()
      [0.0, 5.0]
    """
    return _scale_by_radius(radii.lars(trust_coefficient, eps, axis_name), layers)


def scale_by_percent_delta(
    *,
    trust_coefficient: jax.typing.ArrayLike = 1.0,
    layers: Layers = "kernel",
    axis_name: radii.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale each layer's update so that its parameters change by the same percentage on average.

    Formula:
      `R = trust_coefficient * n / norm1(g / w)`, Gao & Zhong, eq. 24; Abu-El-Haija 2017: the harmonic mean of `|w / g|`
      over the `n` parameters of the layer that are not zero.

    Args:
      trust_coefficient: dimensionless factor inside the radius; a degenerate layer has radius 1 without it.
      layers: `"array"`, `"module"`, `"kernel"` or rules from path regex to layer name, see `layers.group`.
      axis_name: mesh axes (of `shard_map` or `pmap`) that split parameters.

    Returns:
      A transformation whose `update` takes `params`. A layer of zeros, or of zero gradient, has radius 1.

    Raises:
      ValueError: from `update`, without `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import scale_by_percent_delta
      >>> tx = scale_by_percent_delta(layers="array")
      >>> w, g = jnp.array([1.0, -2.0, 0.0]), jnp.array([1.0, 2.0, 7.0])
      >>> tx.update(g, tx.init(w), w)[0].tolist()
      [1.0, 2.0, 7.0]
    """
    return _scale_by_radius(radii.percent_delta(trust_coefficient, axis_name), layers)


def discard_small_gradients(
    fraction: jax.typing.ArrayLike,
    *,
    layers: Layers = "array",
    axis_name: radii.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Zero the smallest-magnitude fraction of each layer's gradient.

    Formula:
      the `floor(fraction * n)` smallest of a layer's `n` magnitudes become 0; "discarding small value gradients",
      section 3.

    Args:
      fraction: of each layer's entries, in [0, 1). Entries that tie with the quantile are kept; 0 changes nothing.
      layers: `"array"`, `"module"`, `"kernel"` or rules from path regex to layer name, see `layers.group`. Leaves that
        are not measured themselves (the biases of `"kernel"`) are cut at their layer's quantile.
      axis_name: mesh axes (of `shard_map` or `pmap`) that split parameters.

    Returns:
      A transformation whose `update` needs no `params`.

    Raises:
      ValueError: if `fraction` is a number outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import discard_small_gradients
      >>> tx = discard_small_gradients(0.5)
      >>> g = jnp.array([1.0, -4.0, 2.0, -3.0])
      >>> tx.update(g, tx.init(g))[0].tolist()
      [0.0, -4.0, 0.0, -3.0]
    """
    if isinstance(fraction, float | int) and not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction} of the gradient cannot be discarded; pass a number in [0, 1).")

    def kept(measured: radii.Leaves, scaled: radii.Leaves):
        population = measured.g or scaled.g
        rank = order_statistics.count_of(fraction, order_statistics.population_size(population, axis_name))
        threshold, _ = order_statistics.order_statistics(population, rank, axis_name)
        # Below is discarded, rather than above kept: NaN compares false, and has to be seen.
        return [jnp.where(jnp.abs(g) < threshold, 0, 1).astype(threshold.dtype) for g in scaled.g]

    return _scale_by_radius(kept, layers, needs_params=False)


def _scale_by_radius(
    rule: radii.Rule, layers: Layers, *, needs_curvature: bool = False, needs_params: bool = True
) -> optax.GradientTransformationExtraArgs:
    layers = checked(layers)

    def init_fn(params):
        del params
        return optax.EmptyState()

    def update_fn(updates, state, params=None, *, hessian_diag=None, **extra_args):
        del extra_args
        if needs_params and params is None:
            raise ValueError("the radius of a layer depends on its parameters; call update(updates, state, params).")
        if needs_curvature and hessian_diag is None:
            raise ValueError(
                "the radius of curvature depends on the Hessian diagonal; pass hessian_diag=... to update, or wrap the"
                " optimizer in curvax.with_hessian_diag and pass obj_fn=... ."
            )
        everything = updates
        if needs_curvature:
            updates = with_curvature(updates, hessian_diag)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
        g = [leaf for _, leaf in leaves]
        w = leaves_like("params", params, updates) if needs_params else g
        h = ()
        if needs_curvature:
            _check_real(leaves)
            h = leaves_like("hessian_diag", hessian_diag, updates)
        scaled = _scaled(rule, group(leaves, layers), radii.Leaves(w, g, h))
        scaled = treedef.unflatten(scaled)
        return jax.tree.map(lambda new, g: g if is_hole(new) else new, scaled, everything, is_leaf=is_hole), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _scaled(rule: radii.Rule, groups: Sequence[Layer], leaves: radii.Leaves) -> list[jax.Array]:
    updates = list(leaves.g)
    for layer in groups:
        measured, scaled = (_at(indices, leaves, layer) for indices in (layer.measured, layer.scaled))
        for index, g, radius in zip(layer.scaled, scaled.g, rule(measured, scaled), strict=True):
            updates[index] = (radius.astype(g.dtype) * g).astype(leaves.g[index].dtype)
    return updates


def _at(indices: Sequence[int], leaves: radii.Leaves, layer: Layer) -> radii.Leaves:
    """The leaves at these indices, in the one dtype in which all of the layer is computed."""
    everything = [leaves.g[i].dtype for i in {*layer.measured, *layer.scaled}]
    everything += [leaves.w[i].dtype for i in {*layer.measured, *layer.scaled}]
    dtype = statistics_dtype(everything)
    w, g = ([x[i].astype(dtype) for i in indices] for x in (leaves.w, leaves.g))
    h = [leaves.h[i].astype(jnp.finfo(dtype).dtype) for i in indices] if leaves.h else []
    return radii.Leaves(w, g, h)


def statistics_dtype(dtypes: Sequence[Any]) -> Any:
    """The dtype of statistics over arrays of these dtypes: float32 at least, whatever the rules for promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes, jnp.float32)


def is_hole(node: Any) -> bool:
    """Whether a place of a tree holds no array: it was masked, or never had one."""
    return node is None or isinstance(node, optax.MaskedNode)


def with_curvature(updates: Any, hessian_diag: Any) -> Any:
    """The updates, with holes where `hessian_diag` has holes: what `where` of `with_hessian_diag` left out.

    Where the structures differ otherwise they stay as they are, for the error that names the leaf.
    """
    keep = lambda g, h: optax.MaskedNode() if is_hole(h) else g
    try:
        return jax.tree.map(keep, updates, hessian_diag, is_leaf=is_hole)
    except ValueError:
        return updates


def leaves_like(name: str, tree: Any, updates: Any) -> list[jax.Array]:
    """The leaves of `tree` where `updates` has leaves: inside `masked` and `partition` it may have fewer."""

    def match(path, g, node):
        if is_hole(g):
            return g
        if getattr(node, "shape", None) != g.shape:
            raise ValueError(
                f"{name} has {getattr(node, 'shape', node)} at '{path_name(path)}', where the update has {g.shape};"
                " pass a tree with the structure and the shapes of params."
            )
        return node

    return jax.tree.leaves(jax.tree_util.tree_map_with_path(match, updates, tree, is_leaf=is_hole))


def _check_real(leaves: Sequence[tuple[Any, jax.Array]]) -> None:
    for path, g in leaves:
        if jnp.iscomplexobj(g):
            raise ValueError(
                f"the parameter '{path_name(path)}' is complex, and has no radius of curvature; train it with a"
                " first-order rule by optax.partition, or split it into real and imaginary parts."
            )
