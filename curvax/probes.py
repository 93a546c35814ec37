"""What the paper measures while a network trains.

A large batch is said to fail because its gradients, and with them its steps in the parameters and in the loss, are
small (Gao & Zhong, section 2). Each of these is a mean over a layer of what one optimizer step sees anyway: the
gradient g that comes in, the update u that goes out, the parameters w. So one wrapper around an optimizer measures them
all, and changes nothing. What takes a second loss, the decrease of a held-out one, is a function.

Under `jit` on a mesh nothing needs a name. Under `shard_map` or `pmap` give the wrapper gradients that are already
means over the batch, as any optimizer wants them, and name the axes that split *parameters*, if any do.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvax import order_statistics
from curvax.checks import check_number, check_transformation
from curvax.curvature.scalar import scalar_objective
from curvax.layers import Layer, Layers, checked, group
from curvax.magnitudes import population_size
from curvax.meshes import on_auto
from curvax.stacks import for_each, sizes, slices
from curvax.sums import Terms, falls_and_rises, magnitudes, totals
from curvax.trees import leaves_like, statistics_dtype
from curvax.varying import AxisName
from curvax.wide import Wide, to_float

Arrays = Sequence[jax.Array]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
PerLayer = dict[str, jax.Array]


class ProbeState(NamedTuple):
    """State of `with_probes`: the measurements of the latest step, by name of the layer, and the wrapped state.

    Attributes:
      mean_abs_gradient: mean of |g|, scalars; eq. 4.
      parameter_stride: mean of |u|, scalars; eq. 6.
      loss_stride: mean of -u g, the first-order decrease of the loss per parameter, scalars; eq. 8.
      radius_quantiles: of |w / g|, `(num_quantiles,)`; eq. 17. For a stack of layers all have one axis more in front.
      inner_state: that of the wrapped transformation.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from curvax import with_probes
      >>> tx = with_probes(optax.sgd(0.5))
      >>> w = {"w": jnp.array([1.0, -3.0])}
      >>> updates, state = tx.update(w, tx.init(w), w)
      >>> {layer: float(x) for layer, x in optax.tree.get(state, "parameter_stride").items()}
      {'w': 1.0}
    """

    mean_abs_gradient: PerLayer
    parameter_stride: PerLayer
    loss_stride: PerLayer
    radius_quantiles: PerLayer
    inner_state: optax.OptState


def with_probes(
    inner: optax.GradientTransformation,
    *,
    layers: Layers = "array",
    quantiles: Sequence[float] = QUANTILES,
    param_axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Measure gradient, step and radius of each layer in every step, without changing any.

    Formula:
      Over the n entries of a layer, with g the incoming gradient, u the outgoing update and w the parameters:
      `sum|g| / n` (eq. 4 of Gao & Zhong), `sum|u| / n` (eq. 6), `-sum u g / n` (eq. 8, with the minus sign that eq. 5
      lacks) and quantiles of `|w / g|` (eq. 17), which is infinite where g = 0 and 0 where w = 0; the
      lower of two where a quantile falls between them.

    Args:
      inner: the optimizer. Inside a chain `with_probes(optax.identity())` measures what passes by.
      layers: `"array"`, `"module"`, `"kernel"` or rules from path regex to layer name, see `layers.group`. A layer is
        measured on all that it scales: with `"kernel"` biases count among their kernel's entries.
      quantiles: which quantiles of the radius, each in [0, 1].
      param_axis_name: mesh axes (of `shard_map` or `pmap`) that split parameters.

    Returns:
      A transformation whose updates are those of `inner`, bit for bit. Its measurements, float32 at least, are read by
      `optax.tree.get(state, "loss_stride")` and so on; before the first step they are 0. NaN is passed on. An `inner`
      that needs no `params` does without them here too, and the quantiles of the radius are NaN then.

    Raises:
      ValueError: if a quantile is no number in [0, 1].

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from curvax import with_probes
      >>> tx = with_probes(optax.sgd(0.5))
      >>> w, g = {"kernel": jnp.array([3.0, -4.0])}, {"kernel": jnp.array([1.0, -2.0])}
      >>> updates, state = tx.update(g, tx.init(w), w)
      >>> {name: float(optax.tree.get(state, name)["kernel"]) for name in ("mean_abs_gradient", "loss_stride")}
      {'mean_abs_gradient': 1.5, 'loss_stride': 1.25}
    """
    wrapped = check_transformation("inner", inner)
    if not isinstance(quantiles, Sequence | np.ndarray) or isinstance(quantiles, str):
        raise ValueError(f"quantiles={quantiles!r} are no sequence; pass several, as in quantiles=(0.5,).")
    quantiles = tuple(quantiles)
    how = checked(layers)
    if (how.layers == "kernel" or how.axes) and param_axis_name is not None:
        raise ValueError(
            f"layers={layers!r} is told by the shapes of whole arrays, of which a device sees parts; pass"
            " layers='array', 'module' or rules beside param_axis_name."
        )
    for q in quantiles:
        check_number("quantiles", q, "[0, 1]")

    def init_fn(params: Any) -> ProbeState:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        groups = group(leaves, layers)

        def zeros(shape: tuple[int, ...]) -> Any:
            # Layers of a placeholder have no names: one leaf, which is no parameter, stands for all.
            if isinstance(params, _Placeholder):
                return jnp.zeros(shape)
            of = lambda layer: [leaves[i][1] for i in layer.scaled]
            number = lambda layer: [math.prod(sizes(of(layer)[0].shape, layer.axes[0]))] if any(layer.axes) else []
            return {x.name: jnp.zeros((*number(x), *shape), _dtype(of(x))) for x in groups}

        return ProbeState(zeros(()), zeros(()), zeros(()), zeros((len(quantiles),)), wrapped.init(params))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, ProbeState]:
        gradients = jax.tree_util.tree_leaves_with_path(updates)
        g = [x for _, x in gradients]
        w = (
            [jnp.full_like(x, jnp.nan) for x in g]
            if params is None
            else leaves_like("params", params, updates, "gradient")
        )
        stepped, inner_state = wrapped.update(updates, state.inner_state, params, **extra_args)
        u = leaves_like("the update", stepped, updates, "gradient")
        values = {}
        for layer in group(gradients, layers):
            # A state keeps its types, whatever those of the gradients are.
            measure = functools.partial(_measure, quantiles=quantiles, axis_name=param_axis_name)
            arrays = _arrays(layer, g, u, w)
            is_stack = any(layer.axes)
            measured = on_auto(measure, *arrays) if is_stack else [x[0] for x in measure(*arrays)]
            before = state.loss_stride.get(layer.name, measured[0])
            values[layer.name] = [x.astype(before.dtype) for x in measured]
        column = lambda i: {name: row[i] for name, row in values.items()}
        return stepped, ProbeState(column(0), column(1), column(2), column(3), inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def held_out_stride(value_fn: Callable[[Any], jax.Array], params: Any, updates: Any) -> jax.Array:
    """How much an update lowers a loss, such as that of examples which are not in the batch.

    Formula:
      `L(w) - L(w + u)`; what `loss_stride` is to first order, with the curvature of the loss, and free of the bias that
      a batch has towards its own examples.

    Args:
      value_fn: the loss, `params -> scalar`.
      params: the parameters w, a pytree.
      updates: the update u, a pytree like `params`.

    Returns:
      A scalar, above 0 where the loss falls.

    Raises:
      ValueError: if `value_fn` returns no scalar, or the update is no tree like the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import held_out_stride
      >>> float(held_out_stride(lambda w: jnp.sum(w**2), jnp.array([2.0]), jnp.array([-1.0])))
      3.0
    """
    function, params = scalar_objective(value_fn, params, None, False)
    leaves_like("updates", updates, params)
    stride: jax.Array = function(params) - function(optax.apply_updates(params, updates))
    return stride


def _arrays(layer: Layer, *columns: Sequence[jax.Array]) -> list[list[jax.Array]]:
    """Each column's arrays of a layer by slices, in the one dtype of its measurements."""
    chosen = [[slices(column[i], axes) for i, axes in zip(layer.scaled, layer.axes, strict=True)] for column in columns]
    dtype = statistics_dtype(*[x.dtype for column in chosen for x in column])
    return [[x.astype(dtype) for x in column] for column in chosen]


def _measure(g: Arrays, u: Arrays, w: Arrays, quantiles: Sequence[float], axis_name: AxisName) -> tuple[jax.Array, ...]:
    """Vectors with an entry for each slice."""

    def means(terms: Terms, *columns: Arrays) -> list[jax.Array]:
        number = g[0].shape[0]
        size = max(population_size(g, axis_name) // number, 1)
        sums = totals(terms, [list(zip(*columns, strict=True))], axis_name)
        return [to_float(Wide(total.value / size, total.exponent)) for total in sums]

    spread = for_each(lambda radii: lower_quantiles(radii, quantiles, axis_name), approximate_radii(w, g))
    fall, rise = means(falls_and_rises, u, g)
    return (*means(magnitudes, g, u), fall - rise, spread)


def approximate_radii(w: Sequence[jax.Array], g: Sequence[jax.Array]) -> list[jax.Array]:
    """Eq. 17, `|w / g|`, infinite where g is zero and w is not."""
    # A parameter at zero has a radius of 0 whatever its gradient, so 0/0 counts as 0 too.
    return [jnp.where((x == 0) & (y == 0), 0, jnp.abs(x) / jnp.abs(y)) for x, y in zip(w, g, strict=True)]


def lower_quantiles(x: Sequence[jax.Array], quantiles: Sequence[float], axis_name: AxisName) -> jax.Array:
    """Not interpolated: between a finite and an infinite radius there is nothing."""
    last = population_size(x, axis_name) - 1
    ranks = [order_statistics.count_of(q, max(last, 0)) for q in quantiles]
    found = [order_statistics.order_statistics(x, rank, axis_name)[0] for rank in ranks]
    return jnp.stack(found) if found else jnp.zeros(0, x[0].dtype)


def _dtype(leaves: Sequence[jax.Array]) -> Any:
    return jnp.finfo(statistics_dtype(*[x.dtype for x in leaves])).dtype


def _placeholder() -> type:
    """The type of what `optax.tree.map_params` passes to `init` in place of parameters."""
    seen: list[type] = []

    def look(params: Any) -> tuple[()]:
        seen.append(type(params))
        return ()

    optax.tree.map_params(look, lambda x: x, ())
    return seen[0]


_Placeholder = _placeholder()
