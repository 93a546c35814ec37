"""The ends of the range of floats: every rule against float64, against powers of two, and where a layer is truly zero.

Numbers below the smallest normal one are no part of this: XLA takes them for 0 on CPUs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax

TINY = np.finfo(np.float32).tiny
ALL = {".*": "all"}


def or_one(radius):
    return np.where((radius > 0) & (radius < np.inf), radius, 1)


def reference_curvature(w, g, h, damping):
    return (1 + g**2) ** 1.5 / (np.abs(h) + damping * np.mean(np.abs(h[g != 0])))


# For each rule the transformation, and its radius of flat float64 arrays.
RULES = {
    "lars": (curvax.scale_by_lars(layers=ALL), lambda w, g, h: np.linalg.norm(w) / np.linalg.norm(g)),
    "eps": (curvax.scale_by_lars(eps=1e-3, layers=ALL), lambda w, g, h: np.linalg.norm(w) / (np.linalg.norm(g) + 1e-3)),
    "percent_delta": (curvax.scale_by_percent_delta(layers=ALL), lambda w, g, h: w.size / np.sum(np.abs(g / w))),
    "median": (
        curvax.scale_by_median_curvature(layers=ALL),
        lambda w, g, h: np.median(np.abs(w)) / np.median(np.abs(g)),
    ),
    "median_of_ratios": (
        curvax.scale_by_median_curvature(layers=ALL, median_of_ratios=True),
        lambda w, g, h: np.median(np.abs(w / g)),
    ),
    "approximate": (curvax.scale_by_approximate_radius(), lambda w, g, h: np.abs(w / g)),
    "bounded": (curvax.scale_by_approximate_radius(1e9), lambda w, g, h: np.minimum(np.abs(w / g), 1e9)),
    "curvature": (
        curvax.scale_by_curvature_radius(0.1, slope_term=True),
        functools.partial(reference_curvature, damping=0.1),
    ),
    "eq_9": (curvax.scale_by_curvature_radius(slope_term=True), functools.partial(reference_curvature, damping=0.0)),
}
# Those whose update has the unit of the parameters and no other.
LAYER_RULES = ["lars", "eps", "percent_delta", "median", "median_of_ratios"]
HOMOGENEOUS = ["lars", "percent_delta", "median", "median_of_ratios", "approximate"]


@functools.cache
def compiled(rule):
    tx = RULES[rule][0]
    return jax.jit(lambda g, w, h: tx.update(g, optax.EmptyState(), w, hessian_diag=h)[0])


def update(rule, w, g, h=None):
    return np.asarray(compiled(rule)(g, w, jnp.ones_like(g, jnp.float32) if h is None else h))


def draw(rng, size, dtype):
    """Numbers of one scale, of all scales, with one outlier, or with zeros, between the ends of a dtype's range."""
    info = jnp.finfo(dtype)
    low, high = np.log10(max(float(info.tiny), TINY)), np.log10(float(info.max))
    one_scale = rng.normal(size=size) * 10 ** rng.uniform(low + 1, high - 1)
    kind = rng.integers(4)
    if kind == 0:
        one_scale = rng.choice([-1, 1], size) * 10 ** rng.uniform(low, high, size)
    if kind == 1:
        one_scale[rng.integers(size)] = 10 ** (high - 0.1)
    if kind == 2:
        one_scale[rng.random(size) < 0.4] = 0
    x = np.clip(one_scale, -float(info.max), float(info.max)).astype(dtype)
    return np.where(np.abs(x.astype(np.float32)) < TINY, 0, x.astype(np.float32)).astype(dtype)


def assert_right_where_representable(actual, expected, dtype):
    info = jnp.finfo(dtype)
    least, most = 2 * max(float(info.tiny), TINY), 0.99 * float(info.max)
    actual, size = actual.astype(np.float64), np.abs(expected)
    inside = (size >= least) & (size <= most)
    np.testing.assert_allclose(actual[inside], expected[inside], rtol=8 * float(info.eps) + 2e-6)
    assert np.all(np.abs(actual[size > most]) > 0.9 * most) and np.all(np.abs(actual[size < least]) <= 2 * least)


@pytest.mark.slow_but_for("float32")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rule", RULES)
def test_updates_are_right_wherever_they_are_floats(rule, dtype):
    rng = np.random.default_rng(0)
    for _ in range(60):
        w, g = (draw(rng, 6, dtype) for _ in range(2))
        h = draw(rng, 6, np.float32)
        wide = [x.astype(np.float64) for x in (w, g, h)]
        with np.errstate(all="ignore"):
            # Entries without a gradient are not measured, and percent_delta counts none at zero.
            counted = (wide[1] != 0) & ((rule != "percent_delta") | (wide[0] != 0))
            if rule in LAYER_RULES:
                radius = RULES[rule][1](*(x[counted] for x in wide)) if counted.any() else 1.0
            else:
                radius = RULES[rule][1](*wide)
            if rule == "eps" and not w[counted].any():
                radius = 1.0
            expected = or_one(radius) * g.astype(np.float64)
        assert_right_where_representable(update(rule, w, g, h), expected, dtype)


@pytest.mark.slow_but_for("lars-5", "5-lars")
@pytest.mark.parametrize("size", [5, 3000])
@pytest.mark.parametrize("rule", HOMOGENEOUS)
def test_powers_of_two_pass_through(rule, size):
    """2^a w and 2^b g have the update of w and g times 2^a, to the last bit if the ratios themselves are floats."""
    with jax.enable_x64(True):
        for dtype, powers in ((np.float32, (-99, 0, 90)), (np.float64, (-900, 0, 900))):
            w, g = np.random.default_rng(1).normal(size=(2, size)).astype(dtype)
            once = update(rule, w, g)
            for a in powers:
                for b in powers:
                    scaled = update(rule, w * dtype(2.0) ** a, g * dtype(2.0) ** b)
                    by_roots = rule == "median_of_ratios" and abs(a - b) > 100
                    rtol = 4 * np.finfo(dtype).eps if by_roots else 0
                    np.testing.assert_allclose(scaled, once * dtype(2.0) ** a, rtol=rtol, atol=0)


@pytest.mark.parametrize("rule", ["lars", "percent_delta"])
def test_sums_over_arrays_of_different_scales(rule):
    """A small array, one of another scale, and one large enough to be summed in another way; with one huge entry."""
    rng = np.random.default_rng(2)
    w = {"a": rng.normal(size=8), "b": 1e25 * rng.normal(size=(3, 5)), "c": 1e-25 * rng.normal(size=2000)}
    g = {"a": rng.normal(size=8), "b": 1e-30 * rng.normal(size=(3, 5)), "c": 1e20 * rng.normal(size=2000)}
    g["c"][7] = 3e38
    w, g = (jax.tree.map(np.float32, t) for t in (w, g))
    together = [np.concatenate([x.ravel().astype(np.float64) for x in t.values()]) for t in (w, g)]
    radius = RULES[rule][1](*together, None)
    actual = np.concatenate([np.ravel(x) for x in jax.jit(RULES[rule][0].update)(g, optax.EmptyState(), w)[0].values()])
    assert_right_where_representable(actual, radius * together[1], np.float32)


@pytest.mark.parametrize("scaler", [curvax.scale_by_lars, curvax.scale_by_median_curvature])
def test_bounds_on_what_follows_a_kernel(scaler):
    """The root mean squares that bound a bias are those of float64, whatever the scales."""
    rng = np.random.default_rng(7)
    kernel, own, bias = rng.normal(size=(4, 3)), rng.normal(size=(4, 3)), rng.normal(size=3)
    update = jax.jit(scaler(layers="kernel").update)
    statistic = np.linalg.norm if scaler is curvax.scale_by_lars else lambda x: np.median(np.abs(x))
    for a, b, c in ((1e25, 1e-12, 1e-30), (1e-25, 1e20, 1e25), (1e-30, 1e-30, 1e-37), (1e37, 1e37, 1e37)):
        w = {"bias": np.zeros(3, np.float32), "kernel": (a * kernel).astype(np.float32)}
        g = {"bias": (c * bias).astype(np.float32), "kernel": (b * own).astype(np.float32)}
        radius = a / b * statistic(kernel) / statistic(own)
        size = 3 * a * np.sqrt(np.mean(kernel**2))
        for name, x in (("kernel", b * own), ("bias", c * bias)):
            expected = min(radius, size / np.sqrt(np.mean(x**2))) * x
            assert_right_where_representable(
                np.asarray(update(g, optax.EmptyState(), w)[0][name]), expected, np.float32
            )


MESH = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


@pytest.mark.slow_but_for("64-")
@pytest.mark.parametrize("rule", ["lars", "percent_delta", "median_of_ratios"])
@pytest.mark.parametrize("size", [64, 16384])
def test_sums_over_devices_of_different_scales(rule, size):
    """Each device has another scale, and only all of them together have the radius."""
    scales = np.repeat(10.0 ** np.array([-30, 0, -20, 10, 20, 30, 0, -10]), size // 8)
    w, g = (np.random.default_rng(3).normal(size=(2, size)) * [np.roll(scales, size // 8), scales]).astype(np.float32)
    expected = RULES[rule][1](w.astype(np.float64), g.astype(np.float64), None) * g.astype(np.float64)
    tx = {
        "lars": curvax.scale_by_lars,
        "percent_delta": curvax.scale_by_percent_delta,
        "median_of_ratios": functools.partial(curvax.scale_by_median_curvature, median_of_ratios=True),
    }[rule]
    by_name = jax.shard_map(
        lambda g, w: tx(layers=ALL, param_axis_name="x").update(g, optax.EmptyState(), w)[0],
        mesh=MESH,
        in_specs=P("x"),
        out_specs=P("x"),
    )
    assert_right_where_representable(np.asarray(jax.jit(by_name)(g, w)), expected, np.float32)
    placed = (jax.device_put(x, NamedSharding(MESH, P("x"))) for x in (g, w))
    automatic = jax.jit(lambda g, w: tx(layers=ALL).update(g, optax.EmptyState(), w)[0])(*placed)
    assert_right_where_representable(np.asarray(automatic), expected, np.float32)


@pytest.mark.parametrize("rule", ["lars", "percent_delta", "median", "median_of_ratios"])
def test_layers_that_are_measured_together_have_the_radii_that_they_have_alone(rule):
    """Of all sizes, those that share a program and those that do not, and of two dtypes."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(8)
        sizes = [7, 5000, 0, 1, 1025, 64, 3, 1000, 100, 4, 4097]
        dtypes = [np.float32, np.float64]
        w, g = (
            {f"{n}/{dtype.__name__}": rng.normal(size=n).astype(dtype) for n in sizes for dtype in dtypes}
            for _ in range(2)
        )
        tx = {
            "lars": curvax.scale_by_lars,
            "percent_delta": curvax.scale_by_percent_delta,
            "median": curvax.scale_by_median_curvature,
            "median_of_ratios": functools.partial(curvax.scale_by_median_curvature, median_of_ratios=True),
        }[rule](layers="array")
        found = jax.jit(tx.update)(g, optax.EmptyState(), w)[0]
        for name, x in w.items():
            if x.size:
                radius = RULES[rule][1](x.astype(np.float64), g[name].astype(np.float64), None)
                np.testing.assert_allclose(found[name], radius * g[name], rtol=20 * np.finfo(x.dtype).eps)
            assert found[name].dtype == x.dtype


@pytest.mark.parametrize("scaler", [curvax.scale_by_lars, curvax.scale_by_percent_delta])
def test_an_update_holds_no_copy_of_a_parameter(scaler):
    tx, leaf = scaler(layers="kernel"), jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    compiled = jax.jit(tx.update).lower([leaf], optax.EmptyState(), [leaf]).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * leaf.size * 4


def test_long_sums_of_equal_terms_round_no_worse_than_one_float():
    for size in (1000, 3_000_000):
        x = np.full(size, 1.1, np.float32)
        np.testing.assert_allclose(update("lars", x, np.ones_like(x)), x, rtol=1e-5)
        np.testing.assert_allclose(update("percent_delta", x, np.ones_like(x)), x, rtol=2e-5)


@pytest.mark.parametrize("rule", HOMOGENEOUS)
def test_zero_infinite_and_nan_layers(rule):
    g = np.array([3.0, -4.0, 5.0], np.float32)
    np.testing.assert_array_equal(update(rule, 0 * g, g), g)
    np.testing.assert_array_equal(update(rule, g, 0 * g), 0 * g)
    assert np.isinf(update(rule, g, np.copysign(np.float32(np.inf), g))).all()
    assert np.isnan(update(rule, g, g * np.float32(np.nan))).all()
    assert np.isnan(update(rule, g * np.float32(np.nan), g)).all()


def test_a_trust_coefficient_of_zero_stops_a_layer():
    """It multiplies the radius of every layer but degenerate ones, as in optax.lars."""
    w, g = jnp.array([3.0, 4.0]), jnp.array([1.0, 2.0])
    for make in (curvax.scale_by_lars, curvax.scale_by_median_curvature):
        np.testing.assert_array_equal(
            make(trust_coefficient=0.0, layers="array").update(g, optax.EmptyState(), w)[0], [0, 0]
        )


def test_the_largest_radius_is_that_of_a_parameter_at_zero_too():
    w, g = jnp.array([0.0, 2.0, 2.0, 0.0]), jnp.array([4.0, 1.0, 0.0, 0.0])
    tx = curvax.scale_by_approximate_radius(0.25)
    np.testing.assert_array_equal(tx.update(g, optax.EmptyState(), w)[0], [1.0, 0.25, 0.0, 0.0])


@pytest.mark.slow_but_for("lars", "curvature]")
@pytest.mark.parametrize("rule", RULES)
def test_derivatives_are_those_of_finite_differences(rule):
    """First and second ones, backwards and forwards; and numbers wherever something is zero."""
    with jax.enable_x64(True):
        x, tx = np.random.default_rng(4).normal(size=15), RULES[rule][0]

        def loss(x):
            w, g, h = x.reshape(3, 5)
            return jnp.sum(jnp.cos(jnp.arange(5.0)) * tx.update(g, optax.EmptyState(), w, hessian_diag=h)[0] ** 2)

        # All points at once: one program.
        steps = 1e-5 * np.concatenate([np.eye(15), -np.eye(15)])
        masks = [np.arange(5) >= zeros for zeros in (0, 1, 3, 5)]
        degenerate = [x * np.concatenate([a, b, a]) for a in masks for b in masks]
        points = np.stack([x, *(x + steps), *degenerate])
        derivatives = jax.jit(jax.vmap(lambda x: (loss(x), jax.grad(loss)(x), jax.hessian(loss)(x))))(points)
        value, slope, curvature = map(np.asarray, derivatives)
        np.testing.assert_allclose(slope[0], (value[1:16] - value[16:31]) / 2e-5, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(curvature[0], (slope[1:16] - slope[16:31]) / 2e-5, rtol=1e-6, atol=1e-7)
        assert np.isfinite(slope).all() and np.isfinite(curvature).all()


@pytest.mark.parametrize("rule", HOMOGENEOUS)
def test_derivatives_at_the_ends_of_the_range(rule):
    """Euler's identity: the update is homogeneous, of degree 1 in w and of degree 0 but for g itself in g."""
    w, g = np.random.default_rng(5).normal(size=(2, 6)).astype(np.float32)
    step = lambda x, y: compiled(rule)(y, x, jnp.ones(6))

    @jax.jit
    def derivatives(x, y):
        u, along_w = jax.jvp(lambda x: step(x, y), (x,), (x,))
        return u, along_w, jax.jvp(lambda y: step(x, y), (y,), (y,))[1]

    for a in (1e-30, 1.0, 1e30):
        for b in (1e-30, 1.0, 1e30):
            x, y = w * np.float32(a), g * np.float32(b)
            u, along_w, along_g = derivatives(x, y)
            np.testing.assert_allclose(along_w, u, rtol=1e-5)
            np.testing.assert_allclose(along_g, np.zeros(6), atol=1e-5 * np.abs(u).max())


def test_the_mean_of_two_huge_magnitudes_is_a_float():
    for dtype, huge in ((np.float32, 3e38), (np.float16, 6e4)):
        x = jnp.array([1.0, huge, -huge, huge], dtype)
        assert curvax.median(x) == x[1]
        np.testing.assert_allclose(curvax.median(jnp.array([huge / 2, huge], dtype)), dtype(0.75 * huge), rtol=1e-3)
    assert np.isinf(curvax.median(jnp.array([1.0, jnp.inf])))


def test_the_derivative_of_a_median_is_that_of_the_entries_in_the_middle():
    x = jnp.array([4.0, -1.0, 0.5, -3.0])
    np.testing.assert_array_equal(jax.grad(curvax.median)(x), [0, -0.5, 0, -0.5])
    np.testing.assert_allclose(jax.grad(curvax.quantile)(x, 0.5), [0, -0.5, 0, -0.5])
    np.testing.assert_allclose(jax.grad(curvax.median)(jnp.array([2.0, -2.0, 2.0])), [1 / 3, -1 / 3, 1 / 3])
    by_name = jax.shard_map(lambda x: curvax.median(x, "x"), mesh=MESH, in_specs=P("x"), out_specs=P())
    x = np.random.default_rng(6).normal(size=40).astype(np.float32)
    np.testing.assert_allclose(jax.jit(jax.grad(by_name))(x), jax.grad(curvax.median)(x), rtol=1e-6)


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
