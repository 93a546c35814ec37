"""The layers of kernels: what follows what, and how far anything goes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax


def update(tx, g, w, **extra):
    return tx.update(g, tx.init(w), w, **extra)[0]


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


RULES = {
    "lars": lambda: curvax.scale_by_lars(layers="kernel"),
    "percent_delta": curvax.scale_by_percent_delta,
    "median": curvax.scale_by_median_curvature,
}


def network(seed=0, scale=0.05):
    """A kernel with its bias, an embedding, and a norm."""
    rng = np.random.default_rng(seed)
    shapes = {"dense": {"kernel": (8, 6), "bias": (6,)}, "embedding": (10, 4), "norm": {"scale": (6,), "shift": (6,)}}
    draw = lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def with_bias(tree, value):
    return {**tree, "dense": {**tree["dense"], "bias": value}}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_a_follower_goes_at_most_three_times_as_far_as_its_kernel_is_large(rule):
    w, g = network(0), network(1)
    kernel = rms(w["dense"]["kernel"])
    for factor, is_bounded in [(1e-3, False), (1e6, True)]:
        bias = g["dense"]["bias"] * factor
        updates = update(RULES[rule](), with_bias(g, bias), w)
        if is_bounded:
            np.testing.assert_allclose(rms(updates["dense"]["bias"]), 3 * kernel, rtol=1e-5)
            # Its direction is that of its gradient.
            np.testing.assert_allclose(
                updates["dense"]["bias"] / rms(updates["dense"]["bias"]), bias / rms(bias), rtol=1e-4
            )
        else:
            radius = updates["dense"]["kernel"] / g["dense"]["kernel"]
            np.testing.assert_allclose(updates["dense"]["bias"] / bias, float(radius[0, 0]), rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_what_follows_no_kernel_has_the_radius_of_all_together(rule):
    """The root mean square of theirs, weighted by squared gradients: of LARS's, that of LARS."""
    w, g = network(0), network(1)
    g["norm"] = jax.tree.map(lambda x: 1e-2 * x, g["norm"])
    updates = update(RULES[rule](), g, w)
    steps, slopes = (
        np.linalg.norm([np.linalg.norm(t["dense"]["kernel"]), np.linalg.norm(t["embedding"])]) for t in (updates, g)
    )
    for name in ("scale", "shift"):
        np.testing.assert_allclose(updates["norm"][name], steps / slopes * g["norm"][name], rtol=1e-5)
    if rule == "lars":
        size = np.linalg.norm([np.linalg.norm(w["dense"]["kernel"]), np.linalg.norm(w["embedding"])])
        assert steps == pytest.approx(size, rel=1e-5)


def test_nothing_depends_on_the_scale_of_the_loss():
    """A loss that is summed where it could be averaged has gradients that are larger, everywhere."""
    w, g = network(0), network(1)
    w = with_bias(w, jnp.zeros(6))
    for rule in RULES.values():
        ours, summed = (update(rule(), jax.tree.map(lambda x: c * x, g), w) for c in (1.0, 1024.0))  # noqa: B023
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, summed)


def test_a_median_of_mostly_tiny_gradients_does_not_throw_the_others():
    """The query and key of a fused kernel have next to no gradient at first, its value has."""
    w = jnp.full((8, 6), 0.1)
    g = jnp.full((8, 6), 1e-6).at[:, 4:].set(1.0)
    np.testing.assert_allclose(rms(update(curvax.scale_by_median_curvature(), g, w)), 0.3, rtol=1e-5)
    np.testing.assert_allclose(update(curvax.scale_by_median_curvature(layers="array"), g, w)[0, 5], 1e5, rtol=1e-5)
    half = curvax.scale_by_median_curvature(trust_coefficient=0.5)
    np.testing.assert_allclose(rms(update(half, g, w)), 0.15, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3])
def test_a_kernel_near_zero_moves_as_if_it_were_larger(rule, size):
    """It leaves zero at a tenth of the others' size, whatever the scale of the loss, or of the parameters."""
    w, g = network(0), network(1)
    sign = jnp.sign(w["embedding"])
    for factor, scale in ((1e-6, 1.0), (1.0, 1e-10), (1e6, 1e10)):
        parameters = jax.tree.map(lambda x: scale * x, {**w, "embedding": size * sign})  # noqa: B023
        gradients = jax.tree.map(lambda x: factor * x, g)  # noqa: B023
        entries = [*np.ravel(parameters["dense"]["kernel"]), *np.ravel(parameters["embedding"])]
        expected = 0.1 * rms(entries if size else entries[:48])
        found = update(RULES[rule](), gradients, parameters)["embedding"]
        assert rms(found) == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(found / rms(found), g["embedding"] / rms(g["embedding"]), rtol=1e-5)
    rows = {**g, "embedding": g["embedding"].at[2:].set(0)}
    found = update(RULES[rule](), rows, {**w, "embedding": jnp.zeros((10, 4))})["embedding"]
    assert rms(found[:2]) == pytest.approx(0.1 * rms(w["dense"]["kernel"]), rel=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_network_of_one_tiny_kernel_is_not_near_zero(rule):
    w, g = 1e-20 * network(0)["embedding"], network(1)["embedding"]
    array = {"lars": curvax.scale_by_lars(), "percent_delta": curvax.scale_by_percent_delta(layers="array")}
    plain = array.get(rule, curvax.scale_by_median_curvature(layers="array"))
    np.testing.assert_allclose(update(RULES[rule](), g, w), update(plain, g, w), rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_where_all_is_zero_the_radius_is_at_most_one(rule):
    nothing = jax.tree.map(jnp.zeros_like, network(0))
    for factor in (1e-6, 1e6):
        gradients = jax.tree.map(lambda x: factor * x, network(1))  # noqa: B023
        updates = update(RULES[rule](), gradients, nothing)
        for u, x in zip(jax.tree.leaves(updates), jax.tree.leaves(gradients), strict=True):
            np.testing.assert_allclose(u, min(1, 1 / rms(x)) * x, rtol=1e-5)


def test_newton_s_steps_out_of_zero_keep_their_length():
    w, u = network(0), network(1)
    w["embedding"] = jnp.zeros((10, 4))
    updates = update(curvax.scale_by_lars(layers="kernel", follow_all=False), u, w)
    np.testing.assert_allclose(updates["embedding"], u["embedding"], rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_without_kernels_a_radius_is_at_most_one(rule):
    w, g = {"a": jnp.array([3.0, 4.0]), "b": jnp.array(2.0)}, {"a": jnp.array([0.3, -0.4]), "b": jnp.array(-50.0)}
    updates = update(RULES[rule](), g, w)
    np.testing.assert_array_equal(updates["a"], g["a"])
    np.testing.assert_allclose(updates["b"], -1.0, rtol=1e-6)


def test_steps_that_are_newton_s_keep_their_length_where_they_follow_no_kernel():
    w, u = network(0), jax.tree.map(lambda x: 0.1 * x, network(1))
    updates = update(curvax.scale_by_lars(layers="kernel", follow_all=False), u, w)
    np.testing.assert_array_equal(updates["norm"]["scale"], u["norm"]["scale"])
    ratio = jnp.linalg.norm(w["embedding"]) / jnp.linalg.norm(u["embedding"])
    np.testing.assert_allclose(updates["embedding"], ratio * u["embedding"], rtol=1e-5)
    u["norm"]["scale"] = jnp.full(6, 1e5)
    bounded = update(curvax.scale_by_lars(layers="kernel", follow_all=False), u, w)
    size = np.sqrt(sum(np.sum(np.square(x)) for x in (w["dense"]["kernel"], w["embedding"])) / 88)
    np.testing.assert_allclose(bounded["norm"]["scale"], 3 * size, rtol=1e-5)


def test_curvature_that_is_noise_sets_no_step():
    """A bias before batch norm has a gradient and a curvature of rounding noise; its kernel's mean damps it."""
    w, g = network(0), network(1)
    h = jax.tree.map(jnp.abs, network(2, scale=1.0))
    g, h = with_bias(g, jnp.full(6, 1e-9)), with_bias(h, jnp.full(6, 1e-16))
    updates = update(curvax.scale_by_curvature_radius(0.1, layers="kernel"), g, w, hessian_diag=h)
    mean = float(jnp.mean(h["dense"]["kernel"]))
    np.testing.assert_allclose(updates["dense"]["bias"], 1e-9 / (0.1 * mean), rtol=1e-5)
    # What follows no kernel is damped by the mean of all; an array that is a layer by a share of that at least.
    kernels = np.concatenate([np.ravel(h["dense"]["kernel"]), np.ravel(h["embedding"])])
    expected = g["norm"]["scale"] / (h["norm"]["scale"] + 0.1 * np.mean(kernels))
    np.testing.assert_allclose(updates["norm"]["scale"], expected, rtol=1e-5)
    alone = update(curvax.scale_by_curvature_radius(0.1, layers="array"), g, w, hessian_diag=h)
    tree = np.mean(np.concatenate([np.ravel(x) for x in jax.tree.leaves(h)]))
    np.testing.assert_allclose(alone["dense"]["bias"], 1e-9 / (0.1 * 1e-4 * tree), rtol=1e-4)


def test_every_dtype_keeps_its_own():
    """Kernels of several dtypes, complex ones too, are followed together by their magnitudes."""
    w = {"a": jnp.full((2, 3), 2.0, jnp.bfloat16), "b": jnp.full((3, 2), 2j, jnp.complex64), "c": jnp.zeros(5)}
    g = {"a": jnp.full((2, 3), 1.0, jnp.bfloat16), "b": jnp.full((3, 2), 1.0 + 0j), "c": jnp.full(5, -0.5)}
    updates = update(curvax.scale_by_lars(layers="kernel"), g, w)
    assert [u.dtype for u in jax.tree.leaves(updates)] == [jnp.bfloat16, jnp.complex64, jnp.float32]
    np.testing.assert_allclose(updates["c"], -1.0, rtol=1e-6)


def test_holes_are_passed_by():
    w, g = network(0), network(1)
    tx = curvax.scale_by_lars(layers="kernel")
    whole = update(tx, g, w)
    masked = optax.masked(tx, {"dense": True, "embedding": False, "norm": False})
    assert jnp.array_equal(update(masked, g, w)["dense"]["bias"], whole["dense"]["bias"])
    holes = [{**tree, "embedding": None} for tree in (g, w)]
    assert jnp.array_equal(update(tx, *holes)["dense"]["bias"], whole["dense"]["bias"])
