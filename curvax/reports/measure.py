"""What a report measures of each layer.

Gradients, steps and curvature are computed on the device, where whole trees of them stay; their statistics are NumPy's,
of one layer after the other on the host, since a program for each would take longer to compile than to count. Estimated
curvature is drawn several times, and what follows from it is averaged over the draws, so that every number has a
standard error and one sample of the curvature is held at a time.
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

from curvax import optimizers, order_statistics
from curvax.curvature.hessian import value_grad_and_hessian_diag
from curvax.curvature.micro_batches import micro_batch, num_examples, number_of_parts, shuffled
from curvax.exact.independence import example_axes
from curvax.layers import Layer, Layers
from curvax.noise_scale import NoiseScale, noise_scale, squared_norm
from curvax.objective import Objective
from curvax.probes import QUANTILES
from curvax.transforms import scale_by_curvature_radius
from curvax.trees import statistics_dtype
from curvax.wide import Wide, concatenate, normal, plus, times

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

Statistics = dict[str, np.ndarray]


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


def each(groups: Sequence[tuple[int, ...]], function: Callable[..., dict[str, Any]], *trees: Any) -> Statistics:
    """What `function` says of the arrays of each group, on the host, one below the other."""
    columns = [jax.tree.leaves(tree) for tree in trees]
    rows = [function(*([_host(column[i]) for i in group] for column in columns)) for group in groups]
    return {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}


def _host(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(statistics_dtype(x.dtype), copy=False).ravel()


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
        return jax.tree.map(lambda x: x / number, (value, grad)), times(1 / number, _squares(parts, grad))

    @functools.partial(jax.jit, donate_argnums=0)
    def add(sums, found):
        return jax.tree.map(jnp.add, sums[0], found[0]), normal(plus(sums[1], found[1]))

    data = jax.jit(lambda data: shuffled(data, axes, jax.random.key(0)))(objective.data)
    sums = None
    for i in range(number):
        with stage(f"gradient of part {i + 1} of {number}"):
            found = of_part(params, data, i)
            sums = jax.block_until_ready(found if sums is None else add(sums, found))
    (value, grad), small = sums
    large = jax.jit(functools.partial(_squares, parts))(grad)
    return value, grad, NoiseScale(*map(_float64, noise_scale(small, large, size // number, size)))


def _squares(parts: Parts, grad: Any) -> Wide:
    """The squared norm of each layer, whatever it is measured on."""
    leaves = jax.tree.leaves(grad)
    norms = [squared_norm([leaves[i] for i in group]) for group in parts.scaled]
    return concatenate([jax.tree.map(lambda x: x[None], norm) for norm in norms])


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

    def of_layer(w, g):
        return {
            "weight_norm": _norm(w),
            "weight_median": _median(w),
            "gradient_norm": _norm(g),
            "gradient_median": _median(g),
            **_quantiles("approximate_radius", [_over(abs(x), abs(y)) for x, y in zip(w, g, strict=True)]),
        }

    found = {"non_finite_gradient": each(parts.scaled, _share_of(lambda x: ~np.isfinite(x)), grad)["share"]}
    found |= each(parts.measured, of_layer, params, grad)
    for name, optimizer in FIRST_ORDER.items():
        found[f"radius_{name}"] = _lengths(
            parts, _step(optimizer(layers=layers))(params, grad, {}), found["gradient_norm"]
        )
    return found


def dead_units(parts: Parts, grad: Any) -> list[int]:
    """How many columns of each layer's arrays have no gradient at all."""
    leaves = jax.tree.leaves(grad)
    columns = [jnp.all(x == 0, tuple(range(x.ndim - 1))) if x.ndim > 1 else jnp.zeros(0, bool) for x in leaves]
    return [sum(int(np.sum(columns[i])) for i in group) for group in parts.measured]


def second_order(
    parts: Parts, layers: Layers, gradient_norms: np.ndarray, params: Any, grad: Any
) -> Callable[[Any], Statistics]:
    """A function that says what follows from a diagonal; what it needs is compiled once for all draws."""
    # Without the slope term a radius does not depend on the gradient, but for what has none, and is not measured.
    moving = jax.tree.map(lambda g: (g != 0).astype(statistics_dtype(g.dtype)), grad)
    radii = _step(scale_by_curvature_radius(DAMPING, slope_term=False, layers=layers))
    cblr = _step(CBLR(layers=layers))
    kinds = {"negative": lambda h: h < 0, "zero": lambda h: h == 0, "non_finite": lambda h: ~np.isfinite(h)}
    of_moving = lambda r: _quantiles("radius", [x[x != 0] for x in r])

    def measure(diag: Any) -> Statistics:
        found = each(parts.measured, of_moving, radii(params, moving, {"hessian_diag": diag}))
        found |= each(parts.measured, lambda h: {"curvature": np.mean(np.concatenate(h))}, diag)
        for name, kind in kinds.items():
            found[name] = each(parts.measured, _share_of(kind), diag)["share"]
        step = cblr(params, grad, {"hessian_diag": diag})
        return {**found, "radius_cblr": _lengths(parts, step, gradient_norms)}

    return measure


def _step(tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    """The first step of a transformation, compiled."""
    return jax.jit(lambda params, grad, extra: tx.update(grad, tx.init(params), params, **extra)[0])


def _lengths(parts: Parts, step: Any, gradient_norms: np.ndarray) -> np.ndarray:
    """How much longer a step is than the gradient; without one every radius is 1."""
    norms = each(parts.measured, lambda u: {"": _norm(u)}, step)[""]
    return np.where(gradient_norms == 0, 1, norms / np.where(gradient_norms == 0, 1, gradient_norms))


def curvature(
    objective: Any, params: Any, measure: Callable, method: Any, keys: Sequence[Any], stage: Callable
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The means of what `measure` says of curvature over the draws, and their standard errors, NaN for a single draw.

    Without keys it is exact, and they are 0.
    """

    @jax.jit
    def draw(params, data, key):
        whole = dataclasses.replace(objective, data=data) if isinstance(objective, Objective) else objective
        return value_grad_and_hessian_diag(whole, params, method, key=key).diag

    data, draws = objective.data if isinstance(objective, Objective) else None, []
    for i, key in enumerate(keys or (None,)):
        with stage(f"curvature, draw {i + 1} of {len(keys)}" if keys else "curvature"):
            draws.append(measure(draw(params, data, key)))
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


def _norm(x: Sequence[np.ndarray]) -> float:
    largest = max((float(np.max(np.abs(a), initial=0)) for a in x), default=0.0)
    if not 0 < largest < np.inf:
        return largest
    return largest * float(np.sqrt(sum(np.sum(np.square(a / largest), dtype=np.float64) for a in x)))


def _median(x: Sequence[np.ndarray]) -> float:
    return float(np.median(np.abs(np.concatenate(x))))


def _over(w: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Eq. 17, infinite where g is zero and w is not."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.divide(w, g, out=np.zeros_like(w), where=w != 0)


def _share_of(kind: Callable[[np.ndarray], np.ndarray]) -> Callable[[Sequence[np.ndarray]], dict[str, float]]:
    return lambda x: {"share": float(np.mean(kind(np.concatenate(x))))}


def _quantiles(name: str, x: Sequence[np.ndarray]) -> dict[str, float]:
    """Not interpolated: between a finite and an infinite radius there is nothing. Of no number there is none."""
    values = np.concatenate(x)
    if not values.size or np.isnan(values).any():
        return {f"{name}_{round(100 * q)}": np.nan for q in QUANTILES}
    ranks = [int(order_statistics.count_of(q, values.size - 1)) for q in QUANTILES]
    found = np.partition(values, ranks)[ranks]
    return {f"{name}_{round(100 * q)}": value for q, value in zip(QUANTILES, found, strict=True)}
