"""What a report measures of each layer.

Gradients, steps and curvature are computed on the device, where whole trees of them stay; their statistics are NumPy's,
of one layer after the other on the host, since a program for each would take longer to compile than to count. Estimated
curvature is drawn several times, and what follows from it is averaged over the draws, so that every number has a
standard error and one sample of the curvature is held at a time.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvax import optimizers, order_statistics
from curvax.curvature.hessian import value_grad_and_hessian_diag
from curvax.curvature.micro_batches import micro_batch, num_examples, number_of_parts, shuffled
from curvax.exact.independence import example_axes
from curvax.layers import Layer, Layers
from curvax.meshes import on_auto
from curvax.noise_scale import noise_scale
from curvax.objective import Objective
from curvax.probes import QUANTILES
from curvax.radii import squared_norms
from curvax.stacks import Axes, sizes, slices
from curvax.transforms import scale_by_curvature_radius
from curvax.trees import statistics_dtype
from curvax.wide import Wide, normal, plus, times

#: Parts of a batch between whose gradients the noise is seen; the estimate's own error is about 1 / sqrt(8) of it.
PARTS = 8
#: The damping of the radii.
DAMPING = 0.1
#: What each optimizer makes of a gradient in a step without momentum at the rate 1.
FIRST_ORDER = {
    "lars": functools.partial(optimizers.lars, 1.0, momentum=0.0, trust_coefficient=1.0),
    "mclr": functools.partial(optimizers.mclr, 1.0, momentum=0.0),
    "percent_delta": functools.partial(optimizers.percent_delta, 1.0, momentum=0.0),
}

Statistics = dict[str, np.ndarray]
#: Of a part of the work, by its name: it says that it runs.
Stage = Callable[[str], AbstractContextManager[None]]

#: Leaves of a layer, as indices into those of a tree, and the axes of each that count layers.
Members = Sequence[tuple[int, Axes]]


@dataclasses.dataclass(frozen=True)
class Parts:
    """The layers of a tree; where one is a stack, every number that is said of it is said of each of its slices.

    Attributes:
      measured: those on which a layer is measured, its kernels where it has some.
      scaled: all that are of a layer; every leaf is of one.
    """

    measured: Sequence[Members]
    scaled: Sequence[Members]

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> "Parts":
        scaled = [list(zip(layer.scaled, layer.axes, strict=True)) for layer in layers]
        kernels = lambda layer, members: [(i, axes) for i, axes in members if i in (layer.measured or layer.scaled)]
        return cls([kernels(*each) for each in zip(layers, scaled, strict=True)], scaled)


def each(layers: Sequence[Members], function: Callable[..., dict[str, Any]], *trees: Any) -> Statistics:
    """What `function` says of the arrays of each layer, on the host, one below the other."""
    columns, rows = [jax.tree.leaves(tree) for tree in trees], []
    for members in layers:
        arrays = [[_host(column[i], axes) for i, axes in members] for column in columns]
        rows += [function(*([x[k] for x in column] for column in arrays)) for k in range(len(arrays[0][0]))]
    return {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}


def _host(x: jax.Array, axes: Axes) -> np.ndarray:
    """The slices in rows."""
    array = np.asarray(x).astype(statistics_dtype(x.dtype), copy=False)
    number = math.prod(sizes(x.shape, axes))
    return np.moveaxis(array, axes, range(len(axes))).reshape(number, -1)


class Noise(NamedTuple):
    """A `NoiseScale` in NumPy's float64, of which that would make float32: one entry for each layer."""

    squared_gradient: np.ndarray
    noise: np.ndarray

    @property
    def critical_batch_size(self) -> np.ndarray:
        known = self.squared_gradient > 0
        return np.where(known, self.noise / np.where(known, self.squared_gradient, 1), np.inf)


def gradient(objective: Any, params: Any, parts: Parts, stage: Stage) -> tuple[Any, Any, Noise | str]:
    """The loss, its gradient, and the noise of the latter or why it is not known."""
    axes = _axes(objective, params)
    if isinstance(axes, str):
        with stage("gradient"):
            return *jax.block_until_ready(jax.jit(jax.value_and_grad(objective))(params)), axes
    number, size = number_of_parts(objective, params, PARTS), num_examples(objective, params)

    @functools.partial(jax.jit, donate_argnums=0)
    def with_part(sums: Any, params: Any, data: Any, index: Any) -> Any:
        part = dataclasses.replace(objective, data=micro_batch(data, axes, number, index))
        found = jax.tree.map(lambda x: x / number, jax.value_and_grad(part)(params))
        squares = times(number, _squares(parts.scaled, found[1]))
        return jax.tree.map(jnp.add, sums[0], found), normal(plus(sums[1], normal(squares)))

    data = jax.jit(lambda data: shuffled(data, axes, jax.random.key(0)))(objective.data)
    shapes = jax.eval_shape(lambda: (jax.value_and_grad(objective)(params), _squares(parts.scaled, params)))
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    for i in range(number):
        with stage(f"gradient of part {i + 1} of {number}"):
            sums = jax.block_until_ready(with_part(sums, params, data, i))
    (value, grad), small = sums
    large = jax.jit(functools.partial(_squares, parts.scaled))(grad)
    return value, grad, Noise(*map(_float64, noise_scale(small, large, size // number, size)))


def _squares(layers: Sequence[Members], tree: Any) -> Wide:
    """The squared norm of the arrays of each layer."""

    def of_layer(leaves: Sequence[jax.Array], members: Members) -> list[jax.Array]:
        dtype = jnp.finfo(statistics_dtype(*[leaves[i].dtype for i, _ in members])).dtype
        return [jnp.abs(slices(leaves[i], axes)).astype(dtype) for i, axes in members]

    norms = lambda leaves: squared_norms([of_layer(leaves, x) for x in layers], None)
    squares: Wide = on_auto(norms, jax.tree.leaves(tree))
    return squares


def _float64(x: Wide) -> np.ndarray:
    """Large enough for the squares of whatever a float32 is."""
    numbers: np.ndarray = np.ldexp(np.asarray(x.value, np.float64), np.asarray(x.exponent))
    return numbers


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

    def of_layer(w: Sequence[np.ndarray], g: Sequence[np.ndarray]) -> dict[str, float]:
        return {
            "weight_norm": _norm(w),
            "weight_median": _median(w),
            "gradient_norm": _norm(g),
            "gradient_median": _median(g),
            **_quantiles("approximate_radius", [_over(abs(x), abs(y)) for x, y in zip(w, g, strict=True)]),
        }

    found = {"non_finite_gradient": each(parts.scaled, _share_of(lambda x: ~np.isfinite(x)), grad)["share"]}
    found |= each(parts.measured, of_layer, params, grad)

    @jax.jit
    def steps(params: Any, grad: Any) -> dict[str, Wide]:
        return {
            name: _squares(parts.measured, _step(tx(layers=layers), params, grad)) for name, tx in FIRST_ORDER.items()
        }

    for name, squared in steps(params, grad).items():
        found[f"radius_{name}"] = _lengths(squared, found["gradient_norm"])
    return found


def dead_units(parts: Parts, grad: Any) -> list[int]:
    """How many columns of each layer's arrays have no gradient at all."""
    leaves = jax.tree.leaves(grad)
    found: list[int] = []
    for members in parts.measured:
        own = [slices(leaves[i], axes) == 0 for i, axes in members]
        columns = [jnp.all(x, tuple(range(1, x.ndim - 1))) for x in own if x.ndim > 2]
        found += sum((np.sum(np.asarray(x), 1) for x in columns), np.zeros(own[0].shape[0], int)).tolist()
    return found


def _step(tx: optax.GradientTransformationExtraArgs, params: Any, grad: Any, **extra: Any) -> Any:
    """The first step of a transformation."""
    return tx.update(grad, tx.init(params), params, **extra)[0]


def _lengths(squared_steps: Wide, gradient_norms: np.ndarray) -> np.ndarray:
    """How much longer steps are than the gradient; without one every radius is 1."""
    return np.where(
        gradient_norms == 0, 1, np.sqrt(_float64(squared_steps)) / np.where(gradient_norms == 0, 1, gradient_norms)
    )


def curvature(
    objective: Any,
    params: Any,
    parts: Parts,
    layers: Layers,
    method: Any,
    keys: Sequence[Any],
    stage: Stage,
) -> tuple[Statistics, Statistics]:
    """The means over the draws of what is said of curvature, and their standard errors, NaN for a single draw.

    Without keys it is exact, and they are 0.
    """
    kinds = {"negative": lambda h: h < 0, "zero": lambda h: h == 0, "non_finite": lambda h: ~np.isfinite(h)}

    # Two programs, of which none holds more than two trees like the parameters beside its arguments.
    @jax.jit
    def draw(params: Any, data: Any, key: Any) -> tuple[Any, Any]:
        whole = dataclasses.replace(objective, data=data) if isinstance(objective, Objective) else objective
        found = value_grad_and_hessian_diag(whole, params, method, key=key)
        return found.grad, found.diag

    @jax.jit
    def radii(params: Any, grad: Any, diag: Any) -> Any:
        # Without the slope term a radius does not depend on the gradient, but for what has none, and is not measured.
        moving = jax.tree.map(lambda g: (g != 0).astype(statistics_dtype(g.dtype)), grad)
        tx = scale_by_curvature_radius(DAMPING, slope_term=False, layers=layers)
        return _step(tx, params, moving, hessian_diag=diag)

    data, draws = objective.data if isinstance(objective, Objective) else None, []
    for i, key in enumerate(keys or (None,)):
        with stage(f"curvature, draw {i + 1} of {len(keys)}" if keys else "curvature"):
            grad, diag = draw(params, data, key)
            of_layer = jax.block_until_ready(radii(params, grad, diag))
            del grad
            found = each(parts.measured, lambda r: _quantiles("radius", [x[x != 0] for x in r]), of_layer)
            del of_layer
            found |= each(parts.measured, lambda h: {"curvature": np.mean(_joined(h))}, diag)
            for name, kind in kinds.items():
                found[name] = each(parts.measured, _share_of(kind), diag)["share"]
            del diag
            draws.append(found)
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


def _joined(x: Sequence[np.ndarray]) -> np.ndarray:
    """All numbers; most layers are measured on one array, of which no copy is made."""
    return x[0] if len(x) == 1 else np.concatenate(x)


def _median(x: Sequence[np.ndarray]) -> float:
    return float(np.median(np.abs(_joined(x)), overwrite_input=True))


def _over(w: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Eq. 17, infinite where g is zero and w is not."""
    with np.errstate(divide="ignore", over="ignore"):
        found: np.ndarray = np.divide(w, g, out=np.zeros_like(w), where=w != 0)
        return found


def _share_of(kind: Callable[[np.ndarray], np.ndarray]) -> Callable[[Sequence[np.ndarray]], dict[str, float]]:
    return lambda x: {"share": float(np.mean(kind(_joined(x))))}


def _quantiles(name: str, x: Sequence[np.ndarray]) -> dict[str, float]:
    """Not interpolated: between a finite and an infinite radius there is nothing. Of no number there is none."""
    values = _joined(x)
    if not values.size or np.isnan(values).any():
        return {f"{name}_{round(100 * q)}": np.nan for q in QUANTILES}
    ranks = [int(order_statistics.count_of(q, values.size - 1)) for q in QUANTILES]
    values.partition(ranks)
    found = values[ranks]
    return {f"{name}_{round(100 * q)}": value for q, value in zip(QUANTILES, found, strict=True)}
