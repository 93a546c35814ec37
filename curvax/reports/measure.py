"""What a report measures of each layer, in the dtype of statistics.

Everything that is large stays on the device, and goes when its statistics are known: a gradient, and one sample of the
curvature at a time. Estimated curvature is drawn several times, and what follows from it is averaged over the draws, so
that every number has a standard error and no tree of parameters has to be kept for it.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvax import optimizers, order_statistics, radii
from curvax.curvature.estimate import Estimate
from curvax.curvature.hessian import value_grad_and_hessian_diag
from curvax.curvature.micro_batches import micro_batch, num_examples, number_of_parts
from curvax.exact.independence import example_axes
from curvax.layers import Layer, Layers
from curvax.noise_scale import NoiseScale, noise_scale, squared_norm
from curvax.objective import Objective
from curvax.probes import QUANTILES, approximate_radii, lower_quantiles
from curvax.transforms import scale_by_curvature_radius
from curvax.trees import statistics_dtype
from curvax.wide import Wide, normal, plus, times, to_float

#: Parts of a batch between whose gradients the noise is seen; the estimate's own error is about 1 / sqrt(8) of it.
PARTS = 8
#: The damping of `cblr`.
DAMPING = 0.1
#: What each optimizer makes of a gradient in a step without momentum at the rate 1.
FIRST_ORDER = {
    "lars": functools.partial(optimizers.lars, 1.0, momentum=0.0, trust_coefficient=1.0),
    "mclr": functools.partial(optimizers.mclr, 1.0, momentum=0.0),
    "percent_delta": functools.partial(optimizers.percent_delta, 1.0, momentum=0.0),
}
CBLR = functools.partial(optimizers.cblr, 1.0, damping=DAMPING, momentum=0.0)
RULES = (*FIRST_ORDER, "cblr")

Statistics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Parts:
    """The layers of a tree, as their indices into its leaves.

    Attributes:
      measured: those on which a layer is measured, its kernels where it has some.
      scaled: all that are of a layer; every leaf is of one.
    """

    measured: Sequence[tuple[int, ...]]
    scaled: Sequence[tuple[int, ...]]

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> "Parts":
        return cls([layer.measured or layer.scaled for layer in layers], [layer.scaled for layer in layers])


def each(groups: Sequence[tuple[int, ...]], function: Callable[..., Any], *trees: Any) -> Any:
    """What `function` says of the arrays of each group, one below the other."""
    columns = [jax.tree.leaves(tree) for tree in trees]
    rows = []
    for group in groups:
        arrays = [[column[i] for i in group] for column in columns]
        dtype = jnp.finfo(statistics_dtype(*[x.dtype for column in arrays for x in column])).dtype
        rows.append(function(*([x.astype(dtype) for x in column] for column in arrays)))
    return jax.tree.map(lambda *column: jnp.stack(column), *rows)


def gradient(objective: Any, params: Any, parts: Parts, stage: Callable) -> tuple[Any, Any, NoiseScale | str]:
    """The loss, its gradient, and the noise of the latter or why it is not known."""
    axes = _axes(objective, params)
    if isinstance(axes, str):
        with stage("gradient"):
            return *jax.block_until_ready(jax.jit(jax.value_and_grad(objective))(params)), axes
    number, size = number_of_parts(objective, params, PARTS), num_examples(objective, params)

    @jax.jit
    def of_part(params, data, index):
        part = dataclasses.replace(objective, data=micro_batch(data, axes, number, index))
        value, grad = jax.value_and_grad(part)(params)
        squares = each(parts.scaled, squared_norm, grad)
        return jax.tree.map(lambda x: x / number, (value, grad)), times(1 / number, squares)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(sums, found):
        return jax.tree.map(jnp.add, sums[0], found[0]), normal(plus(sums[1], found[1]))

    sums = None
    for i in range(number):
        with stage(f"gradient of part {i + 1} of {number}"):
            found = of_part(params, objective.data, i)
            sums = jax.block_until_ready(found if sums is None else add(sums, found))
    (value, grad), small = sums
    large = jax.jit(lambda grad: each(parts.scaled, squared_norm, grad))(grad)
    return value, grad, NoiseScale(*map(_float64, noise_scale(small, large, size // number, size)))


def _float64(x: Wide) -> np.ndarray:
    """Large enough for the squares of whatever a float32 is."""
    return np.ldexp(np.asarray(x.value, np.float64), np.asarray(x.exponent))


def critical_batch_size(noise: NoiseScale) -> np.ndarray:
    """That of NumPy's numbers, of which `NoiseScale` itself would make float32."""
    known = noise.squared_gradient > 0
    return np.where(known, noise.noise / np.where(known, noise.squared_gradient, 1), np.inf)


def _axes(objective: Any, params: Any) -> Any:
    """The example axes of the data, or why the batch is not taken apart."""
    if not isinstance(objective, Objective):
        return "the objective is a plain function, in which no examples can be told apart"
    number = number_of_parts(objective, params, PARTS)
    if number == 1:
        return f"the batch of {num_examples(objective, params)} cannot be divided into equal parts of two or more"
    axes = example_axes(objective, params, number)
    return f"the loss is not proved to treat examples apart ({axes})" if isinstance(axes, str) else axes


def first_order(parts: Parts, layers: Layers, params: Any, grad: Any) -> Statistics:
    """What follows from parameters and gradient alone."""

    def of_layer(w, g, *steps):
        dead = [jnp.sum(jnp.all(x == 0, tuple(range(x.ndim - 1)))) for x in g if x.ndim > 1]
        return {
            "weight_norm": _norm(w),
            "weight_median": order_statistics.median(w),
            "gradient_norm": _norm(g),
            "gradient_median": order_statistics.median(g),
            "dead_units": sum(dead, jnp.zeros((), jnp.int32)).astype(w[0].dtype),
            **{f"radius_{name}": _ratio(u, g) for name, u in zip(FIRST_ORDER, steps, strict=True)},
            **_quantiles("approximate", approximate_radii(w, g)),
        }

    steps = [_step(optimizer(layers=layers), params, grad) for optimizer in FIRST_ORDER.values()]
    broken = each(parts.scaled, lambda g: _share([~jnp.isfinite(x) for x in g]), grad)
    return {"non_finite_gradient": broken, **each(parts.measured, of_layer, params, grad, *steps)}


def second_order(parts: Parts, layers: Layers, params: Any, grad: Any, diag: Any) -> Statistics:
    """What follows from the curvature."""

    def of_layer(g, h, step, radius):
        return {
            "curvature": sum(jnp.sum(x) for x in h) / max(sum(x.size for x in h), 1),
            "negative": _share([x < 0 for x in h]),
            "zero": _share([x == 0 for x in h]),
            "non_finite": _share([~jnp.isfinite(x) for x in h]),
            "radius_cblr": _ratio(step, g),
            **_quantiles("curvature", radius, order_statistics.zeros(radius)),
        }

    step = _step(CBLR(layers=layers), params, grad, hessian_diag=diag)
    # Without the slope term a radius does not depend on the gradient, but for what has none, and is not measured.
    moving = jax.tree.map(lambda g: (g != 0).astype(statistics_dtype(g.dtype)), grad)
    radius = scale_by_curvature_radius(DAMPING, slope_term=False, layers=layers)
    radii = _step(radius, params, moving, hessian_diag=diag)
    return each(parts.measured, of_layer, grad, diag, step, radii)


def _step(tx: optax.GradientTransformationExtraArgs, params: Any, grad: Any, **extra: Any) -> Any:
    return tx.update(grad, tx.init(params), params, **extra)[0]


def curvature(
    objective: Any, params: Any, grad: Any, measure: Callable, method: Any, keys: Sequence[Any], stage: Callable
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The means of what `measure` says of curvature over the draws, and their standard errors, NaN for a single draw.

    Without keys it is exact, and they are 0.
    """

    @jax.jit
    def draw(params, data, grad, key):
        whole = dataclasses.replace(objective, data=data) if isinstance(objective, Objective) else objective
        estimate: Estimate = value_grad_and_hessian_diag(whole, params, method, key=key)
        return measure(params, grad, estimate.diag)

    data, draws = objective.data if isinstance(objective, Objective) else None, []
    for i, key in enumerate(keys or (None,)):
        with stage(f"curvature, draw {i + 1} of {len(keys)}" if keys else "curvature"):
            draws.append({name: np.asarray(x, np.float64) for name, x in draw(params, data, grad, key).items()})
    columns = {name: np.stack([found[name] for found in draws]) for name in draws[0]}
    means = {name: column.mean(0) for name, column in columns.items()}
    if not keys:
        return means, {name: np.zeros_like(mean) for name, mean in means.items()}
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
        return means, {name: x.std(0, ddof=1) / np.sqrt(len(draws)) for name, x in columns.items()}


def unreached(objective: Any, params: Any, grad: Any) -> list[int]:
    """The leaves whose derivative is zero whatever the parameters are: their gradient is, and depends on nothing."""
    closed = jax.make_jaxpr(jax.grad(objective))(params)
    depends = set(closed.jaxpr.invars) | set(closed.jaxpr.constvars)
    for eqn in closed.jaxpr.eqns:
        if any(not hasattr(x, "val") and x in depends for x in eqn.invars):
            depends.update(eqn.outvars)
    constant = [hasattr(out, "val") or out not in depends for out in closed.jaxpr.outvars]
    return [i for i, g in enumerate(jax.tree.leaves(grad)) if constant[i] and not jnp.any(g)]


def _norm(x: Sequence[jax.Array]) -> jax.Array:
    return to_float(radii.root_mean_square(x, None)) * np.sqrt(sum(leaf.size for leaf in x))


def _ratio(u: Sequence[jax.Array], g: Sequence[jax.Array]) -> jax.Array:
    """How much longer a step is than the gradient; without one every radius is 1."""
    length = _norm(g)
    return jnp.where(length == 0, 1, _norm(u) / jnp.where(length == 0, 1, length))


def _share(masks: Sequence[jax.Array]) -> jax.Array:
    number = sum(mask.size for mask in masks)
    return sum(jnp.sum(mask, dtype=jnp.float32) for mask in masks) / max(number, 1)


def _quantiles(name: str, x: Sequence[jax.Array], without: jax.Array | None = None) -> Statistics:
    values = lower_quantiles(x, QUANTILES, None, without)
    return {f"{name}_{round(100 * q)}": value for q, value in zip(QUANTILES, values, strict=True)}
