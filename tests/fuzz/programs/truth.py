"""What is true of a program: the dense Hessian and Gauss-Newton matrix, in float64, and how well they can be known.

    G = J^T H J,        H the Hessian of the mean loss in all outputs, J the Jacobian of all outputs

An entry is judged by what rounding can do to it. `terms` is the sum of the magnitudes of the terms of which it is made:
what cancels between them is lost. `noise` is the change of the entry when every number that goes in is changed by a
relative `PERTURBATION`: what the program itself does to rounding, and kinks that are near. `floor` is what the truth
itself does not know, since the Hessian of a loss that is saturated is a difference of numbers near 1.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from tests.fuzz.programs.build import Spec

PERTURBATION = 1e-6
NAMES = ("hessian", "gauss_newton")
EPS = {True: 2.0**-52, False: 2.0**-23}


class Matrix(NamedTuple):
    """A diagonal, as flat float64 vectors."""

    diagonal: np.ndarray
    terms: np.ndarray
    noise: np.ndarray
    floor: np.ndarray


class Truth(NamedTuple):
    """Of one program; `rare` marks entries that few of an estimator's draws may decide."""

    value: float
    grad: np.ndarray
    hessian: Matrix
    gauss_newton: Matrix
    rare: np.ndarray


def truth(spec: Spec, traits: frozenset[str], wide: dict[str, Any], namespace: dict[str, Any]) -> Truth:
    """The truth of a program whose text was run in `namespace`, and, with 64 bits, in `wide`."""
    with jax.enable_x64(True):
        exact, moved, rounded = _matrices_near(spec, traits, wide, PERTURBATION, EPS[True])
    noise = {name: _largest(moved, exact, name) for name in NAMES}
    # What dense matrices lose, to cancellation inside the network say, any method may lose.
    largest = 2 * EPS[spec.double] * np.max(exact["hessian_terms"], initial=0.0)
    unknown = {name: exact["floor"] + largest + 30 * _largest(rounded, exact, name) for name in NAMES}
    if not spec.double:
        with jax.enable_x64(False):
            single, rounded = _matrices_near(spec, traits, namespace, EPS[False])
        unknown = {name: unknown[name] + 10 * _largest([single, *rounded], exact, name) for name in NAMES}
    hessian, gauss_newton = (Matrix(exact[name], exact[f"{name}_terms"], noise[name], unknown[name]) for name in NAMES)
    return Truth(exact["value"], exact["grad"], hessian, gauss_newton, exact["rare"] > 0)


def _matrices_near(spec: Spec, traits, namespace, *sizes: float) -> list[Any]:
    """The matrices of a program; then, for each relative size, those of two programs whose numbers are so much off."""
    numbers, rng = (namespace["params"], namespace["data"]), np.random.default_rng(spec.seed)
    compiled = jax.jit(functools.partial(_matrices, spec, traits, namespace)).lower(*numbers).compile()
    result = [compiled(*numbers), *([compiled(*_perturbed(numbers, rng, size)) for _ in range(2)] for size in sizes)]
    return jax.tree.map(lambda x: np.asarray(x, np.float64), result)


def _largest(others: list[dict[str, np.ndarray]], exact: dict[str, np.ndarray], name: str) -> np.ndarray:
    return np.max([np.abs(other[name] - exact[name]) for other in others], 0)


def _matrices(spec: Spec, traits, namespace, params, data) -> dict[str, jax.Array]:
    flat, unflatten = ravel_pytree(params)
    predict, loss, penalty = namespace["predict"], namespace["loss"], namespace.get("penalty")
    aux = ("has_aux", "True") in spec.options

    def outputs(vector):
        result = predict(unflatten(vector), data)
        return ravel_pytree(result[0] if aux else result)

    shape = outputs(flat)[1]
    extra = (lambda vector: 0.0 * jnp.sum(vector)) if penalty is None else lambda vector: penalty(unflatten(vector))

    def mean_loss(z):
        return jnp.mean(loss(shape(z), data))

    z = outputs(flat)[0]
    slope, inner = jax.grad(mean_loss)(z), jax.jacfwd(jax.grad(mean_loss))(z)
    jacobian, second = _derivatives(lambda vector: outputs(vector)[0], flat, traits)
    gauss_newton = jnp.einsum("ki,kl,li->i", jacobian, inner, jacobian)
    terms = jnp.einsum("ki,kl,li->i", jnp.abs(jacobian), jnp.abs(inner), jnp.abs(jacobian))
    penalised = jnp.zeros_like(flat) if penalty is None else jnp.diag(jax.jacfwd(jax.grad(extra))(flat))
    objective = lambda vector: mean_loss(outputs(vector)[0]) + extra(vector)
    value, grad = jax.value_and_grad(objective)(flat)
    hessian = gauss_newton + slope @ second
    if "custom_vjp" in traits:
        # A rule of the user's own need not agree with itself: what counts is forward over reverse.
        outer = jax.jacrev if "opaque" in traits else jax.jacfwd
        hessian = jnp.diag(outer(jax.grad(lambda vector: mean_loss(outputs(vector)[0])))(flat))
    # At a kink, as relu has at exactly 0, JAX's own two ways need not agree.
    reverse = (
        jnp.diag(jax.jacrev(jax.grad(objective))(flat))
        if "opaque" in traits
        else _forward_over_reverse(objective, flat)
    )
    disagreement = jnp.abs(hessian + penalised - reverse)
    bends = jnp.abs(slope) @ jnp.abs(second)
    largest = jnp.max(jnp.abs(jacobian), 0) ** 2 * jnp.max(jnp.abs(inner), initial=0.0)
    return {
        "value": value,
        "grad": grad,
        "hessian": hessian + penalised,
        "hessian_terms": terms + bends + jnp.abs(penalised),
        "gauss_newton": gauss_newton + penalised,
        "gauss_newton_terms": terms + jnp.abs(penalised),
        # The numbers of a program are about 1, and what cancels between them leaves a rest.
        "floor": 2.0**-48 * (jnp.sum(jnp.abs(jacobian), 0) ** 2 + jnp.sum(jnp.abs(second), 0)) / spec.batch
        + 2.0**-50
        + jnp.where(disagreement > 1e-6 * jnp.abs(hessian), 2 * disagreement, 0),
        "rare": terms < 1e-3 * largest,
    }


def _forward_over_reverse(objective, flat: jax.Array) -> jax.Array:
    units = jnp.eye(flat.size, dtype=flat.dtype)
    return jax.vmap(lambda unit: jax.jvp(jax.grad(objective), (flat,), (unit,))[1] @ unit)(units)


def _derivatives(function, flat: jax.Array, traits) -> tuple[jax.Array, jax.Array]:
    """The Jacobian of a vector function, and its second derivatives in each entry alone."""
    if "custom_vjp" in traits:
        backward = jax.jacrev(function)
        second = (jax.jacrev if "opaque" in traits else jax.jacfwd)(backward)
        return backward(flat), jnp.einsum("kii->ki", second(flat))

    def along(unit):
        return jax.jvp(lambda vector: jax.jvp(function, (vector,), (unit,))[1], (flat,), (unit,))

    jacobian, second = jax.vmap(along)(jnp.eye(flat.size, dtype=flat.dtype))
    return jacobian.T, second.T


def _perturbed(tree: Any, rng: np.random.Generator, size: float) -> Any:
    """All real numbers of a tree, a little changed."""

    def change(x):
        is_real = isinstance(x, float | np.floating | jax.Array) and jnp.issubdtype(jnp.result_type(x), jnp.floating)
        if not is_real:
            return x
        moved = np.asarray(x) * (1 + size * rng.uniform(-1, 1, np.shape(x)))
        return jnp.asarray(moved, jnp.result_type(x)) if isinstance(x, jax.Array) else type(x)(moved)

    return jax.tree.map(change, tree)


def is_fit(found: Truth) -> bool:
    """Whether the program has numbers with which anything can be judged."""
    numbers = np.concatenate([found.hessian.terms, found.gauss_newton.terms, np.atleast_1d(found.value)])
    return bool(np.all(np.isfinite(numbers)) and np.max(np.abs(numbers), initial=0.0) < 1e9)
