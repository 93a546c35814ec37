"""Exact diagonals of networks as users write them, in Flax's two interfaces."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import curvax
from experiments import models
from experiments.config import TrainConfig


def cross_entropy(outputs, data):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, data["y"])


def half(layer, x):
    """Dropout of half of the features."""
    kept = jax.random.bernoulli(jax.random.fold_in(jax.random.key(1), layer), 0.5, x.shape)
    return jnp.where(kept, 2 * x, 0)


def routes(objective, params):
    return {row.path: row.route for row in curvax.explain(objective, params).rows}


@pytest.mark.parametrize(("model", "train"), [("alexnet", True), ("resnet18", False)])
def test_the_networks_of_the_paper_are_proved_piecewise_linear(model, train):
    """AlexNet with its dropout mask, ResNet18 with the batch norm of inference."""
    definition, params, stats = models.build(TrainConfig(model=model, width=1 / 32), 10, jax.random.key(0))

    def predict(params, data):
        return models.apply(definition, params, stats, data["x"], train=train, drop=half)[0]

    objective = curvax.Objective(predict, cross_entropy, {"x": jnp.ones((4, 32, 32, 3)), "y": jnp.zeros(4, int)})
    explanation = curvax.explain(objective, params)
    assert {row.route for row in explanation.rows} == {"gauss-newton"}
    assert (explanation.passes, explanation.products) == (9, 0)


def test_batch_norm_in_training_mode_takes_no_shortcut():
    definition, params, stats = models.build(TrainConfig(model="resnet18", width=1 / 32), 10, jax.random.key(0))

    def predict(params, data):
        return models.apply(definition, params, stats, data["x"], train=True)[0]

    objective = curvax.Objective(predict, cross_entropy, {"x": jnp.ones((4, 32, 32, 3)), "y": jnp.zeros(4, int)})
    found = routes(objective, params)
    assert {path for path, route in found.items() if route == "gauss-newton"} == {
        # What comes after the last of them.
        *(path for path in found if path.startswith(("linear/", "blocks/7/norm2"))),
    }


class Transformer(nn.Module):
    """A block before its classifier."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        x = x + nn.Dense(4)(nn.gelu(nn.Dense(6)(nn.LayerNorm()(x))))
        return nn.Dense(3)(jnp.mean(x, axis=1))


@pytest.mark.once
def test_a_linen_transformer_equals_unit_vectors():
    module, tokens = Transformer(), jax.random.normal(jax.random.key(0), (3, 4, 4))
    params = module.init(jax.random.key(1), tokens)
    data = {"x": tokens, "y": jnp.arange(3)}
    objective = curvax.Objective(lambda params, data: module.apply(params, data["x"]), cross_entropy, data)
    exact, basis = (
        jax.jit(functools.partial(curvax.hessian_diag, method=method))(objective, params)
        for method in ("exact", "basis")
    )
    for found, expected in zip(jax.tree.leaves(exact), jax.tree.leaves(basis), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert set(routes(objective, params).values()) == {"gauss-newton", "tail", "unit vectors"}


def test_an_nnx_state_keeps_its_structure():
    module = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    definition, params = nnx.split(module)
    data = {"x": jax.random.normal(jax.random.key(0), (5, 3)), "y": jnp.zeros(5, int)}
    objective = curvax.Objective(lambda p, d: nnx.merge(definition, p)(d["x"]), cross_entropy, data)
    diag = curvax.hessian_diag(objective, params, method="exact")
    assert jax.tree.structure(diag) == jax.tree.structure(params)
    assert set(routes(objective, params).values()) == {"gauss-newton"}
