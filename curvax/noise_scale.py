"""How noisy the gradient is, and so beyond which batch size more examples are of little use.

The squared norm of a mean over B examples is that of the true gradient and, on average, 1 / B of the variance of one
example. Seen at two batch sizes, it tells both (McCandlish et al. 2018). Who accumulates micro-batches, or averages
over devices, has gradients of two sizes in every step: `with_noise_scale` compares them, at the price of their norms.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax.checks import check_number, check_transformation
from curvax.layers import Layer, Layers, group, path_name
from curvax.meshes import on_auto
from curvax.stacks import slices
from curvax.sums import squares, totals
from curvax.trees import all_finite, leaves_like, statistics_dtype
from curvax.varying import AxisName
from curvax.wide import Wide, cast, normal, plus, take, times, to_float, wide


class NoiseScale(NamedTuple):
    """Estimates from one step, unbiased both; their ratio is not. Average them over steps, then take the ratio.

    Attributes:
      squared_gradient: `|G|^2` of the gradient G of an infinite batch; it may come out negative.
      noise: `tr(Sigma)`, the variance of one example's gradient, summed over parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import NoiseScale
      >>> float(NoiseScale(squared_gradient=jnp.array(0.5), noise=jnp.array(600.0)).critical_batch_size)
      1200.0
    """

    squared_gradient: jax.Array
    noise: jax.Array

    @property
    def critical_batch_size(self) -> jax.Array:
        """`B_simple = tr(Sigma) / |G|^2`: beyond it a larger batch saves few steps; infinite where `|G|^2 <= 0`."""
        return jnp.where(self.squared_gradient > 0, self.noise / self.squared_gradient, jnp.inf)


def noise_scale_from_batches(
    small: Any, large: Any, small_batch_size: jax.typing.ArrayLike, large_batch_size: jax.typing.ArrayLike
) -> NoiseScale:
    """The gradient noise scale from gradients at two batch sizes.

    Formula:
      `E|G_B|^2 = |G|^2 + tr(Sigma) / B` for the mean gradient of B independent examples, solved for the two unknowns;
      McCandlish et al. 2018, "An empirical model of large-batch training", appendix A.1.

    Args:
      small: gradient of a batch of `small_batch_size` examples, a pytree.
      large: gradient of a batch of `large_batch_size` examples. The small batch may be a part of it.
      small_batch_size: its number of examples.
      large_batch_size: its number of examples, another one.

    Returns:
      The estimates, float32 scalars.

    Raises:
      ValueError: if both batch sizes are equal, or the trees differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import noise_scale_from_batches
      >>> print(noise_scale_from_batches(jnp.array([3.0]), jnp.array([2.0]), 1, 4).critical_batch_size.round(4))
      2.8571
    """
    norms = squared_norm(leaves_like("small", small, large)), squared_norm(large)
    return NoiseScale(*map(to_float, noise_scale(*norms, small_batch_size, large_batch_size)))


def noise_scale_over_devices(grads: Any, batch_size: int | jax.Array, axis_name: str | tuple[str, ...]) -> NoiseScale:
    """The gradient noise scale from the gradients that data-parallel devices have before they are averaged.

    Formula:
      That of `noise_scale_from_batches` with each device's share as the small batch, its squared norm averaged over the
      devices, and all shares together as the large one.

    Args:
      grads: this device's gradient, the mean over its own examples, a pytree. Under `shard_map` with `check_vma`, the
        gradient of replicated parameters is summed already: mark them with `jax.lax.pcast` first.
      batch_size: examples per device.
      axis_name: mesh axes (of `shard_map` or `pmap`) that split the examples, over two devices at least.

    Returns:
      The estimates, the same on all devices.

    Raises:
      ValueError: if there is only one device, or the gradients are known to be the same on all.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax import noise_scale_over_devices
      >>> scale = jax.vmap(lambda g: noise_scale_over_devices(g, 1, "x"), axis_name="x")(jnp.array([1.0, 3.0]))
      >>> float(scale.squared_gradient[0]), float(scale.noise[0])
      (3.0, 2.0)
    """
    check_number("batch_size", batch_size, "[1, inf)", whole=True)
    _check_own(grads, axis_name)
    devices = jax.lax.axis_size(axis_name)
    small = squared_norm(grads, axis_name)
    # In halves the sum over devices would overflow first.
    wide_grads = jax.tree.map(lambda x: x.astype(statistics_dtype(x.dtype)), grads)
    large = squared_norm(jax.lax.pmean(wide_grads, axis_name))
    batch_size = batch_size if isinstance(batch_size, jax.core.Tracer) else int(batch_size)
    return NoiseScale(*map(to_float, noise_scale(times(1 / devices, small), large, batch_size, batch_size * devices)))


class NoiseScaleState(NamedTuple):
    """State of `with_noise_scale`.

    Attributes:
      layers: the `NoiseScale` of each layer, averaged over the steps so far; zeros before the first. Scalars,
        or vectors for stacks of layers.
      num_estimates: how many steps that were, int32.
      small: the sum of squared norms over the micro-batches of this step so far, for each layer.
      inner_state: that of the wrapped transformation, or of the `optax.MultiSteps` that accumulates for it.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from curvax import with_noise_scale
      >>> tx = with_noise_scale(optax.sgd(0.1), 8, accumulate=2)
      >>> w, state = jnp.zeros(1), tx.init(jnp.zeros(1))
      >>> for g in (1.0, 3.0):
      ...   updates, state = tx.update(jnp.array([g]), state, w)
      >>> print(state.whole.squared_gradient.round(4), state.whole.noise.round(4))
      3.0 16.0
    """

    layers: dict[str, NoiseScale]
    num_estimates: jax.Array
    small: dict[str, jax.Array]
    inner_state: optax.OptState

    @property
    def whole(self) -> NoiseScale:
        """That of the whole gradient."""
        return NoiseScale(
            *(functools.reduce(jnp.add, map(jnp.sum, column)) for column in zip(*self.layers.values(), strict=True))
        )


def with_noise_scale(
    inner: optax.GradientTransformation,
    batch_size: int,
    *,
    accumulate: int = 1,
    axis_name: AxisName = None,
    decay: jax.typing.ArrayLike = 0.9,
    layers: Layers = "array",
) -> optax.GradientTransformationExtraArgs:
    """Keep the noise scale of the gradients that are averaged before `inner` sees them.

    Formula:
      In each step an estimate as in `noise_scale_from_batches`, of the norms of the gradients that come in, each of
      `batch_size` examples, and that of their mean, which `inner` is given; kept as the average `a_n = a_(n-1) + (x_n -
      a_(n-1)) (1 - decay) / (1 - decay^n)`, whose bias is corrected. The critical batch size is the ratio of two such
      averages, since a ratio of single estimates is biased.

    Args:
      inner: the optimizer.
      batch_size: examples in a gradient that comes in.
      accumulate: how many micro-batches are a step: then `inner` is in `optax.MultiSteps`.
      axis_name: mesh axes (of `shard_map` or `pmap`) that split the examples: what comes in is the mean gradient of a
        device's own, over which `inner` is given the mean.
      decay: decay rate of the average, in [0, 1).
      layers: the groups of arrays that have a noise scale of their own, see `layers.group`.

    Returns:
      A transformation; `curvax.metrics(state)` has its `noise_scale/<layer>` and `noise_scale`, critical batch sizes in
      examples. A step whose gradient is not finite is left out. With one micro-batch on one device there is nothing to
      compare, and no estimate.

    Raises:
      ValueError: if an argument is out of range, or neither `accumulate` nor `axis_name` is given.

    Example:
      >>> import jax.numpy as jnp, optax, curvax
      >>> tx = curvax.with_noise_scale(optax.sgd(0.1), 8, accumulate=2)
      >>> w = {"w": jnp.zeros(2)}
      >>> state = tx.init(w)
      >>> for g in ([1.0, 3.0], [3.0, 3.0]):
      ...   updates, state = tx.update({"w": jnp.array(g)}, state, w)
      >>> print(updates["w"], round(curvax.metrics(state)["noise_scale"], 4))
      [-0.2 -0.3] 1.3333
    """
    inner = check_transformation("inner", inner)
    check_number("batch_size", batch_size, "[1, inf)", whole=True)
    check_number("accumulate", accumulate, "[1, inf)", whole=True)
    check_number("decay", decay, "[0, 1)")
    if accumulate == 1 and axis_name is None:
        raise ValueError(
            "the noise scale is told from gradients of several batches; pass accumulate=... for the number of"
            " micro-batches in a step, or axis_name=... where devices have gradients of their own."
        )
    steps = inner if accumulate == 1 else optax.MultiSteps(inner, int(accumulate))

    def init_fn(params: Any) -> NoiseScaleState:
        norms = _norms(jax.tree.map(jnp.zeros_like, params), layers)
        zeros = {name: jnp.zeros_like(norm.value) for name, norm in norms.items()}
        scales = {name: NoiseScale(zero, zero) for name, zero in zeros.items()}
        return NoiseScaleState(scales, jnp.zeros((), jnp.int32), zeros, steps.init(params))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, NoiseScaleState]:
        if axis_name is not None:
            _check_own(updates, axis_name)
        devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
        norms = {name: to_float(times(1 / devices, x)) for name, x in _norms(updates, layers, axis_name).items()}
        small = {name: state.small[name] + x.astype(state.small[name].dtype) for name, x in norms.items()}
        updates = updates if axis_name is None else jax.lax.pmean(updates, axis_name)
        number, is_last, mean = 1, True, updates
        if accumulate > 1:
            number = state.inner_state.mini_step + 1
            is_last = number == accumulate
            share = (1 / number).astype(jnp.float32)
            mean = jax.tree.map(lambda m, g: m + (g - m) * share.astype(m.dtype), state.inner_state.acc_grads, updates)
        stepped, inner_state = steps.update(updates, state.inner_state, params, **extra_args)
        state = state._replace(small=small, inner_state=inner_state)
        if devices * accumulate == 1:
            return stepped, state._replace(small=jax.tree.map(jnp.zeros_like, small))
        sizes = int(batch_size), int(batch_size) * devices * int(accumulate)
        large = _norms(mean, layers)
        found = {
            name: NoiseScale(*map(to_float, noise_scale(wide(x / accumulate), large[name], *sizes)))
            for name, x in small.items()
        }
        return stepped, _averaged(state, found, is_last, is_last & all_finite(found), decay)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_own(grads: Any, axis_name: AxisName) -> None:
    """Raises a ValueError where `shard_map` knows that the gradients are the same on all devices."""
    varies = lambda x: jax.typeof(x).manual_axis_type.varying
    # Without `check_vma` nothing is known to vary.
    wanted = varies(jax.lax.axis_index(axis_name))
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        if wanted - varies(g):
            raise ValueError(
                f"the gradient of '{path_name(path)}' is the same on all devices along {axis_name!r}: shard_map has"
                " summed it. Differentiate parameters that are marked as each device's own,"
                f" jax.lax.pcast(params, {axis_name!r}, to='varying'), and pass that gradient before it is averaged."
            )


def _averaged(
    state: NoiseScaleState, found: dict[str, NoiseScale], is_last: Any, is_good: jax.Array, decay: Any
) -> NoiseScaleState:
    count = state.num_estimates + 1
    weight = (1 - decay) / (1 - decay ** count.astype(jnp.float32))
    follow = lambda old, new: jnp.where(is_good, old + (new - old) * weight.astype(old.dtype), old)
    small = jax.tree.map(lambda x: jnp.where(is_last, jnp.zeros_like(x), x), state.small)
    number = jnp.where(is_good, count, state.num_estimates)
    return state._replace(layers=jax.tree.map(follow, state.layers, found), num_estimates=number, small=small)


def _norms(grads: Any, layers: Layers, axis_name: AxisName = None) -> dict[str, Wide]:
    """The squared norm of each layer, or the sum of those of all devices."""
    leaves = jax.tree_util.tree_leaves_with_path(grads)

    def norm(layer: Layer) -> Wide:
        arrays = [slices(leaves[i][1], axes) for i, axes in zip(layer.scaled, layer.axes, strict=True)]
        found: Wide = on_auto(functools.partial(_squared_norms, axis_name=axis_name), arrays)
        return found if any(layer.axes) else take(found, 0)

    return {layer.name: norm(layer) for layer in group(leaves, layers)}


def noise_scale(
    small: Wide, large: Wide, small_batch_size: jax.typing.ArrayLike, large_batch_size: jax.typing.ArrayLike
) -> tuple[Wide, Wide]:
    """The numbers of a `NoiseScale`, of squared norms or of arrays of them."""
    sizes = {"small_batch_size": small_batch_size, "large_batch_size": large_batch_size}
    for name, size in sizes.items():
        check_number(name, size, "[1, inf)", whole=True)
    if not any(isinstance(size, jax.core.Tracer) for size in sizes.values()) and small_batch_size == large_batch_size:
        raise ValueError(f"two batches of {small_batch_size} examples cannot tell noise from gradient; vary the size.")
    b, B = (jnp.asarray(size, small.value.dtype) for size in sizes.values())
    large = cast(large, small.value.dtype)
    difference = plus(normal(small), normal(times(-1, large)))
    squared_gradient = plus(normal(times(B / (B - b), large)), normal(times(-b / (B - b), small)))
    return squared_gradient, times(b * (B / (B - b)), difference)


def squared_norm(grads: Any, axis_name: AxisName = None) -> Wide:
    """The squared norm, or the sum of those of all devices."""
    leaves = jax.tree.leaves(grads)
    if not leaves:
        return wide(jnp.zeros((), jnp.float32))
    return take(_squared_norms([slices(x, ()) for x in leaves], axis_name), 0)


def _squared_norms(arrays: Sequence[jax.Array], axis_name: AxisName) -> Wide:
    """Those of the slices of arrays `(number, ...)` together."""
    dtype = jnp.finfo(statistics_dtype(*[x.dtype for x in arrays])).dtype
    return totals(squares, [[(jnp.abs(x).astype(dtype),) for x in arrays]], axis_name)[0]
