import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import curvax
from curvax import scale_by_curvature_radius, with_hessian_diag


def seen_curvature():
    """A transformation whose update is the curvature that it is handed."""

    def update_fn(updates, state, params=None, *, hessian_diag=None, **extra_args):
        del updates, params, extra_args
        return hessian_diag, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def quadratic(curvature):
    return lambda w: jnp.sum(curvature * w**2) / 2


def run(tx, curvatures, w=None):
    """The updates of steps whose loss has these curvatures, in turn."""
    w = jnp.ones(2) if w is None else w
    state, updates = tx.init(w), []
    for curvature in curvatures:
        update, state = tx.update(w, state, w, obj_fn=quadratic(curvature))
        updates.append(np.asarray(update))
    return np.array(updates)[:, 0], state


def test_average_is_corrected_for_its_bias():
    """The weighted mean of -1, 2, 5, ... with weights decay^age; the sign is kept."""
    curvatures = np.array([-1.0, 2.0, 5.0, -3.0])
    seen, state = run(with_hessian_diag(seen_curvature(), "basis", decay=0.7), curvatures)
    for n in range(4):
        weights = 0.7 ** np.arange(n, -1, -1)
        np.testing.assert_allclose(seen[n], np.average(curvatures[: n + 1], weights=weights), rtol=1e-5)
    assert int(state.num_refreshes) == int(state.count) == 4


def test_curvature_is_refreshed_every_k_steps():
    seen, state = run(with_hessian_diag(seen_curvature(), "basis", every=3), np.arange(1.0, 9.0))
    np.testing.assert_allclose(seen, [1, 1, 1, 4, 4, 4, 7, 7])
    assert int(state.num_refreshes) == 3


def test_between_refreshes_nothing_is_computed():
    calls = []

    def loss(w):
        jax.debug.callback(lambda: calls.append(None))
        return jnp.sum(w**2)

    tx = with_hessian_diag(seen_curvature(), "hutchinson", every=4, key=0)
    step = jax.jit(lambda state, w: tx.update(w, state, w, obj_fn=loss)[1])
    state = tx.init(jnp.ones(2))
    counts = []
    for _ in range(5):
        state = jax.block_until_ready(step(state, jnp.ones(2)))
        jax.effects_barrier()
        counts.append(len(calls))
    assert counts[0] > 0 and counts[1:4] == [counts[0]] * 3 and counts[4] == 2 * counts[0]


def test_curvature_of_the_caller_is_handed_on_and_nothing_computed():
    tx = with_hessian_diag(seen_curvature(), "basis")
    w = jnp.ones(2)
    state = tx.init(w)
    seen, new_state = tx.update(w, state, w, hessian_diag=jnp.array([3.0, 4.0]))
    np.testing.assert_array_equal(seen, [3.0, 4.0])
    assert int(new_state.num_refreshes) == 0
    chex.assert_trees_all_equal(new_state.hessian_diag, state.hessian_diag)


def test_value_fn_serves_as_objective_and_both_reach_the_inner_transformation():
    received = {}

    def update_fn(updates, state, params=None, **extra_args):
        received.update(extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
    tx, w, loss = with_hessian_diag(inner, "basis"), jnp.ones(2), quadratic(2.0)
    tx.update(w, tx.init(w), w, value_fn=loss, value=1.0)
    np.testing.assert_allclose(received["hessian_diag"], 2.0)
    assert received["value_fn"](w) == loss(w) and received["value"] == 1.0


def test_multi_steps_refresh_once_per_real_step():
    """Two mini-steps a step: curvature comes from the first of the two, of every second step."""
    tx = with_hessian_diag(optax.MultiSteps(scale_by_curvature_radius(slope_term=False), 2), "basis", every=2)
    seen, state = run(tx, [1.0, 100.0, 100.0, 100.0, 5.0, 100.0])
    np.testing.assert_allclose(seen, [0, 1, 0, 1, 0, 1 / 5], rtol=1e-6)
    assert int(state.num_refreshes) == 2 and int(state.count) == 3


def test_multi_steps_over_micro_batches_equal_the_whole_batch():
    """A quadratic has one curvature whatever the batch, so that k mini-steps are one step on the mean gradient."""
    targets = jnp.arange(8.0).reshape(4, 2)
    newton = functools.partial(scale_by_curvature_radius, slope_term=False)
    tx = with_hessian_diag(optax.MultiSteps(newton(), 4), "basis")
    w = jnp.zeros(2)
    state = tx.init(w)
    for target in targets:
        loss = lambda w, target=target: jnp.sum(jnp.array([1.0, 9.0]) * (w - target) ** 2)
        update, state = tx.update(jax.grad(loss)(w), state, w, obj_fn=loss)
    np.testing.assert_allclose(-update, targets.mean(0), rtol=1e-6)


def test_a_seed_is_a_key_and_refreshes_draw_anew():
    params, objective = problems.mlp_params(), problems.mlp_objective()

    def draws(key):
        tx = with_hessian_diag(seen_curvature(), "hutchinson", key=key)
        update = jax.jit(tx.update)
        first, state = update(params, tx.init(params), params, obj_fn=objective)
        second, _ = update(params, state, params, obj_fn=objective)
        return first, second

    chex.assert_trees_all_equal(draws(3), draws(jax.random.key(3)))
    first, second = draws(3)
    assert not np.allclose(first[0]["kernel"], second[0]["kernel"])
    assert not np.allclose(first[0]["kernel"], draws(4)[0][0]["kernel"])


def test_frozen_parameters_have_no_curvature_in_the_state():
    params, objective = problems.mlp_params(), problems.mlp_objective()
    where = [False, True]
    newton = optax.masked(
        scale_by_curvature_radius(0.1), [{"bias": False, "kernel": False}, {"bias": True, "kernel": True}]
    )
    tx = with_hessian_diag(newton, "basis", where=where)
    state = tx.init(params)
    assert len(jax.tree.leaves(state.hessian_diag)) == 2
    updates, state = jax.jit(tx.update)(params, state, params, obj_fn=objective)
    chex.assert_trees_all_equal(updates[0], params[0])
    chex.assert_tree_all_finite(updates[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_average_is_float32(dtype):
    state = with_hessian_diag(seen_curvature(), "basis").init(jnp.ones(2, dtype))
    assert state.hessian_diag.dtype == jnp.float32


def test_errors_say_what_to_pass():
    w = jnp.ones(2)
    with pytest.raises(ValueError, match="pass key=0"):
        with_hessian_diag(seen_curvature(), "hutchinson")
    with pytest.raises(ValueError, match="pass key=0"):
        with_hessian_diag(seen_curvature())
    tx = with_hessian_diag(seen_curvature(), "basis")
    with pytest.raises(ValueError, match=r"obj_fn=.*hessian_diag="):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match=r"update\(updates, state, params"):
        tx.update(w, tx.init(w), obj_fn=quadratic(1.0))


def test_the_default_method_is_a_gauss_newton_estimate_where_the_objective_allows_it():
    """A Gauss-Newton diagonal is never negative; Hutchinson's of the same network is, somewhere."""
    params = problems.mlp_params()

    def least(objective):
        tx = with_hessian_diag(seen_curvature(), key=0)
        diag, _ = jax.jit(lambda: tx.update(params, tx.init(params), params, obj_fn=objective))()
        return min(float(jnp.min(x)) for x in jax.tree.leaves(diag))

    objective = problems.mlp_objective()
    assert least(objective) >= 0
    assert least(problems.mlp_objective(problems.squared_error)) < 0
    assert least(lambda params: objective(params)) < 0


def test_state_is_readable_by_name():
    _, state = run(curvax.cblr(0.1, method="basis", every=1, hessian_decay=0.0), [3.0])
    np.testing.assert_allclose(optax.tree.get(state, "hessian_diag"), 3.0)
