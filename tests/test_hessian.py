import dataclasses
import functools

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import curvax
from curvax.curvature.short_forms import as_method


def smooth_loss(params):
    """Cubic, with all cross terms, so that the Hessian is dense and depends on the parameters."""
    flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(params)])
    weights = jnp.sin(jnp.arange(flat.size, dtype=flat.dtype))
    return jnp.dot(weights, flat) ** 3 / 3 + jnp.sum(jnp.cos(flat))


def relative_error(actual, expected):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (actual, expected))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


PARAMS = {"a": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.array(0.3), "c": [jnp.array([0.1, -0.4])]}
KEY = jax.random.key(0)
METHODS = ["exact", "basis", "ggn", "ggn_mc", "hutchinson", "xdiag", None]

# Compiled once for all tests that ask for the same.
estimate = jax.jit(
    curvax.value_grad_and_hessian_diag, static_argnames=("method", "has_aux", "num_samples", "micro_batches")
)


def samples(method):
    return {} if method in ("exact", "basis", "ggn") else {"num_samples": 40}


def test_hvp_is_the_hessian_times_a_vector():
    flat, unflatten = jax.flatten_util.ravel_pytree(PARAMS)
    dense = jax.jit(jax.hessian(lambda x: smooth_loss(unflatten(x))))(flat)
    v = jnp.arange(1.0, flat.size + 1)
    product, _ = jax.flatten_util.ravel_pytree(curvax.hvp(smooth_loss, PARAMS, unflatten(v)))
    np.testing.assert_allclose(product, dense @ v, rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_basis_is_the_dense_diagonal(chunk_size):
    diag = curvax.hessian_diag(smooth_loss, PARAMS, method="basis", chunk_size=chunk_size)
    chex.assert_trees_all_close(diag, problems.dense_hessian_diag(smooth_loss, PARAMS), rtol=1e-4)


def test_basis_in_float64():
    with jax.enable_x64(True):
        params, objective = problems.mlp_params(dtype=jnp.float64), problems.mlp_objective(dtype=jnp.float64)
        diag = estimate(objective, params, method="basis").diag
        assert relative_error(diag, problems.dense_hessian_diag(objective, params)) < 1e-12


@pytest.mark.slow_but_for("-cross_entropy")
@pytest.mark.parametrize("loss", [problems.cross_entropy, problems.weighted_cross_entropy, problems.squared_error])
@pytest.mark.parametrize("method", ["exact", "ggn"])
def test_routes_through_the_traced_network(method, loss):
    """A ReLU network is piecewise linear in each array, so that its Hessian's diagonal is the Gauss-Newton one."""
    objective, params = problems.mlp_objective(loss), problems.mlp_params()
    diag = estimate(objective, params, method=method).diag
    assert relative_error(diag, problems.dense_ggn_diag(objective, params)) < 1e-5
    assert relative_error(diag, problems.dense_hessian_diag(objective, params)) < 1e-5


def test_hutchinson_is_exact_where_the_hessian_is_diagonal():
    curvatures = jnp.array([1.0, -3.0, 50.0])
    diag = curvax.hessian_diag(lambda w: curvatures @ w**2 / 2, jnp.ones(3), method="hutchinson", key=jax.random.key(0))
    np.testing.assert_allclose(diag, curvatures)


def decaying_quadratic(rank=None, size=60):
    """Half of `w^T A w` with the spectrum 0.8^i in random directions, cut off at a rank; and the diagonal of A."""
    rng = np.random.default_rng(0)
    directions, _ = np.linalg.qr(rng.normal(size=(size, size)))
    spectrum = np.where(np.arange(size) < (rank or size), 0.8 ** np.arange(size), 0)
    matrix = jnp.asarray(directions * spectrum @ directions.T, jnp.float32)
    return lambda w: jnp.dot(w, matrix @ w) / 2, jnp.diag(matrix)


def test_xdiag_is_exact_once_its_probes_span_the_range():
    loss, diagonal = decaying_quadratic(rank=6)
    options = {"method": "xdiag", "key": jax.random.key(0), "num_samples": 12, "standard_error": True}
    diag, error = curvax.hessian_diag(loss, jnp.ones(60), **options)
    np.testing.assert_allclose(diag, diagonal, atol=2e-6)
    np.testing.assert_allclose(error, 0, atol=2e-6)


def test_xdiag_with_one_probe_is_hutchinson():
    """A single probe leaves no other to learn from: both are `z * A z`, for some signs z, so that they sum to the same
    over all signs; here a rank-one matrix `a a^T`, of which `z * A z` has the magnitudes `|a_i| |a . z|`."""
    vector = jnp.array([1.0, -2.0, 0.5])
    diag = curvax.hessian_diag(
        lambda w: jnp.dot(vector, w) ** 2 / 2, jnp.ones(3), curvax.XDiag(1), key=jax.random.key(4)
    )
    np.testing.assert_allclose(jnp.abs(diag) / jnp.abs(vector), jnp.abs(diag[0]) * jnp.ones(3), rtol=1e-5)
    assert min(abs(float(abs(diag[0])) - total) for total in (0.5, 1.5, 2.5, 3.5)) < 1e-5


def test_xdiag_is_unbiased_and_beats_hutchinson_at_the_same_number_of_products():
    loss, diagonal = decaying_quadratic()

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def samples(keys, method, num_samples):
        options = {"method": method, "num_samples": num_samples}
        return jax.vmap(lambda key: curvax.hessian_diag(loss, jnp.ones(60), key=key, **options))(keys)

    keys = jax.random.split(jax.random.key(1), 400)
    xdiag, hutchinson = samples(keys, "xdiag", 15), samples(keys, "hutchinson", 30)
    spread = xdiag.std(0) / np.sqrt(len(keys))
    assert np.abs((xdiag.mean(0) - diagonal) / spread).max() < 4
    squared = lambda estimates: float(jnp.mean(jnp.sum((estimates - diagonal[None]) ** 2, 1)))
    assert squared(xdiag) < 0.2 * squared(hutchinson)


SQUARES_OF_BATCHES = functools.partial(curvax.GaussNewton, squares="batch")


@pytest.mark.slow
@pytest.mark.parametrize("method", [curvax.Hutchinson, SQUARES_OF_BATCHES, curvax.XDiag, curvax.GaussNewton])
def test_the_number_of_samples_in_a_pass_changes_nothing(method):
    objective, params = problems.mlp_objective(), problems.mlp_params()

    @jax.jit
    def both(key):
        draw = functools.partial(curvax.hessian_diag, objective, params, key=key, standard_error=True)
        return draw(method(10, chunk_size=4)), draw(method(10))

    together, apart = both(jax.random.key(0))
    chex.assert_trees_all_close(together, apart, rtol=2e-3, atol=1e-4)


@pytest.mark.slow_but_for("exact")
@pytest.mark.parametrize("method", ["exact", "basis", "ggn", "hutchinson", "ggn_mc", "xdiag"])
def test_micro_batches_average_to_the_whole_batch(method):
    objective, params = problems.mlp_objective(), problems.mlp_params()
    draw = functools.partial(estimate, method=method, key=KEY, **samples(method))
    whole, parts = draw(objective, params), draw(objective, params, micro_batches=4)
    chex.assert_trees_all_close(parts[:2], whole[:2], rtol=1e-4, atol=1e-6)
    whole, parts = jax.device_get((whole, parts))
    allowed = lambda h, one, other: 1e-5 * np.max(np.abs(h)) + 5 * np.hypot(one, other)
    allowed = jax.tree.map(allowed, whole.diag, whole.standard_error, parts.standard_error)
    within = jax.tree.map(lambda a, b, most: np.all(np.abs(a - b) <= most), whole.diag, parts.diag, allowed)
    assert all(jax.tree.leaves(within)), within


@pytest.mark.slow
def test_micro_batches_hold_less_memory():
    objective, params = problems.mlp_objective(features=30, examples=8192), problems.mlp_params(sizes=(30, 200, 4))

    def bytes_held(micro_batches):
        diag = functools.partial(curvax.hessian_diag, method="ggn", micro_batches=micro_batches)
        return jax.jit(diag).lower(objective, params).compile().memory_analysis().temp_size_in_bytes

    assert bytes_held(8) < 0.5 * bytes_held(1)


def coupled_by_a_constant(params, data):
    """A derivative sees no coupling here, and yet another batch would be another objective."""
    outputs = problems.mlp(params, data)
    return outputs / (1 + jax.lax.stop_gradient(jnp.mean(outputs)))


def test_micro_batches_of_coupled_examples_are_refused():
    objective, params = problems.mlp_objective(), problems.mlp_params()
    coupled = curvax.Objective(coupled_by_a_constant, objective.loss, objective.data)
    with pytest.raises(ValueError, match=r"independent.*leave micro_batches out"):
        curvax.hessian_diag(coupled, params, method="exact", micro_batches=2)
    with pytest.raises(ValueError, match=r"pass a curvax\.Objective"):
        curvax.hessian_diag(double, jnp.ones(2), method="basis", micro_batches=2)


@pytest.mark.slow_but_for("hutchinson")
@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_other_output_is_handed_through(method):
    plain, params = problems.mlp_objective(), problems.mlp_params()
    pair = curvax.Objective(lambda p, d: (problems.mlp(p, d), {"seen": d["x"].sum()}), plain.loss, plain.data)
    said = dataclasses.replace(pair, has_aux=True)
    both = functools.partial(estimate, params=params, method=method, key=KEY, **samples(method))
    found = both(pair, has_aux=True)
    chex.assert_trees_all_close(found[:4], both(plain)[:4], rtol=1e-5)
    np.testing.assert_allclose(found.aux["seen"], plain.data["x"].sum(), rtol=1e-5)
    chex.assert_trees_all_close(both(said), found, rtol=1e-6)
    value, aux = jax.jit(lambda p: said(p))(params)
    chex.assert_trees_all_close((value, aux), (found.value, found.aux), rtol=1e-5)
    diag, aux = curvax.hessian_diag(lambda w: (double(w), w), jnp.ones(2), method="basis", has_aux=True)
    assert diag.tolist() == [4.0, 4.0] and aux.tolist() == [1.0, 1.0]


def test_exact_above_its_budget_names_the_dearest_parameter():
    with pytest.raises(ValueError, match=r"budget of 3.*'w'.*raise `budget`"):
        curvax.hessian_diag(lambda p: double(p["w"]), {"w": jnp.ones(5)}, method="exact", budget=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [curvax.Hutchinson(3), curvax.GaussNewton(3, "example"), SQUARES_OF_BATCHES(2, micro_batches=2)],
    ids=str,
)
def test_estimates_are_unbiased_and_know_their_error(method):
    """Over many keys the mean is the diagonal, and the mean square of the reported error is the variance."""
    objective = problems.mlp_objective(examples=8, features=3, classes=3)
    params = problems.mlp_params(sizes=(3, 4, 3))
    dense = problems.dense_hessian_diag if isinstance(method, curvax.Hutchinson) else problems.dense_ggn_diag

    @jax.jit
    def draw(keys):
        one = functools.partial(curvax.hessian_diag, objective, params, method, standard_error=True)
        return jax.vmap(lambda key: [jax.flatten_util.ravel_pytree(tree)[0] for tree in one(key=key)])(keys)

    count = 400
    diag, error = np.asarray(draw(jax.random.split(jax.random.key(0), count)), np.float64)
    exact, _ = jax.flatten_util.ravel_pytree(dense(objective, params))
    spread = diag.std(0, ddof=1) / np.sqrt(count)
    assert np.max(np.abs(diag.mean(0) - exact) / (spread + 1e-6)) < 5
    off = np.sum((diag - diag.mean(0)) ** 2 * count / (count - 1) - error**2, 1)
    assert abs(off.mean()) < 5 * off.std() / np.sqrt(count)
    assert np.sum(error.mean(0) ** 2) > 0


@pytest.mark.slow
def test_more_micro_batches_have_less_variance():
    objective, params = problems.mlp_objective(), problems.mlp_params()
    exact = problems.dense_ggn_diag(objective, params)

    @functools.partial(jax.jit, static_argnums=1)
    def mean_squared_error(keys, micro_batches):
        def error(key):
            method = SQUARES_OF_BATCHES(1, micro_batches=micro_batches)
            diag = curvax.hessian_diag(objective, params, method, key=key)
            return optax.tree.norm(jax.tree.map(jnp.subtract, diag, exact), squared=True)

        return jnp.mean(jax.vmap(error)(keys))

    keys = jax.random.split(jax.random.key(0), 200)
    assert mean_squared_error(keys, 6) < 0.4 * mean_squared_error(keys, 1)


@pytest.mark.slow
def test_a_penalty_is_part_of_the_diagonal():
    def penalty(params):
        return sum(jnp.sum(3 * jnp.square(x)) for x in jax.tree.leaves(params))

    plain = problems.mlp_objective()
    penalised = curvax.Objective(plain.predict, plain.loss, plain.data, penalty)
    params = problems.mlp_params()
    for method in ("exact", "ggn_mc", "hutchinson"):
        found, alone = (
            estimate(objective, params, method=method, key=KEY, **samples(method)).diag
            for objective in (penalised, plain)
        )
        chex.assert_trees_all_close(found, jax.tree.map(lambda h: np.asarray(h) + 6, alone), rtol=1e-4, atol=1e-4)


@pytest.mark.slow_but_for("exact", "hutchinson", "None")
@pytest.mark.parametrize("method", METHODS)
def test_value_and_gradient_are_those_of_the_objective(method):
    objective, params = problems.mlp_objective(), problems.mlp_params()
    value, grad, *_ = estimate(objective, params, method=method, key=KEY, **samples(method))
    expected_value, expected_grad = jax.jit(jax.value_and_grad(objective))(params)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    chex.assert_trees_all_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "hutchinson", None])
def test_the_diagonal_alone_outside_of_jit_is_that_of_the_estimate(method):
    objective, params = problems.mlp_objective(), problems.mlp_params()
    diag = estimate(objective, params, method=method, key=KEY, **samples(method)).diag
    alone = curvax.hessian_diag(objective, params, method=method, key=KEY, **samples(method))
    chex.assert_trees_all_close(diag, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.slow_but_for("exact")
@pytest.mark.parametrize("method", ["exact", "hutchinson", None])
def test_where_restricts_to_a_subtree(method):
    objective, params = problems.mlp_objective(), problems.mlp_params()
    last_kernel = [{"kernel": False, "bias": False}, {"kernel": True, "bias": False}]

    def diag(where=None):
        options = {"method": method, "key": jax.random.key(0), "where": where}
        options |= {} if method in ("exact", "basis") else {"num_samples": 300}
        return curvax.hessian_diag(objective, params, **options)

    some, whole = diag(where=last_kernel), diag()
    assert some[0] == {"kernel": optax.MaskedNode(), "bias": optax.MaskedNode()}
    tolerance = 1e-4 if method in ("exact", "basis") else 0.35
    assert relative_error(some[1]["kernel"], whole[1]["kernel"]) < tolerance
    by_function = diag(where=lambda params: last_kernel)
    chex.assert_trees_all_equal(by_function, some)


def test_frozen_leaves_cost_nothing():
    """The number of operations of a probe for the last layer is that of a network of one layer, not of two."""
    objective, params = problems.mlp_objective(features=300, classes=4), problems.mlp_params(sizes=(300, 300, 4))

    def flops(where):
        probe = functools.partial(curvax.hessian_diag, method="hutchinson", key=jax.random.key(0), where=where)
        return jax.jit(probe).lower(objective, params).compile().cost_analysis()["flops"]

    assert flops([False, True]) < 0.35 * flops(None)


@pytest.mark.slow
def test_low_precision_parameters_have_a_float32_diagonal():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), problems.mlp_params())
    with jax.numpy_dtype_promotion("standard"):
        objective = problems.mlp_objective(dtype=jnp.bfloat16)
        for method in ("exact", "basis", "ggn_mc", "hutchinson", None, "xdiag"):
            diag = estimate(objective, params, method=method, key=KEY).diag
            chex.assert_tree_all_finite(diag)
            assert {x.dtype for x in jax.tree.leaves(diag)} == {jnp.dtype("float32")}


def double(x):
    return 2 * jnp.sum(x**2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "newton"}, "'newton' is unknown; pass one of 'exact', 'basis'"),
        ({"method": "hutchinson"}, "pass key=0"),
        ({"method": "hutchinson", "key": 0.5}, r"key=0.5 is no random key.*key=0"),
        ({"method": "ggn_mc", "key": jax.random.key(0)}, "Objective"),
        ({"method": curvax.GaussNewton(1, "batch"), "key": 0}, "Objective"),
        ({"method": "hutchinson", "key": 0, "num_samples": 0}, "num_samples=0 is out of range"),
        ({"method": "exact", "num_samples": 2}, "'exact' takes no num_samples.*its options are .*budget"),
        ({"method": "ggn", "num_samples": 2}, "'ggn_mc' takes it"),
        ({"method": curvax.Basis(), "chunk_size": 2}, r"cannot stand beside method=Basis\(\)"),
        ({"method": curvax.Basis}, r"is no method.*estimate\(objective, params, key\)"),
        ({"where": [True, True]}, "where does not fit the parameters"),
        ({"where": 1}, "where has 1 at ''; pass True or False"),
        ({"method": "hutchinson", "key": jax.random.key(0), "standard_error": True}, "num_samples=2"),
    ],
)
def test_errors_say_what_to_pass(arguments, message):
    with pytest.raises(ValueError, match=message):
        curvax.hessian_diag(double, jnp.ones(2), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": lambda w: w**2}, r"returned float32 of shape \(2,\).*take its mean.*curvax.Objective"),
        ({"objective": lambda w: jnp.argmax(w)}, "returned int32"),
        ({"objective": lambda w: (double(w), w)}, "pass has_aux=True"),
        ({"objective": double, "has_aux": True}, "has_aux=True, and the objective returned no pair"),
        ({"penalty": lambda w: w}, r"penalty returned float32 of shape \(2,\)"),
        ({"data": {"x": jnp.eye(2), "name": "images"}}, "the data of the Objective have 'images' at 'name'"),
        ({"loss": lambda z, d: z, "has_aux": True}, "has_aux=True, and predict returned no pair"),
    ],
)
def test_objectives_that_are_none_are_refused(changes, message):
    objective = {"predict": lambda w, d: d["x"] @ w, "loss": lambda z, d: z**2, "data": {"x": jnp.eye(2)}, **changes}
    has_aux = objective.pop("has_aux", False)
    objective = objective.pop("objective", None) or curvax.Objective(**objective)
    for method in ("basis", "hutchinson"):
        with pytest.raises(ValueError, match=message):
            curvax.hessian_diag(objective, jnp.ones(2), method, key=0, has_aux=has_aux)
    tx = curvax.cblr(0.1, method="basis", has_aux=has_aux)
    with pytest.raises(ValueError, match=message):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2), obj_fn=objective)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("params", [{}, {"a": jnp.zeros((0, 3))}, {"a": jnp.ones(2)}])
def test_where_nothing_is_wanted_there_is_nothing(method, params):
    objective = curvax.Objective(lambda p, x: x, lambda z, x: z**2, jnp.array([1.0, 3.0]))
    where = lambda params: jax.tree.map(lambda x: x.size == 0, params)
    found = curvax.value_grad_and_hessian_diag(objective, params, method, key=0, where=where)
    assert float(found.value) == 5.0
    assert all(x.shape == (0, 3) for x in jax.tree.leaves((found.diag, found.standard_error)))


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
def test_parameters_that_are_not_real_are_named(dtype):
    params = {"real": jnp.ones(2), "odd": [jnp.ones(2, dtype)]}
    with pytest.raises(ValueError, match=r"'odd/0'.*where="):
        curvax.hessian_diag(lambda p: jnp.sum(p["real"] ** 2), params, method="basis")
    real = {"real": True, "odd": False}
    diag = curvax.hessian_diag(lambda p: jnp.sum(p["real"] ** 2), params, method="basis", where=real)
    np.testing.assert_allclose(diag["real"], 2.0)


@pytest.mark.parametrize("v", [{"a": jnp.ones(3)}, {"b": jnp.ones(2)}, jnp.ones(2)])
def test_vectors_unlike_the_parameters_are_refused(v):
    with pytest.raises(ValueError, match=r"v (is|has .* at 'a').*make it a tree like params"):
        curvax.hvp(lambda p: jnp.sum(p["a"] ** 2), {"a": jnp.ones(2)}, v)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda p: p, "is a dict; return curvax.Estimate"),
        (lambda p: curvax.Estimate(0.0, p, {"a": jnp.ones(3)}), "has .3,. at .a."),
        (lambda p: curvax.Estimate(0.0, p, jnp.ones(2)), "make it a tree like params"),
    ],
)
def test_what_a_method_of_the_callers_own_returns_is_checked(found, message):
    class Own:
        def estimate(self, objective, params, key):
            return found(params)

    with pytest.raises(ValueError, match=message):
        curvax.hessian_diag(lambda p: jnp.sum(p["a"] ** 2), {"a": jnp.ones(2)}, Own())


OTHER_OUTPUT = curvax.Objective(
    lambda w, x: (x @ w, {"first": x[0]}), lambda z, x: z**2, jnp.array([[1.0, 2.0], [3.0, 0.0]]), has_aux=True
)


@pytest.mark.slow_but_for("exact", "None")
@pytest.mark.parametrize("method", METHODS)
def test_an_objective_says_itself_that_it_has_other_output(method):
    w, plain = jnp.ones(2), lambda w: OTHER_OUTPUT(w)[0]
    found, aux = curvax.hessian_diag(OTHER_OUTPUT, w, method, key=0)
    method = as_method(method, {})
    alone = dataclasses.replace(OTHER_OUTPUT, predict=lambda w, x: x @ w, has_aux=False)
    run = jax.jit(method.estimate)
    other, expected = run(OTHER_OUTPUT, w, KEY), run(alone, w, KEY)
    np.testing.assert_allclose(found, expected.diag, rtol=1e-5)
    chex.assert_trees_all_close(other[:4], expected[:4], rtol=1e-5)
    assert aux["first"].tolist() == other.aux["first"].tolist() == [1, 2]
    assert method.explain(OTHER_OUTPUT, w) == method.explain(alone, w)
    np.testing.assert_allclose(other.grad, jax.jit(jax.grad(plain))(w), rtol=1e-5)


def test_products_and_choices_leave_other_output_out():
    w, v = jnp.ones(2), jnp.array([1.0, -2.0])
    dense = jax.jit(jax.hessian(lambda w: OTHER_OUTPUT(w)[0]))(w)
    np.testing.assert_allclose(curvax.hvp(OTHER_OUTPUT, w, v), dense @ v, rtol=1e-5)
    assert curvax.Auto().choose(OTHER_OUTPUT, w) == curvax.GaussNewton(1)


@pytest.mark.parametrize(
    ("loss", "v", "message"),
    [
        (lambda p: p["a"] ** 2, jnp.ones(2), r"returned float32 of shape \(2,\).*take its mean"),
        (lambda p: (jnp.sum(p["a"]), p), jnp.ones(2), "the loss alone"),
        (lambda p: jnp.sum(p["a"] > 0), jnp.ones(2), "returned int32"),
        (lambda p: jnp.sum(p["a"] ** 2), jnp.ones(2, jnp.int32), r"v is int32 at 'a'.*cast it: v.astype\(float32\)"),
        (lambda p: jnp.sum(p["a"] ** 2), jnp.ones(2, jnp.bfloat16), "v is bfloat16 at 'a'"),
        (lambda p: jnp.sum(p["a"] ** 2), "ones", "v has 'ones' at 'a', which is no array"),
        (3.0, jnp.ones(2), "the objective is a float.*pass the loss function, not its value"),
    ],
)
def test_products_that_cannot_be_are_refused(loss, v, message):
    with pytest.raises(ValueError, match=message):
        curvax.hvp(loss, {"a": jnp.ones(2)}, {"a": v})


@pytest.mark.parametrize("odd", ["relu", np.array(["relu"]), jax.nn.relu])
def test_leaves_that_are_no_numbers_are_named(odd):
    params = {"w": jnp.ones(2), "layers": [{"activation": odd}]}
    for where in (None, {"w": True, "layers": False}):
        for compute in (curvax.hessian_diag, curvax.explain):
            with pytest.raises(ValueError, match=r"params has .* at 'layers/0/activation'.*leave it out"):
                compute(lambda p: jnp.sum(p["w"] ** 2), params, "basis", where=where)


def test_numbers_of_python_are_parameters():
    assert float(curvax.hvp(lambda w: w**3, 2.0, 1.0)) == 12.0
    assert float(curvax.hessian_diag(lambda w: w**3, 2.0)) == 12.0


@pytest.mark.slow
def test_wider_data_leave_the_diagonal_its_dtype(x64):
    """NumPy's data are float64; what is kept of float32 parameters is float32, in a loop too."""
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(8, 4)), "y": np.arange(8) % 3}
    params = {
        "a": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(5, 3)), "bfloat16"),
    }

    def predict(p, d):
        with jax.numpy_dtype_promotion("standard"):
            return jnp.tanh(d["x"] @ p["a"]) @ p["b"]

    def loss(z, d):
        return optax.softmax_cross_entropy_with_integer_labels(z, d["y"])

    objective = curvax.Objective(predict, loss, data)
    for method in ("exact", "ggn", curvax.GaussNewton(num_samples=9), curvax.GaussNewton(2, "batch"), "hutchinson"):
        found = curvax.hessian_diag(objective, params, method, key=0)
        assert {h.dtype for h in jax.tree.leaves(found)} == {np.dtype("float32")}, method
    tx = curvax.cblr(0.1, every=2)
    step = lambda state, _: (tx.update(jax.grad(objective)(params), state, params, obj_fn=objective)[1], None)
    with jax.numpy_dtype_promotion("standard"):
        state, _ = jax.lax.scan(step, tx.init(params), None, 3)
    assert {h.dtype for h in jax.tree.leaves(optax.tree.get(state, "hessian_diag"))} == {np.dtype("float32")}


def test_a_diagonal_has_its_derivative_or_says_that_it_has_none():
    data = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32), "y": jnp.arange(6) % 3}
    loss = lambda z, d: optax.softmax_cross_entropy_with_integer_labels(z, d["y"])
    objective = curvax.Objective(lambda w, d: d["x"] @ w, loss, data)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)
    total = lambda method: lambda w: jnp.sum(curvax.hessian_diag(objective, w, method, key=0))
    trace = lambda w: jnp.trace(jax.hessian(lambda v: objective(v.reshape(4, 3)))(w.ravel()))
    found, third = jax.jit(lambda w: (jax.grad(total("basis"))(w), jax.grad(trace)(w)))(w)
    np.testing.assert_allclose(found, third, rtol=1e-3, atol=1e-6)
    for method in ("exact", "ggn_mc"):
        with pytest.raises(ValueError, match=r"not known; choose curvax.Basis\(\) or curvax.Hutchinson\(\)"):
            jax.jit(jax.grad(total(method)))(w)
        constant = jax.jit(jax.grad(lambda w, m=method: total(m)(jax.lax.stop_gradient(w)) + jnp.sum(w)))(w)
        np.testing.assert_array_equal(constant, 1)


@pytest.mark.slow
def test_a_gradient_through_the_rate_of_cblr_needs_none_of_the_diagonal():
    loss, w = lambda w: jnp.sum(jnp.cosh(w)), jnp.array([[0.5, -1.0]])
    tx = lambda rate: curvax.cblr(rate, momentum=0.0, method="exact")
    step = lambda rate: tx(rate).update(jax.grad(loss)(w), tx(rate).init(w), w, obj_fn=loss)[0]
    moved = lambda rate: loss(optax.apply_updates(w, step(rate)))
    step_of, found = jax.jit(step), jax.jit(jax.grad(moved))(0.1)
    slope = -np.sum(np.sinh(w + step_of(0.1)) * -np.asarray(step_of(1.0), np.float64))
    np.testing.assert_allclose(found, slope, rtol=1e-3)


@pytest.mark.slow_but_for("XDiag")
@pytest.mark.parametrize("exponent", [-80, -70, 70, 80])
@pytest.mark.parametrize(
    "method", [curvax.XDiag(4), curvax.Hutchinson(4), curvax.GaussNewton(4, micro_batches=2)], ids=repr
)
def test_scaling_a_loss_by_a_power_of_two_scales_estimate_and_error(method, exponent):
    """Where squares of either are no floats."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
    w = jnp.asarray(np.random.default_rng(1).normal(size=5), jnp.float32)

    def found(scale):
        # The scale is a part of the data: one program for all of them.
        predict = lambda w, d: jnp.tanh(d["x"] * w[None]) @ jnp.eye(5)[:, :2]
        loss = lambda z, d: jnp.sum(d["scale"] * z**2, 1)
        objective = curvax.Objective(predict, loss, {"x": x, "scale": jnp.float32(scale)})
        return curvax.hessian_diag(objective, w, method, key=3, standard_error=True)

    for one, scaled in zip(found(1.0), found(2.0**exponent), strict=True):
        np.testing.assert_allclose(np.asarray(scaled, np.float64) / 2.0**exponent, one, rtol=1e-4, atol=1e-5)


def test_a_method_of_the_callers_own_returns_real_numbers():
    class Own:
        def estimate(self, objective, params, key):
            return curvax.Estimate(0.0, params, params.astype(jnp.complex64))

    with pytest.raises(ValueError, match="complex64 at ''; return real"):
        curvax.hessian_diag(lambda w: jnp.sum(w), jnp.ones(2), Own())
