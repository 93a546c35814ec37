"""Trees and losses whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from curvax import Objective

SHAPES = {
    "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)},
    "dense": {"kernel": (8, 5), "bias": (5,)},
    "norm": {"scale": (5,), "shift": ()},
}


def random_tree(seed, dtype=np.float32, zeros=0.0):
    """A tree of Gaussian arrays of `SHAPES`, a fraction of whose entries are zero."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        return np.where(rng.random(shape) < zeros, 0, rng.normal(size=shape)).astype(dtype)

    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def mlp_params(seed=0, sizes=(6, 5, 4), dtype=jnp.float32):
    """Drawn by NumPy, as are the data: JAX compiles a program for each shape."""
    rng = np.random.default_rng(seed)

    def layer(fan_in, fan_out):
        kernel = rng.normal(size=(fan_in, fan_out)) / np.sqrt(fan_in)
        return {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.asarray(0.1 * rng.normal(size=fan_out), dtype)}

    return [layer(*sizes[i : i + 2]) for i in range(len(sizes) - 1)]


def mlp(params, data):
    x = data["x"]
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ params[-1]["kernel"] + params[-1]["bias"][None]


def cross_entropy(outputs, data):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, data["y"])


def weighted_cross_entropy(outputs, data):
    return data["weight"] * cross_entropy(outputs, data)


def squared_error(outputs, data):
    return jnp.sum(jnp.square(outputs - data["target"]), axis=-1)


def classification(seed=0, examples=24, features=6, classes=4, dtype=jnp.float32):
    rng = np.random.default_rng([seed, 1])
    return {
        "x": jnp.asarray(rng.normal(size=(examples, features)), dtype),
        "y": jnp.asarray(rng.integers(0, classes, examples), jnp.int32),
        "weight": jnp.asarray(rng.uniform(0.2, 2.0, examples), dtype),
        "target": jnp.asarray(rng.normal(size=(examples, classes)), dtype),
    }


def mlp_objective(loss=cross_entropy, **kwargs):
    return Objective(mlp, loss, classification(**kwargs))


def dense_hessian_diag(f, params):
    """The diagonal of `jax.hessian` on the flattened parameters."""
    return _dense_hessian_diag(f if isinstance(f, Objective) else jax.tree_util.Partial(f), params)


# Both are compiled once for all objectives of the same functions and shapes.
@jax.jit
def _dense_hessian_diag(f, params):
    flat, unflatten = ravel_pytree(params)
    return unflatten(jnp.diag(jax.hessian(lambda v: f(unflatten(v)))(flat)))


@jax.jit
def dense_ggn_diag(objective, params):
    """The diagonal of `mean_b J_b^T (d^2 loss_b) J_b`, from dense Jacobians."""
    flat, unflatten = ravel_pytree(params)
    outputs = objective.predict(params, objective.data)
    jacobian = jax.jacobian(lambda v: objective.predict(unflatten(v), objective.data))(flat)
    total = jax.hessian(lambda z: jnp.sum(objective.loss(z, objective.data)))(outputs)
    batch = jnp.arange(len(outputs))
    curvature = total[batch, :, batch, :]
    return unflatten(jnp.einsum("bip,bij,bjp->p", jacobian, curvature, jacobian) / len(outputs))
