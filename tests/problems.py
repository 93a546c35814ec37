"""Trees and losses whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

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
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)

    def layer(key, fan_in, fan_out):
        kernel_key, bias_key = jax.random.split(key)
        kernel = jax.random.normal(kernel_key, (fan_in, fan_out), dtype) / np.sqrt(fan_in).astype(dtype)
        return {"kernel": kernel, "bias": 0.1 * jax.random.normal(bias_key, (fan_out,), dtype)}

    return [layer(*arguments) for arguments in zip(keys, sizes[:-1], sizes[1:], strict=True)]


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
    x_key, y_key, w_key = jax.random.split(jax.random.key(seed), 3)
    return {
        "x": jax.random.normal(x_key, (examples, features), dtype),
        "y": jax.random.randint(y_key, (examples,), 0, classes),
        "weight": jax.random.uniform(w_key, (examples,), dtype, 0.2, 2.0),
        "target": jax.random.normal(y_key, (examples, classes), dtype),
    }


def mlp_objective(loss=cross_entropy, **kwargs):
    return Objective(mlp, loss, classification(**kwargs))


def dense_hessian_diag(f, params):
    """The diagonal of `jax.hessian` on the flattened parameters."""
    flat, unflatten = jax.flatten_util.ravel_pytree(params)
    return unflatten(jax.jit(lambda flat: jnp.diag(jax.hessian(lambda v: f(unflatten(v)))(flat)))(flat))


def dense_ggn_diag(objective, params):
    """The diagonal of `mean_b J_b^T (d^2 loss_b) J_b`, from dense Jacobians."""
    flat, unflatten = jax.flatten_util.ravel_pytree(params)

    @jax.jit
    def diagonal(flat):
        outputs = objective.predict(unflatten(flat), objective.data)
        jacobian = jax.jacobian(lambda v: objective.predict(unflatten(v), objective.data))(flat)
        total = jax.hessian(lambda z: jnp.sum(objective.loss(z, objective.data)))(outputs)
        batch = jnp.arange(len(outputs))
        curvature = total[batch, :, batch, :]
        return jnp.einsum("bip,bij,bjp->p", jacobian, curvature, jacobian) / len(outputs)

    return unflatten(diagonal(flat))
