import functools

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import curvax


def train(tx, params, gradients, **extra):
    update = jax.jit(lambda g, state, params: tx.update(g, state, params, **extra))
    state = tx.init(params)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def jax_tree(seed, **kwargs):
    return jax.tree.map(jnp.asarray, problems.random_tree(seed, **kwargs))


@pytest.mark.slow_but_for("nothing-settings1")
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.01, "nesterov": True}, {"eps": 0.5, "momentum": 0.5}])
@pytest.mark.parametrize("zero", ["nothing", "params", "gradient"])
def test_lars_equals_optax(settings, zero):
    """Over many steps, and where a norm is zero."""
    params, gradients = jax_tree(0), [jax_tree(i) for i in range(1, 40)]
    if zero == "params":
        params["dense"]["bias"] = jnp.zeros(5)
    if zero == "gradient":
        gradients = [{**g, "dense": jax.tree.map(jnp.zeros_like, g["dense"])} for g in gradients]
    rate = optax.cosine_decay_schedule(2.0, 40)
    ours = train(curvax.lars(rate, **settings), params, gradients)
    theirs = train(optax.lars(rate, **settings), params, gradients)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_lars_masks_equal_optax():
    params, gradients = jax_tree(0), [jax_tree(i) for i in range(1, 10)]
    kernels = jax.tree.map(lambda x: x.ndim > 1, params)
    settings = {"weight_decay": 0.1, "weight_decay_mask": kernels, "trust_ratio_mask": kernels}
    ours, theirs = (train(make(0.1, **settings), params, gradients) for make in (curvax.lars, optax.lars))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_lamb_equals_optax():
    params, gradients = jax_tree(0), [jax_tree(i) for i in range(1, 40)]
    ours, theirs = (train(make(0.01, weight_decay=0.1), params, gradients) for make in (curvax.lamb, optax.lamb))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow_but_for("lars")
@pytest.mark.parametrize("name", ["mclr", "percent_delta", "lars", "lamb", "cblr"])
def test_schedules_and_rates_agree(name):
    params, gradients = jax_tree(0), [jax_tree(i) for i in range(1, 4)]
    make = getattr(curvax, name)
    extra = {}
    if name == "cblr":
        make, extra = functools.partial(make, eigenbasis=False), {"hessian_diag": jax_tree(9)}
    by_rate, by_schedule = (train(make(r), params, gradients, **extra) for r in (0.1, optax.constant_schedule(0.1)))
    chex.assert_trees_all_close(by_rate, by_schedule, rtol=1e-6)


def test_weight_decay_of_mclr_is_that_of_equation_22():
    """One step without momentum is gamma R (g + beta w) with R = median|w| / median|g + beta w|."""
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=(2, 6, 7)).astype(np.float32)
    tx = curvax.mclr(0.1, weight_decay=0.3, momentum=0.0)
    decayed = g.astype(np.float64) + 0.3 * w
    expected = -0.1 * np.median(np.abs(w)) / np.median(np.abs(decayed)) * decayed
    np.testing.assert_allclose(tx.update(g, tx.init(w), w)[0], expected, rtol=1e-5)


# The radius of curvature alone, anew in every step.
RADIUS = {"damping": 0.0, "eigenbasis": False, "orthogonal": False, "norm_ratio": False, "momentum": 0.0}
RADIUS |= {"every": 1, "hessian_decay": 0.0}


def test_cblr_can_be_the_paper_s_equations():
    w, g, h = (jax_tree(i) for i in range(3))
    pure = curvax.cblr(0.5, slope_term=True, **RADIUS)
    updates, _ = pure.update(g, pure.init(w), w, hessian_diag=h)

    def reference(g, h):
        g = np.asarray(g, np.float64)
        return -0.5 * g * (1 + g**2) ** 1.5 / np.abs(h)

    expected = jax.tree.map(reference, g, h)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


def test_cblr_in_coordinates_moves_every_kernel_by_the_learning_rate():
    """The norm ratio sets the length of a step, curvature its direction; biases follow their kernel's ratio."""
    w, g, h = (jax_tree(i) for i in range(3))
    tx = curvax.cblr(0.02, damping=0.1, momentum=0.0, eigenbasis=False, orthogonal=False)
    updates, _ = tx.update(g, tx.init(w), w, hessian_diag=h)
    for name in ("conv", "dense"):
        lengths = [float(jnp.linalg.norm(tree[name]["kernel"])) for tree in (updates, w)]
        assert lengths[0] / lengths[1] == pytest.approx(0.02, rel=1e-5)
        mean = jnp.mean(jnp.abs(h[name]["kernel"]))
        direction = {k: g[name][k] / (jnp.abs(h[name][k]) + 0.1 * mean) for k in g[name]}
        ratio = {k: np.asarray(updates[name][k] / direction[k]).ravel() for k in direction}
        np.testing.assert_allclose(ratio["bias"], ratio["kernel"][0], rtol=1e-4)


SPECTRUM = jnp.array([[1.0, 10.0, 100.0, 1000.0]])


def ill_conditioned(w):
    """A quadratic of known spectrum in coordinates where the Hessian is diagonal; its minimum is at ones."""
    return jnp.sum(SPECTRUM * (w - 1) ** 2) / 2


def distance_after(tx, steps, w):
    @jax.jit
    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(ill_conditioned)(w), state, w, obj_fn=ill_conditioned)
        return (optax.apply_updates(w, updates), state), None

    (w, _), _ = jax.lax.scan(step, (w, tx.init(w)), length=steps)
    return float(jnp.linalg.norm(w - 1))


def test_curvature_makes_convergence_independent_of_the_condition_number():
    """Newton shrinks the error by 1 - gamma a step in all directions, descent by 1 - 1/1000 in the flattest."""
    start = jnp.array([[2.0, 2.0, 2.0, 2.0]])
    newton = curvax.cblr(0.1, method="hutchinson", **RADIUS)
    assert distance_after(newton, 50, start) == pytest.approx(2 * 0.9**50, rel=1e-2)
    descent = optax.with_extra_args_support(optax.sgd(1e-3))
    by_eigenvalue = (1 - 1e-3 * np.asarray(SPECTRUM)) ** 50
    assert distance_after(descent, 50, start) == pytest.approx(np.linalg.norm(by_eigenvalue), rel=1e-2)


@pytest.mark.slow_but_for("lars")
@pytest.mark.parametrize(
    "tx",
    [
        curvax.lars(optax.cosine_decay_schedule(0.05, 400), trust_coefficient=1.0),
        curvax.mclr(optax.cosine_decay_schedule(0.001, 400)),
        curvax.percent_delta(optax.cosine_decay_schedule(0.05, 400)),
        curvax.lamb(optax.cosine_decay_schedule(0.05, 400)),
        curvax.cblr(optax.cosine_decay_schedule(0.05, 400)),
    ],
    ids=["lars", "mclr", "percent_delta", "lamb", "cblr"],
)
def test_every_method_trains_a_classifier_to_its_minimum_loss(tx):
    """Ten points in general position in ten dimensions are separable, so that the loss goes to zero.

    With a rate that ends there too: relative steps do not shrink with the gradient.
    """
    data = problems.classification(examples=10, features=10)
    objective = curvax.Objective(problems.mlp, problems.cross_entropy, data)
    params = problems.mlp_params(sizes=(10, 16, 4))

    @jax.jit
    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(objective)(params)
        updates, state = tx.update(gradient, state, params, obj_fn=objective)
        return (optax.apply_updates(params, updates), state), value

    _, losses = jax.lax.scan(step, (params, tx.init(params)), length=400)
    assert losses[0] > 1.0
    assert losses[-1] < 0.05


def test_hyperparameters_can_be_injected_as_schedules():
    make = optax.inject_hyperparams(functools.partial(curvax.mclr, layers="array"))
    tx = make(learning_rate=lambda count: 0.1 / (count + 1.0), weight_decay=0.0)
    w, g = jnp.full((2, 2), 2.0), jnp.ones((2, 2))
    state = tx.init(w)
    _, state = tx.update(g, state, w)
    updates, _ = tx.update(g, state, w)
    np.testing.assert_allclose(updates, -(0.9 * 0.1 + 0.05) * 2.0 * np.ones((2, 2)), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_lamb_of_halves_keeps_its_averages_in_float32(dtype):
    """They are those of float32 parameters with the same gradients; in bfloat16 the second moment would stand still."""
    params, gradients = jax_tree(0), [jax_tree(i) for i in range(1, 60)]
    halves = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    tx = curvax.lamb(0.01, b2=0.99)
    update, narrow = jax.jit(tx.update), tx.init(halves(params))
    wide = tx.init(params)
    for g in gradients:
        updates, narrow = update(halves(g), narrow, halves(params))
        expected, wide = update(jax.tree.map(lambda x: x.astype(jnp.float32), halves(g)), wide, params)
    chex.assert_trees_all_close(narrow[0], wide[0], rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, halves(params))
    # The parameters are rounded, and the updates are.
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), updates), expected, rtol=4 * float(jnp.finfo(dtype).eps)
    )


def test_layers_of_split_parameters_cross_flax_serialization():
    params = {"dense": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
    tx = curvax.mclr(0.1, param_axis_name="x")
    state = tx.init(params)
    restored = flax.serialization.from_bytes(tx.init(params), flax.serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)


@pytest.mark.parametrize("bad", [{"b1": 1.0}, {"b2": -0.1}, {"eps": -1.0}, {"eps_root": jnp.nan}])
def test_lamb_checks_its_numbers(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}=.*out of range"):
        curvax.lamb(0.1, **bad)
