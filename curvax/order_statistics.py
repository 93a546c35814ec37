"""Placeholder until the counting median is merged."""

import jax
import jax.numpy as jnp


def median(x, axis_name=None):
    del axis_name
    flat = jnp.concatenate([jnp.abs(leaf).ravel() for leaf in jax.tree.leaves(x)])
    return jnp.median(flat) if flat.size else jnp.zeros((), flat.dtype)


def quantile(x, q, axis_name=None):
    del axis_name
    flat = jnp.concatenate([jnp.abs(leaf).ravel() for leaf in jax.tree.leaves(x)])
    return jnp.quantile(flat, q) if flat.size else jnp.zeros((), flat.dtype)
