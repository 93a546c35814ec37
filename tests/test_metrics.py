"""The numbers of a state, for loggers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax

W = {"dense": {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]]), "bias": jnp.array([0.5, 0.5])}}


def loss(w):
    return sum(jnp.sum(x**4) for x in jax.tree.leaves(w))


def test_probes_and_curvature_have_names_and_values():
    tx = optax.chain(optax.clip_by_global_norm(1e6), curvax.with_probes(curvax.cblr(0.1, method="basis")))
    grads = jax.grad(loss)(W)
    _, state = tx.update(grads, tx.init(W), W, obj_fn=loss)
    found = curvax.metrics(state)
    assert all(type(value) is float for value in found.values())
    assert found["curvature/num_refreshes"] == 1 and found["curvature/num_skipped"] == 0
    assert found["curvature/mean_abs/dense/kernel"] == pytest.approx(12 * np.mean([1, 4, 9, 16]), rel=1e-5)
    assert found["probes/mean_abs_gradient/dense/bias"] == pytest.approx(4 * 0.5**3, rel=1e-6)
    quantiles = [found[f"probes/radius_quantiles/dense/kernel/{i}"] for i in range(5)]
    assert quantiles == sorted(quantiles)


def test_paths_that_read_alike_are_two_arrays():
    w = {"a/b": jnp.ones(2), "a": {"b": jnp.full(2, 2.0)}}
    tx = curvax.with_hessian_diag(optax.identity(), "basis")
    _, state = tx.update(jax.grad(loss)(w), tx.init(w), w, obj_fn=loss)
    found = curvax.metrics(state)
    assert found["curvature/mean_abs/['a/b']"] == 12 and found["curvature/mean_abs/['a']['b']"] == 48


def test_several_of_a_kind_are_numbered():
    tx = curvax.with_probes(curvax.with_probes(optax.sgd(0.1)), layers="module")
    state = tx.update(W, tx.init(W), W)[1]
    names = {name.rsplit("/", 2)[0] if "quantiles" in name else name for name in curvax.metrics(state)}
    assert "probes/loss_stride/dense" in names and "probes_1/loss_stride/dense/kernel" in names


def test_other_states_have_none():
    assert curvax.metrics(optax.adam(0.1).init(W)) == {}


def test_masked_curvature_is_left_out():
    tx = curvax.cblr(0.1, method="basis", where={"dense": {"kernel": True, "bias": False}})
    _, state = tx.update(W, tx.init(W), W, obj_fn=loss)
    assert [name for name in curvax.metrics(state) if "mean_abs" in name] == ["curvature/mean_abs/dense/kernel"]
