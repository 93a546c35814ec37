import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import curvax
from curvax import Objective


def penalty(params):
    return 0.5 * sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params))


def test_is_mean_loss_plus_penalty():
    data, params = problems.classification(), problems.mlp_params()
    objective = Objective(problems.mlp, problems.cross_entropy, data, penalty)
    logits = np.asarray(problems.mlp(params, data), np.float64)
    log_p = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    squares = sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(params))
    expected = -np.mean(log_p[np.arange(len(logits)), data["y"]]) + squares / 2
    np.testing.assert_allclose(objective(params), expected, rtol=1e-6)
    aux = dataclasses.replace(objective, predict=lambda p, d: (problems.mlp(p, d), d["y"]), has_aux=True)
    np.testing.assert_allclose(aux(params)[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(aux(params)[1], data["y"])


def test_crosses_jit_as_an_argument_without_retracing():
    traces = []

    @jax.jit
    def value(objective, params):
        traces.append(None)
        return objective(params)

    params = problems.mlp_params()
    first, second = (problems.mlp_objective(seed=seed) for seed in (0, 1))
    np.testing.assert_allclose(value(first, params), first(params), rtol=1e-6)
    np.testing.assert_allclose(value(second, params), second(params), rtol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda z, data: jnp.mean(problems.cross_entropy(z, data)), r"shape \(\).*one loss per example.*\(B,\)"),
        (lambda z, data: (problems.cross_entropy(z, data), z), r"a tuple.*one loss per example.*\(B,\)"),
    ],
)
def test_losses_that_are_not_those_of_examples_are_refused(loss, message):
    objective, params = Objective(problems.mlp, loss, problems.classification()), problems.mlp_params()
    with pytest.raises(ValueError, match=message):
        objective(params)
    with pytest.raises(ValueError, match=message):
        curvax.hessian_diag(objective, params)
    tx = curvax.cblr(0.1, method="hutchinson")
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), params, obj_fn=objective)


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
@pytest.mark.parametrize("method", ["exact", "basis", "ggn", "ggn_mc", "hutchinson", "xdiag", None])
def test_the_mean_of_no_losses_is_refused(method, shape):
    objective, w = Objective(lambda w, x: x * jnp.sum(w), lambda z, x: z**2, jnp.ones(shape)), jnp.ones(2)
    message = rf"an array of shape {re.escape(str(shape))}: a batch without examples has no mean.*leave out"
    with pytest.raises(ValueError, match=message):
        objective(w)
    for options in ({}, {"micro_batches": 2}):
        with pytest.raises(ValueError, match=message):
            curvax.hessian_diag(objective, w, method, key=0, **options)


METHODS = ["exact", curvax.Hutchinson(1)]


def alike(objective, plain, params, methods):
    """Every method sees in both the same loss, with the same random numbers."""
    for method in methods:
        found, expected = (curvax.value_grad_and_hessian_diag(o, params, method, key=0)[:3] for o in (objective, plain))
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_an_example_s_loss_is_the_mean_of_its_tokens():
    data = {"x": jnp.sin(jnp.arange(4 * 3 * 2.0)).reshape(4, 3, 2), "y": jnp.arange(12).reshape(4, 3) % 2}
    token = Objective(lambda w, d: d["x"] @ w, problems.cross_entropy, data)
    mean = dataclasses.replace(token, loss=lambda z, d: jnp.mean(problems.cross_entropy(z, d), 1))
    w = jnp.array([[1.0, -2.0], [0.5, 0.3]])
    np.testing.assert_allclose(token(w), jnp.mean(problems.cross_entropy(data["x"] @ w, data)), rtol=1e-6)
    alike(token, mean, w, METHODS)


@pytest.mark.slow
def test_data_may_hold_what_no_example_has_of_its_own():
    """A key, scalars and class weights, beside the examples."""
    plain = problems.classification(examples=8, features=3, classes=2)
    weights = jnp.array([1.0, 3.0])
    data = {**plain, "key": jax.random.key(0), "beta": jnp.array(2.0), "gamma": 0.5, "weights": weights}
    objective = Objective(
        lambda w, d: d["beta"] * d["gamma"] * d["x"] @ w + jax.random.normal(d["key"], (1, 2)),
        lambda z, d: problems.cross_entropy(z, d) * d["weights"][d["y"]],
        data,
    )
    noise = jax.random.normal(jax.random.key(0), (1, 2))
    expected = Objective(
        lambda w, d: d["x"] @ w + noise, lambda z, d: problems.cross_entropy(z, d) * weights[d["y"]], plain
    )
    w = jnp.array([[1.0, -2.0], [0.5, 0.3], [0.1, 0.2]])
    alike(objective, expected, w, METHODS)


@pytest.mark.slow
def test_outputs_may_be_any_tree():
    data = {"x": jnp.sin(jnp.arange(12.0)).reshape(4, 3)}
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 1))}
    named = Objective(
        lambda p, d: {"a": jnp.sin(d["x"] @ p["a"]), "b": (d["x"] @ p["b"], jnp.arange(4))},
        lambda z, d: jnp.sum(z["a"] ** 2, 1) + jnp.where(z["b"][1] > 1, jnp.sum(z["b"][0] ** 4, 1), 0),
        data,
    )
    joined = Objective(
        lambda p, d: jnp.concatenate([jnp.sin(d["x"] @ p["a"]), d["x"] @ p["b"]], 1),
        lambda z, d: jnp.sum(z[:, :2] ** 2, 1) + jnp.where(jnp.arange(4) > 1, z[:, 2] ** 4, 0),
        data,
    )
    alike(named, joined, params, ["exact", "ggn", curvax.Hutchinson(1)])


def test_other_output_is_a_pair_and_no_array_of_two():
    objective = Objective(lambda p, d: p * d["x"], lambda z, d: z, {"x": jnp.ones((2, 3))}, has_aux=True)
    with pytest.raises(ValueError, match="predict returned no pair"):
        objective(jnp.ones(()))


def weighted(**options):
    """A small network on sequences: its losses `(4, 6)`, weights of which a third is padding."""
    rng = np.random.default_rng(3)
    data = {
        "x": jnp.asarray(rng.normal(size=(4, 6, 3))),
        "y": jnp.asarray(rng.integers(0, 5, (4, 6))),
        "weight": jnp.asarray(rng.uniform(size=(4, 6)) * (np.arange(6) < 4)),
    }
    predict = lambda p, d: jnp.tanh(d["x"] @ p["in"]) @ p["out"]
    loss = lambda z, d: optax.softmax_cross_entropy_with_integer_labels(z, d["y"])
    params = {"in": jnp.asarray(rng.normal(size=(3, 4))), "out": jnp.asarray(rng.normal(size=(4, 5)))}
    return Objective(predict, loss, data, **options), params


MEANS = {
    "tokens": ({"weights": lambda d: d["weight"]}, lambda x, d: (x * d["weight"]).sum() / d["weight"].sum()),
    "examples": (
        {"weights": lambda d: d["weight"][:, 0]},
        lambda x, d: (x.mean(1) * d["weight"][:, 0]).sum() / d["weight"][:, 0].sum(),
    ),
    "sum": ({"reduction": "sum"}, lambda x, d: x.sum()),
    "weighted sum": ({"weights": lambda d: d["weight"], "reduction": "sum"}, lambda x, d: (x * d["weight"]).sum()),
}


@pytest.mark.slow_but_for("tokens")
@pytest.mark.parametrize("name", MEANS)
def test_weights_and_sums_are_those_of_the_formula(name, x64):
    options, formula = MEANS[name]
    objective, params = weighted(penalty=lambda p: jnp.sum(p["out"] ** 2), **options)

    def expected(p):
        return formula(objective.loss(objective.predict(p, objective.data), objective.data), objective.data) + jnp.sum(
            p["out"] ** 2
        )

    flat, unflatten = jax.flatten_util.ravel_pytree(params)
    dense = lambda flat: jnp.diag(jax.hessian(lambda v: expected(unflatten(v)))(flat))
    run = jax.jit(lambda p, flat: (objective(p), *jax.value_and_grad(expected)(p), unflatten(dense(flat))))
    itself, value, grad, diag = run(params, flat)
    found = curvax.value_grad_and_hessian_diag(objective, params, curvax.Exact(micro_batches=2))
    np.testing.assert_allclose(found.value, value, rtol=1e-12)
    np.testing.assert_allclose(itself, value, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found.diag, diag)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found.grad, grad)


@pytest.mark.slow
def test_weighted_tokens_are_a_softmax_and_may_be_split(x64):
    objective, params = weighted(weights=lambda d: d["weight"])
    assert "a softmax" in str(curvax.explain(objective, params, None))
    exact = curvax.hessian_diag(objective, params, "ggn")
    method = curvax.GaussNewton(num_samples=400, micro_batches=2)
    diag, error = curvax.hessian_diag(objective, params, method, key=0, standard_error=True)
    for name in params:
        assert np.all(np.abs(diag[name] - exact[name]) < 5.5 * error[name] + 1e-12)


def test_other_output_comes_beside_a_weighted_mean():
    objective, params = weighted(weights=lambda d: d["weight"])
    pair = dataclasses.replace(objective, predict=lambda p, d: (objective.predict(p, d), d["y"]), has_aux=True)
    value, aux = pair(params)
    np.testing.assert_allclose(value, objective(params))
    assert curvax.hessian_diag(pair, params, "basis")[1] is not None and aux.shape == (4, 6)


def test_weights_that_do_not_fit_are_refused():
    objective, params = weighted(weights=lambda d: d["weight"][:, :3])
    with pytest.raises(ValueError, match=r"weights.* shape \(4, 3\) for losses of shape \(4, 6\)"):
        objective(params)
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        weighted(reduction="none")


def test_what_cannot_be_called_so_is_refused_where_it_is_given():
    predict, loss = lambda p, d: p, lambda z, d: z
    for name, bad, said in [
        ("predict", lambda p: p, r"predict takes \(p\), and is called as predict\(params, data\)"),
        ("loss", lambda z: z, r"loss takes .* loss\(outputs, data\)"),
        ("loss", None, "loss=None is no function"),
        ("penalty", 0.1, "penalty=0.1 is no function"),
        ("weights", lambda a, b: a, r"weights takes .* weights\(data\)"),
    ]:
        with pytest.raises(ValueError, match=said):
            Objective(**{"predict": predict, "loss": loss, "data": (), name: bad})
