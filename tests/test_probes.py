"""Probes against NumPy in float64, and the noise scale of gradients whose mean and variance are known."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax import probes

NAMES = ("mean_abs_gradient", "parameter_stride", "loss_stride", "radius_quantiles")
MESH = jax.make_mesh((8,), ("x",), (AxisType.Auto,))


def tree(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {"dense": {"kernel": rng.normal(size=(16, 24)).astype(dtype), "bias": rng.normal(size=24).astype(dtype)}}


W, G = tree(0), tree(1)
OPTIMIZER = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5, momentum=0.9))


def measured(state):
    return {name: optax.tree.get(state, name) for name in NAMES}


def reference(w, g, u, quantiles=probes.QUANTILES):
    """The measurements of one layer, of flat float64 vectors."""
    w, g, u = (np.asarray(x, np.float64).ravel() for x in (w, g, u))
    values = (
        np.mean(np.abs(g)),
        np.mean(np.abs(u)),
        -np.mean(u * g),
        np.quantile(np.abs(w / g), quantiles, method="lower"),
    )
    return dict(zip(NAMES, values, strict=True))


def flat(tree):
    return np.concatenate([np.ravel(tree["dense"][name]) for name in ("bias", "kernel")])


@pytest.mark.parametrize("layers", ["array", "kernel"])
def test_measurements_of_two_steps(layers):
    tx = curvax.with_probes(OPTIMIZER, layers=layers)
    state, plain = tx.init(W), OPTIMIZER.init(W)
    for g in (G, tree(2)):
        u, state = jax.jit(tx.update)(g, state, W)
        expected, plain = jax.jit(OPTIMIZER.update)(g, plain, W)
        chex.assert_trees_all_equal(u, expected)
    parts = {"dense/kernel": tuple(map(flat, (W, g, u)))}
    if layers == "array":
        parts = {f"dense/{name}": tuple(t["dense"][name] for t in (W, g, u)) for name in ("kernel", "bias")}
    for layer, arrays in parts.items():
        values = {name: value[layer] for name, value in measured(state).items()}
        chex.assert_trees_all_close(values, reference(*arrays), rtol=1e-5)


def step(g, w, axis_name=None):
    tx = curvax.with_probes(OPTIMIZER, axis_name=axis_name)
    return measured(tx.update(g, tx.init(w), w)[1])


@pytest.mark.parametrize("spec", [P("x"), P(None)], ids=["split", "replicated"])
def test_parameters_on_a_mesh(spec):
    expected = step(G, W)
    placed = [jax.device_put(t, NamedSharding(MESH, spec)) for t in (G, W)]
    chex.assert_trees_all_close(jax.jit(step)(*placed), expected, rtol=1e-5)
    named = functools.partial(step, axis_name="x" if spec == P("x") else None)
    chex.assert_trees_all_close(
        jax.jit(jax.shard_map(named, mesh=MESH, in_specs=spec, out_specs=P()))(G, W), expected, rtol=1e-5
    )


def test_parameters_split_by_pmap():
    parts = jax.tree.map(lambda x: x.reshape(8, -1), (G, W))
    values = jax.pmap(functools.partial(step, axis_name="x"), axis_name="x")(*parts)
    for device in (0, 7):
        chex.assert_trees_all_close(jax.tree.map(lambda x, d=device: x[d], values), step(G, W), rtol=1e-5)


def test_the_first_order_stride_of_gradient_descent_is_the_rate_times_the_squared_gradient():
    tx = curvax.with_probes(optax.sgd(0.25), layers={".*": "all"})
    stride = optax.tree.get(tx.update(G, tx.init(W), W)[1], "loss_stride")["all"]
    np.testing.assert_allclose(stride, 0.25 * np.mean(flat(G) ** 2), rtol=1e-5)


def test_zeros_have_no_radius_and_flat_directions_an_infinite_one():
    tx = curvax.with_probes(optax.identity(), quantiles=(0.0, 0.5, 1.0))
    w, g = jnp.array([0.0, 2.0, 3.0]), jnp.array([0.0, 4.0, 0.0])
    np.testing.assert_array_equal(measured(tx.update(g, tx.init(w), w)[1])["radius_quantiles"][""], [0, 0.5, np.inf])


def test_nan_is_seen_and_stays_in_its_layer():
    broken = {"dense": {**G["dense"], "bias": np.full(24, np.nan, np.float32)}}
    values = step(broken, W)
    for name in NAMES:
        assert np.all(np.isnan(values[name]["dense/bias"])) and np.all(np.isfinite(values[name]["dense/kernel"]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_measured_in_float32(dtype):
    w, g = (jax.tree.map(lambda x: jnp.asarray(x, dtype), t) for t in (W, G))
    tx = curvax.with_probes(optax.identity())
    state = tx.init(w)
    u, after = tx.update(g, state, w)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    expected = {name: reference(w["dense"][name], g["dense"][name], u["dense"][name]) for name in ("kernel", "bias")}
    for name, values in expected.items():
        chex.assert_trees_all_close({k: v[f"dense/{name}"] for k, v in measured(after).items()}, values, rtol=1e-5)


def test_inside_optax_wrappers():
    """A masked leaf is not measured, an injected rate and an accumulation change nothing."""
    tx = optax.masked(curvax.with_probes(optax.scale(-1.0)), {"dense": {"kernel": True, "bias": False}})
    assert list(measured(tx.update(G, tx.init(W), W)[1])["loss_stride"]) == ["dense/kernel"]
    tx = optax.MultiSteps(curvax.with_probes(optax.sgd(1.0)), 2)
    state = tx.init(W)
    for g in (G, tree(2)):
        with jax.numpy_dtype_promotion("standard"):
            _, state = tx.update(g, state, W)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, G, tree(2))
    seen = measured(state.inner_opt_state)["mean_abs_gradient"]["dense/kernel"]
    np.testing.assert_allclose(seen, np.mean(np.abs(mean["dense"]["kernel"])), rtol=1e-5)


def test_the_held_out_stride_of_a_parabola():
    """L = a w^2 / 2 falls by -a w u - a u^2 / 2."""
    stride = curvax.held_out_stride(
        lambda w: jnp.sum(3 * w["x"] ** 2 / 2), {"x": jnp.float32(2)}, {"x": jnp.float32(-0.5)}
    )
    np.testing.assert_allclose(stride, 3 * 2 * 0.5 - 3 * 0.25 / 2, rtol=1e-6)


MU, SIGMA, SIZE = 0.2, 1.5, 2000


def gradients(seed, num):
    """Gradients of single examples: normal around a mean of norm MU sqrt(SIZE)."""
    return (MU + SIGMA * np.random.default_rng(seed).normal(size=(num, SIZE))).astype(np.float32)


def test_the_noise_scale_of_known_gradients_from_two_batch_sizes():
    estimates = []
    for seed in range(40):
        g = gradients(seed, 64)
        estimates.append(curvax.noise_scale_from_batches({"w": g[:8].mean(0)}, {"w": g.mean(0)}, 8, 64))
    mean = jax.tree.map(lambda *x: jnp.mean(jnp.stack(x)), *estimates)
    # Their standard errors over 40 draws are 1 % and 0.3 %.
    np.testing.assert_allclose(mean.squared_gradient, SIZE * MU**2, rtol=0.05)
    np.testing.assert_allclose(mean.noise, SIZE * SIGMA**2, rtol=0.02)
    np.testing.assert_allclose(mean.critical_batch_size, (SIGMA / MU) ** 2, rtol=0.05)


def expected_over_devices(g):
    small = np.mean(np.sum(g.reshape(8, -1, SIZE).astype(np.float64).mean(1) ** 2, axis=1))
    large = np.sum(g.astype(np.float64).mean(0) ** 2)
    # Two equations E|G_B|^2 = x + y / B in two unknowns.
    return np.linalg.solve([[1, 8 / len(g)], [1, 1 / len(g)]], [small, large])


@pytest.mark.parametrize("by", ["shard_map", "pmap"])
def test_the_noise_scale_over_devices(by):
    g = gradients(0, 64)

    def local(part):
        return curvax.noise_scale_over_devices({"w": jnp.mean(part, axis=0)}, 8, "x")

    if by == "pmap":
        scale = jax.tree.map(lambda x: x[3], jax.pmap(local, axis_name="x")(g.reshape(8, 8, SIZE)))
    else:
        scale = jax.jit(jax.shard_map(local, mesh=MESH, in_specs=P("x"), out_specs=P()))(g)
    np.testing.assert_allclose(scale, expected_over_devices(g), rtol=1e-3)


def test_no_signal_has_an_infinite_critical_batch_size():
    scale = curvax.noise_scale_from_batches(jnp.array([2.0]), jnp.array([0.5]), 1, 4)
    assert scale.squared_gradient < 0 and np.isinf(scale.critical_batch_size)


def test_errors_say_what_to_pass():
    with pytest.raises(ValueError, match="vary the size"):
        curvax.noise_scale_from_batches(W, W, 8, 8)
    with pytest.raises(ValueError, match="quantile=50 is out of range"):
        curvax.with_probes(optax.identity(), quantiles=(50,))
