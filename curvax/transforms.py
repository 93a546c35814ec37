"""Gradient transformations that multiply each layer's update by its radius.

    update = radius(layer) * gradient

`_scale_by_radius` is the one place that multiplies. The public functions choose the rule; `layers` chooses the
grouping; whoever calls `update` provides the curvature, as the keyword `hessian_diag` (see `with_hessian_diag`). Sign
and learning rate, momentum and weight decay are left to optax.

Statistics are float32 (float64 for float64 parameters) whatever the dtype of the parameters; updates keep theirs.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax import order_statistics, radii
from curvax.bounds import bounded
from curvax.checks import check_number
from curvax.layers import Layer, Layers, WholeLayers, checked, group, of_parts, path_name
from curvax.magnitudes import population_size
from curvax.meshes import on_auto
from curvax.stacks import Axes, for_each, joined, slices
from curvax.trees import check_floats, is_hole, leaves_like, statistics_dtype, with_curvature
from curvax.varying import AxisName, is_bound
from curvax.wide import Wide, product, wide

Mask = Any | Callable[[optax.Params], Any] | None


def scale_by_curvature_radius(
    damping: jax.typing.ArrayLike = 0.0,
    max_radius: jax.typing.ArrayLike | None = None,
    *,
    slope_term: bool | None = None,
    layers: Layers = "array",
    param_axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale each parameter's update by the radius of curvature of the loss along it.

    Formula:
      `R_i = (1 + g_i^2)^(3/2) / |h_i|`, exactly eq. 9 of Gao & Zhong. With damping it is `1 / (|h_i| + damping *
      mean|h|)`, with the mean over the layer: damped diagonal Newton, which does not depend on the scale of the loss.
      The slope term `(1 + g_i^2)^(3/2)` does, and where slopes are steep a step with it overshoots by orders of
      magnitude. `h` is the Hessian diagonal, and its absolute value is taken here, so that averages of `h` over time
      keep their sign.

    Args:
      damping: dimensionless, as a fraction of the layer's mean absolute curvature.
      max_radius: the largest radius, in units of parameter^2 / loss; `None` for no bound.
      slope_term: whether to keep the factor `(1 + g^2)^(3/2)`; `None` for eq. 9's own
        form, which has it where `damping` is 0.
      layers: the groups over which `mean|h|` is taken; `"array"`, `"module"`, `"kernel"` or rules from path regex to
        layer name, see `layers.group`.
      param_axis_name: mesh axes (of `shard_map` or `pmap`) that split parameters.

    Returns:
      A transformation whose `update` takes `params` and `hessian_diag`: a real tree with the structure of `params`,
      read only where `updates` has leaves. A radius of 0 or inf becomes 1 if there is no `max_radius`; so is the radius
      where `hessian_diag` has `optax.MaskedNode()` or `None` in place of a leaf.

    Raises:
      ValueError: if `damping` is below 0 or `max_radius` not above it; from `update`, without `params` or
        `hessian_diag`, or where a parameter is complex or the shape of its `hessian_diag` differs.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import scale_by_curvature_radius
      >>> tx = scale_by_curvature_radius()
      >>> w, g, h = jnp.array([1.0, 1.0]), jnp.array([0.0, 0.75]), jnp.array([2.0, -4.0])
      >>> updates, _ = tx.update(g, tx.init(w), w, hessian_diag=h)
      >>> print(updates.round(4))
      [0.     0.3662]
    """
    check_number("damping", damping, "[0, inf)")
    _check_max_radius(max_radius)
    rule = radii.curvature(damping, max_radius, slope_term, param_axis_name)
    return _scale_by_radius(rule, layers, None, param_axis_name, needs_curvature=True)


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
    _check_max_radius(max_radius)
    return _scale_by_radius(radii.each(radii.approximate(max_radius)), "array")


def scale_by_median_curvature(
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Mask = None,
    *,
    trust_coefficient: jax.typing.ArrayLike = 1.0,
    median_of_ratios: bool = False,
    layers: Layers = "kernel",
    param_axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale each layer's update by the ratio of its median parameter to its median gradient, in magnitude.

    Formula:
      `R * (g + weight_decay * w)`, `R = trust_coefficient * median|w| / median|g + weight_decay * w|`, Gao & Zhong, eq.
      20-22, over the entries whose g is not exactly zero. The paper writes medians of signed values, which are near 0/0
      in any symmetric layer; magnitudes are meant. With `layers="kernel"` no array's step is longer than `3 *
      trust_coefficient` times its kernel's parameters in root mean square, and a kernel much smaller than the others
      moves as if it were a tenth of their size, see `bounds`.

    Args:
      weight_decay: beta of eq. 22, in units of loss / parameter^2.
      weight_decay_mask: which parameters decay, as in `optax.add_decayed_weights`.
      trust_coefficient: dimensionless factor inside the radius; a degenerate layer has radius 1 in any case.
      median_of_ratios: whether to take `median(|w / (g + weight_decay * w)|)` instead.
      layers: `"array"`, `"module"`, `"kernel"` or rules from path regex to layer name, see `layers.group`.
      param_axis_name: mesh axes (of `shard_map` or `pmap`) that split parameters.

    Returns:
      A transformation whose `update` takes `params`. Units that are dead and rows of embeddings that were not looked up
      have a gradient of exactly zero, and do not shape the radius of the others.

    Raises:
      ValueError: from `update`, without `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import scale_by_median_curvature
      >>> tx = scale_by_median_curvature(layers="array")
      >>> w, g = jnp.array([1.0, -4.0, 9.0, 50.0]), jnp.array([-1.0, 2.0, 3.0, 0.0])
      >>> tx.update(g, tx.init(w), w)[0].tolist()
      [-2.0, 4.0, 6.0, 0.0]
    """
    rule = radii.median(trust_coefficient, median_of_ratios, param_axis_name)
    return _scale_by_layer(rule, trust_coefficient, layers, param_axis_name, weight_decay, weight_decay_mask)


def scale_by_lars(
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Mask = None,
    *,
    trust_coefficient: jax.typing.ArrayLike = 1.0,
    eps: jax.typing.ArrayLike = 0.0,
    layers: Layers = "array",
    follow_all: bool = True,
    param_axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale each layer's update by the ratio of its parameters' norm to its gradient's.

    Formula:
      `R * (g + weight_decay * w)`, `R = trust_coefficient * norm2(w) / (norm2(g + weight_decay * w) + eps)`, Gao &
      Zhong, eq. 23; You et al. 2017; over the entries whose g is not exactly zero. Where none is it equals
      `optax.scale_by_trust_ratio` but for its statistics, which here are float32 at least. With `layers="kernel"` no
      array's step is longer than `3 * trust_coefficient` times its kernel's parameters in root mean square, and a
      kernel much smaller than the others moves as if it were a tenth of their size, see `bounds`.

    Args:
      weight_decay: strength of the decay, in units of loss / parameter^2.
      weight_decay_mask: which parameters decay, as in `optax.add_decayed_weights`.
      trust_coefficient: dimensionless factor inside the radius; a degenerate layer has radius 1 in any case.
      eps: added to the gradient's norm, in its units.
      layers: `"array"`, `"module"`, `"kernel"` or rules from path regex to layer name, see `layers.group`.
      follow_all: whether, with `layers="kernel"`, what follows no kernel has the radius of all kernels together. Else
        it is 1: for updates that are steps already, such as Newton's.
      param_axis_name: mesh axes (of `shard_map` or `pmap`) that split parameters.

    Returns:
      A transformation whose `update` takes `params`. A zero norm gives radius 1. Units that are dead and rows of
      embeddings that were not looked up have a gradient of exactly zero, and do not shape the radius of the others.

    Raises:
      ValueError: from `update`, without `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import scale_by_lars
      >>> tx = scale_by_lars()
      >>> w, g = jnp.array([3.0, 4.0, 50.0]), jnp.array([0.3, 0.4, 0.0])
      >>> print(tx.update(g, tx.init(w), w)[0])
      [3. 4. 0.]
    """
    check_number("eps", eps, "[0, inf)")
    rule = radii.lars(trust_coefficient, eps, param_axis_name)
    return _scale_by_layer(
        rule, trust_coefficient, layers, param_axis_name, weight_decay, weight_decay_mask, follow_all=follow_all
    )


def scale_by_percent_delta(
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Mask = None,
    *,
    trust_coefficient: jax.typing.ArrayLike = 1.0,
    layers: Layers = "kernel",
    param_axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale each layer's update so that its parameters change by the same percentage on average.

    Formula:
      `R * (g + weight_decay * w)`, `R = trust_coefficient * n / norm1((g + weight_decay * w) / w)`, Gao & Zhong, eq.
      24; Abu-El-Haija 2017: the harmonic mean of `|w / g|` over the `n` entries where neither w nor g is exactly zero.
      With `layers="kernel"` no array's step is longer than `3 * trust_coefficient` times its kernel's parameters in
      root mean square, see `bounds`.

    Args:
      weight_decay: strength of the decay, in units of loss / parameter^2.
      weight_decay_mask: which parameters decay, as in `optax.add_decayed_weights`.
      trust_coefficient: dimensionless factor inside the radius; a degenerate layer has radius 1 in any case.
      layers: `"array"`, `"module"`, `"kernel"` or rules from path regex to layer name, see `layers.group`.
      param_axis_name: mesh axes (of `shard_map` or `pmap`) that split parameters.

    Returns:
      A transformation whose `update` takes `params`. A layer of zeros, or of zero gradient, has radius 1. Units that
      are dead and rows of embeddings that were not looked up have a gradient of exactly zero, and do not shape the
      radius of the others.

    Raises:
      ValueError: from `update`, without `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import scale_by_percent_delta
      >>> tx = scale_by_percent_delta(layers="array")
      >>> w, g = jnp.array([1.0, -2.0, 0.0, 50.0]), jnp.array([1.0, 2.0, 7.0, 0.0])
      >>> tx.update(g, tx.init(w), w)[0].tolist()
      [1.0, 2.0, 7.0, 0.0]
    """
    rule = radii.percent_delta(trust_coefficient, param_axis_name)
    return _scale_by_layer(rule, trust_coefficient, layers, param_axis_name, weight_decay, weight_decay_mask)


def discard_small_gradients(
    fraction: jax.typing.ArrayLike,
    *,
    layers: Layers = "array",
    param_axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Zero the smallest-magnitude fraction of each layer's gradient.

    Formula:
      the `floor(fraction * n)` smallest of a layer's `n` magnitudes become 0; "discarding small value gradients",
      section 3.

    Args:
      fraction: of each layer's entries, in [0, 1). Entries that tie with the quantile are kept; 0 changes nothing.
      layers: `"array"`, `"module"`, `"kernel"` or rules from path regex to layer name, see `layers.group`. Leaves that
        are not measured themselves (the biases of `"kernel"`) are cut at their layer's quantile.
      param_axis_name: mesh axes (of `shard_map` or `pmap`) that split parameters.

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
    check_number("fraction", fraction, "[0, 1)")

    def threshold(population: Sequence[jax.Array]) -> jax.Array:
        rank = order_statistics.count_of(fraction, population_size(population, param_axis_name))
        found: jax.Array = order_statistics.order_statistics(population, rank, param_axis_name)[0]
        return found

    def kept(measured: radii.Leaves, scaled: radii.Leaves) -> list[Wide]:
        # What follows nothing is cut at the quantile of all that does not, stacks and other arrays together.
        thresholds = for_each(threshold, measured.g or [jax.lax.expand_dims(g, (0,)) for g in scaled.g])
        # Below is discarded, rather than above kept: NaN compares false, and has to be seen.
        keep = lambda g: jnp.where(jnp.abs(g) < radii.along(thresholds, g), 0, 1).astype(thresholds.dtype)
        return [wide(keep(g)) for g in scaled.g]

    return _scale_by_radius(radii.each(kept), layers, None, param_axis_name, needs_params=False)


def _check_max_radius(max_radius: jax.typing.ArrayLike | None) -> None:
    if max_radius is not None:
        check_number("max_radius", max_radius, "(0, inf]")


def _scale_by_layer(
    rule: radii.Rule,
    trust_coefficient: jax.typing.ArrayLike,
    layers: Layers,
    param_axis_name: AxisName,
    weight_decay: float | jax.Array,
    weight_decay_mask: Mask,
    follow_all: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """For the rules with one radius for all of a layer."""
    check_number("weight_decay", weight_decay, "[0, inf)")
    check_number("trust_coefficient", trust_coefficient, "[0, inf)")
    is_bounded = checked(layers).layers == "kernel"
    of_all = bounded(rule, trust_coefficient, follow_all, param_axis_name) if is_bounded else radii.one_for_all(rule)
    # A number that is not zero, or one that may change.
    decays = not isinstance(weight_decay, float | int) or weight_decay != 0
    decay = optax.add_decayed_weights(weight_decay, weight_decay_mask) if decays else None
    return _scale_by_radius(of_all, layers, decay, param_axis_name)


class SplitState(NamedTuple):
    """The state of a transformation of parameters that devices hold in parts, with the layers of the whole ones."""

    layers: WholeLayers
    inner_state: optax.OptState


def _teach_flax() -> None:
    """Lets `flax.serialization`, where it is used, save a state with layers: they are made anew by `init`."""
    flax = sys.modules.get("flax.serialization")
    if flax is not None:
        flax.register_serialization_state(WholeLayers, lambda layers: {}, lambda layers, saved: layers, override=True)


def _scale_by_radius(
    rule: radii.TreeRule,
    layers: Layers,
    decay: optax.GradientTransformation | None = None,
    param_axis_name: AxisName = None,
    *,
    needs_curvature: bool = False,
    needs_params: bool = True,
) -> optax.GradientTransformationExtraArgs:
    how = checked(layers)
    by_whole_shapes = param_axis_name is not None and (how.layers == "kernel" or bool(how.axes))

    def init_fn(params: Any) -> Any:
        inner = optax.EmptyState() if decay is None else decay.init(params)
        if not by_whole_shapes or is_bound(param_axis_name):
            return inner
        _teach_flax()
        return SplitState(WholeLayers.of(jax.tree_util.tree_leaves_with_path(params), layers), inner)

    def layers_of(leaves: Sequence[tuple[Any, jax.Array]], state: Any) -> list[Layer]:
        if isinstance(state, SplitState):
            return state.layers.among(leaves)
        is_split = by_whole_shapes and is_bound(param_axis_name)
        return of_parts(leaves, layers, jax.lax.axis_size(param_axis_name)) if is_split else group(leaves, layers)

    def update_fn(
        updates: Any, state: Any, params: Any = None, *, hessian_diag: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        if needs_params and params is None:
            raise ValueError("the radius of a layer depends on its parameters; call update(updates, state, params).")
        if needs_curvature and hessian_diag is None:
            raise ValueError(
                "the radius of curvature depends on the Hessian diagonal; pass hessian_diag=... to update, or wrap the"
                " optimizer in curvax.with_hessian_diag and pass obj_fn=... ."
            )
        everything = updates
        check_floats(updates)
        if needs_curvature:
            updates = with_curvature(updates, hessian_diag)
        moving = [g != 0 for g in jax.tree.leaves(updates)]
        inner = state.inner_state if isinstance(state, SplitState) else state
        if decay is not None:
            updates, inner = decay.update(updates, inner, params)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
        g = [leaf for _, leaf in leaves]
        w = leaves_like("params", params, updates, "gradient") if needs_params else g
        h: Sequence[jax.Array] = ()
        if needs_curvature:
            _check_real(leaves)
            h = leaves_like("hessian_diag", hessian_diag, updates, "gradient")

        groups = layers_of(leaves, state)
        scale = functools.partial(_scaled, rule, groups, decays=decay is not None, param_axis_name=param_axis_name)
        columns = radii.Leaves(w, g, h)
        if any(axes for layer in groups for axes in layer.axes):
            # What slices are divided by has no name where all layers are a vector.
            scaled = on_auto(scale, columns, moving, like=g)
        else:
            scaled = scale(columns, moving)
        scaled = jax.tree.unflatten(treedef, scaled)
        state = state._replace(inner_state=inner) if isinstance(state, SplitState) else inner
        return jax.tree.map(lambda new, g: g if is_hole(new) else new, scaled, everything, is_leaf=is_hole), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _scaled(
    rule: radii.TreeRule,
    groups: Sequence[Layer],
    leaves: radii.Leaves,
    moving: Sequence[jax.Array],
    decays: bool,
    param_axis_name: AxisName,
) -> list[jax.Array]:
    """The updates. `moving` says which entries of the leaves have a gradient; others are not measured."""
    updates, axes_of = list(leaves.g), {i: axes for x in groups for i, axes in zip(x.scaled, x.axes, strict=True)}
    layers = [(layer.measured, layer.scaled) for layer in groups if layer.measured]
    # What has no measured leaves is the same everywhere, and taken together.
    alone = tuple(i for layer in groups if not layer.measured for i in layer.scaled)
    layers += [((), alone)] if alone else []

    def measurable(scaled: radii.Leaves, places: Sequence[int], indices: Sequence[int]) -> radii.Leaves:
        w, g, h = ([column[k] for k in places] if column else [] for column in scaled)
        masks: Sequence[jax.Array] = [slices(moving[i], axes_of[i]) for i in indices]
        masks = _or_all(masks, param_axis_name) if decays else masks
        # Not every rule sees a curvature.
        keep = lambda column: [jnp.where(m, x, 0) for m, x in zip(masks, column, strict=True)] if column else []
        # A gradient that does not decay is zero already where it is not measured: what is one array is summed once.
        return radii.Leaves(keep(w), keep(g) if decays else g, keep(h))

    arrays = []
    for measured, indices in layers:
        scaled = _at(indices, leaves, axes_of, _dtype_of(indices, leaves))
        arrays.append((measurable(scaled, [indices.index(i) for i in measured], measured), scaled))
    found = rule(arrays) if layers else []
    for (_, indices), (_, scaled), of_layer in zip(layers, arrays, found, strict=True):
        for i, g, radius in zip(indices, scaled.g, of_layer, strict=True):
            update = product(radius, g).astype(leaves.g[i].dtype)
            updates[i] = joined(update, leaves.g[i].shape, axes_of[i])
    return updates


def _or_all(masks: Sequence[jax.Array], param_axis_name: AxisName) -> Sequence[jax.Array]:
    """The masks; where none has an entry, all entries: a layer without a gradient decays by all that it is."""
    if not masks:
        return masks
    any_of = lambda mask: jnp.any(mask, tuple(range(1, mask.ndim)))
    some = functools.reduce(jnp.logical_or, map(any_of, masks))
    some = some if param_axis_name is None else jax.lax.pmax(some.astype(jnp.int32), param_axis_name) > 0
    return [mask | ~radii.along(some, mask) for mask in masks]


def _dtype_of(indices: Sequence[int], leaves: radii.Leaves) -> Any:
    """The one dtype in which all of a layer is computed."""
    return statistics_dtype(*[column[i].dtype for i in indices for column in (leaves.g, leaves.w)])


def _at(indices: Sequence[int], leaves: radii.Leaves, axes_of: Mapping[int, Axes], dtype: Any) -> radii.Leaves:
    def cast(x: jax.Array, axes: Axes) -> jax.Array:
        # Magnitudes are all that a radius sees.
        x = jnp.abs(x) if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating) else x
        return slices(x.astype(dtype), axes)

    w, g = ([cast(x[i], axes_of[i]) for i in indices] for x in (leaves.w, leaves.g))
    h = [slices(leaves.h[i].astype(jnp.finfo(dtype).dtype), axes_of[i]) for i in indices] if leaves.h else []
    return radii.Leaves(w, g, h)


def _check_real(leaves: Sequence[tuple[Any, jax.Array]]) -> None:
    for path, g in leaves:
        if jnp.iscomplexobj(g):
            raise ValueError(
                f"the parameter '{path_name(path)}' is complex, and has no radius of curvature; train it with a"
                " first-order rule by optax.partition, or split it into real and imaginary parts."
            )
