"""SOAP, for the race: Adam in the eigenbasis of the gradient's second moments (Vyas et al. 2024, arXiv 2409.11321).

As the authors' own code has it: the first gradient only gives the basis; later ones turn it by one step of orthogonal
iteration, whose columns are sorted by their curvature; Adam's first moment is kept in coordinates, its second in the
basis. A side of a matrix that is wider than `max_width` stays in coordinates.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class SoapState(NamedTuple):
    """Adam's moments of all matrices; of each side `G G'` or `G' G`, and the basis, or None if it is too wide."""

    count: jax.Array
    mu: Any
    nu: Any
    factors: list[list[jax.Array | None]]
    bases: list[list[jax.Array | None]]


def scale_by_soap(
    b1: float = 0.95, b2: float = 0.95, eps: float = 1e-8, frequency: int = 10, max_width: int = 1024
) -> optax.GradientTransformation:
    """Adam in the eigenbasis; of arrays with two axes or more, of which all but the last one are rows."""

    def init_fn(params):
        sides = [matrix(x).shape for x in jax.tree.leaves(params)]
        zeros = [[None if n > max_width else jnp.zeros((n, n)) for n in shape] for shape in sides]
        moments = [jnp.zeros(shape) for shape in sides]
        return SoapState(jnp.zeros((), jnp.int32), moments, moments, zeros, zeros)

    def update_fn(updates, state, params=None):
        del params
        leaves, treedef = jax.tree.flatten(updates)
        grads, first = [matrix(g) for g in leaves], state.count == 0
        mean = lambda decay: lambda old, new: jnp.where(first, 0 * old, decay * old + (1 - decay) * new)
        turned = [turn(g, q) for g, q in zip(grads, state.bases, strict=True)]
        mu = jax.tree.map(mean(b1), state.mu, grads)
        nu = jax.tree.map(mean(b2), state.nu, [g**2 for g in turned])
        # The first gradient gave no step, and does not count.
        corrected = lambda tree, decay: optax.tree.bias_correction(tree, decay, jnp.maximum(state.count, 1))
        steps = []
        for m, v, q in zip(corrected(mu, b1), corrected(nu, b2), state.bases, strict=True):
            steps.append(turn(turn(m, q) / (jnp.sqrt(v) + eps), q, back=True))

        squares = [(g @ g.T, g.T @ g) for g in grads]
        renew = lambda old, new: None if old is None else jnp.where(first, new, b2 * old + (1 - b2) * new)
        factors = [list(map(renew, old, new)) for old, new in zip(state.factors, squares, strict=True)]
        due = jnp.where(first, 0, jnp.where(state.count % frequency == 0, 1, 2))
        branches = (begin, follow, lambda factors, bases, nu: (bases, nu))
        bases, nu = jax.lax.switch(due, branches, factors, state.bases, nu)
        steps = [s.reshape(g.shape) for s, g in zip(steps, leaves, strict=True)]
        return treedef.unflatten(steps), SoapState(state.count + 1, mu, nu, factors, bases)

    return optax.GradientTransformation(init_fn, update_fn)


def matrix(x: jax.Array) -> jax.Array:
    """All axes but the last as rows."""
    return x.reshape(-1, x.shape[-1])


def turn(m: jax.Array, bases: list[jax.Array | None], back: bool = False) -> jax.Array:
    """`U' m V`, into the bases, or `U m V'`, back."""
    u, v = (q if q is None or not back else q.T for q in bases)
    m = m if u is None else u.T @ m
    return m if v is None else m @ v


def begin(factors, bases, nu):
    """The bases of the first factors, the largest eigenvalue first."""
    eigenvectors = lambda f: None if f is None else jnp.linalg.eigh(f)[1][:, ::-1]
    return [list(map(eigenvectors, some)) for some in factors], nu


def follow(factors, bases, nu):
    """One step of orthogonal iteration; the second moments keep to their directions."""
    turned, moved = [], []
    for some, qs, v in zip(factors, bases, nu, strict=True):
        orders = [None if f is None else jnp.argsort(-jnp.sum(q * (f @ q), 0)) for f, q in zip(some, qs, strict=True)]
        new = lambda f, q, order: None if f is None else jnp.linalg.qr(f @ q[:, order])[0]
        turned.append(list(map(new, some, qs, orders)))
        take = lambda v, side: v if side[1] is None else jnp.take(v, side[1], axis=side[0])
        moved.append(functools.reduce(take, enumerate(orders), v))
    return turned, moved
