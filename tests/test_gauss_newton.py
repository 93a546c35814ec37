"""Losses as the trace sees them, and the estimates and closed forms that follow, against dense matrices in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import curvax
from curvax import Objective, hessian_diag
from curvax.curvature import micro_batches
from curvax.curvature.gauss_newton import plan_sampling, sampled_gauss_newton
from curvax.exact import columns, exact_diag, explain, ggn_diag
from curvax.exact.atoms import Separate, Softmax, find_atoms
from curvax.exact.dataflow import analyse
from curvax.exact.independence import example_axes
from curvax.exact.trace import trace_loss

EXAMPLES, CLASSES = 6, 3
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def any_promotion():
    """Losses are other people's code."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def batch(examples=EXAMPLES, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(examples, 4)),
        "label": rng.integers(0, CLASSES, examples),
        "target": rng.normal(size=(examples, CLASSES)),
        "share": rng.dirichlet(np.ones(CLASSES), examples),
        "weight": rng.normal(size=examples),
        "kept": rng.random((examples, CLASSES)) < 0.6,
    }


def parameters(seed=1, classes=CLASSES):
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(4, 5))), "v": jnp.asarray(rng.normal(size=(5, classes)))}


def network(p, d):
    return jax.nn.relu(d["x"] @ p["w"]) @ p["v"]


def linear(w, d):
    return d["x"] @ w


def ce(z, d):
    return optax.softmax_cross_entropy_with_integer_labels(z, d["label"])


def entropy_of_kept(z, d):
    kept = d["kept"] | (jnp.arange(CLASSES)[None] == d["label"][:, None])
    return jax.nn.logsumexp(z, -1, where=kept) - z[jnp.arange(z.shape[0]), d["label"]]


SOFTMAX, SEPARATE = "softmax", "functions of single outputs"
NESTED = "atoms of atoms"
LOSSES = {
    "cross entropy": (ce, [SOFTMAX]),
    "smooth labels": (lambda z, d: optax.softmax_cross_entropy(z, optax.smooth_labels(d["share"], 0.1)), [SOFTMAX]),
    "temperature and weights of either sign": (lambda z, d: d["weight"] * ce(z / 2.5, d), [SOFTMAX]),
    "advantages": (
        lambda z, d: -d["weight"] * jnp.take_along_axis(jax.nn.log_softmax(z), d["label"][:, None], 1)[:, 0],
        [SOFTMAX],
    ),
    "masked classes": (entropy_of_kept, [SOFTMAX]),
    "two tasks": (lambda z, d: ce(z, d) + 0.3 * jnp.sum((z - d["target"]) ** 2, -1), [SOFTMAX, SEPARATE]),
    "squared": (lambda z, d: jnp.sum((z - d["target"]) ** 2, -1), [SEPARATE]),
    "masked squares": (lambda z, d: jnp.where(d["kept"], (z - d["target"]) ** 2, 0.0).mean(-1), [SEPARATE]),
    "binary": (lambda z, d: optax.sigmoid_binary_cross_entropy(z, d["share"]).sum(-1), [SEPARATE]),
    "poisson": (lambda z, d: (jnp.exp(z) - d["target"] * z).mean(-1), [SEPARATE]),
    "huber": (lambda z, d: optax.huber_loss(z, d["target"]).sum(-1), [SEPARATE]),
    "log cosh": (lambda z, d: optax.log_cosh(z, d["target"]).sum(-1), [SEPARATE]),
    "squared hinge": (lambda z, d: (jax.nn.relu(1 - z * d["target"]) ** 2).sum(-1), [SEPARATE]),
    "z-loss": (lambda z, d: ce(z, d) + 0.1 * jax.nn.logsumexp(z, -1) ** 2, NESTED),
    "soft cap": (lambda z, d: ce(2 * jnp.tanh(z / 2), d), NESTED),
    "focal": (lambda z, d: (1 - jnp.exp(-ce(z, d))) ** 2 * ce(z, d), NESTED),
    "cosine": (lambda z, d: optax.cosine_distance(z, d["target"]), None),
    "hinge": (lambda z, d: jax.nn.relu(1 - z * d["target"]).sum(-1), []),
    "coupled by its mean": (lambda z, d: ce(z - z.mean(0, keepdims=True), d), [SOFTMAX]),
    "contrast": (
        lambda z, d: optax.softmax_cross_entropy_with_integer_labels(z @ d["target"].T, jnp.arange(z.shape[0])),
        [SOFTMAX],
    ),
}


def dense(objective, params):
    """The Gauss-Newton diagonal, whatever the loss couples, from dense matrices."""
    flat, unflatten = ravel_pytree(params)
    outputs = lambda v: ravel_pytree(objective.predict(unflatten(v), objective.data))
    z, shape = outputs(flat)
    jacobian = jax.jacobian(lambda v: outputs(v)[0])(flat)
    curvature = jax.hessian(lambda z: jnp.mean(objective.example_losses(shape(z), objective.data)))(z)
    return unflatten(jnp.einsum("ip,ij,jp->p", jacobian, curvature, jacobian))


dense_of = jax.jit(dense)
draw = jax.jit(sampled_gauss_newton, static_argnames=("num_samples", "squares", "micro_batches"))
diag_of = jax.jit(lambda objective, params: exact_diag(objective, params)[2])


def assert_within_errors(found, error, expected, errors=5.5):
    for name in expected:
        off = np.abs(np.asarray(found[name] - expected[name]))
        rounding = 1e-9 * np.abs(np.asarray(expected[name])).max()
        assert np.all(off <= errors * np.asarray(error[name]) + rounding), (name, off / np.asarray(error[name]))


@pytest.mark.parametrize("name", LOSSES)
def test_the_trace_proves_what_a_loss_is_curved_by(name):
    loss, kinds = LOSSES[name]
    flow = analyse(trace_loss(Objective(network, loss, batch()), jnp.zeros((EXAMPLES, CLASSES))))
    structure = find_atoms(flow)
    if isinstance(structure, str):
        assert kinds is None
    elif not structure.simple:
        assert kinds == NESTED
    else:
        assert [{Softmax: SOFTMAX, Separate: SEPARATE}[type(atom)] for atom in structure.atoms] == kinds


@pytest.mark.slow_but_for("cross entropy", "two tasks")
@pytest.mark.parametrize("name", LOSSES)
def test_both_forms_of_the_estimate_are_unbiased(name, x64):
    objective, params = Objective(network, LOSSES[name][0], batch()), parameters()
    estimates = [
        functools.partial(sampled_gauss_newton, num_samples=400, squares=squares) for squares in ("example", "batch")
    ]
    run = jax.jit(lambda o, p, key: (dense(o, p), ggn_diag(o, p)[2], [estimate(o, p, key) for estimate in estimates]))
    expected, exact, found = run(objective, params, jax.random.key(2))
    for name in params:
        np.testing.assert_allclose(exact[name], expected[name], rtol=1e-7, atol=1e-12)
    for estimate in found:
        assert_within_errors(estimate.diag, estimate.standard_error, expected)


def ordinal(z, d):
    """The logarithm of a difference of sigmoids of one output."""
    ends = jnp.array([[-30.0, -1.0, 1.0, 30.0]]) - z
    shares = jnp.diff(jax.nn.sigmoid(ends), axis=1)
    return -jnp.log(shares[jnp.arange(z.shape[0]), d["label"]])


def sharp(z, d):
    """A softmax that is written as a sum with weights: its logarithm is not proved to be of a sum of exponentials."""
    return jax.nn.logsumexp(20 * z, -1, b=jnp.ones(CLASSES)) - 20 * jnp.take_along_axis(z, d["label"][:, None], 1)[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "outputs"), [(ordinal, 1), (sharp, CLASSES)])
def test_atoms_that_cancel_each_other_are_factored_where_outputs_are_few(loss, outputs, x64):
    """Convex losses: a column `v` of random signs has `E[(a v)^4] <= 3 (a H a)^2`, so that the squares of B examples,
    with the diagonals `c_b`, have variances of `2 sum_b c_b^2 / B^2` at most; and none where there is one output."""
    objective, w = Objective(lambda w, d: d["x"] @ w, loss, batch()), parameters(classes=outputs)["v"][:4]
    assert "few outputs" in str(curvax.explain(objective, w, None))
    one = lambda w, row: loss((row["x"] @ w)[None], jax.tree.map(lambda x: x[None], row))[0]
    hessian = lambda row: jnp.diag(jax.hessian(one)(w, row).reshape(w.size, w.size))
    of_examples = np.asarray(jax.jit(jax.vmap(hessian))(batch()))
    keys = jax.random.split(jax.random.key(0), 500)
    many = jax.jit(jax.vmap(lambda key: sampled_gauss_newton(objective, w, key).diag.ravel()))
    squares = (np.asarray(many(keys)) - of_examples.mean(0)) ** 2
    most = 2 * np.sum(of_examples**2, 0) / EXAMPLES**2 if outputs > 1 else np.zeros(w.size)
    # A polynomial of second degree in signs has a fourth moment of 81 times the square of its second at most.
    assert np.all(squares.mean(0) <= most * (1 + 5 * 9 / np.sqrt(len(keys))) + 1e-20), squares.mean(0) / most


@pytest.mark.slow
@pytest.mark.parametrize("part", [4 * CLASSES * 2, 2**22])
def test_a_random_column_is_drawn_in_parts_where_it_is_large(part, x64, monkeypatch):
    monkeypatch.setattr(columns, "PART", part)
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, CLASSES, (4, 6)))
    predict = lambda p, d: jnp.tanh(d["x"][:, None, :] * jnp.arange(1.0, 7)[None, :, None] @ p["w"]) @ p["v"]
    loss = lambda z, d: optax.softmax_cross_entropy_with_integer_labels(z, d["tokens"])
    objective, params = Objective(predict, loss, {"x": jnp.asarray(batch(4)["x"]), "tokens": tokens}), parameters()
    run = jax.jit(lambda o, p, key: (dense(o, p), sampled_gauss_newton(o, p, key, num_samples=300)))
    expected, estimate = run(objective, params, jax.random.key(4))
    assert_within_errors(estimate.diag, estimate.standard_error, expected)


@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_unlikely_classes_keep_their_curvature(classes):
    """A class of probability 1e-8, in float32, to 1e-4; and one of 1 - 1e-8, whose 1 - p is no difference."""
    places = np.arange(classes)
    several, one, hardly = places < classes // 2, places == 3, places == 0
    for logits in (np.where(several, 0.0, -18.0), np.where(one, 0.0, -18.0), np.where(hardly, 0.0, -50.0)):
        p = np.exp(logits - np.max(logits))
        p /= p.sum()
        others = np.array([np.delete(p, k).sum() for k in range(classes)])
        objective = Objective(linear, ce, {"x": jnp.ones((2, 1)), "label": jnp.array([0, 1])})
        w = jnp.asarray(logits[None], jnp.float32)
        np.testing.assert_allclose(diag_of(objective, w)[0], p * others, rtol=1e-4)
        assert explain(objective, w).passes == classes - 1


def test_small_entries_of_a_factored_hessian_keep_their_precision():
    """The loss has no structure that is known: its Hessian is factored by eigenvectors."""
    loss = lambda z, d: jax.nn.logsumexp(z, -1) ** 2
    objective = Objective(lambda w, d: d["x"] @ w, loss, {"x": jnp.ones((2, 1))})
    w = jnp.array([[3.0, 3.0, -14.0]])
    diag = diag_of(objective, w)
    z = np.array([3.0, 3.0, -14.0])
    p = np.exp(z) / np.exp(z).sum()
    expected = 2 * np.log(np.exp(z).sum()) * p * (1 - p) + 2 * p**2
    np.testing.assert_allclose(diag[0], expected, rtol=1e-4)


SCALED = {
    "squared": lambda z, d: jnp.sum((z - d["target"]) ** 2, -1),
    "binary": lambda z, d: optax.sigmoid_binary_cross_entropy(z, d["share"]).sum(-1),
    "poisson": lambda z, d: (jnp.exp(z) - d["target"] * z).mean(-1),
    "log cosh": lambda z, d: optax.log_cosh(z, d["target"]).sum(-1),
    "cross entropy": ce,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALED)
def test_outputs_of_any_size_keep_their_curvature(name):
    """The loss takes back the scale of its outputs, whose square leaves float32: all is as if there were none."""
    data, w = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), batch()), jnp.ones((4, CLASSES)) / 3

    @jax.jit
    def found(scale):
        loss = lambda z, d: SCALED[name](z / d["scale"], d)
        objective = Objective(lambda w, d: (d["x"] @ w) * d["scale"], loss, data | {"scale": scale})
        sampled = sampled_gauss_newton(objective, w, jax.random.key(0)).diag
        return exact_diag(objective, w)[2], ggn_diag(objective, w)[2], sampled

    unscaled = Objective(linear, SCALED[name], data)
    with jax.enable_x64(True):
        expected = np.asarray(dense_of(unscaled, w.astype(jnp.float64)))
    drawn = found(1.0)[2]
    for scale in (1e25, 1e-25):
        exact, ggn, estimate = found(scale)
        np.testing.assert_allclose(exact, expected, rtol=1e-4)
        np.testing.assert_allclose(ggn, expected, rtol=1e-4)
        np.testing.assert_allclose(estimate, drawn, rtol=1e-4)


@pytest.mark.slow
def test_a_head_for_each_task_has_its_own_columns(x64):
    """Outputs are any pytree; what does not reach a task has none of its columns."""

    def predict(p, d):
        hidden = jax.nn.relu(d["x"] @ p["w"])
        return {"kind": hidden @ p["v"], "size": (hidden @ p["u"])[:, 0]}

    def loss(outputs, d):
        return ce(outputs["kind"], d) + (outputs["size"] - d["weight"]) ** 2

    params = parameters() | {"u": jnp.ones((5, 1))}
    objective = Objective(predict, loss, batch())
    expected, exact = jax.jit(lambda o, p: (dense(o, p), exact_diag(o, p)[2]))(objective, params)
    for name in params:
        np.testing.assert_allclose(exact[name], expected[name], rtol=1e-9)
    assert explain(objective, params).passes == CLASSES - 1 + 1
    estimate = jax.jit(functools.partial(sampled_gauss_newton, num_samples=300))(objective, params, jax.random.key(0))
    assert_within_errors(estimate.diag, estimate.standard_error, expected)


def test_logits_at_zero_have_the_curvature_that_jax_gives_them():
    """Where the parts of a softplus have a kink, its own rule has none."""
    objective = Objective(lambda w, d: d["x"] @ w, LOSSES["binary"][0], batch())
    w = jnp.zeros((4, CLASSES))
    hessian = jax.jit(jax.hessian(lambda w: objective(w)))(w).reshape(w.size, w.size)
    np.testing.assert_allclose(diag_of(objective, w).ravel(), np.diag(hessian), rtol=1e-5)


@pytest.mark.slow
def test_nan_is_passed_on():
    data = batch() | {"weight": np.where(np.arange(EXAMPLES) == 2, np.nan, 1.0)}
    objective = Objective(network, LOSSES["temperature and weights of either sign"][0], data)
    for squares in ("example", "batch"):
        diag = draw(objective, parameters(), jax.random.key(0), squares=squares).diag
        assert all(jnp.isnan(x).any() for x in jax.tree.leaves(diag))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def clipped(x, most):
    return x


clipped.defvjp(lambda x, most: (x, None), lambda most, _, g: (jnp.clip(g, -most, most),))


def test_a_backward_rule_that_is_no_derivative_has_no_gauss_newton_matrix():
    """Clipped gradients: their derivative is exact, and nothing is summed before it is clipped."""
    objective = Objective(lambda w, d: clipped(d["x"] @ w, 0.3), lambda z, d: z[:, 0] ** 2, batch())
    w = jnp.ones((4, 1)) / 7
    expected = np.diag(jax.jit(jax.jacrev(jax.grad(objective)))(w).reshape(4, 4))
    for method in ("exact", "basis"):
        np.testing.assert_allclose(hessian_diag(objective, w, method).ravel(), expected, rtol=1e-5)
    for method in ("ggn", "ggn_mc"):
        with pytest.raises(ValueError, match=r"'clipped' is not proved to be linear.*'basis'"):
            hessian_diag(objective, w, method, key=0 if method == "ggn_mc" else None)
    assert "Hutchinson" in curvax.explain(objective, w, None).method


# Splitting a batch.


def plain(p, d):
    return network(p, d)


SPLITS = {
    "plain": (plain, ce, None),
    "batch norm": (lambda p, d: network(p, d) - network(p, d).mean(0), ce, "independent"),
    "a constant": (lambda p, d: network(p, d) / jax.lax.stop_gradient(d["x"].sum()), ce, "independent"),
    "contrast": (plain, LOSSES["contrast"][0], "place"),
    "its place": (lambda p, d: network(p, d) * jnp.arange(EXAMPLES)[:, None], ce, "place"),
    "size of the batch": (lambda p, d: network(p, d), lambda z, d: ce(z, d) / z.shape[0], "independent"),
    "closure": (lambda p, d: network(p, d) * jnp.asarray(batch()["weight"])[:, None], ce, "closes over"),
    "dropout": (
        lambda p, d: network(p, d) * jax.random.bernoulli(jax.random.key(0), 0.5, (d["x"].shape[0], 1)),
        ce,
        "independent",
    ),
}


def drawn_in_a_loop(p, d):
    keys = jax.random.split(jax.random.key(0), 3)
    return network(p, d) * jax.lax.map(lambda k: jax.random.normal(k, (d["x"].shape[0], 1)), keys).sum(0)


def discounted(z, d):
    return jax.lax.scan(lambda c, _: (c * 0.5, c), 1.0, None, length=z.shape[0])[1] * ce(z, d)


SPLITS |= {
    "random numbers in a loop": (drawn_in_a_loop, ce, "independent"),
    "discounts": (plain, discounted, "loop"),
    "a power of the batch": (plain, lambda z, d: ce(z ** (z.shape[0] // 3), d), "independent"),
    "a column of the batch": (plain, lambda z, d: z[:, z.shape[0] // 3 - 1] ** 2, "independent"),
    "a closed array with the size of the batch": (
        plain,
        lambda z, d: ce(z * np.full(z.shape[1], 1 / z.shape[0]), d),
        "independent",
    ),
    "a closed array": (plain, lambda z, d: ce(z * np.arange(z.shape[1]), d), None),
    "a closed key": (lambda p, d: network(p, d) + jax.random.normal(KEY, (CLASSES,)), ce, None),
}


def backward_rule(pull, value=lambda x: x, primal=lambda x: x):
    """A function whose cotangent `g` becomes `pull(x, g)`."""
    function = jax.custom_vjp(primal)
    function.defvjp(lambda x: (value(x), x), lambda x, g: (pull(x, g),))
    return function


def forward_rule(push, value=lambda x: x):
    """The identity, whose tangent `t` becomes `push(x, t)`."""
    function = jax.custom_jvp(lambda x: x)
    function.defjvp(lambda x, t: (value(*x), push(*x, *t)))
    return function


@jax.custom_vjp
def layer(x, w):
    return x @ w


layer.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))

halved_in_a_part = forward_rule(lambda x, t: t / x.shape[0])


def shared_in_a_loop(p, d):
    """Weights that a loop makes, by a rule that knows the size of the batch."""
    rule = forward_rule(lambda w, t: t / len(d["x"]))
    weights, _ = jax.lax.scan(lambda w, _: (rule(w), None), p["w"], None, length=2)
    return jax.nn.relu(d["x"] @ weights) @ p["v"]


COUPLED_RULES = {
    "cotangents by the size": backward_rule(lambda x, g: g / g.shape[0]),
    "centred cotangents": backward_rule(lambda x, g: g - g.mean(0)),
    "kept from the batch": backward_rule(lambda x, g: g * x.mean(0)),
    "centred going forward": backward_rule(lambda x, g: g, lambda x: x - x.mean(0)),
    "tangents by the size": halved_in_a_part,
    "centred tangents": forward_rule(lambda x, t: t - t.mean(0)),
    "value of a rule": forward_rule(lambda x, t: t, lambda x: x - x.mean(0)),
    "rule in a rule": forward_rule(lambda x, t: t * halved_in_a_part(x)),
    "rule behind a rule": forward_rule(lambda x, t: t * backward_rule(lambda x, g: g - g.mean(0))(x)),
}
OWN_RULES = {
    "straight through": backward_rule(lambda x, g: g, jnp.round, lambda x: jnp.round(x)),
    "masked": backward_rule(lambda x, g: jnp.where(jnp.abs(x) < 1, -2 * g, 0)),
    "layer": lambda z: layer(z, jnp.eye(CLASSES)),
    "entry by entry": forward_rule(lambda x, t: t * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
    "softmax": jax.nn.softmax,
    "logsumexp": lambda z: z - jax.nn.logsumexp(z, -1, keepdims=True),
}
of_outputs = lambda function: lambda p, d: function(network(p, d))
SPLITS |= {name: (of_outputs(function), ce, "independent") for name, function in COUPLED_RULES.items()}
SPLITS |= {name: (of_outputs(function), ce, None) for name, function in OWN_RULES.items()}
SPLITS |= {
    # The mean over a part has larger gradients: another clip.
    "clipped cotangents": (of_outputs(backward_rule(lambda x, g: jnp.clip(g, -0.1, 0.1))), ce, "linear"),
    "clipped for the weights": (
        lambda p, d: jax.nn.relu(d["x"] @ backward_rule(lambda x, g: jnp.clip(g, -0.1, 0.1))(p["w"])) @ p["v"],
        ce,
        "linear",
    ),
    "layer of parameters": (lambda p, d: layer(layer(d["x"], p["w"]), p["v"]), ce, None),
    "rule in a loop": (shared_in_a_loop, ce, "independent"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_batch_is_split_only_where_its_parts_have_the_same_losses(name):
    predict, loss, reason = SPLITS[name]
    data = batch() | {"shared": np.ones(3), "scale": 2.0}
    objective = Objective(predict, loss, jax.tree.map(jnp.asarray, data))
    axes = example_axes(objective, parameters(), 3)
    if reason is not None:
        assert reason in axes
        return
    split = dict(zip(sorted(data), axes, strict=True))
    assert split["x"] is not None and split["shared"] is None and split["scale"] is None


@pytest.mark.slow_but_for("straight through")
@pytest.mark.parametrize("name", ["straight through", "masked", "layer of parameters", "silu"])
def test_functions_with_rules_of_their_own_are_the_mean_over_parts(name, x64):
    """Where a split is proved, it is right: against JAX's derivatives of the whole batch."""
    objective, params = Objective(*SPLITS[name][:2], jax.tree.map(jnp.asarray, batch())), parameters()
    found = curvax.value_grad_and_hessian_diag(objective, params, curvax.Basis(micro_batches=3))
    flat, unflatten = ravel_pytree(params)
    function = lambda flat: objective(unflatten(flat))
    gradient, hessian = jax.jit(lambda flat: (jax.grad(function)(flat), jax.jacrev(jax.grad(function))(flat)))(flat)
    np.testing.assert_allclose(ravel_pytree(found.grad)[0], gradient, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ravel_pytree(found.diag)[0], np.diag(hessian), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["cotangents by the size", "centred tangents", "clipped cotangents"])
def test_derivatives_that_a_split_would_change_are_of_the_whole_batch(name):
    objective, params = Objective(*SPLITS[name][:2], jax.tree.map(jnp.asarray, batch())), parameters()
    found = curvax.value_grad_and_hessian_diag(objective, params, None, key=0)
    expected = jax.jit(jax.grad(objective))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found.grad, expected)
    with pytest.raises(ValueError, match=SPLITS[name][2]):
        hessian_diag(objective, params, "basis", micro_batches=2)


@pytest.mark.slow
def test_parts_have_two_examples_at_least(x64):
    """One example alone would have no axis to be told from others by."""
    objective, params = Objective(network, ce, jax.tree.map(jnp.asarray, batch())), parameters()
    assert micro_batches.number_of_parts(objective, params, EXAMPLES) == EXAMPLES // 2
    found = hessian_diag(objective, params, curvax.Exact(micro_batches=EXAMPLES))
    expected = dense_of(objective, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, expected)
    alone = dataclasses.replace(objective, data=jax.tree.map(lambda x: jnp.asarray(x)[:1], batch()))
    found = hessian_diag(alone, params, curvax.Exact(micro_batches=2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, dense_of(alone, params))


@pytest.mark.slow
def test_coupled_examples_are_seen_as_one_batch():
    """By default a batch is split where it may be, and not where it may not."""
    data = jax.tree.map(jnp.asarray, batch())
    coupled = Objective(lambda p, d: network(p, d) - network(p, d).mean(0), ce, data)
    assert plan_sampling(coupled, parameters()).form == "batch"
    whole = draw(coupled, parameters(), jax.random.key(0), micro_batches=1).diag
    found = draw(coupled, parameters(), jax.random.key(0)).diag
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    with pytest.raises(ValueError, match="independent"):
        sampled_gauss_newton(coupled, parameters(), jax.random.key(0), micro_batches=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["z-loss", "soft cap", "tokens as examples", "squared by batch"])
def test_memory_stays_near_the_gradients_with_a_large_vocabulary(name):
    """Nothing of the size of the logits is squared, and a sample's copies of them are of a part of the batch."""
    examples, tokens, width, vocabulary = 4, 16, 8, 20_000
    rng = np.random.default_rng(0)
    table = {name: jnp.asarray(rng.normal(size=(vocabulary, width)), jnp.float32) for name in ("in", "out")}
    words = jnp.asarray(rng.integers(0, vocabulary, (examples, tokens)))
    words = words.reshape(-1) if name == "tokens as examples" else words
    predict = lambda p, words: p["in"][words] @ p["out"].T

    def loss(logits, words):
        logits = 30.0 * jnp.tanh(logits / 30.0) if name == "soft cap" else logits
        total = optax.softmax_cross_entropy_with_integer_labels(logits, words)
        if name == "z-loss":
            total += 1e-4 * jax.nn.logsumexp(logits, -1) ** 2
        return total if total.ndim == 1 else total.mean(-1)

    def held(function):
        return jax.jit(function).lower(table, words).compile().memory_analysis().temp_size_in_bytes

    squares = "batch" if name == "squared by batch" else None
    gradient = held(lambda p, words: jax.grad(Objective(predict, loss, words))(p))
    method = functools.partial(sampled_gauss_newton, key=jax.random.key(0), squares=squares)
    assert held(lambda p, words: method(Objective(predict, loss, words), p)[:3]) < 1.3 * gradient


def test_one_example_alone_has_its_column():
    """Nothing tells its outputs' axis from others, and no other example's; its gradient squared is exact."""
    one, params = {"x": jnp.array([[1.0, -2.0, 3.0]])}, jnp.array([0.5, 1.0, 1.0])
    objective = Objective(lambda p, d: jnp.tanh(d["x"] @ p), lambda z, d: 2 * z**2, one)
    found = draw(objective, params, jax.random.key(0), squares="batch")
    slope = 1 - np.tanh(1.5) ** 2
    np.testing.assert_allclose(found.diag, 4 * slope**2 * np.array([1, 4, 9]), rtol=1e-5)
