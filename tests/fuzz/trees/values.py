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

_RULES = {
    "scale_by_lars": reference.lars,
    "scale_by_percent_delta": reference.percent_delta,
    "scale_by_median_curvature": reference.median,
    "scale_by_approximate_radius": reference.approximate,
    "scale_by_curvature_radius": reference.curvature,
    "discard_small_gradients": reference.discard,
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
    if ran.example.name in _RULES:
        _check_layers(ran, w, g, h, u)


def _check_layers(ran: Ran, w, g, h, u) -> None:
    default = "kernel" if ran.example.name in _KERNELS else "array"
    way, trust, rule = _evaluate(
        ran.example,
        lambda *numbers, layers=default, **named: (
            layers,
            named.get("trust_coefficient", 1.0),
            _RULES[ran.example.name](*numbers, **named),
        ),
    )
    layers = group(jax.tree_util.tree_leaves_with_path(ran.g), way)
    # Denormal numbers are zero to some operations, and not to others.
    if any(_has_denormals(x) for x in (*w, *g, *h)):
        return
    doubles = any(jnp.finfo(x.dtype).bits == 64 for x in (*w, *g))
    statistics = np.finfo(np.float64 if doubles else np.float32)
    with silenced():
        columns = [list(map(wide, x)) for x in (w, g)]
        radii = rule(layers, *columns, [wide(x).real for x in h])
        if way == "kernel" and ran.example.name in ("scale_by_lars", *_KERNELS):
            radii = reference.bounded(layers, radii, *columns, trust)
    for i, radius in enumerate(radii):
        _check_leaf(i, u[i], wide(g[i]), radius, statistics)


def _evaluate(example: Example, function) -> Any:
    return eval(f"function({example.arguments})", {"function": function})


def _check_leaf(i: int, got: np.ndarray, g: np.ndarray, radius: np.ndarray, statistics) -> None:
    kind = jnp.finfo(got.dtype)
    smallest, largest = 4 * float(kind.tiny), float(kind.max)
    with silenced():
        want, size = np.abs(radius * g), np.abs(wide(got))
        eps = UNITS * (float(kind.eps) + float(statistics.eps))
        off = np.abs(size - want) > eps * want + smallest
        # Beyond the range of the update is infinity, or the end of the range.
        off &= ~((want >= largest * (1 - eps)) & (size >= largest * (1 - eps)))
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
    # What becomes denormal is zero to some operations.
    if any(_has_denormals(x) for x in (*leaves(larger(ran.g)), *leaves(larger(ran.h)))):
        return
    ratios = ("scale_by_lars", *_KERNELS, "scale_by_approximate_radius", "lars", "percent_delta", "mclr")
    if example.name in ratios and not re.search("weight_decay|eps|max_radius", example.arguments):
        _check_unmoved(ran, ran.step(ran.tx, larger(ran.g))[0], factor)
    elif example.name == "discard_small_gradients":
        check_same(larger(ran.updates), ran.step(ran.tx, larger(ran.g))[0], 0.0, "scaled")
    elif example.name == "cblr" and "norm_ratio=False" not in example.arguments:
        layers = group(jax.tree_util.tree_leaves_with_path(ran.g), "kernel")
        sizes = [x.size for x in leaves(ran.g)]
        if not any(sizes[i] for layer in layers for i in layer.measured):
            return  # Without a kernel there is no norm ratio.
        updates = ran.step(ran.tx, ran.g, hessian_diag=larger(ran.h))[0]
        check_same(ran.updates, updates, 32 * float(jnp.finfo(jnp.bfloat16).eps), "with larger curvature")


def _check_unmoved(ran: Ran, updates, factor: float) -> None:
    """Every entry stays; those of layers whose radius is 1 for want of evidence grow with the gradient."""
    way = _evaluate(ran.example, lambda *_, layers="kernel", **__: layers)
    layers = group(
        jax.tree_util.tree_leaves_with_path(ran.g), way if ran.example.name.startswith("scale") else "kernel"
    )
    evidence = [np.sum(np.abs(wide(x)[wide(y) != 0])) for x, y in zip(leaves(ran.w), leaves(ran.g), strict=True)]
    alone = {i for layer in layers if not sum(evidence[j] for j in layer.measured) for i in layer.scaled}
    for i, (x, y, g) in enumerate(zip(*map(leaves, (ran.updates, updates, ran.g)), strict=True)):
        if i in alone:
            # What follows no kernel, or one that says nothing, has radius 1 up to a bound.
            continue
        same = (x == y) | (np.abs(x - y) <= 4 * tiny(x.dtype)) | (x * np.asarray(factor, x.dtype) == y)
        if not same.all():
            raise Broken(
                f"leaf {i}: {x.tolist()} became {y.tolist()} when the gradient {g.tolist()} grew {factor} times"
            )
