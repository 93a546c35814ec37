"""A stack of layers is treated as its layers, one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax.radii import Leaves, lars, median, percent_delta
from curvax.sums import falls_and_rises, slopes, squares, totals
from curvax.wide import to_float

NUMBER = 3
SHAPES = {"kernel": (4, 5), "bias": (5,), "norm": (4,)}


@pytest.fixture
def other_people_promote(strict_promotion):
    """As optax's Adam and MultiSteps do."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def network(seed):
    """Blocks of very different sizes, one of them zero, and a head."""
    scale = jnp.array([1.0, 30.0, 0.0])
    blocks = {name: normal(seed + i, NUMBER, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
    blocks = jax.tree.map(lambda x: x * scale.reshape(-1, *[1] * (x.ndim - 1)), blocks)
    return {"blocks": blocks, "head": {"kernel": normal(seed + 9, 5, 2), "bias": normal(seed + 8, 2)}}


def unstacked(tree, axis=0):
    """The same tree with a list of blocks."""
    blocks = [jax.tree.map(lambda x, i=i: jnp.take(x, i, axis), tree["blocks"]) for i in range(NUMBER)]
    return {**tree, "blocks": blocks}


def steps(tx, params, gradients):
    state = tx.init(params)
    update = jax.jit(tx.update)
    for g in gradients:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


OPTIMIZERS = {
    "mclr": functools.partial(curvax.mclr, 0.1, weight_decay=0.01),
    "mclr, median of ratios": functools.partial(curvax.mclr, 0.1, median_of_ratios=True),
    "lars by kernel": functools.partial(curvax.lars, 0.1, layers="kernel"),
    "percent_delta": functools.partial(curvax.percent_delta, 0.1),
    "lamb": functools.partial(curvax.lamb, 0.1, weight_decay=0.01, layers="kernel"),
    "cblr": functools.partial(curvax.cblr, 0.1, method="squares"),
    "discard": functools.partial(curvax.discard_small_gradients, 0.4, layers="kernel"),
}


@pytest.mark.slow_but_for("mclr]")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stack_trains_as_its_layers_in_a_list(name, other_people_promote):
    make = OPTIMIZERS[name]
    params, gradients = network(0), [network(20), network(40)]
    wanted = unstacked(steps(make(), params, gradients))
    found = steps(make(), unstacked(params), [unstacked(g) for g in gradients])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), found, wanted)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("layers", ["array", "module", (("kernel", "kernels"), (".*", "others"))])
def test_any_axis_counts_layers_in_any_grouping(layers, axis):
    w, g = ({"m": {"kernel": normal(s, 3, 4, 5)}, "one": normal(s + 1, 6)} for s in (0, 2))
    at = lambda tree: {**tree, "m": jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), tree["m"])}
    tx = curvax.scale_by_lars(layers=curvax.Stacked({"^m/": axis}, layers))
    found = tx.update(at(g), tx.init(at(w)), at(w))[0]
    norms = np.linalg.norm(w["m"]["kernel"].reshape(3, -1), axis=1) / np.linalg.norm(
        g["m"]["kernel"].reshape(3, -1), axis=1
    )
    wanted = norms[:, None, None] * g["m"]["kernel"]
    np.testing.assert_allclose(jnp.moveaxis(found["m"]["kernel"], axis, 0), wanted, rtol=1e-5)
    np.testing.assert_allclose(found["one"], g["one"] * np.linalg.norm(w["one"]) / np.linalg.norm(g["one"]), rtol=1e-5)


def test_two_axes_count_layers():
    w, g = normal(0, 2, 5, 3, 4), normal(1, 2, 5, 3, 4)
    tx = curvax.scale_by_median_curvature(layers=curvax.Stacked((("", (2, 0)),), "array"))
    middle = lambda x: np.median(np.abs(x), axis=(1, 3), keepdims=True)
    np.testing.assert_allclose(tx.update(g, tx.init(w), w)[0], middle(w) / middle(g) * g, rtol=1e-6)


@pytest.mark.slow_but_for("40")
@pytest.mark.parametrize("size", [40, 1100, 5000])
def test_layers_of_any_size_are_measured_apart(size):
    """Small ones in rows, larger ones by a sort, the largest by a search."""
    w, g = normal(0, 3, 5, size // 5), normal(1, 3, 5, size // 5)
    g = g.at[1].multiply(1e25).at[2, :3].set(0)  # Of layers, one overflows where squared, one is mostly at rest.
    moving = [Leaves([jnp.where(g != 0, w, 0)], [g], ())]
    for make in (lars(1.0, 0.0, None), percent_delta(1.0, None), median(1.0, False, None), median(1.0, True, None)):
        single = [make([Leaves([x.w[0][i : i + 1]], [x.g[0][i : i + 1]], ())]) for x in moving for i in range(3)]
        np.testing.assert_allclose(to_float(make(moving)), [to_float(x)[0] for x in single], rtol=1e-6)


def test_sums_of_stacks_have_the_derivatives_of_their_layers():
    x, y = normal(0, 3, 2, 7), normal(1, 3, 2, 7)
    x = x.at[1].multiply(1e-25)
    for terms in (squares, slopes, falls_and_rises):

        def each(x, y, terms=terms):
            return jnp.stack(
                [to_float(a)[0] for i in range(3) for a in totals(terms, [[(x[i : i + 1], y[i : i + 1])]], None)]
            )

        def together(x, y, terms=terms):
            found = [to_float(a) for a in totals(terms, [[(x, y)]], None)]
            return jnp.stack(found, 1).reshape(-1)

        weights = normal(2, *jax.eval_shape(each, x, y).shape)
        of = lambda f, weights=weights: jax.jit(jax.grad(lambda x, y: weights @ f(x, y), argnums=(0, 1)))(x, y)
        wanted, found = of(each), of(together)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, wanted)


@pytest.mark.slow
def test_probes_and_noise_scale_of_each_layer(other_people_promote):
    params, g = network(0), network(20)
    tx = curvax.with_probes(curvax.with_noise_scale(optax.sgd(0.5), 8, accumulate=2, layers="kernel"), layers="kernel")

    def numbers(params, gradients):
        state, update = tx.init(params), jax.jit(tx.update)
        for g in gradients:
            _, state = update(g, state, params)
        return curvax.metrics(state)

    halves = [jax.tree.map(lambda x, s=s: x * s, g) for s in (0.5, 2.0)]
    found, wanted = numbers(params, halves), numbers(unstacked(params), [unstacked(g) for g in halves])
    in_list = {f"blocks/kernel[{i}]": f"blocks/{i}/kernel" for i in range(NUMBER)}
    in_list |= {f"blocks[{i}]": f"blocks/{i}" for i in range(NUMBER)}

    def renamed(name):
        for old, new in in_list.items():
            name = name.replace(old, new)
        return name

    assert {renamed(name) for name in found} == set(wanted)
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[renamed(name)], rtol=1e-5)


def test_stacked_experts_in_scanned_layers_have_a_basis_each():
    w = {"experts": normal(0, 2, 3, 4, 5)}
    tx = curvax.cblr(0.1, method="squares", layers=curvax.Stacked({"experts": (0, 1)}))
    found = tx.init(w).vectors
    assert found.rows["experts"].shape == (6, 4, 4) and found.columns["experts"].shape == (6, 5, 5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("d"), P(None, "d"), P(None, None, "d")])
def test_devices_may_divide_a_stack_anyhow(kind, spec):
    w, g = ({"kernel": normal(s, 4, 8, 8), "bias": normal(s + 1, 4, 8)} for s in (0, 2))
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    tx = curvax.mclr(0.1, layers=curvax.Stacked({"": 0}))
    wanted = jax.jit(lambda g, w: tx.update(g, tx.init(w), w)[0])(g, w)
    place = lambda tree: jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(*spec[: x.ndim]))), tree)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda g, w: tx.update(g, tx.init(w), w)[0])(place(g), place(w))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), jax.device_get(found), wanted)


def test_parts_of_each_layer_inside_shard_map():
    w, g = ({"kernel": normal(s, 4, 8, 8), "bias": normal(s + 1, 4, 8)} for s in (0, 2))
    whole, parts = (curvax.scale_by_median_curvature(param_axis_name=name) for name in (None, "d"))
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))

    def run(spec, state):
        update = lambda g, w: parts.update(g, parts.init(w) if state is None else state, w)[0]
        specs = {"kernel": spec, "bias": P(*spec[:2]) if spec[0] else P(None, spec[-1])}
        return jax.jit(jax.shard_map(update, mesh=mesh, in_specs=(specs, specs), out_specs=specs))(g, w)

    found, wanted = run(P(None, None, "d"), parts.init(w)), whole.update(g, whole.init(w), w)[0]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, wanted)
    with pytest.raises(ValueError, match=r"'bias' is a stack of \(4,\) layers, of which a device holds \(2,\)"):
        run(P("d", None, None), parts.init(w))
    with pytest.raises(ValueError, match=r"'bias' is a stack of layers, .* call init\(params\) outside of shard_map"):
        run(P(None, None, "d"), None)


REFUSED = {
    "an axis that is not there": ({"kernel": 3}, r"'kernel' has the shape \(2, 3\), of which axes \(3,\) cannot"),
    "an axis twice": ({"kernel": (0, -2)}, r"axes \(0, -2\) cannot count layers"),
    "no axis": ({"kernel": 1.5}, "do not say which axes count layers"),
    "no regex": ({"(": 0}, "do not say which axes count layers"),
    "no rules": (7, "do not say which axes count layers"),
    "one layer, two numbers": ({"kernel": 0}, r"the arrays of the layer '' are stacks of \(\) and of \(2,\) layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    axes, message = REFUSED[name]
    w = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    with pytest.raises(ValueError, match=message):
        tx = curvax.scale_by_lars(layers=curvax.Stacked(axes, "module"))
        tx.update(w, tx.init(w), w)


def test_one_stack_in_another_is_one_stack():
    with pytest.raises(ValueError, match="give all axes in one"):
        curvax.mclr(0.1, layers=curvax.Stacked({"a": 0}, curvax.Stacked({"b": 0})))
    assert curvax.Stacked({"a": 0}) == curvax.Stacked((("a", (0,)),))


def in_scan(read):
    """A network that scans over what `read` makes of its blocks."""

    def predict(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, read(params["blocks"]))[0]

    return curvax.Objective(predict, lambda z, x: jnp.sum(z**2, 1), jnp.ones((2, 3)))


def twice(params, x):
    inner = lambda h, ws: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, ws)
    return jax.lax.scan(lambda h, ws: (inner(h, ws)[0], None), x, params["blocks"])[0]


FOUND = {
    "a scan": (in_scan(lambda w: w), (3, 3, 3), (0,)),
    "a scan over casts": (in_scan(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32)), (3, 3, 3), (0,)),
    "a scan along the last axis": (in_scan(lambda w: jnp.moveaxis(w, 2, 0)), (3, 3, 3), (2,)),
    "a scan in a scan": (curvax.Objective(twice, lambda z, x: z[:, 0], jnp.ones((2, 3))), (4, 2, 3, 3), (0, 1)),
    "scanned and read whole": (in_scan(lambda w: w - jnp.mean(w)), (3, 3, 3), ()),
    "turned around": (in_scan(lambda w: w[::-1]), (3, 3, 3), ()),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_trace_shows_over_which_axis_a_scan_runs(name):
    objective, shape, axes = FOUND[name]
    wanted = curvax.Stacked({"^blocks$": axes} if axes else {})
    assert curvax.find_stacks(objective, {"blocks": jnp.ones(shape)}) == wanted


def test_shapes_are_enough_to_find_stacks():
    objective, shape, _ = FOUND["a scan"]
    params = {"blocks": jax.ShapeDtypeStruct(shape, jnp.float32)}
    assert curvax.find_stacks(objective, params) == curvax.Stacked({"^blocks$": 0})


def test_paths_that_read_alike_are_refused_where_one_is_a_stack():
    predict = lambda p, x: jax.lax.scan(lambda h, w: (h @ w, None), x, p["a"]["b"])[0] @ p["a/b"]
    objective = curvax.Objective(predict, lambda z, x: z[:, 0], jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="'a/b' is the path of two arrays"):
        curvax.find_stacks(objective, {"a": {"b": jnp.ones((2, 3, 3))}, "a/b": jnp.ones((3, 3))})


def test_an_empty_array_beside_a_stack():
    w = {"blocks": {"kernel": normal(0, 3, 4, 5), "empty": jnp.ones((3, 0))}}
    tx = curvax.mclr(0.1, layers=curvax.Stacked({"^blocks/": 0}, "module"))
    alone = curvax.mclr(0.1, layers=curvax.Stacked({"": 0}, "array"))
    found = tx.update(w, tx.init(w), w)[0]["blocks"]["kernel"]
    kernel = w["blocks"]["kernel"]
    np.testing.assert_allclose(found, alone.update(kernel, alone.init(kernel), kernel)[0], rtol=1e-6)
