import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import curvax
from curvax import scale_by_curvature_radius, with_hessian_diag
from curvax.curvature import refresh


def seen_curvature():
    """A transformation whose update is the curvature that it is handed."""

    def update_fn(updates, state, params=None, *, hessian_diag=None, **extra_args):
        del updates, params, extra_args
        return hessian_diag, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def quadratic(curvature):
    curvature = jnp.asarray(curvature, jnp.float32)
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


def test_without_an_average_the_fresh_diagonal_comes_back_to_the_bit():
    curvatures = [1e8, 1.0, 1e-3, -3.3e-20, 7e30, 0.1]
    seen, _ = run(with_hessian_diag(seen_curvature(), "basis"), curvatures)
    fresh = [curvax.hessian_diag(quadratic(c), jnp.ones(2), "basis")[0] for c in curvatures]
    np.testing.assert_array_equal(seen, np.asarray(fresh))


def test_an_average_forgets_what_was_far_away():
    seen, _ = run(with_hessian_diag(seen_curvature(), "basis", decay=0.5), [1e8] + 60 * [1e-3])
    # Of 1e8 there is 2^-60 left, of its share in the sum of weights.
    np.testing.assert_allclose(seen[-1], 1e-3 + 1e8 * 2.0**-61, rtol=1e-5)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("bad", [[NAN, NAN], [NAN, 1.0], [1.0, INF], [-INF, 2.0]])
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("every", [1, 3])
def test_a_curvature_that_is_not_finite_is_counted_and_forgotten(every, decay, bad):
    """As if the refresh had not been: the average is that of the other two, with the weights of two."""
    tx = with_hessian_diag(seen_curvature(), "basis", every=every, decay=decay)
    steps = [c for c in (2.0, bad, 5.0) for _ in range(every)]
    seen, state = run(tx, steps)
    expected = np.average([2.0, 5.0], weights=[decay, 1.0])
    np.testing.assert_allclose(seen, every * [2.0] + every * [2.0] + every * [expected], rtol=1e-6)
    assert (int(state.num_refreshes), int(state.num_skipped), int(state.count)) == (2, 1, 3 * every)
    without, _ = run(tx, [c for c in (2.0, 5.0) for _ in range(every)])
    np.testing.assert_array_equal(without[-1], seen[-1])


def test_one_bad_leaf_discards_the_whole_refresh():
    tx = with_hessian_diag(seen_curvature(), "basis")
    w = {"a": jnp.ones(2), "b": jnp.ones(3)}
    loss = lambda a, b: lambda w: (a * jnp.sum(w["a"] ** 2) + b * jnp.sum(w["b"] ** 2)) / 2
    _, state = tx.update(w, tx.init(w), w, obj_fn=loss(1.0, 2.0))
    seen, state = tx.update(w, state, w, obj_fn=loss(3.0, NAN))
    chex.assert_trees_all_equal(seen, {"a": jnp.ones(2), "b": jnp.full(3, 2.0)})
    assert int(state.num_skipped) == 1


def test_before_the_first_good_refresh_there_are_zeros_and_radius_one():
    tx = with_hessian_diag(scale_by_curvature_radius(0.1, slope_term=False), "basis", every=2)
    seen, state = run(tx, [NAN, 4.0, 4.0])
    np.testing.assert_allclose(seen, [1, 1, 1 / (4 + 0.4)], rtol=1e-6)
    assert int(state.num_refreshes) == 1
    seen, _ = run(with_hessian_diag(seen_curvature(), "basis", every=2), [NAN, 4.0])
    np.testing.assert_array_equal(seen, [0, 0])


def skips_large(updates, gradient_step, params):
    del gradient_step, params
    return jnp.any(jnp.abs(updates) > 100), ()


GUARDS = {
    "apply_if_finite around": lambda tx: optax.apply_if_finite(tx(seen_curvature()), 5),
    "MultiSteps around": lambda tx: optax.MultiSteps(tx(seen_curvature()), 1, should_skip_update_fn=skips_large),
    "conditionally_mask around": lambda tx: optax.conditionally_mask(tx(seen_curvature()), lambda step: step != 1),
    "apply_if_finite inside": lambda tx: tx(optax.apply_if_finite(seen_curvature(), 5)),
    "skip_not_finite inside": lambda tx: tx(
        optax.MultiSteps(seen_curvature(), 1, should_skip_update_fn=optax.skip_not_finite)
    ),
    "MultiSteps inside": lambda tx: tx(optax.MultiSteps(seen_curvature(), 1, should_skip_update_fn=skips_large)),
}


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("every", [1, 2])
def test_a_step_that_a_guard_skips_leaves_no_trace(guard, every):
    """The second of the steps has a gradient that the guard refuses, and a curvature that nobody should remember."""
    tx = GUARDS[guard](functools.partial(with_hessian_diag, method="basis", every=every, decay=0.5))
    bad = 1e9 if "MultiSteps" in guard or "mask" in guard else NAN
    update = jax.jit(lambda g, state, w, c: tx.update(g, state, w, obj_fn=lambda w: jnp.sum(c * w**2) / 2))

    def steps(curvatures):
        w = jnp.ones(2)
        state, seen = tx.init(w), []
        for c in curvatures:
            u, state = update(jnp.full(2, c), state, w, jnp.full(2, 7.0 if np.isnan(c) else c))
            seen.append(u[0])
        names = ("count", "next_refresh", "num_refreshes", "hessian_diag")
        is_own = lambda x: isinstance(x, curvax.HessianDiagState)
        (own,) = filter(is_own, jax.tree.leaves(state, is_leaf=is_own))
        return np.asarray(seen), [getattr(own, name) for name in names]

    if "mask" in guard:
        # This guard goes by the number of the step.
        seen, state = steps([1.0, bad, 2.0, 3.0])
        np.testing.assert_allclose(seen[[0, 2]], [1, (0.5 + 2) / 1.5] if every == 1 else [1, 1], rtol=1e-6)
        assert int(state[0]) == 3
        return
    seen, state = steps([1.0, bad, 2.0, 3.0])
    without, expected = steps([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(np.delete(seen, 1), without)
    chex.assert_trees_all_equal(state, expected)


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


def test_multi_steps_are_recognised_as_a_transformation():
    """`gradient_transformation()` drops the extra arguments, so that the scaler inside would see no curvature."""
    multi_steps = optax.MultiSteps(scale_by_curvature_radius(slope_term=False), 2)
    direct, by_name = (
        run(with_hessian_diag(inner, "basis"), [4.0, 5.0])[0]
        for inner in (multi_steps, multi_steps.gradient_transformation())
    )
    np.testing.assert_array_equal(direct, by_name)
    np.testing.assert_allclose(direct[1], 1 / 4, rtol=1e-6)


def test_without_the_loss_what_is_stored_is_used_and_a_refresh_waits():
    tx, w = with_hessian_diag(seen_curvature(), "basis", every=2), jnp.ones(2)
    state, seen = tx.init(w), []
    for c in (3.0, None, None, 5.0, 6.0, 7.0):
        u, state = tx.update(w, state, w, **({} if c is None else {"obj_fn": quadratic(c)}))
        seen.append(u[0])
    np.testing.assert_allclose(seen, [3, 3, 3, 5, 5, 7])


def step_without_the_loss(w):
    """The updates of a fresh state, for parameters of all kinds."""
    tx, params = with_hessian_diag(optax.identity(), "basis"), {"w": w, "half": w.astype(jnp.bfloat16), "n": w > 5}
    return tx.update(params, tx.init(params), params)[0]


MESH = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])


@pytest.mark.parametrize(
    "run",
    [
        lambda step: jax.jit(step)(jnp.ones(2)),
        lambda step: jax.lax.scan(lambda w, _: (step(w)["w"], step(w)), jnp.ones(2), length=2)[1],
        lambda step: jax.jit(jax.vmap(step))(jnp.ones((3, 2))),
        lambda step: jax.pmap(step, devices=jax.devices()[:2])(jnp.ones((2, 2))),
        lambda step: jax.jit(jax.shard_map(step, mesh=MESH, in_specs=P("x"), out_specs=P("x")))(jnp.ones(4)),
    ],
)
def test_a_program_that_never_has_the_loss_warns_and_its_updates_are_nan(run):
    with pytest.warns(RuntimeWarning, match=r"pass obj_fn=.*or hessian_diag=.*updates are NaN"):
        updates = jax.block_until_ready(run(step_without_the_loss))
        jax.effects_barrier()
    assert updates["half"].dtype == jnp.bfloat16 and not np.any(updates["n"])
    assert np.all(np.isnan(updates["w"])) and np.all(np.isnan(updates["half"].astype(jnp.float32)))


@pytest.mark.filterwarnings("error")
def test_a_program_without_the_loss_is_right_where_a_refresh_was_tried():
    """Also a bad one, and for several optimizers in parallel."""
    tx, w = with_hessian_diag(optax.scale(-1.0), "basis", every=2), jnp.ones(2)
    for curvature in (3.0, jnp.nan):
        _, state = tx.update(w, tx.init(w), w, obj_fn=quadratic(curvature))
        updates, state = jax.jit(tx.update)(w, state, w)
        np.testing.assert_array_equal(updates, -1)
    states = jax.tree.map(lambda *x: jnp.stack(x), state, state)
    updates, _ = jax.jit(jax.vmap(tx.update, (None, 0, None)))(w, states, w)
    np.testing.assert_array_equal(updates, -1)
    # Nothing is asked of the host where the loss is given, or the curvature.
    given = {"obj_fn": quadratic(3.0)}, {"hessian_diag": w}
    assert not any("callback" in str(jax.make_jaxpr(lambda w, g=g: tx.update(w, tx.init(w), w, **g))(w)) for g in given)


@pytest.mark.filterwarnings("ignore:curvature needs the loss")
def test_steps_with_and_without_the_loss_may_be_chosen_between_in_a_program():
    """Under `vmap` both are computed, and what the one says of a state that has nothing yet does not end the other."""
    tx, w = with_hessian_diag(seen_curvature(), "basis"), jnp.ones(2)

    def step(state, loss_is_given):
        update = lambda **given: tx.update(w, state, w, **given)
        return jax.lax.cond(loss_is_given, lambda: update(obj_fn=quadratic(3.0)), lambda: update())[::-1]

    run = jax.vmap(lambda given: jax.lax.scan(step, tx.init(w), given)[1])
    updates = jax.jit(run)(jnp.array([[True, False], [True, True], [False, True]]))
    np.testing.assert_array_equal(updates[:, :, 0], [[3, 3], [3, 3], [np.nan, 3]])


def test_a_seed_is_a_key_and_refreshes_draw_anew():
    w, loss = jnp.ones(40), lambda w: jnp.sum(w) ** 2

    def draws(key):
        tx = with_hessian_diag(seen_curvature(), "hutchinson", key=key)
        first, state = tx.update(w, tx.init(w), w, obj_fn=loss)
        return first, tx.update(w, state, w, obj_fn=loss)[0]

    first, second = draws(3)
    for key in (jax.random.key(3), jax.random.PRNGKey(3), np.int64(3)):
        chex.assert_trees_all_equal(draws(key), (first, second))
    assert not np.allclose(first, second)
    assert not np.allclose(first, draws(4)[0])


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
    with pytest.raises(ValueError, match="'newton' is unknown"):
        with_hessian_diag(seen_curvature(), "newton")
    with pytest.raises(ValueError, match=r"'exact' takes no num_samples"):
        with_hessian_diag(seen_curvature(), "exact", num_samples=3)
    for every in (0, -1, 2.5, True, float("nan"), np.float32(3)):
        with pytest.raises(ValueError, match="every="):
            with_hessian_diag(seen_curvature(), "basis", every=every)
    for decay in (1.0, -0.1, float("nan"), "0.5"):
        with pytest.raises(ValueError, match="decay="):
            with_hessian_diag(seen_curvature(), "basis", decay=decay)
    tx = with_hessian_diag(seen_curvature(), "basis", every=np.int64(3), decay=np.float64(0.5))
    with pytest.raises(ValueError, match=r"obj_fn=.*hessian_diag="):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match=r"update\(updates, state, params"):
        tx.update(w, tx.init(w), obj_fn=quadratic(1.0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"obj_fn": 0.5}, "obj_fn is a float.*pass the loss function, not its value"),
        ({"obj_fn": jnp.array(0.5)}, "obj_fn is a .*pass the loss function, not its value"),
        ({"value_fn": 0.5}, "value_fn is a float.*pass the loss function, not its value"),
        (
            {"obj_fn": lambda p, d: jnp.sum(p)},
            r"obj_fn takes \(p, d\).*loss\(params, batch\).*Objective",
        ),
        ({"obj_fn": jax.jit(lambda p, d: jnp.sum(p))}, r"obj_fn takes \(p, d\)"),
        ({"value_fn": lambda p, d: jnp.sum(p)}, r"value_fn takes \(p, d\)"),
    ],
)
def test_what_is_no_loss_of_the_parameters_is_refused(given, message):
    """Also in a step without a refresh."""
    tx, w = with_hessian_diag(optax.identity(), "basis", every=2), jnp.ones(2)
    state = tx.init(w)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            tx.update(w, state, w, **given)
        with pytest.raises(ValueError, match=message):
            jax.jit(lambda w, state: tx.update(w, state, w, **given))(w, state)
        _, state = tx.update(w, state, w, obj_fn=quadratic(1.0))


def test_losses_may_have_other_arguments_that_are_given():
    tx, w = with_hessian_diag(seen_curvature(), "basis"), jnp.ones(2)
    loss = lambda p, scale=3.0, *, power=2: scale * jnp.sum(p**power) / 2
    for given in ({"obj_fn": loss}, {"value_fn": loss, "scale": 3.0}, {"obj_fn": jax.jit(loss)}):
        assert tx.update(w, tx.init(w), w, **given)[0].tolist() == [3.0, 3.0]


@pytest.mark.slow
def test_the_state_names_the_method_that_was_taken():
    params = problems.mlp_params(sizes=(6, 4))

    def taken(objective, method=None):
        tx = with_hessian_diag(seen_curvature(), method, key=0)
        assert tx.init(params).method_name == "none"
        return jax.jit(lambda: tx.update(params, tx.init(params), params, obj_fn=objective))()[1].method_name

    objective = problems.mlp_objective()
    assert taken(objective) == curvax.Auto().choose(objective, params).name == "ggn_mc"
    assert taken(lambda params: objective(params)) == "hutchinson"
    assert taken(objective, curvax.GaussNewton()) == "ggn"


def test_state_is_readable_by_name():
    _, state = run(curvax.cblr(0.1, method="basis", every=1, hessian_decay=0.0), [3.0])
    np.testing.assert_allclose(optax.tree.get(state, "hessian_diag"), 3.0)


def test_the_average_is_stored_as_asked():
    """In bfloat16 it is what is kept in float32, rounded in each refresh."""
    loss = lambda w: jnp.sum(jnp.cosh(w))
    w = jnp.linspace(-2.0, 2.0, 7)
    steps = {}
    for dtype in (None, jnp.bfloat16):
        tx = curvax.with_hessian_diag(optax.identity(), "basis", decay=0.5, hessian_dtype=dtype)
        state = tx.init(w)
        for shift in (0.0, 0.3, 0.6):
            _, state = tx.update(jax.grad(loss)(w + shift), state, w + shift, obj_fn=loss)
        steps[dtype] = state.hessian_diag
    assert steps[jnp.bfloat16].dtype == jnp.bfloat16
    np.testing.assert_allclose(steps[jnp.bfloat16].astype(np.float32), steps[None], rtol=3 * 2.0**-9)
    with pytest.raises(ValueError, match="has not the range of curvature"):
        curvax.with_hessian_diag(optax.identity(), "basis", hessian_dtype=jnp.float16)


def test_the_warning_computes_nothing_on_the_device():
    """Which may be busy with the program that waits for it."""

    class Number:
        __eq__ = __hash__ = None

        def __array__(self, *_, **__):
            return np.zeros((), np.int32)

    with pytest.warns(RuntimeWarning, match="The updates are NaN"):
        refresh._warn(Number())
