"""Radii, ranks and probes at the ends of the range of floats, against float64 and known values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax


def update(tx, w, g):
    return tx.update(g, tx.init(w), w)[0]


@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e-19, 1.0, 1e15, 1e19, 1e37])
def test_lars_moves_a_layer_by_its_norm_whatever_the_size_of_its_gradient(size):
    w, g = jnp.array([3.0, 4.0]), jnp.array([0.6, 0.8]) * size
    np.testing.assert_allclose(update(curvax.scale_by_lars(), w, g), [3, 4], rtol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_lars_of_parameters_at_the_ends_of_the_range(size):
    w, g = jnp.array([3.0, 4.0]) * size, jnp.array([0.6, 0.8])
    np.testing.assert_allclose(update(curvax.scale_by_lars(), w, g), np.array([3, 4]) * size, rtol=1e-5)


@pytest.mark.parametrize("w", [[1.0, 1.0, 1.0, 1e-37], [1e-30, 2e-30, 3.0, 0.0], [1e30, 2e30, 1e-5, 3.0]])
def test_percent_delta_is_the_harmonic_mean_where_ratios_are_no_floats(w):
    g = np.array([1e3, -2e2, 3e3, 1e3])
    wide = np.array(w)
    there = wide != 0
    expected = there.sum() / np.sum(np.abs(g[there] / wide[there])) * g
    found = update(curvax.scale_by_percent_delta(layers="array"), jnp.array(w), jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-35)


def test_derivatives_through_a_step_are_finite_where_a_layer_is_zero():
    tx, g = curvax.lars(1.0, momentum=0.0), jnp.array([1.0, 2.0])
    slope = jax.grad(lambda w: jnp.sum((w + update(tx, w, g)) ** 2))(jnp.zeros(2))
    np.testing.assert_allclose(slope, [-2, -4])
    for rule in (curvax.scale_by_percent_delta(layers="array"), curvax.scale_by_approximate_radius()):
        assert jnp.all(jnp.isfinite(jax.grad(lambda w, rule=rule: jnp.sum(update(rule, w, g)))(jnp.zeros(2))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_losses_are_ranked_as_they_are(dtype):
    """However far apart they are, and of whatever sign."""
    losses = jnp.array([-3e4, 0.9, 0.1, 0.5, 0.7, 0.3], dtype)
    assert curvax.discard_small_losses(losses, 0.5).tolist() == [0, 2, 0, 2, 2, 0]
    assert curvax.discard_small_losses(jnp.array([-jnp.inf, 1.0, -1.0, -2.0], dtype), 0.5).tolist() == [0, 2, 2, 0]


def test_probes_ask_for_nothing_that_the_optimizer_does_not_need():
    tx, g = curvax.with_probes(optax.sgd(0.1)), {"a": jnp.ones(3)}
    updates, state = tx.update(g, tx.init(g))
    np.testing.assert_allclose(updates["a"], -0.1)
    assert float(state.parameter_stride["a"]) == pytest.approx(0.1) and np.isnan(state.radius_quantiles["a"]).all()


def test_probes_keep_the_structure_of_what_is_mapped_over_parameters():
    tx, w = curvax.with_probes(optax.adam(0.1)), {"a": jnp.ones(3), "b": {"c": jnp.ones((2, 2))}}
    with jax.numpy_dtype_promotion("standard"):
        _, state = tx.update(w, tx.init(w), w)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    np.testing.assert_allclose(optax.tree.get(doubled, "mu")["a"], 2 * optax.tree.get(state, "mu")["a"])
    np.testing.assert_array_equal(doubled.loss_stride["a"], state.loss_stride["a"])


@pytest.mark.parametrize("size", [np.int64(4), 4, jnp.asarray(4)])
def test_two_batches_of_one_size_tell_nothing(size):
    with pytest.raises(ValueError, match="two batches of 4"):
        curvax.noise_scale_from_batches(jnp.ones(2), jnp.ones(2), size, size)
