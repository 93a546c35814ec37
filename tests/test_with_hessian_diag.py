"""Curvature among the other transformations of optax, and methods of the caller's own."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import curvax
from curvax import scale_by_curvature_radius, with_hessian_diag


def quartic(w, shift=1.0):
    return jnp.sum((w - shift) ** 4 + w**2)


SEARCHES = {
    "backtracking": lambda: optax.scale_by_backtracking_linesearch(8),
    "zoom": lambda: optax.scale_by_zoom_linesearch(8),
}


@pytest.mark.parametrize("search", SEARCHES)
def test_a_line_search_inside_gets_a_value_fn_that_it_accepts(search):
    """Along Newton's direction; the search refuses arguments that it does not know, and `value_fn` takes `shift`."""
    newton = scale_by_curvature_radius(slope_term=False)
    tx = with_hessian_diag(optax.chain(newton, optax.scale(-1.0), SEARCHES[search]()), "basis")
    w, shift = jnp.array([3.0, -2.0]), jnp.array(1.5)
    value, grad = jax.value_and_grad(quartic)(w, shift)
    given = {"value": value, "grad": grad, "value_fn": quartic, "shift": shift}
    updates, _ = jax.jit(lambda w: tx.update(grad, tx.init(w), w, **given))(w)
    step = -np.asarray(grad) / (12 * (np.asarray(w) - 1.5) ** 2 + 2)
    along = np.asarray(updates) / step
    np.testing.assert_allclose(along, along[0], rtol=1e-5)
    assert along[0] > 0 and quartic(w + updates, shift) < value


def test_an_objective_serves_a_line_search_too():
    objective = curvax.Objective(lambda w, x: x @ w, lambda z, x: z**4 + z**2, jnp.eye(2))
    tx = with_hessian_diag(optax.chain(optax.scale(-1.0), optax.scale_by_backtracking_linesearch(40)), "basis")
    w = jnp.array([3.0, -2.0])
    value, grad = jax.value_and_grad(objective)(w)
    updates, _ = tx.update(grad, tx.init(w), w, obj_fn=objective, value=value, grad=grad)
    assert objective(w + updates) < value


PARAMS = {
    "base": jnp.array([[1.0, 2.0], [3.0, 1.0], [0.5, 2.0]]),
    "lora": jnp.array([[1.0, -2.0, 3.0], [0.5, 1.0, -1.0]]),
}
LABELS = {"base": "frozen", "lora": "trained"}
WHERE = {"base": False, "lora": True}


def lora_loss(p):
    return jnp.sum((p["lora"] @ p["base"]) ** 2)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, WHERE),
        lambda tx: optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, LABELS),
    ],
)
def test_inside_masked_and_partition_the_message_says_where_curvature_goes(wrap):
    grads, tx = jax.grad(lora_loss)(PARAMS), wrap(curvax.cblr(0.1, method="basis"))
    with pytest.raises(ValueError, match=r"'base' is hidden .* put with_hessian_diag outermost"):
        tx.update(grads, tx.init(PARAMS), PARAMS, obj_fn=lora_loss)
    in_coordinates = wrap(curvax.cblr(0.1, method="basis", eigenbasis=False))
    outermost = with_hessian_diag(in_coordinates, "basis", where=WHERE)
    updates, state = outermost.update(grads, outermost.init(PARAMS), PARAMS, obj_fn=lora_loss)
    alone = curvax.cblr(0.1, eigenbasis=False)
    w, g, h = PARAMS["lora"], grads["lora"], state.hessian_diag["lora"]
    expected, _ = alone.update(g, alone.init(w), w, hessian_diag=h)
    np.testing.assert_allclose(updates["lora"], expected, rtol=1e-6)
    # Of L = sum (lora @ base)^2, twice the squared rows of the base.
    np.testing.assert_allclose(h, np.broadcast_to(2 * np.sum(np.asarray(PARAMS["base"]) ** 2, 1), (2, 3)), rtol=1e-6)


def test_where_alone_gives_the_other_parameters_the_step_of_lars():
    grads = jax.grad(lora_loss)(PARAMS)
    options = {"method": "basis", "where": WHERE, "nesterov": False, "eigenbasis": False, "orthogonal": False}
    tx, lars = curvax.cblr(0.1, **options), curvax.lars(0.1, trust_coefficient=1.0, layers="kernel")
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS, obj_fn=lora_loss)
    assert isinstance(state.hessian_diag["base"], optax.MaskedNode)
    by_lars, _ = lars.update(grads, lars.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["base"], by_lars["base"], rtol=1e-6)
    assert not np.allclose(updates["lora"], by_lars["lora"], rtol=1e-2)


def test_what_is_no_transformation_is_refused():
    with pytest.raises(ValueError, match="call its factory"):
        with_hessian_diag(optax.sgd, "basis")


def own_squares():
    class Squares:
        """The squared gradient: no curvature at all, but what some take for it."""

        stochastic = True

        def estimate(self, objective, params, key):
            value, grad = jax.value_and_grad(objective)(params)
            return curvax.Estimate(value, grad, jax.tree.map(jnp.square, grad))

    return Squares()


def test_a_method_of_the_callers_own():
    w, loss, method = jnp.array([1.0, 2.0]), lambda w: jnp.sum(w**3), own_squares()
    np.testing.assert_allclose(curvax.hessian_diag(loss, w, method, key=0), [9, 144])
    with pytest.raises(ValueError, match="pass key=0"):
        curvax.hessian_diag(loss, w, method)
    seen = optax.GradientTransformationExtraArgs(
        lambda p: optax.EmptyState(), lambda u, s, p=None, *, hessian_diag=None, **_: (hessian_diag, s)
    )
    tx = with_hessian_diag(seen, method, key=0)
    updates, state = tx.update(w, tx.init(w), w, obj_fn=loss)
    np.testing.assert_allclose(updates, [9, 144])
    assert state.method_name == "other"
    said = curvax.explain(loss, w, method)
    assert "your own" in said.rows[0].reason and said.passes is said.products is None and "?" in str(said)


def steps(tx, state, w, number=4):
    for _ in range(number):
        updates, state = tx.update(jax.grad(quartic)(w), state, w, obj_fn=quartic)
        w = optax.apply_updates(w, updates)
    return w, state


W = jnp.array([[3.0, -2.0, 0.5]])


def cblr(learning_rate=0.05, **options):
    return curvax.cblr(learning_rate, every=2, method=curvax.Hutchinson(2), **options)


def four_steps(tx):
    step = lambda carry, _: (steps(tx, carry[1], carry[0], 1), None)
    return jax.lax.scan(step, (W, tx.init(W)), length=4)[0]


@functools.cache
def expected_steps():
    return steps(cblr(), cblr().init(W), W)


def check_steps(found, rtol=1e-5):
    chex.assert_trees_all_close(found, expected_steps(), rtol=rtol)


@pytest.mark.slow
def test_steps_under_jit_and_scan():
    """Two steps in a program, twice; and a loop of four."""
    two = jax.jit(lambda w, state: steps(cblr(), state, w, 2))
    check_steps(two(*two(W, cblr().init(W))))
    check_steps(four_steps(cblr()))


def test_a_donated_state_and_one_that_was_saved():
    step = jax.jit(lambda w, state: steps(cblr(), state, w, 1), donate_argnums=(0, 1))
    w, state = W + 0, cblr().init(W)
    for _ in range(4):
        w, state = step(w, state)
        leaves, treedef = jax.tree.flatten(jax.device_get((w, state)))
        w, state = treedef.unflatten([jnp.asarray(x) for x in leaves])
    check_steps((w, state))
    assert state.inner_state.method_name == "hutchinson"


@pytest.mark.slow
def test_optimizers_in_parallel():
    rates = jnp.array([0.05, 0.01])
    w, _ = jax.jit(jax.vmap(lambda rate: four_steps(cblr(rate))))(rates)
    np.testing.assert_allclose(w[0], expected_steps()[0], rtol=1e-5)
    assert not np.allclose(w[0], w[1])


@pytest.mark.slow
def test_injected_hyperparameters():
    """Numbers become arrays, and are checked all the same; a method and `where` stay as they are."""
    tx = optax.inject_hyperparams(curvax.cblr)(
        learning_rate=optax.constant_schedule(0.05), every=2, method=curvax.Hutchinson(2), where=True
    )
    w, state = steps(tx, tx.init(W), W)
    np.testing.assert_allclose(w, expected_steps()[0], rtol=1e-5)
    w, _ = jax.jit(lambda w: steps(tx, tx.init(w), w))(W)
    np.testing.assert_allclose(w, expected_steps()[0], rtol=1e-5)
    state.hyperparams["damping"] = jnp.array(-1.5)
    with pytest.raises(ValueError, match=r"damping=-1.5 is out of range"):
        steps(tx, state, W, 1)


def test_map_params_reaches_the_stored_curvature():
    params = {"a": jnp.ones(3), "b": {"c": jnp.ones((2, 2))}}
    tx = curvax.cblr(0.1)
    state = optax.tree.map_params(tx, lambda x: x + 1, tx.init(params))
    chex.assert_trees_all_equal(optax.tree.get(state, "hessian_diag"), params)


def test_all_devices_discard_a_refresh_that_one_finds_bad():
    """Parameters are split between two devices, and the curvature of the second's is not finite."""
    tx = with_hessian_diag(optax.identity(), "basis", param_axis_name="x")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def local(w, c):
        _, state = tx.update(w, tx.init(w), w, obj_fn=lambda w: jnp.sum(c * w**2) / 2)
        return state.hessian_diag, state.num_skipped

    split = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("x"), P("x")), out_specs=(P("x"), P())))
    diag, skipped = split(jnp.ones(4), jnp.array([1.0, 2.0, 3.0, jnp.nan]))
    assert diag.tolist() == [0, 0, 0, 0] and int(skipped) == 1
    diag, skipped = split(jnp.ones(4), jnp.array([1.0, 2.0, 3.0, 4.0]))
    assert diag.tolist() == [1, 2, 3, 4] and int(skipped) == 0


@pytest.mark.parametrize("shared", [True, False])
def test_an_axis_that_is_forgotten_or_made_up_is_named(shared):
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    w, data = jnp.ones(3), jnp.ones((4, 3))
    objective = lambda x: curvax.Objective(lambda p, d: d @ p, lambda z, d: z**2, x)
    tx = curvax.cblr(0.1, axis_name=None if shared else "y")

    def step(w, state, x):
        grads = jax.lax.pmean(jax.grad(objective(x))(jax.lax.pcast(w, "x", to="varying")), "x")
        return tx.update(grads, state, w, obj_fn=objective(x))[0]

    sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("x")), out_specs=P())
    with pytest.raises(ValueError, match="pass axis_name='x'" if shared else "axis_name='y' names no mesh axis"):
        jax.jit(sharded)(w, tx.init(w), data)


def test_a_loss_of_an_nnx_model_is_told_what_it_gets():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    loss = lambda model: jnp.sum(model(jnp.ones((1, 2))) ** 2)
    optimizer = nnx.Optimizer(model, curvax.cblr(0.1), wrt=nnx.Param)
    grads = nnx.grad(loss)(model)
    with pytest.raises(ValueError, match=r"pass lambda params: loss\(nnx.merge\(nnx.graphdef\(model\), params\)\)"):
        optimizer.update(model, grads, obj_fn=loss)
    optimizer.update(model, grads, obj_fn=lambda params: loss(nnx.merge(nnx.graphdef(model), params)))
