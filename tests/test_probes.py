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
    tx = curvax.with_probes(OPTIMIZER, param_axis_name=axis_name)
    return measured(tx.update(g, tx.init(w), w)[1])


@functools.cache
def step_on_one_device():
    return jax.device_get(jax.jit(step)(G, W))


@pytest.mark.slow_but_for("split")
@pytest.mark.parametrize("spec", [P("x"), P(None)], ids=["split", "replicated"])
def test_parameters_on_a_mesh(spec):
    expected = step_on_one_device()
    placed = [jax.device_put(t, NamedSharding(MESH, spec)) for t in (G, W)]
    chex.assert_trees_all_close(jax.jit(step)(*placed), expected, rtol=1e-5)
    named = functools.partial(step, axis_name="x" if spec == P("x") else None)
    chex.assert_trees_all_close(
        jax.jit(jax.shard_map(named, mesh=MESH, in_specs=spec, out_specs=P()))(G, W), expected, rtol=1e-5
    )


@pytest.mark.slow
def test_parameters_split_by_pmap():
    parts = jax.tree.map(lambda x: x.reshape(8, -1), (G, W))
    values = jax.pmap(functools.partial(step, axis_name="x"), axis_name="x")(*parts)
    for device in (0, 7):
        of_device = jax.tree.map(lambda x, d=device: np.asarray(x)[d], values)
        chex.assert_trees_all_close(of_device, step_on_one_device(), rtol=1e-5)


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
    values = jax.jit(step)(broken, W)
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
    estimates, estimate = [], jax.jit(lambda small, large: curvax.noise_scale_from_batches(small, large, 8, 64))
    for seed in range(40):
        g = gradients(seed, 64)
        estimates.append(estimate({"w": g[:8].mean(0)}, {"w": g.mean(0)}))
    mean = jax.tree.map(lambda *x: np.mean(x), *estimates)
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
    with pytest.raises(ValueError, match="quantiles=50 is out of range"):
        curvax.with_probes(optax.identity(), quantiles=(50,))


def test_without_parameters_all_but_the_radius_is_measured():
    """The inner transformation decides whether it needs them; its own error is what a user sees."""
    tx = curvax.with_probes(optax.sgd(0.25))
    updates, state = jax.jit(lambda g, s: tx.update(g, s))(G, tx.init(W))
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda x: np.float32(-0.25) * x, G))
    for name in ("kernel", "bias"):
        expected = reference(np.ones_like(W["dense"][name]), G["dense"][name], -0.25 * G["dense"][name])
        found = {key: value[f"dense/{name}"] for key, value in measured(state).items()}
        assert np.isnan(found.pop("radius_quantiles")).all()
        expected.pop("radius_quantiles")
        chex.assert_trees_all_close(found, expected, rtol=1e-5)
    needs_params = curvax.with_probes(optax.add_decayed_weights(0.1))
    with pytest.raises(ValueError, match="params"):
        needs_params.update(G, needs_params.init(W))


def test_extra_arguments_are_handed_on():
    spy = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), lambda u, s, p=None, *, scale=1.0: (jax.tree.map(lambda x: scale * x, u), s)
    )
    tx = curvax.with_probes(spy)
    chex.assert_trees_all_equal(tx.update(G, tx.init(W), W, scale=2.0)[0], jax.tree.map(lambda x: 2 * x, G))


WRAPPED = {
    "adam": curvax.with_probes(optax.adam(0.1)),
    "chain": optax.chain(optax.scale_by_adam(), curvax.with_probes(optax.trace(0.9))),
    "inject": optax.inject_hyperparams(lambda rate: curvax.with_probes(optax.sgd(rate, momentum=0.9)))(rate=0.1),
    "masked": optax.masked(curvax.with_probes(optax.adam(0.1)), {"dense": {"kernel": True, "bias": False}}),
    "multi_steps": optax.MultiSteps(curvax.with_probes(optax.adam(0.1)), 2),
    "lamb": curvax.with_probes(curvax.lamb(0.1)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_trees_of_parameters_in_a_state_are_found_by_optax(name):
    tx = WRAPPED[name]
    with jax.numpy_dtype_promotion("standard"):
        _, state = jax.jit(tx.update)(G, tx.init(W), W)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    chex.assert_trees_all_equal_structs(doubled, state)
    for field in ("trace", "mu"):
        for (_, new), (_, old) in zip(*(optax.tree.get_all_with_path(s, field) for s in (doubled, state)), strict=True):
            chex.assert_trees_all_equal(new, jax.tree.map(lambda x: 2 * x, old))
    for field in NAMES:
        chex.assert_trees_all_equal(
            optax.tree.get_all_with_path(doubled, field)[0][1], optax.tree.get_all_with_path(state, field)[0][1]
        )


def test_paths_that_read_alike_are_measured_apart():
    w = {"a/b": jnp.array([1.0]), "a": {"b": jnp.array([2.0])}}
    tx = curvax.with_probes(optax.identity())
    means = optax.tree.get(tx.update(w, tx.init(w), w)[1], "mean_abs_gradient")
    assert sorted(map(float, means.values())) == [1.0, 2.0]


@pytest.mark.parametrize("w", [{}, {"empty": jnp.zeros((0, 3))}, {"none": None, "scalar": jnp.array(-2.0)}])
def test_trees_with_little_in_them(w):
    tx = curvax.with_probes(optax.sgd(1.0))
    state = tx.init(w)
    updates, after = tx.update(w, state, w)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.negative, w))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)


def test_a_state_keeps_its_types_under_gradients_of_others():
    with jax.enable_x64(True):
        w, g = jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.float64)
        tx = curvax.with_probes(optax.identity())
        state = tx.init(w)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.update(g, state, w)[1])


@pytest.mark.parametrize("scale", [1e-28, 1e-19, 1.0, 1e37])
@pytest.mark.parametrize("size", [12, 3000])
def test_means_at_the_ends_of_the_range(scale, size):
    rng = np.random.default_rng(9)
    g, w = (rng.normal(size=(2, size)) * [[scale], [1.0]]).astype(np.float32)
    rate = np.float32({1e-28: 1e20, 1e-19: 1e5, 1.0: 1e-9, 1e37: 1e-37}[scale])
    tx = curvax.with_probes(optax.scale(-rate))
    state = jax.jit(lambda g, w: tx.update(g, tx.init(w), w)[1])(g, w)
    expected = reference(w, g, -rate * g.astype(np.float64))
    for name in ("mean_abs_gradient", "parameter_stride", "loss_stride"):
        np.testing.assert_allclose(measured(state)[name][""], np.float32(expected[name]), rtol=1e-5, atol=1e-37)


@pytest.mark.slow
def test_the_noise_scale_of_small_gradients_and_of_halves():
    """Squares that vanish one by one have a sum; and means of halves over devices are not summed in halves."""
    small, large = np.full(4000, 3e-20, np.float32), np.full(4000, 2e-20, np.float32)
    scale = curvax.noise_scale_from_batches(small, large, 1, 4)
    expected = np.linalg.solve([[1, 1], [1, 1 / 4]], [4000 * np.float64(3e-20) ** 2, 4000 * np.float64(2e-20) ** 2])
    np.testing.assert_allclose(np.array(scale) * 1e30, expected * 1e30, rtol=1e-5)
    scale = curvax.noise_scale_from_batches(1e18 * jnp.ones(2), 9e17 * jnp.ones(2), 10_000, 40_000)
    squares = np.array([2 * 1e36, 2 * 8.1e35])
    np.testing.assert_allclose(scale.squared_gradient, (4 * squares[1] - squares[0]) / 3, rtol=1e-5)
    g = jnp.full((8, 3), 30_000, jnp.float16)
    scale = jax.vmap(lambda g: curvax.noise_scale_over_devices(g, np.int8(100), "x"), axis_name="x")(g)
    np.testing.assert_allclose(scale.squared_gradient, np.full(8, 3 * 9e8), rtol=1e-5)
    np.testing.assert_array_equal(scale.noise, np.zeros(8))


@pytest.mark.parametrize("sizes", [(0, 4), (-1, 4), (np.int64(4), 4), (0.5, 4), (True, 4), (4, np.nan), ("4", 8)])
def test_sizes_of_no_batches_are_refused(sizes):
    with pytest.raises(ValueError, match=r"batch_size=|two batches of 4"):
        curvax.noise_scale_from_batches(W, W, *sizes)


@pytest.mark.parametrize("q", [np.nan, -0.1, np.float32(1.5), jnp.array(2.0), "0.5", True])
def test_quantiles_that_do_not_exist_are_refused(q):
    with pytest.raises(ValueError, match=r"quantiles=.*\[0, 1\]"):
        curvax.with_probes(optax.identity(), quantiles=(0.5, q))
    with pytest.raises(ValueError, match=r"q=.*\[0, 1\]"):
        curvax.quantile(jnp.ones(3), q)


def test_what_measures_refuses_what_it_cannot_take():
    for call, said in [
        (lambda: curvax.with_probes(optax.sgd), "no optax transformation"),
        (lambda: curvax.with_probes(optax.sgd(0.1), quantiles=0.5), "quantiles=0.5 are no sequence"),
        (lambda: curvax.held_out_stride(lambda w: (w, 1), W, W), "returned a tuple"),
        (
            lambda: curvax.held_out_stride(lambda w: jnp.zeros(()), {"a": jnp.ones(2)}, {"a": jnp.ones(3)}),
            "updates has",
        ),
        (lambda: curvax.held_out_stride(lambda w: None, W, W), "returned a NoneType"),
        (lambda: curvax.noise_scale_from_batches({"a": jnp.ones(2)}, {"a": jnp.ones(3)}, 1, 2), "small has"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
