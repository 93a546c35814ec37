"""Exact diagonals where a proof is easily a case short, against dense Hessians in float64.

Programs of one kind are compiled together: what they find, and what is true of them.
"""

import gc
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.flatten_util import ravel_pytree

import curvax.exact
import curvax.placements
from curvax import Objective, explain, hessian_diag
from curvax.exact import exact_diag, ggn_diag

B = 3
RNG = np.random.default_rng(0)
DATA = {
    "x": RNG.normal(size=(B, 4)),
    "image": RNG.normal(size=(B, 3, 3, 2)),
    "complex": RNG.normal(size=(B, 4)) + 1j * RNG.normal(size=(B, 4)),
    "label": np.arange(B) % 3,
    "anywhere": RNG.integers(-9, 9, (B, 4)),
}
PARAMS = {"w": RNG.normal(size=(4, 4)) / 2, "b": RNG.normal(size=(1, 4)), "h": RNG.normal(size=(4, 3)) / 2}
relu = jax.nn.relu


def cross_entropy(outputs, data):
    return jax.nn.logsumexp(outputs, -1) - jnp.take_along_axis(outputs, data["label"][:, None], 1)[:, 0]


def hidden(p, d):
    return relu(d["x"] @ p["w"] + p["b"])


def between_layers(function):
    return lambda p, d: function(hidden(p, d), p, d) @ p["h"], cross_entropy


def of_kernel(function):
    return lambda p, d: relu(d["x"] @ function(p["w"])) @ p["h"], cross_entropy


def of_loss(function):
    return hidden, lambda outputs, d: jnp.sum(function(outputs, d), -1)


def to_logits(predict):
    return predict, cross_entropy


def rows(table, indices, mode):
    numbers = lax.GatherDimensionNumbers((2,), (0,), (0,))
    return lax.gather(table, indices[..., None], numbers, (1, table.shape[1]), mode=mode, fill_value=0.5)


def recurrence(p, d):
    def cell(carry, row):
        state, unused, count = carry
        new = jnp.tanh(row @ p["w"][:2] + state @ p["w"])
        return (new, 2 * unused, count + 1), (new, count)

    zeros = jnp.zeros((len(d["image"]), 4))
    return lax.scan(cell, (zeros, zeros, 0), jnp.swapaxes(d["image"][:, 0], 0, 1), reverse=True)


def convolution(order, numbers):
    """A convolution with the whole image, in some layout."""

    def predict(p, d):
        kernel = jnp.einsum("hw,io->hwio", p["w"][:3, :3], p["h"][:2])
        out = lax.conv_general_dilated(d["image"].transpose(order), kernel, (1, 1), "VALID", dimension_numbers=numbers)
        return out.reshape(len(d["image"]), 3)

    return to_logits(predict)


KINDS = {
    "complex": {
        "abs": between_layers(lambda u, p, d: jnp.abs(u * (1 + d["complex"]))),
        "layer": to_logits(lambda p, d: relu((d["complex"] @ p["w"]).real) @ p["h"]),
        "kernel": of_kernel(lambda w: (w * (1 + 2j) * (0.5 - 1j)).real + lax.complex(w, 2 * w).imag),
        "filter": between_layers(lambda u, p, d: jnp.fft.irfft(jnp.fft.rfft(u) * jnp.array([[1, 2j, 0.5]]), n=4)),
        "filter over examples": between_layers(lambda u, p, d: jnp.fft.fft(u, axis=0).real),
        "literal in a loss": of_loss(lambda u, d: (u * (1 + 1j)).real ** 2 + (1j * u).imag),
        "softmax in a loss": of_loss(lambda u, d: jnp.log(jnp.sum(jnp.exp(1j * u), -1, keepdims=True)).real),
        "sum in a loss": of_loss(lambda u, d: ((1 + 2j) * jnp.sum(jnp.exp(1j * u), -1, keepdims=True)).real),
        "spectrum in a loss": of_loss(lambda u, d: jnp.abs(jnp.fft.fft(u) + 1) ** 2),
    },
    "complex outputs": {
        "norm": (lambda p, d: d["complex"] @ p["w"], lambda z, d: jnp.sum(jnp.abs(z) ** 2, -1)),
        "parts": (lambda p, d: hidden(p, d) * (1 + 2j), lambda z, d: jnp.sum(z.real**2 * z.imag, -1)),
    },
    "gathers": {
        "rows that fill": to_logits(lambda p, d: jnp.sum(relu(rows(p["w"], d["anywhere"], "fill")), 1) @ p["h"]),
        "rows that clip": to_logits(lambda p, d: jnp.sum(relu(rows(p["w"], d["anywhere"], "clip")), 1) @ p["h"]),
        "entries that fill": between_layers(
            lambda u, p, d: jnp.take(u, jnp.array([0, 7, -1, -9]), 1, mode="fill", fill_value=2.0)
        ),
        "labels that fill": of_loss(
            lambda u, d: jnp.square(
                jax.nn.logsumexp(u, -1, keepdims=True)
                - jnp.take_along_axis(u, 3 + d["label"][:, None], 1, mode="fill", fill_value=0.0)
            )
        ),
        "a batch of one table": to_logits(
            lambda p, d: jax.vmap(lambda table, i: table[i], (0, None))(p["w"][None], d["label"])[0] @ p["h"]
        ),
    },
    "scatters": {
        "dropped": between_layers(lambda u, p, d: u.at[:, jnp.array([1, 8])].set(p["h"][:2, 0], mode="drop")),
        "clipped": between_layers(lambda u, p, d: u.at[:, jnp.array([1, 8])].add(p["h"][:2, 0], mode="clip")),
        "into a parameter": to_logits(
            lambda p, d: (
                jax.vmap(lambda i, x: p["b"][0].at[i].set(x, mode="drop"))(d["anywhere"], d["x"] @ p["w"]) @ p["h"]
            )
        ),
        "a sparse kernel": of_kernel(
            lambda w: jnp.zeros((4, 4)).at[jnp.array([0, 1, 3, 3]), jnp.array([0, 2, 1, 1])].add(w[0])
        ),
        "rows to others": between_layers(lambda u, p, d: jnp.zeros((B, 4)).at[jnp.array([2, 0, 2])].add(u)),
    },
    "moves": {
        "read by columns": between_layers(lambda u, p, d: lax.reshape(u, (B, 4), (1, 0))),
        "one row over another": between_layers(
            lambda u, p, d: lax.dynamic_update_slice(u, u[1:2], (d["label"][2], jnp.zeros_like(d["label"][2])))
        ),
        "sorted with others": between_layers(lambda u, p, d: lax.sort((u, jnp.cumsum(u, 0)), num_keys=1)[1]),
        "sorted with its own": between_layers(lambda u, p, d: lax.sort((u, jnp.cumsum(u, 1)), num_keys=1)[1]),
        "tiled": to_logits(lambda p, d: jnp.max((jnp.tile(hidden(p, d), (2, 1)) @ p["h"]).reshape(B, 2, 3), 1)),
    },
    "unused results": {
        "of a scan, its states": to_logits(lambda p, d: jnp.mean(recurrence(p, d)[1][0], 0) @ p["h"]),
        "of a scan, its carry": to_logits(lambda p, d: recurrence(p, d)[0][0] @ p["h"]),
        "of a branch": between_layers(
            lambda u, p, d: lax.cond(d["x"][0, 0] > 0, lambda u: (u, u**2), lambda u: (u, jnp.tanh(u)), u)[1]
        ),
    },
    "no sizes": {
        "features": to_logits(lambda p, d: d["x"][:, :0] @ p["w"][:0] @ p["h"] + p["h"][:1]),
        "positions": to_logits(lambda p, d: jnp.sum(d["image"][:, :0, 0] @ p["w"][:2], 1) @ p["h"] + 1),
    },
    "computed again by the loss": {
        "an output": (
            lambda p, d: {"a": d["x"] @ p["w"], "b": jnp.tanh(d["x"] @ p["w"])},
            lambda z, d: jnp.sum(jnp.tanh(z["a"]) ** 2 + z["b"] * z["a"], -1),
        ),
    },
}

ONE_EXAMPLE = {
    "convolution": convolution((0, 1, 2, 3), ("NHWC", "HWIO", "NHWC")),
    "convolution, examples last": convolution((1, 2, 3, 0), ("HWCN", "HWIO", "HWNC")),
    "batch axis made late": to_logits(lambda p, d: (relu(d["x"][0] @ p["w"] + p["b"][0]) @ p["h"])[None]),
    "batch axis merged": to_logits(
        lambda p, d: jnp.sum(relu(d["image"].reshape(-1, 2) @ p["w"][:2]), 0)[None] @ p["h"]
    ),
    "a parameter like the batch": to_logits(lambda p, d: hidden(p, d) @ p["h"]),
    "a parameter for outputs": to_logits(lambda p, d: p["b"][:, :3]),
    "smooth": to_logits(lambda p, d: jnp.tanh(d["x"] @ p["w"]) @ p["h"]),
}


@pytest.fixture(autouse=True, scope="module")
def quick_compile():
    """Compiles fast rather than well: what is computed is the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def assert_diagonals(programs, data):
    """Both exact diagonals of every program are those of the dense matrices."""

    @jax.jit
    def everything(params, data):
        objectives = {name: Objective(predict, loss, data) for name, (predict, loss) in programs.items()}
        return {
            name: (exact_diag(o, params)[2], ggn_diag(o, params)[2], dense_diagonals(o, params))
            for name, o in objectives.items()
        }

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        found = everything(jax.tree.map(jnp.asarray, PARAMS), jax.tree.map(jnp.asarray, data))
    for name, (exact, gauss_newton, (hessian, product)) in found.items():
        for leaf in PARAMS:
            tolerance = {"rtol": 1e-9, "atol": 1e-12, "err_msg": f"{name}, {leaf}"}
            np.testing.assert_allclose(exact[leaf], hessian[leaf], **tolerance)
            np.testing.assert_allclose(gauss_newton[leaf], product[leaf], **tolerance)


def dense_diagonals(objective, params):
    """Of the Hessian and of the Gauss-Newton matrix, complex outputs being their real and imaginary parts."""
    flat, unravel = ravel_pytree(params)
    split = lambda z: [z.real, z.imag] if jnp.iscomplexobj(z) else [z, None]
    parts = lambda outputs: jax.tree.map(split, outputs)
    outputs = lambda flat: parts(objective.predict(unravel(flat), objective.data))
    flat_outputs, unravel_outputs = ravel_pytree(outputs(flat))

    def loss(flat_outputs):
        whole = lambda part: part[0] if part[1] is None else lax.complex(*part)
        tree = jax.tree.map(whole, unravel_outputs(flat_outputs), is_leaf=lambda x: isinstance(x, list))
        return jnp.mean(objective.loss(tree, objective.data))

    jacobian = jax.jacrev(lambda flat: ravel_pytree(outputs(flat))[0])(flat)
    product = jnp.einsum("oi,op,pi->i", jacobian, jax.hessian(loss)(flat_outputs), jacobian)
    hessian = jax.jacfwd(jax.grad(lambda flat: objective(unravel(flat))))(flat)
    return unravel(jnp.diag(hessian)), unravel(product)


@pytest.mark.slow_but_for("no sizes", "computed again")
@pytest.mark.parametrize("kind", KINDS)
def test_programs_of_a_kind(kind):
    assert_diagonals(KINDS[kind], DATA)


@pytest.mark.slow
def test_batches_of_one():
    assert_diagonals(ONE_EXAMPLE, {name: x[:1] for name, x in DATA.items()})


@jax.custom_vjp
def calls_itself(x):
    """Its gradient has no forward derivative."""
    return jnp.tanh(x)


calls_itself.defvjp(lambda x: (calls_itself(x), x), lambda x, cotangent: ((1 - jnp.tanh(x) ** 2) * cotangent,))


@jax.custom_vjp
def opaque(x):
    """Its gradient has no derivative at all."""
    return jnp.tanh(x)


def tanh_elsewhere(x):
    return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="expand_dims")


opaque.defvjp(lambda x: (opaque(x), x), lambda x, cotangent: ((1 - tanh_elsewhere(x) ** 2) * cotangent,))


def smooth_objective(activation):
    data = jax.tree.map(jnp.float32, {"x": DATA["x"], "target": DATA["x"][:, :3]})
    predict = lambda w, d: activation(d["x"] @ w)
    return Objective(predict, lambda z, d: jnp.sum(jnp.cos(z - d["target"]), -1), data), jnp.float32(PARAMS["h"])


@pytest.mark.slow_but_for("basis")
@pytest.mark.parametrize("method", ["exact", "basis", "ggn", "hutchinson", "xdiag"])
def test_functions_differentiated_in_reverse_only(method):
    key = jax.random.key(0) if method in ("hutchinson", "xdiag") else None
    found, expected = (hessian_diag(*smooth_objective(f), method, key=key) for f in (calls_itself, jnp.tanh))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "basis", "hutchinson", "xdiag"])
def test_functions_differentiated_once_are_refused(method):
    key = jax.random.key(0) if method in ("hutchinson", "xdiag") else None
    with pytest.raises(ValueError, match=r'once, but not twice.*Pure callbacks do not support JVP.*method="ggn"'):
        hessian_diag(*smooth_objective(opaque), method, key=key)


def test_gauss_newton_differentiates_the_network_once():
    found, expected = (hessian_diag(*smooth_objective(f), "ggn") for f in (opaque, jnp.tanh))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_kernel_made_of_half_precision_parameters():
    """By a function that has its dtypes inside, and that casts."""
    kernel = lambda w: (relu(w) * 1.5).astype(jnp.float32).astype(w.dtype)
    objective = lambda x: Objective(
        lambda w, x: relu(x @ kernel(w)), lambda z, x: jnp.sum(z.astype(x.dtype) ** 2, -1), x
    )
    w, x = jnp.asarray(PARAMS["w"], jnp.bfloat16), jnp.asarray(DATA["x"], jnp.bfloat16)
    found = hessian_diag(objective(x), w, "exact")
    expected = hessian_diag(objective(x.astype(jnp.float32)), w.astype(jnp.float32), "exact")
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0.02)


def test_indices_are_counted_inside_an_eager_shard_map():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    loss = lambda z, d: -jax.nn.log_softmax(z)[jnp.arange(2), d["label"]]
    routes = []

    def on_each_device(x):
        objective = Objective(lambda p, d: d["x"] @ p, loss, {"x": x, "label": jnp.array([0, 2])})
        routes.append(explain(objective, jnp.float32(PARAMS["h"])).rows[0].route)
        return x

    spec = jax.sharding.PartitionSpec("x")
    jax.shard_map(on_each_device, mesh=mesh, in_specs=spec, out_specs=spec)(jnp.ones((4, 4)))
    assert routes == ["gauss-newton"]


@pytest.mark.parametrize("method", ["exact", "basis", "ggn", "hutchinson", "xdiag"])
def test_trees_without_numbers(method):
    data = jnp.float32(DATA["x"])
    objective = Objective(lambda p, x: x + jnp.sum(p["empty"]) if p else x, lambda z, x: jnp.sum(z**2, -1), data)
    for params in ({}, {"empty": jnp.zeros((0, 2))}):
        diag = hessian_diag(objective, params, method, key=jax.random.key(0) if method[0] in "hx" else None)
        assert jax.tree.map(jnp.shape, diag) == jax.tree.map(jnp.shape, params)


def test_a_batch_without_examples_is_refused():
    objective = Objective(lambda w, x: x @ w, lambda z, x: jnp.sum(z**2, -1), jnp.ones((0, 4)))
    with pytest.raises(ValueError, match="a batch without examples has no mean"):
        hessian_diag(objective, jnp.ones((4, 2)), "exact")


# Names that one of the JAX versions we support does not know.
GONE, NEW = {"closed_call"}, {"log2", "one_minus_square"}
# A table of their parameters.
PARAMETERS = {"SHAPES", "BODIES"}


def test_the_primitives_in_the_tables_exist():
    """A name that JAX changes would silently fall to unit vectors."""
    known = {thing.name for thing in gc.get_objects() if isinstance(thing, Primitive)}
    modules = pkgutil.iter_modules(curvax.exact.__path__, "curvax.exact.")
    for module in (curvax.placements, *(importlib.import_module(module.name) for module in modules)):
        tables = {name: table for name, table in vars(module).items() if isinstance(table, frozenset | dict | tuple)}
        for name, table in tables.items():
            if not name.startswith("__") and name not in PARAMETERS and all(isinstance(item, str) for item in table):
                assert not set(table) - known - GONE - NEW, (module.__name__, name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.uint32])
@pytest.mark.parametrize("mode", ["clip", "fill"])
@pytest.mark.parametrize("made", [False, True], ids=["table", "made"])
def test_tokens_of_a_type_too_small_for_the_rows(dtype, mode, made):
    """A vocabulary of 256 bytes and more, looked up by bytes; the table is a parameter, or made from one."""
    rows = 300
    tokens = np.array([[0, 3, 250], [255, 3, 256]]).astype(dtype)
    numbers = lax.GatherDimensionNumbers(offset_dims=(2,), collapsed_slice_dims=(0,), start_index_map=(0,))
    mix = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)

    def predict(p, data):
        table = mix @ p if made else p
        return jnp.tanh(lax.gather(table, data[..., None], numbers, (1, 2), mode=mode).sum(1))

    objective = Objective(predict, lambda z, data: jnp.sum(z**2, -1), jnp.asarray(tokens))
    params = jnp.asarray(np.random.default_rng(1).normal(size=(4 if made else rows, 2)), jnp.float32)
    for method in ("exact", "ggn") if made else ("exact",):
        wide = Objective(predict, objective.loss, jnp.asarray(tokens.astype(np.int32)))
        expected = hessian_diag(wide, params, method)
        np.testing.assert_allclose(hessian_diag(objective, params, method), expected, rtol=1e-5, atol=1e-7)
    if made:
        # XLA, as the tests compile, scatters wrongly by bytes, and JAX's gradient is wrong with it.
        basis = hessian_diag(wide, params, "basis")
        np.testing.assert_allclose(hessian_diag(objective, params, "exact"), basis, rtol=1e-3, atol=1e-5)
    else:
        found = np.unique(np.nonzero(np.asarray(hessian_diag(objective, params, "ggn")))[0])
        indices = tokens.astype(np.int64)
        kept = np.clip(indices, 0, rows - 1) if mode == "clip" else indices[(indices >= 0) & (indices < rows)]
        np.testing.assert_array_equal(found, np.unique(kept))


def test_a_conversion_that_wraps_is_known_to():
    """Rows 0 to 299 as bytes: a constant index, which is folded as XLA computes it."""
    index = lambda: jnp.arange(300).astype(jnp.uint8).astype(jnp.int32)
    data = jnp.asarray(np.random.default_rng(0).normal(size=(300, 2)), jnp.float32)
    objective = Objective(lambda p, d: (d @ p)[index()], lambda z, d: z**2, data)
    params = jnp.ones(2)
    np.testing.assert_allclose(
        hessian_diag(objective, params, "exact"), hessian_diag(objective, params, "basis"), rtol=1e-4
    )
