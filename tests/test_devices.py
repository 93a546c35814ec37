"""One device and eight give the same numbers, however parameters and examples are divided between them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax

RULES = {
    "lars": curvax.scale_by_lars,
    "percent_delta": functools.partial(curvax.scale_by_percent_delta, layers="array"),
    "percent_delta_kernel": curvax.scale_by_percent_delta,
    "median": curvax.scale_by_median_curvature,
    "median_of_ratios": functools.partial(curvax.scale_by_median_curvature, 0.1, median_of_ratios=True),
    "curvature": functools.partial(curvax.scale_by_curvature_radius, 0.1),
    "approximate": lambda param_axis_name=None: curvax.scale_by_approximate_radius(),
    "discard": functools.partial(curvax.discard_small_gradients, 0.3),
}

# How the arrays of `tree` are split over the mesh: fully sharded, by columns as in tensor parallelism, and not at all.
SPECS = {
    "first_axis": {"kernel": P("x", None), "bias": P("x")},
    "last_axis": {"kernel": P(None, "x"), "bias": P("x")},
    "replicated": {"kernel": P(None, None), "bias": P(None)},
}


def tree(seed):
    rng = np.random.default_rng(seed)
    return {"kernel": rng.normal(size=(16, 24)).astype(np.float32), "bias": rng.normal(size=24).astype(np.float32)}


W, G, H = tree(0), tree(1), tree(2)


def every_update(g, w, h, **options):
    """Of all rules: one program, where devices and placements are the same."""
    transformations = {rule: make(**options) for rule, make in RULES.items()}
    return {rule: tx.update(g, tx.init(w), w, hessian_diag=h)[0] for rule, tx in transformations.items()}


@functools.cache
def on_one_device():
    return jax.device_get(jax.jit(every_update)(G, W, H))


def mesh(axis_type):
    return jax.make_mesh((8,), ("x",), axis_types=(axis_type,))


@pytest.mark.slow_but_for("last_axis-auto")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", SPECS)
def test_sharded_parameters_under_jit(spec, axis_type):
    m = mesh(axis_type)
    with jax.set_mesh(m):
        place = lambda t: {k: jax.device_put(t[k], NamedSharding(m, SPECS[spec][k])) for k in t}
        updates = jax.jit(every_update)(place(G), place(W), place(H))
    chex.assert_trees_all_close(jax.device_get(updates), on_one_device(), rtol=1e-5)
    for rule, found in updates.items():
        for name, x in found.items():
            assert x.sharding.is_equivalent_to(NamedSharding(m, SPECS[spec][name]), x.ndim), rule


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["first_axis", "last_axis"])
def test_axis_name_of_split_parameters(spec):
    run = functools.partial(every_update, param_axis_name="x")
    specs = {"in_specs": (SPECS[spec],) * 3, "out_specs": dict.fromkeys(RULES, SPECS[spec])}
    sharded = jax.shard_map(run, mesh=mesh(AxisType.Auto), **specs)
    chex.assert_trees_all_close(jax.jit(sharded)(G, W, H), on_one_device(), rtol=1e-5)


@pytest.mark.slow
def test_axis_name_of_split_parameters_under_pmap():
    run = jax.pmap(functools.partial(every_update, param_axis_name="x"), axis_name="x")
    updates = run(*(jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), t) for t in (G, W, H)))
    updates = {rule: {k: np.reshape(x, W[k].shape) for k, x in found.items()} for rule, found in updates.items()}
    chex.assert_trees_all_close(updates, on_one_device(), rtol=1e-5)


OPTIMIZERS = {
    "lars": functools.partial(curvax.lars, 0.1, 0.01),
    "mclr": functools.partial(curvax.mclr, 0.1, 0.01),
    "percent_delta": functools.partial(curvax.percent_delta, 0.1, 0.01),
    "lamb": functools.partial(curvax.lamb, 0.1, weight_decay=0.01),
    "cblr": functools.partial(curvax.cblr, 0.1, weight_decay=0.01, eigenbasis=False),
    "cblr_squares": functools.partial(curvax.cblr, 0.1, method=curvax.SquaredGradients(), basis_every=2),
}


def three_steps(name, w, g, h):
    """One program of one step, and not of three."""
    tx = OPTIMIZERS[name]()

    @jax.jit
    def step(scale, w, state):
        extra = {} if isinstance(state, curvax.EigenbasisState) else {"hessian_diag": h}
        updates, state = tx.update(jax.tree.map(lambda x: scale * x, g), state, w, **extra)
        return optax.apply_updates(w, updates), state

    state = tx.init(w)
    for scale in (1.0, -0.5, 2.0):
        w, state = step(np.float32(scale), w, state)
    return w, state


@functools.cache
def three_steps_on_one_device(name):
    return jax.device_get(three_steps(name, W, G, H))


@pytest.mark.slow_but_for("mclr-auto")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_alike_on_a_mesh_and_keep_their_state_with_the_parameters(name, axis_type):
    m = mesh(axis_type)
    with jax.set_mesh(m):
        places = {k: NamedSharding(m, spec) for k, spec in SPECS["first_axis"].items()}
        w, g, h = ({k: jax.device_put(t[k], places[k]) for k in t} for t in (W, G, H))
        spread = three_steps(name, w, g, h)
    alone = three_steps_on_one_device(name)
    if name == "cblr_squares":  # Eigenvectors have either sign, and those of next to no eigenvalue are any.
        chex.assert_trees_all_close(jax.device_get(spread[0]), alone[0], rtol=2e-3, atol=2e-3)
    else:
        chex.assert_trees_all_close(jax.device_get(spread), alone, rtol=1e-5, atol=1e-6)
    # What has the shape of a parameter lies where the parameter does, in equal parts; what is smaller lies everywhere.
    shapes = {w.shape: places[k] for k, w in W.items()}
    # The bases of kernels lie where the compiler has put their factors.
    is_basis = lambda node: isinstance(node, curvax.rotations.Sides)
    for leaf in jax.tree.leaves(spread, is_leaf=is_basis):
        if is_basis(leaf):
            continue
        expected = shapes.get(leaf.shape, NamedSharding(m, P()))
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), (leaf.shape, leaf.sharding)


OBJECTIVE = problems.mlp_objective(examples=32)
PARAMS = problems.mlp_params()
METHODS = {
    "basis": curvax.Basis(),
    "exact": curvax.Exact(micro_batches=2),
    "hutchinson": curvax.Hutchinson(4000),
    "ggn_mc": curvax.GaussNewton(100),
    "ggn_of_batches": curvax.GaussNewton(4000, "batch", micro_batches=1),
}


def seen_curvature():
    def update_fn(updates, state, params=None, *, hessian_diag=None, **extra_args):
        del updates, params, extra_args
        return hessian_diag, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def curvature_of(params, objective, method, axis_name=None):
    tx = curvax.with_hessian_diag(seen_curvature(), METHODS[method], key=0, axis_name=axis_name)
    return tx.update(params, tx.init(params), params, obj_fn=objective)[0]


def error(diag, method):
    dense = problems.dense_ggn_diag if method.startswith("ggn") else problems.dense_hessian_diag
    found, exact = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (diag, dense(OBJECTIVE, PARAMS)))
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


# A sampled diagonal has a relative error of a few percent after 4000 samples, on each of eight devices of its own.
TOLERANCE = {"basis": 1e-5, "exact": 1e-5, "hutchinson": 0.1, "ggn_mc": 0.1, "ggn_of_batches": 0.04}


@pytest.mark.slow_but_for("exact-True")
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_axis_name_of_split_examples_under_shard_map(method, check_vma):
    run = functools.partial(curvature_of, method=method, axis_name="x")
    run = jax.shard_map(run, mesh=mesh(AxisType.Auto), in_specs=(P(), P("x")), out_specs=P(), check_vma=check_vma)
    assert error(jax.jit(run)(PARAMS, OBJECTIVE), method) < TOLERANCE[method]


@pytest.mark.slow
@pytest.mark.parametrize("method", [curvax.Hutchinson(), curvax.GaussNewton(1, "batch", micro_batches=1)])
def test_probes_that_differ_between_shards_lower_the_variance(method):
    """Eight shards of equal examples: one set of probes for all errs as one device does, eight sets 8 times less."""
    data = jax.tree.map(lambda x: jnp.tile(x[:4], (8,) + (1,) * (x.ndim - 1)), OBJECTIVE.data)
    repeated = curvax.Objective(OBJECTIVE.predict, OBJECTIVE.loss, data)

    def estimate(key, objective, axis_name):
        tx = curvax.with_hessian_diag(seen_curvature(), method, key=key, axis_name=axis_name)
        return tx.update(PARAMS, tx.init(PARAMS), PARAMS, obj_fn=objective)[0]

    def variance(run):
        draws = [jax.device_get(run(jax.random.key(i), repeated)) for i in range(100)]
        return sum(np.var(np.stack(leaves), axis=0).sum() for leaves in zip(*map(jax.tree.leaves, draws), strict=True))

    shards = functools.partial(estimate, axis_name="x")
    shards = jax.shard_map(shards, mesh=mesh(AxisType.Auto), in_specs=(P(), P("x")), out_specs=P())
    one = functools.partial(estimate, axis_name=None)
    ratio = variance(jax.jit(shards)) / variance(jax.jit(lambda key, f: one(key, jax.tree.map(lambda x: x[:4], f))))
    # A variance over 100 draws is known to about a fifth.
    assert 0.5 / 8 < ratio < 2 / 8


@pytest.mark.slow_but_for("exact")
@pytest.mark.parametrize("method", METHODS)
def test_axis_name_of_split_examples_under_pmap(method):
    split = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), OBJECTIVE)
    run = functools.partial(curvature_of, method=method, axis_name="x")
    diag = jax.pmap(run, axis_name="x", in_axes=(None, 0))(PARAMS, split)
    first, last = (jax.tree.map(lambda x, i=i: np.asarray(x[i]), diag) for i in (0, 7))
    assert error(first, method) < TOLERANCE[method]
    chex.assert_trees_all_equal(first, last)


@pytest.mark.slow_but_for("exact")
@pytest.mark.parametrize("method", METHODS)
def test_a_sharded_batch_under_jit_draws_the_numbers_of_one_device(method):
    run = jax.jit(functools.partial(curvature_of, method=method))
    spread = jax.device_put(OBJECTIVE, NamedSharding(mesh(AxisType.Auto), P("x")))
    chex.assert_trees_all_close(run(PARAMS, spread), run(PARAMS, OBJECTIVE), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_state_of_cblr_is_placed_like_its_parameters(axis_type):
    tx = curvax.cblr(0.1)
    m = mesh(axis_type)
    loss = lambda w: sum(jnp.sum(x**2) for x in jax.tree.leaves(w))
    with jax.set_mesh(m):
        w, g = ({k: jax.device_put(t[k], NamedSharding(m, SPECS["last_axis"][k])) for k in t} for t in (W, G))
        state = tx.init(w)
        _, new_state = jax.jit(functools.partial(tx.update, obj_fn=loss))(g, state, w)
    for name, spec in SPECS["last_axis"].items():
        assert optax.tree.get(state, "hessian_diag")[name].sharding.spec == spec
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, new_state)
    if axis_type is AxisType.Explicit:
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new_state)


MESH = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
KERNELS = {
    "lars": functools.partial(curvax.scale_by_lars, layers="kernel"),
    "median": curvax.scale_by_median_curvature,
    "percent_delta": curvax.scale_by_percent_delta,
    "curvature": functools.partial(curvax.scale_by_curvature_radius, 0.1, layers="kernel"),
    "discard": functools.partial(curvax.discard_small_gradients, 0.3, layers="kernel"),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", KERNELS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_biases_follow_their_own_kernels_where_devices_hold_parts_of_both(rule, weight_decay):
    """A bias (64,) fits its kernel (16, 64), and its part (8,) does not fit (2, 64)."""
    rng = np.random.default_rng(0)
    shapes = {"a": {"kernel": (16, 64), "bias": (64,)}, "z": {"kernel": (32, 8), "bias": (8,)}}
    w, g, h = (
        jax.tree.map(
            lambda shape: rng.normal(size=shape).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
        )
        for _ in range(3)
    )
    w["z"]["kernel"] *= 10
    options = {"weight_decay": weight_decay} if weight_decay and rule not in ("curvature", "discard") else {}
    tx, whole = KERNELS[rule](param_axis_name="x", **options), KERNELS[rule](**options)
    state = tx.init(w)

    def update(g, state, w, h):
        return tx.update(g, state, w, hessian_diag=h)[0]

    spec = P("x")
    parts = jax.jit(jax.shard_map(update, mesh=MESH, in_specs=(spec, P(), spec, spec), out_specs=spec))(g, state, w, h)
    expected = jax.jit(whole.update)(g, whole.init(w), w, hessian_diag=h)[0]
    chex.assert_trees_all_close(parts, expected, rtol=2e-5)

    def inside(g, w, h):
        return tx.update(g, tx.init(w), w, hessian_diag=h)[0]

    with pytest.raises(ValueError, match=r"which kernel 'a/bias' belongs to.*init.params. outside of shard_map"):
        jax.shard_map(inside, mesh=MESH, in_specs=spec, out_specs=spec)(g, w, h)


def test_layers_of_whole_shapes_follow_a_tree_that_is_masked():
    w = {"a": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}, "b": jnp.ones((4, 2))}
    tx = optax.masked(curvax.scale_by_median_curvature(param_axis_name="x"), {"a": True, "b": False})
    state = tx.init(w)
    doubled = jax.tree.map(lambda x: 2 * x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state) and not jax.tree.leaves(state)
