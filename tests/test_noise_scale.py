"""The gradient noise scale over many steps, of gradients whose noise is known."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import curvax

TRUE = {"a": np.array([0.3, -0.4, 0.5]), "b": np.array([[1.0, 0.5]])}
SIGMA = {"a": 2.0, "b": 0.5}
BATCH, PARTS = 8, 4


def gradients(steps, parts=PARTS, seed=0):
    """Mean gradients of so many micro-batches of so many steps, `(steps, parts, ...)`."""
    rng = np.random.default_rng(seed)
    noise = lambda x, sigma: rng.normal(size=(steps, parts, *x.shape)) * sigma / np.sqrt(BATCH)
    return {name: jnp.asarray(x + noise(x, SIGMA[name]), jnp.float32) for name, x in TRUE.items()}


def accumulated(tx, grads):
    """The state after all micro-batches, and the update after each."""
    params = jax.tree.map(lambda x: jnp.zeros(x.shape[2:]), grads)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), grads)

    def step(state, g):
        updates, state = tx.update(g, state, params)
        return state, updates

    return jax.jit(functools.partial(jax.lax.scan, step))(tx.init(params), flat)


def test_the_average_is_that_of_single_estimates():
    """Decay 0 keeps the last one; otherwise weights decay, and their sum is 1."""
    grads = gradients(5)
    tx = curvax.with_noise_scale(optax.sgd(1.0), BATCH, accumulate=PARTS, decay=0.5)
    state, _ = accumulated(tx, grads)
    assert int(state.num_estimates) == 5
    for name, g in grads.items():
        g = np.asarray(g, np.float64)
        small = np.mean([[np.sum(part**2) for part in step] for step in g], 1)
        large = np.array([np.sum(step.mean(0) ** 2) for step in g])
        squared = (PARTS * large - small) / (PARTS - 1)
        noise = (small - large) * BATCH * PARTS / (PARTS - 1)
        weights = 0.5 ** np.arange(5)[::-1] / np.sum(0.5 ** np.arange(5))
        np.testing.assert_allclose(state.layers[name].squared_gradient, weights @ squared, rtol=1e-4)
        np.testing.assert_allclose(state.layers[name].noise, weights @ noise, rtol=1e-4)


def test_the_critical_batch_size_is_that_of_the_noise():
    state, _ = accumulated(
        curvax.with_noise_scale(optax.sgd(1.0), BATCH, accumulate=PARTS, decay=0.9999), gradients(4000)
    )
    noise = {name: SIGMA[name] ** 2 * x.size for name, x in TRUE.items()}
    expected = sum(noise.values()) / sum(np.sum(x**2) for x in TRUE.values())
    found = curvax.metrics(state)
    np.testing.assert_allclose(found["noise_scale"], expected, rtol=0.05)
    np.testing.assert_allclose(found["noise_scale/b"], noise["b"] / np.sum(TRUE["b"] ** 2), rtol=0.05)


def test_updates_are_those_of_multi_steps():
    tx = curvax.with_noise_scale(optax.adam(0.1), BATCH, accumulate=PARTS)
    state, found = accumulated(tx, gradients(3))
    expected_state, expected = accumulated(optax.MultiSteps(optax.adam(0.1), PARTS), gradients(3))
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    chex.assert_trees_all_close(state.inner_state, expected_state, rtol=1e-6)


def over_devices(grads):
    """The state after all steps, and the last update, where every micro-batch is a device's."""
    params = jax.tree.map(lambda x: jnp.zeros(x.shape[2:]), grads)
    tx = curvax.with_noise_scale(optax.sgd(1.0), BATCH, axis_name="x")

    @functools.partial(jax.vmap, axis_name="x", in_axes=(None, 0))
    def step(state, g):
        updates, state = tx.update(g, state, params)
        return state, updates

    state = tx.init(params)
    for i in range(len(grads["a"])):
        states, updates = step(state, jax.tree.map(lambda x, i=i: x[i], grads))
        state = jax.tree.map(lambda x: x[0], states)
    return state, updates


@pytest.mark.slow
def test_devices_are_micro_batches():
    grads = gradients(3)
    state, updates = over_devices(grads)
    expected, steps = accumulated(curvax.with_noise_scale(optax.sgd(1.0), BATCH, accumulate=PARTS), grads)
    chex.assert_trees_all_close(state.layers, expected.layers, rtol=1e-4)
    chex.assert_trees_all_close(updates["a"][0], steps["a"][-1], rtol=1e-5)


def test_a_bad_step_is_left_out():
    grads = gradients(3)
    state, _ = over_devices(jax.tree.map(lambda x: x.at[1, 2].set(jnp.nan), grads))
    expected, _ = over_devices(jax.tree.map(lambda x: x[jnp.array([0, 2])], grads))
    assert int(state.num_estimates) == 2
    chex.assert_trees_all_close(state.layers, expected.layers, rtol=1e-4)


def test_with_nothing_to_compare_there_is_no_estimate():
    with pytest.raises(ValueError, match=r"pass accumulate=.* or axis_name="):
        curvax.with_noise_scale(optax.sgd(1.0), BATCH)
    tx = curvax.with_noise_scale(optax.sgd(1.0), BATCH, axis_name="x")
    alone = jax.vmap(lambda g: tx.update(g, tx.init(g), g)[1].num_estimates, axis_name="x")
    assert alone(jnp.ones((1, 3))).tolist() == [0]


def test_gradients_that_shard_map_has_summed_are_refused():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))

    def local(w, x, own):
        w = jax.lax.pcast(w, "x", to="varying") if own else w
        return curvax.noise_scale_over_devices(jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w), 4, "x").noise

    x = jax.random.normal(jax.random.key(0), (8, 3))
    run = lambda own: jax.shard_map(functools.partial(local, own=own), mesh=mesh, in_specs=(P(), P("x")), out_specs=P())
    with pytest.raises(ValueError, match=r"shard_map has summed it.*pcast\(params, 'x'"):
        jax.jit(run(False))(jnp.ones(3), x)
    assert jax.jit(run(True))(jnp.ones(3), x) > 0
