"""What a method costs, and why, before anything is computed."""

import dataclasses

import jax
import jax.numpy as jnp
import problems
import pytest

import curvax
from curvax import explain

OBJECTIVE, PARAMS = problems.mlp_objective(), problems.mlp_params()
SIZE = sum(x.size for x in jax.tree.leaves(PARAMS))


@pytest.mark.parametrize(
    ("method", "passes", "products"),
    [
        ("exact", 3, 0),
        ("ggn", 3, 0),
        (curvax.GaussNewton(7), 7, 0),
        (curvax.GaussNewton(7, "batch"), 7, 0),
        ("basis", 0, SIZE),
        (curvax.Hutchinson(7), 0, 7),
        (curvax.XDiag(7), 0, 14),
    ],
)
def test_the_cost_of_every_method(method, passes, products):
    explanation = explain(OBJECTIVE, PARAMS, method)
    assert (explanation.passes, explanation.products) == (passes, products)
    assert [row.path for row in explanation.rows] == ["0/bias", "0/kernel", "1/bias", "1/kernel"]
    assert all(row.reason and row.route for row in explanation.rows)


def test_which_product_is_taken():
    smooth = dataclasses.replace(OBJECTIVE, predict=lambda p, d: jnp.tanh(problems.mlp(p, d)))
    routes = [explain(objective, PARAMS, "hutchinson").rows[0].route for objective in (OBJECTIVE, smooth)]
    assert "Gauss-Newton" in routes[0] and "Hessian" in routes[1]


def test_what_is_chosen_by_default_is_what_is_taken():
    function = lambda params: OBJECTIVE(params)
    for objective in (OBJECTIVE, function):
        explanation = explain(objective, PARAMS, None, num_samples=3)
        chosen = curvax.Auto(num_samples=3).choose(objective, PARAMS)
        assert explanation.rows == explain(objective, PARAMS, chosen).rows
        assert str(explanation).startswith(f"{chosen!r}, chosen by Auto(num_samples=3)\n")


def test_shapes_are_enough_and_where_and_aux_are_heard():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (OBJECTIVE, PARAMS))
    assert explain(*shapes) == explain(OBJECTIVE, PARAMS)
    where = [False, {"bias": False, "kernel": True}]
    for arguments in (shapes, (OBJECTIVE, PARAMS)):
        assert [row.path for row in explain(*arguments, where=where).rows] == ["1/kernel"]
    pair = dataclasses.replace(OBJECTIVE, predict=lambda p, d: (problems.mlp(p, d), d))
    assert explain(pair, PARAMS, has_aux=True) == explain(OBJECTIVE, PARAMS)


def test_options_are_those_of_the_method():
    assert explain(OBJECTIVE, PARAMS, "hutchinson", num_samples=5).products == 5
    with pytest.raises(ValueError, match="'basis' takes no num_samples"):
        explain(OBJECTIVE, PARAMS, "basis", num_samples=5)
    with pytest.raises(ValueError, match="Objective"):
        explain(lambda params: OBJECTIVE(params), PARAMS, "ggn")
