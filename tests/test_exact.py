"""Exact diagonals against dense Hessians in float64, and the routes that were proved for them.

Each case is a network, built from tiny arrays, with the routes its parameters must take: a supported layer that falls
to unit vectors is a failure even though the numbers would be right, and so is an unsound one that does not.
"""

import dataclasses
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

from curvax.exact import exact_diag, explain, ggn_diag
from curvax.objective import Objective

B, CLASSES = 4, 3
GN, TAIL, UNITS = "gauss-newton", "tail", "unit vectors"


def cross_entropy(outputs, data):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, data["label"])


def squared_error(outputs, data):
    return jnp.sum((outputs - data["target"]) ** 2, -1)


@dataclasses.dataclass(frozen=True)
class Case:
    predict: Callable
    params: dict[str, tuple[int, ...]]
    routes: dict[str, str]
    loss: Callable = cross_entropy
    penalty: Callable | None = None


CASES: dict[str, Case] = {}


def case(routes, loss=cross_entropy, penalty=None, **params):
    """Registers a network; `routes` names the parameters that do not take the Gauss-Newton route."""

    def register(predict):
        every = {name: routes.get(name, GN) for name in params}
        CASES[predict.__name__] = Case(predict, params, every, loss, penalty)
        return predict

    return register


def make_params(shapes, seed=0):
    rng = np.random.default_rng(seed)
    scaled = lambda shape: rng.normal(size=shape) / np.sqrt(max(np.prod(shape[:-1]), 1.0))
    return {name: jnp.asarray(scaled(shape)) for name, shape in shapes.items()}


def make_data(examples=B, seed=1):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.normal(size=(examples, 6, 5, 4))),
        "row": jnp.asarray(rng.normal(size=(examples, 5))),
        "tokens": jnp.asarray(rng.integers(0, 6, (examples, 4))),
        "label": jnp.asarray(rng.integers(0, CLASSES, examples)),
        "target": jnp.asarray(rng.normal(size=(examples, CLASSES))),
        "mask": jnp.asarray(rng.integers(0, 2, (examples, 5)), float),
    }


def rows(vector):
    """A vector as a row: tests forbid promotion of ranks."""
    return vector[None]


def conv(images, kernel, strides=1, padding="SAME", **options):
    spatial = "DHW"[3 - images.ndim + 2 :]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    strides = (strides,) * len(spatial) if isinstance(strides, int) else strides
    return lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=numbers, **options)


def max_pool(images, window=2, strides=2):
    shape, strides = (1, window, window, 1), (1, strides, strides, 1)
    return lax.reduce_window(images, -jnp.inf, lax.max, shape, strides, "VALID")


def flatten(x):
    return x.reshape(x.shape[0], -1)


def normalise(x, axis):
    centred = x - jnp.mean(x, axis, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred**2, axis, keepdims=True) + 1e-3)


# Layers that are piecewise linear, one at a time.


@case({}, w=(5, 6), b=(6,), h=(6, 3))
def dense(p, d):
    return jax.nn.relu(d["row"] @ p["w"] + rows(p["b"])) @ p["h"]


@case({}, w=(4, 6), b=(1, 1, 1, 6), h=(6, 3))
def dense_over_positions(p, d):
    return jnp.mean(jax.nn.leaky_relu(d["image"] @ p["w"] + p["b"]), (1, 2)) @ p["h"]


@case({}, w=(4, 6), h=(6, 3))
def dense_over_merged_positions(p, d):
    hidden = jnp.abs(d["image"].reshape(-1, 4) @ p["w"])
    return jnp.mean(hidden.reshape(B, 30, 6), 1) @ p["h"]


@case({}, w=(3, 2, 4), h=(12, 3))
def dense_by_heads(p, d):
    heads = jnp.einsum("bij,hjk->hbik", d["image"][:, 0, :, :2], p["w"])
    return flatten(jnp.max(jnp.moveaxis(heads, 0, 1), 2)) @ p["h"]


@case({}, w=(3, 2, 4, 5), b=(1, 1, 1, 5), v=(2, 2, 5, 4), h=(8, 3))
def conv_pool_conv(p, d):
    hidden = max_pool(jax.nn.relu(conv(d["image"], p["w"]) + p["b"]))
    return flatten(jax.nn.relu(conv(hidden, p["v"], padding="VALID"))) @ p["h"]


@case({}, w=(3, 2, 2, 6), h=(6, 3))
def conv_strided_dilated_grouped(p, d):
    options = dict(strides=(2, 1), padding=((1, 2), (0, 3)), rhs_dilation=(2, 1), feature_group_count=2)
    return jnp.max(conv(d["image"], p["w"], **options), (1, 2)) @ p["h"]


@case({}, w=(3, 1, 6, 1), h=(6, 3))
def conv_channels_first(p, d):
    numbers = ("NCHW", "OIHW", "NCHW")
    kernel = p["w"].transpose(2, 3, 0, 1)
    image = d["image"].transpose(0, 3, 1, 2)[:, :1]
    return (
        jnp.mean(
            jax.nn.relu(lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=numbers)), (2, 3)
        )
        @ p["h"]
    )


@case({}, w=(3, 4, 3), h=(3, 3))
def conv_1d(p, d):
    return jnp.mean(jax.nn.relu(conv(d["image"][:, 0], p["w"], strides=2)), 1) @ p["h"]


@case({}, w=(2, 1, 2, 1, 3), v=(2, 2, 2, 3, 2), h=(2, 3))
def conv_3d(p, d):
    volumes = jax.nn.relu(conv(d["image"][..., None], p["w"]))
    return jnp.mean(jax.nn.relu(conv(volumes, p["v"], strides=2)), (1, 2, 3)) @ p["h"]


@case({}, w=(3, 3, 4, 2), h=(2, 3))
def conv_transposed(p, d):
    out = lax.conv_transpose(d["image"], p["w"], (2, 2), "SAME")
    return jnp.mean(jnp.maximum(out, 0.1), (1, 2)) @ p["h"]


@case({}, w=(2, 2, 4, 3), v=(2, 2, 3, 3), h=(3, 3))
def overlapping_and_average_pooling(p, d):
    hidden = max_pool(conv(d["image"], p["w"]), window=3, strides=1)
    hidden = lax.reduce_window(hidden, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "SAME") / 4.0
    return jnp.mean(jax.nn.relu(conv(hidden, p["v"])), (1, 2)) @ p["h"]


@case({}, table=(6, 5), h=(5, 3))
def embedding(p, d):
    # Repeated tokens: their rows must be summed before they are squared.
    return jnp.sum(jax.nn.relu(jnp.take(p["table"], d["tokens"], axis=0)), 1) @ p["h"]


@case({}, table=(6, 5), h=(5, 3))
def embedding_by_one_hot(p, d):
    return jnp.max(jax.nn.one_hot(d["tokens"], 6, dtype=p["table"].dtype) @ p["table"], 1) @ p["h"]


@case({}, token=(1, 1, 4), place=(1, 6, 4), w=(4, 4), h=(4, 3))
def class_token_and_positions(p, d):
    tokens = jnp.concatenate([jnp.broadcast_to(p["token"], (B, 1, 4)), d["image"][:, 0]], 1) + p["place"]
    return jnp.max(jax.nn.relu(tokens @ p["w"]), 1) @ p["h"]


@case({}, frozen=(5, 6), a=(5, 2), b=(2, 6), h=(6, 3))
def lora_merged(p, d):
    return jax.nn.relu(d["row"] @ (p["frozen"] + 0.5 * (p["a"] @ p["b"]))) @ p["h"]


@case({}, a=(4, 2), b=(2, 6), h=(6, 3))
def lora_applied(p, d):
    return jnp.mean(jax.nn.relu(d["image"] @ p["a"] @ p["b"]), (1, 2)) @ p["h"]


@case({}, w=(5, 6), scale=(6,), shift=(6,), h=(6, 3))
def batch_norm_fixed(p, d):
    mean, variance = jnp.full((1, 6), 0.3), jnp.full((1, 6), 2.0)
    hidden = (d["row"] @ p["w"] - mean) * lax.rsqrt(variance + 1e-3) * rows(p["scale"]) + rows(p["shift"])
    return jax.nn.relu(hidden) @ p["h"]


@case({}, w=(5, 5), h=(5, 3))
def dropout_fixed(p, d):
    return jnp.where(d["mask"] > 0, jax.nn.relu(d["row"] @ p["w"]) / 0.5, 0.0) @ p["h"]


@case({}, w=(5, 6), slope=(1, 6), h=(6, 3))
def prelu(p, d):
    hidden = d["row"] @ p["w"]
    return jnp.where(hidden > 0, hidden, p["slope"] * hidden) @ p["h"]


@case({}, w=(3, 3, 4, 4), v=(3, 3, 4, 4), s=(1, 1, 4, 4), h=(4, 3))
def residual_block(p, d):
    image = d["image"]
    hidden = conv(jax.nn.relu(conv(image, p["w"], strides=2)), p["v"])
    return jnp.mean(jax.nn.relu(hidden + conv(image, p["s"], strides=2)), (1, 2)) @ p["h"]


@case({}, w=(5, 3), v=(5, 3), h=(6, 3))
def branches_concatenated(p, d):
    branches = [jax.nn.relu(d["row"] @ p["w"]), -jnp.sort(d["row"] @ p["v"], -1)]
    return jnp.concatenate(branches, -1)[:, ::-1] @ p["h"]


@case({}, w=(5, 6), h=(6, 3))
def checkpointed(p, d):
    return jax.checkpoint(lambda w, x: jax.nn.relu(x @ w))(p["w"], d["row"]) @ p["h"]


@case({}, w=(5, 6), h=(6, 3))
def one_example_at_a_time(p, d):
    return jax.vmap(lambda row: jax.nn.relu(row @ p["w"]) @ p["h"])(d["row"])


@case({}, w=(3, 3, 4, 5), h=(5, 3))
def one_image_at_a_time(p, d):
    return jax.vmap(lambda image: jnp.max(conv(image[None], p["w"]), (0, 1, 2)) @ p["h"])(d["image"])


@case({}, w=(6, 5), h=(6, 3))
def scaled_transposed_and_sliced(p, d):
    return jax.nn.relu(d["row"][:, 1:] @ (-2.0 * p["w"].T[1:] / 3.0)) @ p["h"]


@case({}, w=(5, 5), h=(5, 3))
def symmetric_weight(p, d):
    return jax.nn.relu(d["row"] @ (p["w"] + p["w"].T)) @ p["h"]


@case({}, w=(5, 6), h=(6, 3))
def mixing_examples_linearly(p, d):
    # As in a graph network: the examples' rows are mixed before any of them matters to a loss.
    mixing = jnp.asarray(np.random.default_rng(3).normal(size=(B, B)))
    return jax.nn.relu(mixing @ (d["row"] @ p["w"])) @ p["h"]


# Losses.


@case({}, loss=squared_error, w=(5, 6), h=(6, 3))
def squared_loss(p, d):
    return dense({**p, "b": jnp.zeros(6)}, d)


@case(
    {}, loss=lambda o, d: jnp.sum(optax.sigmoid_binary_cross_entropy(o, d["mask"][:, :CLASSES]), -1), w=(5, 6), h=(6, 3)
)
def sigmoid_loss(p, d):
    return dense({**p, "b": jnp.zeros(6)}, d)


@case({}, loss=lambda o, d: jnp.cos(o[:, 0] * o[:, 1]) - jnp.prod(jnp.tanh(o), -1), w=(5, 6), h=(6, 3))
def indefinite_loss(p, d):
    return dense({**p, "b": jnp.zeros(6)}, d)


@case({}, loss=lambda o, d: optax.softmax_cross_entropy(o / 2.0, jax.nn.softmax(d["target"])), w=(5, 6), h=(6, 3))
def soft_label_loss(p, d):
    return dense({**p, "b": jnp.zeros(6)}, d)


@case({}, loss=lambda o, d: -jax.nn.log_softmax(o)[jnp.arange(B), d["label"]], w=(5, 6), h=(6, 3))
def loss_indexed_by_example(p, d):
    return dense({**p, "b": jnp.zeros(6)}, d)


# Smooth networks: a longer tail.


@case({"w": TAIL, "b": TAIL}, w=(5, 6), b=(6,), h=(6, 3))
def gelu(p, d):
    return jax.nn.gelu(d["row"] @ p["w"] + rows(p["b"])) @ p["h"]


@case({"w": TAIL, "v": TAIL}, w=(5, 4), v=(4, 4), h=(4, 3))
def tanh_twice(p, d):
    return jnp.tanh(jnp.tanh(d["row"] @ p["w"]) @ p["v"]) @ p["h"]


@case({"w": TAIL}, w=(3, 3, 4, 5), h=(5, 3))
def smooth_after_pooling(p, d):
    return jax.nn.softplus(jnp.mean(jax.nn.relu(conv(d["image"], p["w"])), (1, 2))) @ p["h"]


@case({"w": TAIL}, w=(3, 3, 4, 5), h=(5, 3))
def smooth_over_positions(p, d):
    return jnp.mean(jnp.tanh(max_pool(conv(d["image"], p["w"]), strides=3)), (1, 2)) @ p["h"]


@case({"w": TAIL}, w=(5, 6), scale=(1, 6), h=(6, 3))
def layer_norm(p, d):
    return (normalise(jax.nn.relu(d["row"] @ p["w"]), -1) * p["scale"]) @ p["h"]


@case({"q": TAIL, "k": TAIL}, q=(4, 4), k=(4, 4), v=(4, 4), o=(4, 4), h=(4, 3))
def attention(p, d):
    tokens = d["image"][:, 0, :3]
    query, key, value = (tokens @ p[name] for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bid,bjd->bij", query, key) / 2.0)
    return jnp.mean(jnp.einsum("bij,bjd->bid", weights, value) @ p["o"] + tokens, 1) @ p["h"]


@case({}, loss=squared_error, w=(5, 2), v=(2, 8), h=(8, 3))
def bottleneck(p, d):
    return jax.nn.relu(jax.nn.relu(d["row"] @ p["w"]) @ p["v"]) @ p["h"]


# What must not take a shortcut.


@case({"w": UNITS}, w=(5, 5), h=(5, 3))
def tied(p, d):
    return jax.nn.relu(jax.nn.relu(d["row"] @ p["w"]) @ p["w"]) @ p["h"]


@case({"w": UNITS}, w=(5, 4), h=(8, 3))
def shared_by_two_branches(p, d):
    return jnp.concatenate([jax.nn.relu(d["row"] @ p["w"]), jax.nn.relu(-2.0 * d["row"] @ p["w"])], -1) @ p["h"]


@case({"w": UNITS}, w=(5, 6), h=(6, 3))
def weight_norm(p, d):
    return jax.nn.relu(d["row"] @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))) @ p["h"]


@case({"w": UNITS}, w=(5, 6), scale=(1, 6), h=(6, 3))
def batch_norm_training(p, d):
    return jax.nn.relu(normalise(d["row"] @ p["w"], 0) * p["scale"]) @ p["h"]


@case({"w": UNITS}, loss=lambda o, d: cross_entropy(o - 0.5 * jnp.max(o, 0, keepdims=True), d), w=(5, 3))
def loss_couples_examples(p, d):
    return d["row"] @ p["w"]


@case({"w": UNITS}, w=(5, 3))
def examples_rolled(p, d):
    outputs = d["row"] @ p["w"]
    return jax.nn.relu(outputs) + jnp.roll(outputs, 1, 0)


@case({"w": UNITS}, w=(2, 5, 5), h=(5, 3))
def scanned(p, d):
    return lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), d["row"], p["w"])[0] @ p["h"]


@jax.custom_vjp
def opaque(x):
    return jax.nn.relu(x)


opaque.defvjp(lambda x: (jax.nn.relu(x), x), lambda x, ct: (jnp.where(x > 0, ct, 0),))


@case({"w": UNITS}, w=(5, 6), h=(6, 3))
def custom_vjp(p, d):
    return opaque(d["row"] @ p["w"]) @ p["h"]


@jax.custom_jvp
def straight_through(x):
    return jnp.round(x)


straight_through.defjvp(lambda primals, tangents: (jnp.round(*primals), *tangents))


@case({"w": UNITS}, w=(5, 6), h=(6, 3))
def custom_jvp_straight_through(p, d):
    return straight_through(3.0 * d["row"] @ p["w"]) @ p["h"]


@jax.custom_jvp
def secretly_coupled(x):
    return x


secretly_coupled.defjvp(lambda primals, tangents: (*primals, tangents[0] + jnp.roll(tangents[0], 1, 0)))


@case({"w": UNITS}, w=(5, 3))
def custom_jvp_coupling_examples(p, d):
    return secretly_coupled(jax.nn.relu(d["row"] @ p["w"]))


@case({"w": UNITS}, w=(5, 3))
def product_of_layer_with_itself(p, d):
    return (d["row"] @ p["w"]) * (d["row"] @ p["w"][::-1])


@case({"w": "zero"}, w=(5, 3), h=(5, 3))
def no_derivative(p, d):
    return d["row"] @ p["h"] + lax.stop_gradient(d["row"] @ p["w"])


# Penalties.


@case({}, penalty=lambda p: 0.1 * jnp.sum(p["w"] ** 2) + jnp.sum(jnp.log(jnp.cosh(p["h"]))), w=(5, 6), h=(6, 3))
def penalty_by_entries(p, d):
    return dense({**p, "b": jnp.zeros(6)}, d)


@case({}, penalty=lambda p: jnp.linalg.norm(p["w"]) * jnp.sum(p["h"] ** 3), w=(5, 6), h=(6, 3), b=(6,))
def penalty_that_mixes(p, d):
    return dense(p, d)


@pytest.fixture(autouse=True, scope="module")
def quick_compile():
    """Compiles fast rather than well: what is computed is the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def dense_references(objective, params):
    """Diagonals of the full Hessian and of the full Gauss-Newton matrix."""
    flat, unravel = ravel_pytree(params)
    outputs = lambda flat: objective.predict(unravel(flat), objective.data)
    out = outputs(flat)
    loss = lambda u: jnp.mean(objective.loss(u.reshape(out.shape), objective.data))
    jacobian = jax.jacrev(lambda flat: outputs(flat).ravel())(flat)
    gauss_newton = jnp.einsum("oi,op,pi->i", jacobian, jax.hessian(loss)(out.ravel()), jacobian)
    if objective.penalty is not None:
        gauss_newton += jnp.diag(jax.hessian(lambda flat: objective.penalty(unravel(flat)))(flat))
    return unravel(jnp.diag(jax.hessian(lambda flat: objective(unravel(flat)))(flat))), unravel(gauss_newton)


def assert_close(found, expected, tolerance):
    for name in expected:
        error = jnp.linalg.norm(found[name].astype(expected[name].dtype) - expected[name])
        # A Hessian that is zero, as with one class, is known to rounding only.
        assert error <= tolerance * jnp.maximum(jnp.linalg.norm(expected[name]), 1e-3), (name, float(error))


@pytest.mark.slow_but_for("dense]", "conv_pool_conv", "attention", "tied")
@pytest.mark.parametrize("name", CASES)
def test_diagonals_are_those_of_the_dense_matrices(name, x64):
    chosen = CASES[name]
    params, data = make_params(chosen.params), make_data()
    objective = Objective(chosen.predict, chosen.loss, data, chosen.penalty)

    @jax.jit
    def everything(objective, params):
        found = exact_diag(objective, params), ggn_diag(objective, params)[2]
        return *found, jax.value_and_grad(objective)(params), dense_references(objective, params)

    (value, grad, diag), ggn, (true_value, true_grad), (hessian, gauss_newton) = everything(objective, params)
    np.testing.assert_allclose(value, true_value, rtol=1e-12)
    assert_close(grad, true_grad, 1e-12)
    assert_close(diag, hessian, 1e-10)
    assert_close(ggn, gauss_newton, 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_routes(name):
    chosen = CASES[name]
    params, data = jax.tree.map(jnp.float32, make_params(chosen.params)), make_data()
    explanation = explain(Objective(chosen.predict, chosen.loss, data, chosen.penalty), params)
    found = {row.path: row.route for row in explanation.rows if not row.path.startswith("penalty")}
    assert found == chosen.routes, str(explanation)


@pytest.mark.slow_but_for("dense_over")
@pytest.mark.parametrize("name", ["conv_pool_conv", "dense_over_positions", "tanh_twice", "attention"])
def test_single_precision(name):
    chosen = CASES[name]
    params, data = jax.tree.map(jnp.float32, make_params(chosen.params)), make_data()
    diag = jax.jit(exact_diag)(Objective(chosen.predict, chosen.loss, data), params)[2]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, float) if x.dtype == jnp.float32 else x, (params, data))
        hessian, _ = jax.jit(dense_references)(Objective(chosen.predict, chosen.loss, wide[1]), wide[0])
        assert_close(diag, hessian, 1e-5)


@pytest.mark.slow
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(
    size=st.tuples(st.integers(3, 6), st.integers(3, 6)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    low=st.integers(0, 2),
    base_dilation=st.integers(1, 2),
    kernel_dilation=st.integers(1, 2),
    groups=st.integers(1, 2),
    examples=st.integers(2, 5),
)
def test_any_convolution(size, kernel, strides, low, base_dilation, kernel_dilation, groups, examples):
    with jax.enable_x64(True):
        options = dict(lhs_dilation=(base_dilation, 1), rhs_dilation=(1, kernel_dilation), feature_group_count=groups)

        def predict(p, d):
            padding = ((low, kernel[0]), (2, kernel[1] * kernel_dilation))
            hidden = jax.nn.relu(conv(d["image"], p["w"], strides, padding, **options))
            return jnp.max(jax.nn.relu(conv(hidden, p["v"])), (1, 2)) @ p["h"]

        shapes = {"w": (*kernel, 4 // groups, 4), "v": (2, 2, 4, 3), "h": (3, CLASSES)}
        data = make_data(examples)
        data["image"] = data["image"][:, : size[0], : size[1]]
        assert_exact(Objective(predict, cross_entropy, data), make_params(shapes))


@pytest.mark.slow
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(
    positions=st.integers(1, 6),
    classes=st.integers(1, 7),
    width=st.integers(1, 5),
    examples=st.integers(1, 5),
    chunk=st.sampled_from([None, 1, 2, 3]),
    smooth=st.booleans(),
)
def test_any_dense_layer(positions, classes, width, examples, chunk, smooth):
    with jax.enable_x64(True):
        activation = jnp.tanh if smooth else jax.nn.relu

        def predict(p, d):
            return jnp.max(activation(d["x"] @ p["w"] + p["b"]), 1) @ p["h"]

        rng = np.random.default_rng(0)
        data = {"x": rng.normal(size=(examples, positions, 3)), "label": rng.integers(0, classes, examples)}
        shapes = {"w": (3, width), "b": (1, 1, width), "h": (width, classes)}
        objective = Objective(predict, cross_entropy, jax.tree.map(jnp.asarray, data))
        assert_exact(objective, make_params(shapes), chunk_size=chunk)


def assert_exact(objective, params, **options):
    @jax.jit
    def both(objective, params):
        return exact_diag(objective, params, **options)[2], dense_references(objective, params)[0]

    assert_close(*both(objective, params), 1e-10)
