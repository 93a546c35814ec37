"""Every rule against formulas written again in NumPy and float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import curvax


def flat(arrays):
    return np.concatenate([np.ravel(x).astype(np.float64) for x in arrays])


def or_one(radius):
    return radius if np.isfinite(radius) and radius > 0 else 1.0


def reference_lars(w, g):
    return np.sqrt(np.sum(w**2)) / np.sqrt(np.sum(g**2))


def reference_percent_delta(w, g):
    w, g = w[w != 0], g[w != 0]
    return len(w) / np.sum(np.abs(g / w))


def reference_median(w, g):
    return np.median(np.abs(w)) / np.median(np.abs(g))


def reference_median_of_ratios(w, g):
    return np.median(np.where(w == 0, 0, np.abs(w / g)))


def expected(rule, layers, w, g):
    """`radius * g` in float64, where `layers` names a list of `(measured, scaled)` pairs of paths.

    Entries without a gradient are not measured. The bounds of the layers of kernels have tests of their own.
    """
    out = {name: dict(module) for name, module in g.items()}
    for measured, scaled in GROUPS[layers]:
        w_and_g = [flat([tree[m][n] for m, n in measured]) for tree in (w, g)]
        moving = w_and_g[1] != 0
        with np.errstate(all="ignore"):
            radius = or_one(rule(*(x[moving] for x in w_and_g))) if moving.any() else 1
        for m, n in scaled:
            out[m][n] = radius * g[m][n].astype(np.float64)
    return out


PATHS = [(m, n) for m in problems.SHAPES for n in problems.SHAPES[m]]
GROUPS = {
    "array": [([p], [p]) for p in PATHS],
    "module": [([p for p in PATHS if p[0] == m],) * 2 for m in problems.SHAPES],
}

RULES = {
    "lars": (curvax.scale_by_lars, reference_lars),
    "percent_delta": (curvax.scale_by_percent_delta, reference_percent_delta),
    "median": (curvax.scale_by_median_curvature, reference_median),
    "median_of_ratios": (
        functools.partial(curvax.scale_by_median_curvature, median_of_ratios=True),
        reference_median_of_ratios,
    ),
}


def update(tx, g, w, **extra):
    return tx.update(g, tx.init(w), w, **extra)[0]


@pytest.mark.slow_but_for("lars")
@pytest.mark.parametrize("layers", GROUPS)
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), zeros=st.sampled_from([0.0, 0.4, 1.0]))
def test_layer_rules(rule, layers, seed, zeros):
    scaler, reference = RULES[rule]
    w, g = problems.random_tree(seed, zeros=zeros), problems.random_tree(seed + 1, zeros=zeros / 2)
    actual = update(scaler(layers=layers), g, w)
    chex.assert_trees_all_close(actual, expected(reference, layers, w, g), rtol=2e-5)


@pytest.mark.slow_but_for("True")
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), damping=st.sampled_from([0.0, 0.1, 1.0]), cap=st.sampled_from([None, 3.0]))
@pytest.mark.parametrize("slope_term", [True, False, None])
def test_curvature_radius(slope_term, seed, damping, cap):
    w, g, h = (problems.random_tree(seed + i) for i in range(3))

    def reference(g, h):
        g, h = g.astype(np.float64), np.abs(h.astype(np.float64))
        with_slope = damping == 0 if slope_term is None else slope_term
        radius = ((1 + g**2) ** 1.5 if with_slope else 1) / (h + damping * np.mean(h))
        return (radius if cap is None else np.minimum(radius, cap)) * g

    tx = curvax.scale_by_curvature_radius(damping, cap, slope_term=slope_term)
    chex.assert_trees_all_close(update(tx, g, w, hessian_diag=h), jax.tree.map(reference, g, h), rtol=2e-5)


def test_a_damping_that_is_injected_decides_on_the_slope_term_as_a_number_does():
    w, g, h = (problems.random_tree(i) for i in range(3))
    tx = optax.inject_hyperparams(curvax.scale_by_curvature_radius)(damping=0.0)
    for damping in (0.0, 0.1):
        state = tx.init(w)
        state.hyperparams["damping"] = jnp.asarray(damping)
        found = jax.jit(tx.update)(g, state, w, hessian_diag=h)[0]
        expected = update(curvax.scale_by_curvature_radius(damping), g, w, hessian_diag=h)
        chex.assert_trees_all_close(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda x: curvax.scale_by_curvature_radius(x), "damping"),
        (lambda x: curvax.scale_by_curvature_radius(max_radius=x), "max_radius"),
        (lambda x: curvax.scale_by_approximate_radius(x), "max_radius"),
        (lambda x: curvax.scale_by_lars(trust_coefficient=x), "trust_coefficient"),
        (lambda x: curvax.lars(0.1, eps=x), "eps"),
        (lambda x: curvax.mclr(0.1, trust_coefficient=x), "trust_coefficient"),
        (lambda x: curvax.percent_delta(0.1, trust_coefficient=x), "trust_coefficient"),
        (lambda x: curvax.cblr(0.1, damping=x), "damping"),
        (lambda x: curvax.scale_by_lars(x), "weight_decay"),
        (lambda x: curvax.mclr(0.1, x), "weight_decay"),
        (lambda x: curvax.cblr(0.1, weight_decay=x), "weight_decay"),
        (lambda x: curvax.percent_delta(x), "learning_rate"),
        (lambda x: curvax.lamb(x), "learning_rate"),
        (lambda x: curvax.lars(0.1, momentum=x), "momentum"),
        (lambda x: curvax.cblr(0.1, momentum=x), "momentum"),
    ],
)
@pytest.mark.parametrize("value", [-0.1, np.float32(np.nan), "0.1", True])
def test_numbers_that_are_none_are_refused(make, name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        make(value)


def test_the_sign_of_curvature_is_ignored_by_the_radius():
    w, g, h = (problems.random_tree(i) for i in range(3))
    tx = curvax.scale_by_curvature_radius(0.1)
    minus_h = jax.tree.map(np.negative, h)
    chex.assert_trees_all_equal(update(tx, g, w, hessian_diag=h), update(tx, g, w, hessian_diag=minus_h))


def test_flat_directions():
    """Zero curvature has radius 1 by the policy for degenerate radii, or the largest one where there is one."""
    w, g, h = jnp.ones(3), jnp.array([2.0, 0.0, 4.0]), jnp.array([0.0, 0.0, 2.0])
    plain = update(curvax.scale_by_curvature_radius(slope_term=False), g, w, hessian_diag=h)
    capped = update(curvax.scale_by_curvature_radius(0.0, 10.0, slope_term=False), g, w, hessian_diag=h)
    np.testing.assert_allclose(plain, [2.0, 0.0, 2.0])
    np.testing.assert_allclose(capped, [20.0, 0.0, 2.0])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_approximate_radius_is_signed_relative_step(seed):
    """Eq. 17 with eq. 11: a step of |w| sign(g), and of g where w starts at zero."""
    w, g = problems.random_tree(seed, zeros=0.2), problems.random_tree(seed + 1, zeros=0.2)
    reference = jax.tree.map(lambda w, g: np.where(w == 0, g, np.abs(w) * np.sign(g)), w, g)
    chex.assert_trees_all_close(update(curvax.scale_by_approximate_radius(), g, w), reference, rtol=1e-6)


def radius_of(tx, w, g):
    return float(np.ravel(update(tx, g, w))[0] / np.ravel(g)[0])


def test_lars_is_a_weighted_root_mean_square_of_the_radii():
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=(2, 1000)).astype(np.float32)
    r = np.abs(w.astype(np.float64) / g)
    assert radius_of(curvax.scale_by_lars(), w, g) == pytest.approx(
        np.sqrt(np.sum((g * r) ** 2) / np.sum(g**2.0)), rel=1e-5
    )


def test_percent_delta_is_the_harmonic_mean_of_the_radii():
    rng = np.random.default_rng(1)
    w, g = rng.normal(size=(2, 1000)).astype(np.float32)
    harmonic = 1 / np.mean(1 / np.abs(w.astype(np.float64) / g))
    assert radius_of(curvax.scale_by_percent_delta(layers="array"), w, g) == pytest.approx(harmonic, rel=1e-4)


def test_medians_and_lars_agree_for_gaussian_layers():
    """|w| and |g| are half-normal of scales 0.3 and 0.01, so every statistic of the pair has the ratio 30."""
    rng = np.random.default_rng(2)
    w, g = (0.3 * rng.normal(size=300_000)).astype(np.float32), (0.01 * rng.normal(size=300_000)).astype(np.float32)
    for tx in (
        curvax.scale_by_lars(),
        curvax.scale_by_median_curvature(layers="array"),
        curvax.scale_by_median_curvature(layers="array", median_of_ratios=True),
    ):
        assert radius_of(tx, w, g) == pytest.approx(30, rel=0.02)


LAYER_RULES = [curvax.scale_by_lars, curvax.scale_by_percent_delta, curvax.scale_by_median_curvature]


@pytest.mark.parametrize("scaler", LAYER_RULES)
def test_degenerate_layers_have_radius_one_after_the_trust_coefficient(scaler):
    tx, zeros, ones = scaler(trust_coefficient=0.01, layers="array"), jnp.zeros(4), jnp.ones(4)
    np.testing.assert_array_equal(update(tx, ones, zeros), ones)
    np.testing.assert_array_equal(update(tx, zeros, ones), zeros)
    np.testing.assert_array_equal(update(tx, zeros, zeros), zeros)
    np.testing.assert_allclose(update(tx, ones, ones), 0.01 * ones, rtol=1e-6)


EVERY_RULE = {
    **{name: scaler for name, (scaler, _) in RULES.items()},
    "curvature": functools.partial(curvax.scale_by_curvature_radius, 0.3),
    "curvature_with_norm_ratio": lambda **kwargs: optax.chain(
        curvax.scale_by_curvature_radius(0.3, **kwargs), curvax.scale_by_lars(**kwargs)
    ),
}


@pytest.mark.slow_but_for("9-", "11-")
@pytest.mark.parametrize("rule", EVERY_RULE)
@pytest.mark.parametrize("layers", ["array", "kernel"])
@pytest.mark.parametrize("looked_up", [2, 9, 10, 11, 20])
def test_rows_that_were_not_looked_up_do_not_shape_the_radius_of_others(rule, layers, looked_up):
    """An embedding of 20 rows moves as one that has only those which the batch contains."""
    rng = np.random.default_rng(looked_up)
    w, g, h = rng.normal(size=(3, 20, 6)).astype(np.float32)
    rows = rng.permutation(20)[:looked_up]
    g[np.setdiff1d(np.arange(20), rows)] = 0
    tx = EVERY_RULE[rule](layers=layers)
    whole = update(tx, g, w, hessian_diag=h)
    np.testing.assert_allclose(whole[rows], update(tx, g[rows], w[rows], hessian_diag=h[rows]), rtol=1e-5)
    np.testing.assert_array_equal(np.delete(whole, rows, 0), 0)


@pytest.mark.parametrize("scaler", LAYER_RULES)
def test_what_only_decays_is_not_measured_either(scaler):
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=(2, 20, 6)).astype(np.float32)
    g[3:] = 0
    whole = update(scaler(0.1, layers="array"), g, w)
    np.testing.assert_allclose(whole[:3], update(scaler(0.1, layers="array"), g[:3], w[:3]), rtol=1e-5)
    radius = whole[0, 0] / (g[0, 0] + 0.1 * w[0, 0])
    np.testing.assert_allclose(whole[3:], radius * 0.1 * w[3:], rtol=1e-5)
    undecayed = update(scaler(0.1, {"w": False}, layers="array"), {"w": g}, {"w": w})["w"]
    np.testing.assert_allclose(undecayed, update(scaler(layers="array"), g, w), rtol=1e-6)


@pytest.mark.parametrize("scaler", LAYER_RULES)
@pytest.mark.parametrize("spoiled", ["w", "g"])
def test_nan_propagates_within_its_layer_only(scaler, spoiled):
    tree = {"a": np.full((2, 2), 0.5, np.float32), "b": np.full((2, 2), 2.0, np.float32)}
    bad = {**tree, "a": np.array([[0.5, np.nan], [0.5, 0.5]], np.float32)}
    updates = update(scaler(layers="array"), bad if spoiled == "g" else tree, bad if spoiled == "w" else tree)
    assert np.isnan(updates["a"]).all()
    np.testing.assert_allclose(updates["b"], tree["b"])


@pytest.mark.parametrize("scaler", [*LAYER_RULES, curvax.scale_by_approximate_radius])
def test_an_infinite_gradient_is_seen_in_the_update(scaler):
    g = jnp.array([1.0, jnp.inf, 2.0])
    assert not np.isfinite(update(scaler(), g, jnp.ones(3))).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("scaler", LAYER_RULES)
def test_statistics_are_float32_and_updates_keep_their_dtype(scaler, dtype):
    """In float16 the sum of these squares is infinite, and in bfloat16 a sum of ones stops at 256."""
    w, g = jnp.full((64, 64), 200.0, dtype), jnp.full((64, 64), 100.0, dtype)
    updates = update(scaler(), g, w)
    assert updates.dtype == dtype
    np.testing.assert_allclose(updates.astype(np.float32), 200.0, rtol=1e-2)


@pytest.mark.slow_but_for("lars")
@pytest.mark.parametrize("scaler", LAYER_RULES)
def test_float64(scaler):
    with jax.enable_x64(True):
        w, g = (jnp.asarray(problems.random_tree(i, np.float64)["dense"]["kernel"]) for i in range(2))
        reference = {
            curvax.scale_by_lars: reference_lars,
            curvax.scale_by_percent_delta: reference_percent_delta,
            curvax.scale_by_median_curvature: reference_median,
        }[scaler]
        np.testing.assert_allclose(update(scaler(), g, w), reference(flat([w]), flat([g])) * g, rtol=1e-13)


@pytest.mark.slow_but_for("lars")
@pytest.mark.parametrize("scaler", [*LAYER_RULES, curvax.scale_by_approximate_radius])
def test_complex_parameters(scaler):
    """Magnitudes are all that a radius sees, so turning every number in the plane turns the update too."""
    w, g = (problems.random_tree(i)["dense"] for i in range(2))
    turned_w = jax.tree.map(lambda x: x.astype(np.complex64) * np.exp(np.complex64(0.7j)), w)
    turned_g = jax.tree.map(lambda x: x.astype(np.complex64) * 1j, g)
    expected = jax.tree.map(lambda x: x.astype(np.complex64) * 1j, update(scaler(), g, w))
    chex.assert_trees_all_close(update(scaler(), turned_g, turned_w), expected, rtol=1e-5)


def test_complex_parameters_have_no_curvature():
    w = {"a": {"kernel": jnp.ones(2, jnp.complex64)}}
    with pytest.raises(ValueError, match="'a/kernel' is complex"):
        update(curvax.scale_by_curvature_radius(), w, w, hessian_diag=w)


@pytest.mark.parametrize("scaler", LAYER_RULES)
def test_empty_scalar_and_missing_leaves(scaler):
    w = {"empty": jnp.zeros((0, 3)), "none": None, "scalar": jnp.array(2.0), "kernel": jnp.full((2, 2), 4.0)}
    g = {"empty": jnp.zeros((0, 3)), "none": None, "scalar": jnp.array(3.0), "kernel": jnp.full((2, 2), 2.0)}
    updates = update(scaler(layers="array"), g, w)
    chex.assert_trees_all_close(
        updates, {"empty": jnp.zeros((0, 3)), "none": None, "scalar": jnp.array(2.0), "kernel": jnp.full((2, 2), 4.0)}
    )


def test_errors_say_what_to_pass():
    w = jnp.ones(2)
    with pytest.raises(ValueError, match=r"update\(updates, state, params\)"):
        curvax.scale_by_lars().update(w, optax.EmptyState())
    with pytest.raises(ValueError, match="hessian_diag="):
        update(curvax.scale_by_curvature_radius(), w, w)
    with pytest.raises(ValueError, match=r"hessian_diag has \(3,\) at 'a'.*\(2,\)"):
        update(curvax.scale_by_curvature_radius(), {"a": w}, {"a": w}, hessian_diag={"a": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"None at 'a'.*\(2,\)"):
        curvax.scale_by_lars().update({"a": w}, optax.EmptyState(), {"a": None})


@pytest.mark.parametrize("hole", [None, optax.MaskedNode()])
def test_parameters_without_curvature_have_radius_one(hole):
    w, g, h = (problems.random_tree(i) for i in range(3))
    newton = curvax.scale_by_curvature_radius(0.1)
    some = update(
        newton, g, w, hessian_diag={**h, "norm": dict.fromkeys(h["norm"], hole), "dense": {**h["dense"], "bias": hole}}
    )
    whole = update(newton, g, w, hessian_diag=h)
    expected = {**whole, "norm": g["norm"], "dense": {**whole["dense"], "bias": g["dense"]["bias"]}}
    chex.assert_trees_all_equal(some, expected)


def test_masked_and_partition_hand_down_the_whole_tree_of_curvature():
    w, g, h = (problems.random_tree(i) for i in range(3))
    newton = curvax.scale_by_curvature_radius(0.1)
    whole = update(newton, g, w, hessian_diag=h)
    is_kernel = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", w)
    labels = jax.tree.map(lambda kernel: "newton" if kernel else "plain", is_kernel)
    mixed = jax.tree.map(lambda kernel, new, old: new if kernel else old, is_kernel, whole, g)
    chex.assert_trees_all_close(update(optax.masked(newton, is_kernel), g, w, hessian_diag=h), mixed, rtol=1e-6)
    parts = optax.partition({"newton": newton, "plain": optax.identity()}, labels)
    chex.assert_trees_all_close(update(parts, g, w, hessian_diag=h), mixed, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), fraction=st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_discard_small_gradients_keeps_the_largest(seed, fraction):
    g = problems.random_tree(seed)
    kept = update(curvax.discard_small_gradients(fraction), g, g)

    def reference(g):
        drop = int(np.floor(fraction * g.size + 1e-6))
        order = np.argsort(np.abs(g.ravel()), kind="stable")
        out = g.ravel().copy()
        out[order[:drop]] = 0
        return out.reshape(g.shape)

    chex.assert_trees_all_equal(kept, jax.tree.map(reference, g))


def test_discard_small_gradients_refuses_impossible_fractions():
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        curvax.discard_small_gradients(1.0)


@pytest.mark.parametrize(
    "leaf", [2.0, jnp.array([1, 2]), np.zeros(2, jax.dtypes.float0), jnp.zeros(2, jnp.float8_e4m3fn), jax.random.key(0)]
)
def test_updates_that_are_no_floats_are_named(leaf):
    tree = {"a": jnp.ones(2), "b": leaf}
    with pytest.raises(ValueError, match=r"the update 'b' is .*optax.masked"):
        curvax.scale_by_lars().update(tree, optax.EmptyState(), tree)


@pytest.mark.parametrize("other", [{"a": jnp.ones(2)}, [jnp.ones(2)] * 2, {"a": jnp.ones(2), "b": {"c": jnp.ones(2)}}])
def test_trees_of_another_structure_are_named(other):
    g = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"params (is|has) .*make it a tree like params"):
        curvax.scale_by_lars().update(g, optax.EmptyState(), other)
    with pytest.raises(ValueError, match=r"hessian_diag (is|has) .*make it a tree like params"):
        curvax.scale_by_curvature_radius().update(g, optax.EmptyState(), g, hessian_diag=other)
