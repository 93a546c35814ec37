"""Functions of the parameters `p` alone, as text."""

PENALTIES = {
    "l2": "0.05 * sum(jnp.sum(w**2) for w in jax.tree.leaves(p))",
    "l1": "0.1 * sum(jnp.sum(jnp.abs(w)) for w in jax.tree.leaves(p))",
    "mixing": "0.1 * sum(jnp.sum(w) ** 2 for w in jax.tree.leaves(p))",
    "product": "0.1 * jnp.tanh(sum(jnp.sum(jnp.sin(w)) for w in jax.tree.leaves(p)))",
    "first_only": "jnp.sum(jnp.exp(jax.tree.leaves(p)[0]))",
    "kernels": "0.1 * sum(jnp.sum((w.T @ w) ** 2) for w in jax.tree.leaves(p) if w.ndim == 2)",
    "norm": "0.1 * jnp.sqrt(1 + sum(jnp.sum(w**2) for w in jax.tree.leaves(p)))",
}
