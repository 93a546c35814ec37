import jax
import jax.numpy as jnp
import pytest

from curvax import layers, scale_by_lars


def grouped(tree, rule):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [layers.path_name(path) for path, _ in leaves]
    return {
        layer.name: ([names[i] for i in layer.measured], [names[i] for i in layer.scaled])
        for layer in layers.group(leaves, rule)
    }


PARAMS = {
    "conv": {"kernel": jnp.ones((3, 3, 1, 2)), "bias": jnp.ones(2)},
    "norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
    "lstm": {"input": jnp.ones((2, 3)), "hidden": jnp.ones((3, 3)), "bias": jnp.ones(3)},
}


def test_array():
    assert grouped(PARAMS, "array")["conv/bias"] == (["conv/bias"], ["conv/bias"])
    assert len(grouped(PARAMS, "array")) == 7


def test_module():
    assert grouped(PARAMS, "module") == {
        module: ([f"{module}/{name}" for name in sorted(PARAMS[module])],) * 2 for module in ("conv", "lstm", "norm")
    }


def test_kernel():
    """Vectors follow the larger arrays of their module together, or stand without a measure where it has none."""
    assert grouped(PARAMS, "kernel") == {
        "conv/kernel": (["conv/kernel"], ["conv/bias", "conv/kernel"]),
        "lstm": (["lstm/hidden", "lstm/input"], ["lstm/bias"]),
        "lstm/hidden": (["lstm/hidden"],) * 2,
        "lstm/input": (["lstm/input"],) * 2,
        "norm": ([], ["norm/bias", "norm/scale"]),
    }


def test_path_rules_take_the_first_match():
    assert grouped(PARAMS, {"^conv": "features", "bias$": "biases", ".*": "rest"}) == {
        "features": (["conv/bias", "conv/kernel"],) * 2,
        "biases": (["lstm/bias", "norm/bias"],) * 2,
        "rest": (["lstm/hidden", "lstm/input", "norm/scale"],) * 2,
    }


def test_a_parameter_that_no_rule_covers_is_named():
    with pytest.raises(ValueError, match="'lstm/bias'"):
        grouped(PARAMS, {"^conv|^norm": "a"})


def test_an_unknown_grouping_is_refused():
    with pytest.raises(ValueError, match="'array', 'module', 'kernel'"):
        scale_by_lars(layers="layer").update({"w": jnp.ones(2)}, (), {"w": jnp.ones(2)})


@pytest.mark.parametrize("rule", ["module", "kernel"])
def test_integer_keys_stand_alone(rule):
    """A list of arrays says nothing of modules, but a list of layers does."""
    alone = grouped([jnp.ones((2, 2)), jnp.ones(2)], rule)
    assert [scaled for _, scaled in alone.values()] == [["0"], ["1"]]
    layers_of_list = grouped([{"w": jnp.ones((2, 2)), "b": jnp.ones(2)}], rule)
    assert [scaled for _, scaled in layers_of_list.values()] == [["0/b", "0/w"]]
    by_number = grouped({0: jnp.ones((2, 2)), 1: jnp.ones(2)}, rule)
    assert [scaled for _, scaled in by_number.values()] == [["0"], ["1"]]


def test_a_bare_array_is_a_layer():
    assert grouped(jnp.ones((2, 2)), "module") == {"": ([""], [""])}


def test_nnx_paths_end_in_value():
    nnx = pytest.importorskip("flax.nnx")
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert grouped(state, "kernel") == {"kernel": (["kernel"], ["bias", "kernel"])}
