"""The published networks: their sizes, to the parameter, and their shapes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.config import TrainConfig

apply = jax.jit(models.apply, static_argnums=0, static_argnames=("train", "drop"))


def count(config, classes=10):
    _, params, _ = models.build(config, classes, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({"model": "alexnet"}, 23_272_266),
        ({"model": "resnet18"}, 11_173_962),
        # 2,252,992 in the convolutions of AlexNet, then 1024 -> 1024 -> 1024 -> 10.
        ({"model": "alexnet", "hidden": 1024}, 2_251_584 + 2 * (1024 * 1024 + 1024) + 1024 * 10 + 10),
    ],
)
def test_published_sizes(changes, parameters):
    assert count(TrainConfig(**changes)) == parameters


def test_only_the_last_layer_depends_on_the_classes():
    assert count(TrainConfig(), 100) - count(TrainConfig(), 10) == 90 * (4096 + 1)
    assert count(TrainConfig(model="resnet18"), 100) - count(TrainConfig(model="resnet18"), 10) == 90 * (512 + 1)


@pytest.mark.parametrize("model", ["alexnet", "resnet18"])
@pytest.mark.parametrize(("width", "size", "classes"), [(1.0, 32, 10), (0.25, 32, 7), (0.01, 16, 2), (0.1, 47, 3)])
def test_shapes_at_any_width_and_image_size(model, width, size, classes):
    config = TrainConfig(model=model, width=width, image_size=size)
    definition, params, stats = models.build(config, classes, jax.random.key(0))
    run = functools.partial(models.apply, definition, train=True)
    logits, after = jax.eval_shape(run, params, stats, jnp.zeros((4, size, size, 3)))
    assert logits.shape == (4, classes)
    assert logits.dtype == jnp.float32
    assert jax.tree.map(jnp.shape, stats) == jax.tree.map(lambda leaf: leaf.shape, after)


def test_pytorch_initialisation_is_uniform_within_the_root_of_the_fan_in():
    config = TrainConfig(width=0.25, init="pytorch")
    _, params, _ = models.build(config, 10, jax.random.key(0))
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    biases = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 1]
    assert len(kernels) == len(biases) == 8
    for leaf in kernels:
        bound = 1 / np.sqrt(math.prod(leaf.shape[:-1]))
        assert bound * 0.95 < np.max(np.abs(leaf)) <= bound
        np.testing.assert_allclose(np.std(leaf), bound / np.sqrt(3), rtol=0.1)
    assert all(np.all(leaf != 0) for leaf in biases)


def test_he_initialisation_keeps_the_scale_of_the_signal():
    _, params, _ = models.build(TrainConfig(width=0.25), 10, jax.random.key(0))
    for leaf in jax.tree.leaves(params):
        if leaf.ndim == 1:
            assert np.all(leaf == 0)
        else:
            np.testing.assert_allclose(np.var(leaf), 2 / math.prod(leaf.shape[:-1]), rtol=0.2)


def test_what_drops_sees_the_inputs_of_two_layers_in_training_alone():
    images = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))
    alexnet = models.build(TrainConfig(width=0.02, image_size=16), 10, jax.random.key(0))
    seen = []

    def drop(layer, x):
        seen.append((layer, x.shape))
        return jnp.zeros_like(x)

    logits, _ = models.apply(*alexnet, images, train=True, drop=drop)
    assert seen == [(0, (8, 5)), (1, (8, 82))]
    # Biases begin at 0, and nothing else is left.
    np.testing.assert_array_equal(logits, 0)
    models.apply(*alexnet, images, drop=drop)
    assert len(seen) == 2


def test_batch_norm_differs_between_training_and_judging():
    images = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))
    config = TrainConfig(width=0.02, image_size=16, model="resnet18")
    definition, params, stats = models.build(config, 10, jax.random.key(0))
    _, after = apply(definition, params, stats, images, train=True)
    stem = jax.lax.conv_general_dilated(
        images, params["stem"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    # The averages began at 0 and forget a tenth per step.
    np.testing.assert_allclose(after["norm"]["mean"], 0.1 * stem.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    _, unchanged = apply(definition, params, stats, images)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), unchanged, stats))


@pytest.mark.parametrize(("side", "stride"), [(1, 1), (2, 1), (2, 2), (5, 2)])
def test_a_convolution_of_tiny_images_is_jaxs(side, stride):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, side, side, 4), (3, 3, 4, 6)))
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    ours = models.convolve(x, kernel, (stride, stride), ((1, 1), (1, 1)), **options)
    theirs = jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((1, 1), (1, 1)), **options)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
