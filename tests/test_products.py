"""The matrix behind `same_diagonal`, column by column, against the dense Hessian in float64."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import problems
import pytest

import curvax
from curvax.curvature.products import same_diagonal


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def relu_network(params, data):
    """Two layers, and the examples' mean taken off in the outputs: the routes could not tell the examples apart."""
    hidden = jax.nn.relu(data["x"] @ params["in"] + params["bias"][None])
    outputs = hidden @ params["out"]
    return outputs - jnp.mean(outputs, 0, keepdims=True)


def smooth_network(params, data):
    return jnp.tanh(data["x"] @ params["in"] + params["bias"][None]) @ params["out"]


def tied_network(params, data):
    """Linear twice in one array, whose entries meet."""
    hidden = jax.nn.relu(data["x"] @ params["in"] + params["bias"][None])
    return (hidden @ params["in"].T) @ params["out"][:3]


def network_of_two_outputs(params, data):
    hidden = jax.nn.relu(data["x"] @ params["in"] + params["bias"][None])
    return {"scores": hidden @ params["out"], "size": jnp.sum(hidden, 1)}


def loss_of_two(outputs, data):
    return problems.cross_entropy(outputs["scores"], data) + outputs["size"] ** 2 / 10


def contrastive(outputs, data):
    """Every example's loss depends on all the others."""
    return -jnp.diag(jax.nn.log_softmax(outputs @ outputs.T)) + problems.cross_entropy(outputs, data)


def coupled_penalty(params):
    return jnp.sum(params["in"]) ** 2 * jnp.sum(params["out"] ** 4)


LINEAR = {"relu": (relu_network, problems.cross_entropy), "coupled loss": (relu_network, contrastive)}
CURVED = {
    "tanh": (smooth_network, problems.cross_entropy),
    "tied": (tied_network, problems.cross_entropy),
}


def matrices(predict, loss, penalty):
    """That of the products, and the Hessian; and the gradients that belong to both."""
    params = {"in": normal(0, 3, 4), "bias": normal(1, 4), "out": normal(2, 4, 5)}
    data = {"x": normal(3, 6, 3), "y": jnp.arange(6) % 5}
    objective = curvax.Objective(predict, loss, data, penalty)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    ravel = lambda tree: jax.flatten_util.ravel_pytree(tree)[0]

    @jax.jit
    def both(flat):
        value, grad, product = same_diagonal(objective, unravel(flat))
        ours = jax.vmap(lambda unit: ravel(product(unravel(unit))))(jnp.eye(flat.size, dtype=flat.dtype))
        function = lambda flat: objective(unravel(flat))
        return (value, ravel(grad), ours), (*jax.value_and_grad(function)(flat), jax.hessian(function)(flat))

    return both(flat)


@pytest.mark.slow_but_for("relu-None")
@pytest.mark.parametrize("penalty", [None, coupled_penalty])
@pytest.mark.parametrize("name", [*LINEAR, *CURVED])
def test_the_diagonal_is_the_hessians(name, penalty):
    with jax.enable_x64(True):
        (value, grad, ours), (expected_value, expected_grad, hessian) = matrices(*{**LINEAR, **CURVED}[name], penalty)
        np.testing.assert_allclose(value, expected_value, rtol=1e-12)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(jnp.diag(ours), jnp.diag(hessian), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(ours, ours.T, rtol=1e-10, atol=1e-12)
        elsewhere = float(jnp.max(jnp.abs(ours - hessian)))
        # Between the arrays of a piecewise linear network the Hessian has what the Gauss-Newton matrix leaves out.
        assert elsewhere < 1e-10 if name in CURVED else elsewhere > 1e-3


def test_a_piecewise_linear_network_needs_fewer_operations_for_it():
    """Of n matrices: n forward and 2 n - 1 back for the gradient, as many as 4 n - 2 more for this product, and 6 n - 4
    more for the Hessian's, so that 39 stand against 49 here."""
    params, objective = problems.mlp_params(sizes=(200,) * 7), problems.mlp_objective(features=200, classes=200)

    def flops(function):
        return jax.jit(function).lower(params, params).compile().cost_analysis()["flops"]

    def with_product(params, vector):
        value, grad, product = same_diagonal(objective, params)
        return value, grad, product(vector)

    def with_hessian_product(params, vector):
        return jax.jvp(jax.value_and_grad(objective), (params,), (vector,))

    assert flops(with_product) < 0.83 * flops(with_hessian_product)
