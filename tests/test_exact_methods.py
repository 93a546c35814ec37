"""The methods around the exact routes: estimates, costs and refusals, columns in chunks, devices, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from curvax.curvature.gauss_newton import sampled_gauss_newton
from curvax.exact import contract, exact_diag, explain, factor, ggn_diag
from curvax.exact.primitives import record
from curvax.objective import Objective

CLASSES = 5


@pytest.fixture(autouse=True, scope="module")
def quick_compile():
    """Compiles fast rather than well: what is computed is the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def cross_entropy(outputs, data):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, data["label"])


def relu_cnn(params, data):
    numbers = ("NHWC", "HWIO", "NHWC")
    hidden = lax.conv_general_dilated(data["image"], params["w"], (1, 1), "SAME", dimension_numbers=numbers)
    hidden = lax.reduce_window(jax.nn.relu(hidden), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    hidden = lax.conv_general_dilated(hidden, params["v"], (1, 1), "SAME", dimension_numbers=numbers)
    return jax.nn.relu(hidden).reshape(hidden.shape[0], -1) @ params["h"]


def cnn_problem(examples=16, classes=CLASSES, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 3, 2, 6), "v": (3, 3, 6, 6), "h": (24, classes)}
    params = {k: jnp.asarray(rng.normal(size=s) * np.sqrt(2 / np.prod(s[:-1])), dtype) for k, s in shapes.items()}
    image = jnp.asarray(rng.normal(size=(examples, 4, 4, 2)), dtype)
    data = {"image": image, "label": jnp.asarray(rng.integers(0, classes, examples))}
    return Objective(relu_cnn, cross_entropy, data), params


def mlp(activation, width=16, inputs=40, classes=3, examples=6):
    rng = np.random.default_rng(0)
    shapes = {"w": (inputs, width), "b": (1, width), "h": (width, classes)}
    params = {k: jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32) for k, s in shapes.items()}
    row, label = rng.normal(size=(examples, inputs)), rng.integers(0, classes, examples)
    data = {"row": jnp.asarray(row, jnp.float32), "label": jnp.asarray(label)}
    return Objective(lambda p, d: activation(d["row"] @ p["w"] + p["b"]) @ p["h"], cross_entropy, data), params


def relative_error(found, expected):
    square = lambda tree: sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree))
    return float(jnp.sqrt(square(jax.tree.map(jnp.subtract, found, expected)) / square(expected)))


# Cost and refusal.


def test_softmax_needs_one_column_fewer_than_classes():
    explanation = explain(*cnn_problem())
    assert (explanation.passes, explanation.products) == (CLASSES - 1, 0)


def test_smooth_network_costs_a_twentieth_of_unit_vectors():
    objective, params = mlp(jax.nn.gelu)
    explanation = explain(objective, params)
    assert explanation.products <= sum(leaf.size for leaf in params.values()) / 20


def test_bottleneck_is_cheaper_than_the_outputs():
    def predict(params, data):
        return jax.nn.relu(jax.nn.relu(data["x"] @ params["in"]) @ params["out"])

    params = {"in": jnp.ones((20, 2)), "out": jnp.ones((2, 20))}
    objective = Objective(predict, lambda out, data: jnp.sum((out - data["x"]) ** 2, -1), {"x": jnp.ones((3, 20))})
    rows = {row.path: row for row in explain(objective, params).rows}
    assert rows["in"].route == "tail" and rows["in"].products == 2


def test_over_budget_names_the_parameter_its_cost_and_the_cures():
    objective, params = mlp(jax.nn.gelu)
    with pytest.raises(ValueError, match=r"(?s)budget of 10.*'b'.*16 products.*raise `budget`.*ggn"):
        exact_diag(objective, params, budget=10)
    assert jax.eval_shape(lambda: exact_diag(objective, params, budget=None)[2])["w"].shape == params["w"].shape


def test_a_plain_function_goes_by_unit_vectors():
    function = lambda p: jnp.sum(p["a"] ** 3) * jnp.prod(p["b"])
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 5.0])}
    value, grad, diag = exact_diag(function, params)
    assert float(value) == 135.0 and float(grad["b"][0]) == 45.0
    np.testing.assert_allclose(diag["a"], [90.0, 180.0])
    np.testing.assert_allclose(diag["b"], [0.0, 0.0])
    assert {row.route for row in explain(function, params).rows} == {"unit vectors"}


def test_gauss_newton_of_a_plain_function_is_refused():
    with pytest.raises(ValueError, match="Objective"):
        ggn_diag(lambda p: jnp.sum(p), jnp.ones(2))


def test_integer_and_complex_parameters_are_refused_by_path():
    with pytest.raises(ValueError, match="block/count"):
        exact_diag(lambda p: 0.0, {"block": {"count": jnp.arange(3)}})
    with pytest.raises(ValueError, match="phase"):
        exact_diag(lambda p: 0.0, {"phase": jnp.ones(2, complex)})


def test_a_loss_that_is_no_vector_is_refused():
    objective, params = cnn_problem()
    scalar = Objective(relu_cnn, lambda out, data: jnp.mean(out), objective.data)
    with pytest.raises(ValueError, match="one loss per example"):
        exact_diag(scalar, params)


def test_empty_and_scalar_leaves_have_diagonals():
    def predict(params, data):
        return data["x"] * params["scale"] + jnp.sum(params["none"])

    params = {"scale": jnp.array(2.0), "none": jnp.zeros((0, 3))}
    objective = Objective(predict, lambda out, data: jnp.sum(out**2, -1), {"x": jnp.array([[1.0, 2.0], [0.0, 3.0]])})
    diag = exact_diag(objective, params)[2]
    np.testing.assert_allclose(diag["scale"], 2.0 * (5 + 9) / 2)
    assert diag["none"].shape == (0, 3)


# The pieces agree with each other and with JAX.


@pytest.mark.slow_but_for("3")
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_chunks_of_columns_do_not_change_the_diagonal(chunk_size):
    objective, params = cnn_problem()
    whole = jax.jit(lambda o, p: exact_diag(o, p, chunk_size=CLASSES)[2])(objective, params)
    chunked = jax.jit(lambda o, p: exact_diag(o, p, chunk_size=chunk_size)[2])(objective, params)
    assert relative_error(chunked, whole) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [False, True])
def test_products_and_pairs_are_the_same_sum(pairs, monkeypatch):
    objective, params = cnn_problem()
    expected = jax.jit(lambda o, p: exact_diag(o, p)[2])(objective, params)
    monkeypatch.setattr(contract, "_prefers_pairs", lambda *_: pairs)
    # Blocks of one example, so that the loop over blocks is what is tested.
    monkeypatch.setattr(contract, "BLOCK", 1)
    forced = jax.jit(lambda o, p: exact_diag(o, p)[2])(objective, params)
    assert relative_error(forced, expected) < 1e-6


def test_what_accelerators_do_is_the_same_sum(monkeypatch):
    """Convolutions and matrices are treated otherwise on CPU, for speed alone."""
    objective, params = cnn_problem()
    expected = jax.jit(lambda o, p: exact_diag(o, p)[2])(objective, params)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert relative_error(jax.jit(lambda o, p: exact_diag(o, p)[2])(objective, params), expected) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("problem", [cnn_problem, lambda: mlp(jnp.tanh)])
def test_streamed_columns_are_those_of_the_eigenvectors(problem, monkeypatch):
    objective, params = problem()
    expected = jax.jit(lambda o, p: exact_diag(o, p)[2])(objective, params)
    monkeypatch.setattr(factor, "FACTORED_TAIL", 0)
    monkeypatch.setattr(factor, "FACTORED_OUTPUTS", 0)
    streamed = jax.jit(lambda o, p: exact_diag(o, p)[2])(objective, params)
    assert relative_error(streamed, expected) < 1e-5


@pytest.mark.parametrize("window, strides, padding", [((2, 2), (2, 2), "VALID"), ((3, 2), (2, 1), "SAME")])
def test_max_pooling_chooses_as_jax_does_among_equals(window, strides, padding):
    images = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (3, 7, 6, 2)), jnp.float32)
    pool = lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *strides, 1), padding)
    out, pull = jax.vjp(pool, images)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=out.shape), jnp.float32)
    (eqn,) = jax.make_jaxpr(pool)(images).jaxpr.eqns
    special = record(eqn).pullback(eqn, [images])
    np.testing.assert_allclose(special(cotangent), pull(cotangent)[0], rtol=1e-6, atol=1e-6)


def test_at_the_kink_of_a_relu_the_branch_is_jaxs():
    objective, params = mlp(jax.nn.relu, width=4, inputs=5)
    params["b"] = jnp.zeros_like(params["b"])
    objective.data["row"] = objective.data["row"].at[:3].set(0.0)
    dense = jax.jit(jax.hessian(objective))(params)
    diagonal = lambda name: jnp.diag(dense[name][name].reshape(params[name].size, -1)).reshape(params[name].shape)
    diag = jax.jit(exact_diag)(objective, params)[2]
    for name in params:
        np.testing.assert_allclose(diag[name], diagonal(name), rtol=1e-4, atol=1e-6)


# Precision and devices.


@pytest.mark.slow
def test_bfloat16_parameters_have_float32_diagonals():
    objective, params = cnn_problem()
    low = {name: leaf.astype(jnp.bfloat16) for name, leaf in params.items()}

    def predict(params, data):
        return relu_cnn({name: leaf.astype(jnp.float32) for name, leaf in params.items()}, data)

    mixed = Objective(predict, cross_entropy, objective.data)
    exact = jax.jit(exact_diag)(objective, {name: leaf.astype(jnp.float32) for name, leaf in low.items()})[2]
    diag = jax.jit(exact_diag)(mixed, {**low, "h": low["h"].astype(jnp.float32)})[2]
    assert {leaf.dtype for leaf in diag.values()} == {jnp.dtype("float32")}
    # The network computes in float32: nothing of the diagonal may be lost on its way back through the casts.
    assert relative_error(diag, exact) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [exact_diag, ggn_diag, lambda o, p: sampled_gauss_newton(o, p, jax.random.key(0))[:3]]
)
def test_sharded_batches_give_the_mean_over_the_mesh(method):
    objective, params = cnn_problem(examples=16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(objective, NamedSharding(mesh, PartitionSpec("data")))
    replicated = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    alone, together = jax.jit(method)(objective, params), jax.jit(method)(sharded, replicated)
    assert relative_error(together, alone) < 1e-5


def tied_problem():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(5, 5)), jnp.float32)}
    return Objective(tied, cross_entropy, {"row": jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)}), params


@pytest.mark.slow
@pytest.mark.parametrize("problem", [cnn_problem, lambda: mlp(jnp.tanh, examples=16), tied_problem])
def test_under_shard_map_each_device_has_the_diagonal_of_its_examples(problem):
    """By every route: columns, a tail's columns, unit vectors."""
    objective, params = problem()
    label = jnp.arange(jax.tree.leaves(objective.data)[0].shape[0]) % 3
    objective = Objective(objective.predict, cross_entropy, {**objective.data, "label": label})
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])

    def mean_over_devices(objective, params):
        # Marked as different on each device, or `shard_map` would sum gradients itself.
        apart = jax.tree.map(lambda x: lax.pcast(x, "data", to="varying"), params)
        return lax.pmean(exact_diag(objective, apart)[2], "data")

    specs = (PartitionSpec("data"), PartitionSpec())
    spread = jax.shard_map(mean_over_devices, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    together, alone = jax.jit(lambda o, p: (spread(o, p), exact_diag(o, p)[2]))(objective, params)
    assert relative_error(together, alone) < 1e-5


# The estimate.


@pytest.mark.slow
def test_estimate_is_exact_with_a_single_column():
    objective, params = cnn_problem(classes=1)
    loss = lambda outputs, data: optax.sigmoid_binary_cross_entropy(outputs[:, 0], data["label"].astype(outputs.dtype))
    objective = Objective(relu_cnn, loss, objective.data)
    exact = jax.jit(ggn_diag)(objective, params)[2]
    estimate = jax.jit(sampled_gauss_newton)(objective, params, jax.random.key(0)).diag
    assert relative_error(estimate, exact) < 1e-5


def indefinite(outputs, data):
    return jnp.cos(outputs[:, 0] * outputs[:, 1]) + jnp.sum(outputs**2, -1) / 4


def tied(params, data):
    return jnp.tanh(jnp.tanh(data["row"] @ params["w"]) @ params["w"])


@pytest.mark.slow
@pytest.mark.parametrize("loss", [cross_entropy, indefinite])
@pytest.mark.parametrize("network", ["layers", "tied"])
def test_estimate_converges_at_its_standard_error(network, loss):
    if network == "tied":
        params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)), jnp.float32)}
        data = {"row": jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)), jnp.float32)}
        objective = Objective(tied, loss, {**data, "label": jnp.arange(4)})
    else:
        objective, params = mlp(jax.nn.relu, width=4, inputs=5, classes=4)
        objective = Objective(objective.predict, loss, objective.data)
    exact = jax.jit(ggn_diag)(objective, params)[2]
    sample = jax.jit(lambda o, p, k: sampled_gauss_newton(o, p, k, num_samples=1000)[2:4])
    estimate, error = sample(objective, params, jax.random.key(0))
    for name in params:
        deviation = jnp.abs(estimate[name] - exact[name]) / (error[name] + 1e-6)
        assert float(jnp.max(deviation)) < 4.5, name


@pytest.mark.slow
def test_one_sample_is_within_half_of_a_relu_network_s_diagonal():
    objective, params = cnn_problem(examples=64, classes=10)
    exact = jax.jit(ggn_diag)(objective, params)[2]
    estimate, error = jax.jit(sampled_gauss_newton)(objective, params, jax.random.key(0))[2:4]
    assert relative_error(estimate, exact) < 0.48
    assert error is None
