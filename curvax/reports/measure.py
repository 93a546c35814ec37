"""What a report measures of each layer, in the dtype of statistics.

Everything that is large stays on the device, and goes when its statistics are known: a gradient, and one sample of the
curvature at a time. Estimated curvature is drawn several times, and what follows from it is averaged over the draws, so
that every number has a standard error and no tree of parameters has to be kept for it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax import order_statistics, radii
from curvax.curvature.estimate import Estimate
from curvax.curvature.hessian import value_grad_and_hessian_diag
from curvax.curvature.micro_batches import micro_batch, num_examples, number_of_parts
from curvax.exact.independence import example_axes
from curvax.layers import Layer
from curvax.objective import Objective
from curvax.probes import QUANTILES, NoiseScale, approximate_radii, lower_quantiles, noise_scale
from curvax.transforms import statistics_dtype
from curvax.wide import to_float, wide

#: Parts of a batch between whose gradients the noise is seen; the estimate's own error is about 1 / sqrt(8) of it.
PARTS = 8
#: The damping of `cblr`.
DAMPING = 0.1
#: The rules of which every layer has one radius.
RULES = {
    "lars": radii.lars(1.0, 0.0, None),
    "mclr": radii.median(1.0, False, None),
    "percent_delta": radii.percent_delta(1.0, None),
}

Statistics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Parts:
    """The layers of a tree, as their indices into its leaves: those on which a layer is measured."""

    groups: Sequence[tuple[int, ...]]

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> "Parts":
        return cls([layer.measured or layer.scaled for layer in layers])

    def each(self, function: Callable[..., Statistics], *trees: Any) -> Statistics:
        """The statistics of every layer, one below the other."""
        columns = [jax.tree.leaves(tree) for tree in trees]
        rows = []
        for group in self.groups:
            arrays = [[column[i] for i in group] for column in columns]
            dtype = jnp.finfo(statistics_dtype([x.dtype for column in arrays for x in column])).dtype
            rows.append(function(*([x.astype(dtype) for x in column] for column in arrays)))
        return {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}


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
        return jax.tree.map(lambda x: x / number, (value, grad, _squared_norms(parts, grad)))

    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
    sums = None
    for i in range(number):
        with stage(f"gradient of part {i + 1} of {number}"):
            found = of_part(params, objective.data, i)
            sums = jax.block_until_ready(found if sums is None else add(sums, found))
    value, grad, small = sums
    large = jax.jit(functools.partial(_squared_norms, parts))(grad)
    return value, grad, noise_scale(wide(small), wide(large), size // number, size)


def _squared_norms(parts: Parts, grad: Any) -> jax.Array:
    return parts.each(lambda g: {"": sum(jnp.sum(jnp.square(leaf)) for leaf in g)}, grad)[""]


def _axes(objective: Any, params: Any) -> Any:
    """The example axes of the data, or why the batch is not taken apart."""
    if not isinstance(objective, Objective):
        return "the objective is a plain function, in which no examples can be told apart"
    number = number_of_parts(objective, params, PARTS)
    if number == 1:
        return f"the batch of {num_examples(objective, params)} cannot be divided into equal parts of two or more"
    axes = example_axes(objective, params, number)
    return f"the loss is not proved to treat examples apart ({axes})" if isinstance(axes, str) else axes


def first_order(parts: Parts, params: Any, grad: Any) -> Statistics:
    """What follows from parameters and gradient alone."""

    def of_layer(w, g):
        moving = [x != 0 for x in g]
        seen = radii.Leaves([jnp.where(m, x, 0) for m, x in zip(moving, w, strict=True)], g, ())
        found = {f"radius_{name}": to_float(rule(seen, seen)[0]) for name, rule in RULES.items()}
        dead = [jnp.sum(jnp.all(~m, tuple(range(m.ndim - 1)))) for m in moving if m.ndim > 1]
        return {
            "weight_norm": _norm(w),
            "weight_median": order_statistics.median(w),
            "gradient_norm": _norm(g),
            "gradient_median": order_statistics.median(g),
            "non_finite_gradient": _share([~jnp.isfinite(x) for x in g]),
            "dead_units": sum(dead, jnp.zeros((), jnp.int32)).astype(w[0].dtype),
            **found,
            **_quantiles("approximate", approximate_radii(w, g)),
        }

    return parts.each(of_layer, params, grad)


def second_order(parts: Parts, params: Any, grad: Any, diag: Any) -> Statistics:
    """What follows from the curvature."""
    rule = radii.curvature(DAMPING, None, False, None)

    def of_layer(w, g, h):
        kernel = radii.Leaves(w, g, h)
        radius = [to_float(x) for x in rule([(kernel, kernel)])[0]]
        steps = [x * y for x, y in zip(radius, g, strict=True)]
        return {
            "curvature": sum(jnp.sum(x) for x in h) / max(sum(x.size for x in h), 1),
            "negative": _share([x < 0 for x in h]),
            "zero": _share([x == 0 for x in h]),
            "non_finite": _share([~jnp.isfinite(x) for x in h]),
            "radius_cblr": _quotient(_norm(steps), _norm(g)),
            **_quantiles("curvature", radius),
        }

    return parts.each(of_layer, params, grad, diag)


def curvature(
    objective: Any, params: Any, grad: Any, parts: Parts, method: Any, keys: Sequence[Any], stage: Callable
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The means of `second_order` over the draws, and their standard errors; without keys it is exact."""

    @jax.jit
    def draw(params, data, grad, key):
        whole = dataclasses.replace(objective, data=data) if isinstance(objective, Objective) else objective
        estimate: Estimate = value_grad_and_hessian_diag(whole, params, method, key=key)
        return second_order(parts, params, grad, estimate.diag)

    data, draws = objective.data if isinstance(objective, Objective) else None, []
    for i, key in enumerate(keys or (None,)):
        with stage(f"curvature, draw {i + 1} of {len(keys)}" if keys else "curvature"):
            draws.append({name: np.asarray(x, np.float64) for name, x in draw(params, data, grad, key).items()})
    columns = {name: np.stack([found[name] for found in draws]) for name in draws[0]}
    means = {name: column.mean(0) for name, column in columns.items()}
    number = len(draws)
    errors = {n: c.std(0, ddof=1) / np.sqrt(number) if number > 1 else 0 * c[0] for n, c in columns.items()}
    return means, errors


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


def _share(masks: Sequence[jax.Array]) -> jax.Array:
    number = sum(mask.size for mask in masks)
    return sum(jnp.sum(mask, dtype=jnp.float32) for mask in masks) / max(number, 1)


def _quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(b == 0, 1, a / jnp.where(b == 0, 1, b))


def _quantiles(name: str, x: Sequence[jax.Array]) -> Statistics:
    values = lower_quantiles(x, QUANTILES, None)
    return {f"{name}_{round(100 * q)}": value for q, value in zip(QUANTILES, values, strict=True)}
