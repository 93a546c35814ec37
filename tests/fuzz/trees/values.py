"""What the numbers of one step must be: those of the formula, NaN where there was one, zero where there was zero."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.layers import group
from tests.fuzz.trees import reference
from tests.fuzz.trees.examples import Example, needs_curvature
from tests.fuzz.trees.run import Broken, Ran, check_same, leaves, silenced, tiny, wide

# Units in the last place, of both dtypes that are met: sums of a few squares, a root, a quotient.
UNITS = 16

_REFERENCES = {
    "scale_by_lars": lambda trust_coefficient=1.0, eps=0.0, **_: reference.lars(trust_coefficient, eps),
    "scale_by_percent_delta": lambda **_: reference.percent_delta(),
    "scale_by_median_curvature": lambda weight_decay=0.0, median_of_ratios=False, **_: reference.median(
        weight_decay, 1.0, median_of_ratios
    ),
    "scale_by_approximate_radius": lambda max_radius=None: reference.approximate(max_radius),
    "scale_by_curvature_radius": lambda damping=0.0, max_radius=None, slope_term=None, **_: reference.curvature(
        damping, max_radius, damping == 0 if slope_term is None else slope_term
    ),
    "discard_small_gradients": lambda fraction, **_: reference.discard(fraction),
}
_KERNELS = ("scale_by_percent_delta", "scale_by_median_curvature")


def values(ran: Ran) -> None:
    """NaN is passed on, and never made of finite numbers; where there is a formula, it gives the update."""
    w, g, h, u = (leaves(tree) for tree in (ran.w, ran.g, ran.h, ran.updates))
    for i, (x, y) in enumerate(zip(g, u, strict=True)):
        if (np.isnan(x) & ~np.isnan(y)).any():
            raise Broken(f"leaf {i}: the gradient {x.tolist()} has NaN, the update {y.tolist()} does not")
    if not all(np.isfinite(x).all() for x in (*g, *w, *(h if needs_curvature(ran.example.name) else []))):
        return
    for i, y in enumerate(u):
        if np.isnan(y).any():
            raise Broken(f"leaf {i}: an update {y.tolist()} of finite numbers")
    if ran.example.name in _REFERENCES:
        _check_layers(ran, w, g, h, u)


def _check_layers(ran: Ran, w, g, h, u) -> None:
    example = ran.example
    rule = _evaluate(example, _REFERENCES[example.name])
    default = "kernel" if example.name in _KERNELS else "array"
    layers = _evaluate(example, lambda *_, layers=default, **__: layers)
    for layer in group(jax.tree_util.tree_leaves_with_path(ran.g), layers):
        members = {*layer.measured, *layer.scaled}
        # Denormal numbers are zero to some operations, and not to others.
        if any(_has_denormals(x) for i in members for x in (w[i], g[i], h[i])):
            continue
        doubles = any(jnp.finfo(x[i].dtype).bits == 64 for i in members for x in (w, g))
        statistics = np.finfo(np.float64 if doubles else np.float32)
        for i, radius in zip(layer.scaled, _radii(rule, layer, w, g, h), strict=False):
            _check_leaf(i, u[i], wide(g[i]), radius.reshape(g[i].shape), statistics)


def _evaluate(example: Example, function) -> Any:
    return eval(f"function({example.arguments})", {"function": function})


def _radii(rule, layer, w, g, h) -> list[np.ndarray]:
    """A radius for each entry that the layer scales."""

    def flat(columns, indices):
        return np.concatenate([wide(columns[i]).ravel() for i in indices])

    sizes = [g[i].size for i in layer.scaled]
    if not layer.measured:
        return [np.ones(size, np.longdouble) for size in sizes]
    with silenced():
        radii = rule(flat(w, layer.measured), flat(g, layer.measured), flat(h, layer.measured).real)
    if layer.measured == layer.scaled:
        return np.split(radii, np.cumsum(sizes)[:-1])
    # A rule that tells entries apart has a radius of its own for followers, which is left to the unit tests.
    one_for_all = radii.size and (radii == radii[0]).all()
    return [np.full(size, radii[0]) for size in sizes] if one_for_all else []


def _check_leaf(i: int, got: np.ndarray, g: np.ndarray, radius: np.ndarray, statistics) -> None:
    kind = jnp.finfo(got.dtype)
    smallest, largest = 4 * float(kind.tiny), float(kind.max)
    with silenced():
        want, size = np.abs(radius * g), np.abs(wide(got))
        eps = UNITS * (float(kind.eps) + float(statistics.eps))
        off = np.abs(size - want) > eps * want + smallest
        # Beyond the range of the update is infinity, or the end of the range.
        off &= ~((want >= largest * (1 - eps)) & (size >= largest * (1 - eps)))
        # Where the radius itself is out of range, what counts is that it is small, or large.
        tiny_radius, huge_radius = radius < float(statistics.tiny), radius > float(statistics.max)
        off &= ~(tiny_radius & (size <= np.abs(g) * float(statistics.tiny) + smallest))
        off &= ~(huge_radius & (size >= np.minimum(np.abs(g) * float(statistics.max) / 2, largest)))
    if off.any():
        j = int(np.argmax(off.ravel()))
        sizes = f"got {size.ravel()[j]}, want {want.ravel()[j]} in magnitude, with the radius {radius.ravel()[j]}"
        raise Broken(f"leaf {i}, entry {j}: {sizes}")


def _has_denormals(x: np.ndarray) -> bool:
    size = np.abs(wide(x))
    return bool(((size > 0) & (size < max(tiny(x.dtype), tiny(np.float32)))).any())


def zero(ran: Ran) -> None:
    """No gradient, no step."""
    if "weight_decay=" in ran.example.arguments:
        return
    updates, _, _ = ran.step(ran.tx, jax.tree.map(jnp.zeros_like, ran.g))
    for i, u in enumerate(leaves(updates)):
        if (u != 0).any():
            raise Broken(f"leaf {i}: the update {u.tolist()} of a gradient of zeros")


def scale(ran: Ran) -> None:
    """What a power of two does to gradient or curvature, it does to the update, or nothing: to the last bit."""
    example, factor = ran.example, 2.0 ** int(ran.example.detail)
    # Halves have too short a range for such factors.
    if any(leaf.dtype == "float16" for leaf in example.leaves):
        return
    larger = lambda tree: jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), tree)
    ratios = ("scale_by_lars", *_KERNELS, "scale_by_approximate_radius", "lars", "percent_delta", "mclr")
    if example.name in ratios and not re.search("weight_decay|eps|max_radius", example.arguments):
        _check_unmoved(ran, ran.step(ran.tx, larger(ran.g))[0], factor)
    elif example.name == "discard_small_gradients":
        check_same(larger(ran.updates), ran.step(ran.tx, larger(ran.g))[0], 0.0, "scaled")
    elif example.name == "cblr" and "norm_ratio=False" not in example.arguments:
        updates = ran.step(ran.tx, ran.g, hessian_diag=larger(ran.h))[0]
        check_same(ran.updates, updates, 32 * float(jnp.finfo(jnp.bfloat16).eps), "with larger curvature")


def _check_unmoved(ran: Ran, updates, factor: float) -> None:
    """Every entry stays; those of layers whose radius is 1 for want of evidence grow with the gradient."""
    for i, (x, y, g) in enumerate(zip(*map(leaves, (ran.updates, updates, ran.g)), strict=True)):
        same = (x == y) | (np.abs(x - y) <= 4 * tiny(x.dtype)) | (x * np.asarray(factor, x.dtype) == y)
        if not same.all():
            raise Broken(
                f"leaf {i}: {x.tolist()} became {y.tolist()} when the gradient {g.tolist()} grew {factor} times"
            )
