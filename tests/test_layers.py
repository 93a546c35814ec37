import jax
import jax.numpy as jnp
import optax
import pytest

import curvax
from curvax import layers


def grouped(tree, rule):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [layers.path_name(path) for path, _ in leaves]
    return {
        layer.name: ([names[i] for i in layer.measured], [names[i] for i in layer.scaled])
        for layer in layers.group(leaves, rule)
    }


def kernels_of(tree):
    """By path, the kernel that an array follows; None for those that follow nothing."""
    found = grouped(tree, "kernel").values()
    return {name: measured[0] if measured else None for measured, scaled in found for name in scaled}


def arrays(**shapes):
    """A tree from shapes."""
    return jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))


PARAMS = arrays(
    conv={"kernel": (3, 3, 1, 2), "bias": (2,)},
    norm={"scale": (2,), "bias": (2,)},
    lstm={"input": (2, 3), "hidden": (3, 3), "bias": (3,)},
)


def test_array():
    assert grouped(PARAMS, "array")["conv/bias"] == (["conv/bias"], ["conv/bias"])
    assert len(grouped(PARAMS, "array")) == 7


def test_module():
    assert grouped(PARAMS, "module") == {
        module: ([f"{module}/{name}" for name in sorted(PARAMS[module])],) * 2 for module in ("conv", "lstm", "norm")
    }


def test_kernel():
    """A bias follows the one kernel that it fits; what fits none, or several, stands without a measure."""
    assert grouped(PARAMS, "kernel") == {
        "conv/kernel": (["conv/kernel"], ["conv/bias", "conv/kernel"]),
        "lstm": ([], ["lstm/bias"]),
        "lstm/hidden": (["lstm/hidden"],) * 2,
        "lstm/input": (["lstm/input"],) * 2,
        "norm": ([], ["norm/bias", "norm/scale"]),
    }


KERNELS_AND_BIASES = {
    "dense": ((4, 3), (3,)),
    "dense, outputs first": ((3, 4), (3,)),
    "dense, one output": ((4, 1), (1,)),
    "dense, one input": ((1, 4), (4,)),
    "dense, one of each": ((1, 1), (1,)),
    "convolution": ((3, 3, 2, 5), (5,)),
    "convolution, outputs first": ((5, 2, 3, 3), (5, 1, 1)),
    "depthwise convolution": ((3, 1, 3, 3), (3, 1, 1)),
    "convolution with a bias to broadcast": ((3, 3, 2, 5), (1, 1, 1, 5)),
    "heads": ((4, 2, 3), (2, 3)),
    "fused heads": ((4, 3, 2, 5), (3, 2, 5)),
    "ensemble": ((7, 4, 3), (7, 3)),
    "ensemble with a bias to broadcast": ((7, 4, 3), (7, 1, 3)),
    "scalar gain": ((4, 3), ()),
}


@pytest.mark.parametrize("name", KERNELS_AND_BIASES)
@pytest.mark.parametrize("keys", [("kernel", "bias"), ("bias", "kernel"), (1, 0)])
def test_what_fits_the_only_kernel_of_its_module_follows_it(name, keys):
    """Whatever the two are called."""
    kernel, bias = keys
    shapes = KERNELS_AND_BIASES[name]
    tree = {"layer": {key: jnp.ones(shape) for key, shape in zip(keys, shapes, strict=True)}}
    assert kernels_of(tree) == dict.fromkeys((f"layer/{kernel}", f"layer/{bias}"), f"layer/{kernel}")


ALONE = {
    "norm": {"scale": (5,), "bias": (5,)},
    "norm to broadcast": {"scale": (1, 1, 1, 5), "bias": (1, 1, 1, 5)},
    "norm with a scalar": {"scale": (5,), "shift": ()},
    "scalar": {"temperature": ()},
}


@pytest.mark.parametrize("name", ALONE)
def test_vectors_without_a_kernel_follow_nothing(name):
    tree = {"norm": arrays(**ALONE[name]), "dense": arrays(kernel=(5, 5))}
    assert kernels_of(tree) == {"dense/kernel": "dense/kernel"} | dict.fromkeys(
        [f"norm/{key}" for key in ALONE[name]], None
    )


def test_no_norm_follows_an_embedding():
    several = arrays(wte=(64, 16), wpe=(8, 16), lnf=(16,))
    beside_blocks = arrays(wte=(64, 16), lnf=(16,), blocks=[{"norm": (16,), "mlp": {"w": (16, 16), "b": (16,)}}])
    assert kernels_of(several)["lnf"] is None
    followed = kernels_of(beside_blocks)
    assert followed["lnf"] is None and followed["blocks/0/norm"] is None
    assert followed["blocks/0/mlp/b"] == "blocks/0/mlp/w"


def test_one_of_several_kernels_is_not_guessed():
    flat = kernels_of(arrays(w1=(8, 6), b1=(6,), w2=(6, 3), b2=(3,)))
    assert flat == {"w1": "w1", "b1": None, "w2": "w2", "b2": "w2"}


BLOCK = {
    "norm": {"scale": (6,), "bias": (6,)},
    "query": {"kernel": (6, 2, 3), "bias": (2, 3)},
    "up": {"kernel": (6, 24), "bias": (24,)},
    "gate": {"kernel": (6, 24)},
}


def test_a_stack_is_grouped_as_one_of_its_modules():
    """A stack of vectors is no kernel, under `scan` over modules as little as alone."""
    stacked = jax.tree.map(lambda shape: (4, *shape), BLOCK, is_leaf=lambda x: isinstance(x, tuple))
    head = {"kernel": (6, 9), "bias": (9,)}
    one, four = (kernels_of(arrays(block=block, head=head)) for block in (BLOCK, stacked))
    assert one == four
    assert four["block/norm/scale"] is None and four["block/query/bias"] == "block/query/kernel"
    flat = kernels_of(arrays(norm=(4, 6), w1=(4, 6, 24), b1=(4, 24), w2=(4, 24, 6), b2=(4, 6)))
    assert flat == {"w1": "w1", "w2": "w2", "norm": None, "b1": None, "b2": None}


def test_equal_widths_are_no_stack():
    mlp = [{"kernel": (6, 6), "bias": (6,)}, {"kernel": (6, 6), "bias": (6,)}]
    assert kernels_of(arrays(mlp=mlp)) == {f"mlp/{i}/{key}": f"mlp/{i}/kernel" for i in (0, 1) for key in mlp[0]}
    without_biases = [{"kernel": (6, 6)}, {"kernel": (6, 6)}]
    assert None not in kernels_of(arrays(mlp=without_biases)).values()


def test_a_list_of_pairs_is_a_list_of_layers():
    assert kernels_of([(jnp.ones((4, 3)), jnp.ones(3)), (jnp.ones((3, 2)), jnp.ones(2))]) == {
        f"{i}/{j}": f"{i}/0" for i in (0, 1) for j in (0, 1)
    }


def test_biases_move_as_far_as_their_kernels():
    tx = curvax.scale_by_median_curvature()
    for kernel, bias in [((3, 1, 3, 3), (3, 1, 1)), ((4, 2, 3), (2, 3))]:
        w = {"layer": {"weight": jnp.full(kernel, 10.0), "bias": jnp.zeros(bias)}}
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, w), tx.init(w), w)
        assert jnp.array_equal(updates["layer"]["bias"], jnp.full(bias, 10.0))


ALIKE = [
    {"a/b": jnp.array([3.0, 4.0]), "a": {"b": jnp.array([0.3, 0.4])}},
    {"a": {"": jnp.array([3.0, 4.0])}, "a/": jnp.array([0.3, 0.4])},
    {"a": {0: jnp.array([3.0, 4.0])}, "a/0": jnp.array([0.3, 0.4])},
    {"a": [{"b/c": jnp.array([3.0, 4.0]), "b": {"c": jnp.array([0.3, 0.4])}}]},
]


@pytest.mark.parametrize("tree", ALIKE)
@pytest.mark.parametrize("rule", ["array", "module", "kernel"])
def test_paths_that_read_alike_are_two_layers_of_two_names(tree, rule):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = layers.group(leaves, rule)
    assert len({layer.name for layer in found}) == len(found)
    assert sorted(i for layer in found for i in layer.scaled) == [0, 1]
    if rule == "array":
        tx = curvax.scale_by_lars()
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree), tree)
        for w, u in zip(jax.tree.leaves(tree), jax.tree.leaves(updates), strict=True):
            assert jnp.allclose(u, jnp.linalg.norm(w) / jnp.sqrt(2.0), rtol=1e-6)
        probes = curvax.with_probes(optax.identity())
        state = probes.update(tree, probes.init(tree), tree)[1]
        strides = sorted(float(x) for x in state.parameter_stride.values())
        assert strides == pytest.approx([0.35, 3.5])


RULES = {"^conv": "features", "bias$": "biases", ".*": "rest"}


@pytest.mark.parametrize("rules", [RULES, tuple(RULES.items()), [list(rule) for rule in RULES.items()]])
def test_path_rules_take_the_first_match(rules):
    assert grouped(PARAMS, rules) == {
        "features": (["conv/bias", "conv/kernel"],) * 2,
        "biases": (["lstm/bias", "norm/bias"],) * 2,
        "rest": (["lstm/hidden", "lstm/input", "norm/scale"],) * 2,
    }


def test_a_parameter_that_no_rule_covers_is_named():
    with pytest.raises(ValueError, match="'lstm/bias'"):
        grouped(PARAMS, {"^conv|^norm": "a"})


@pytest.mark.parametrize(
    "unknown", ["layer", "", {}, (), ("^head", "head"), ["fc", "bn"], {"^head": 1}, [("a",)], 3, None]
)
def test_an_unknown_grouping_is_refused_where_it_is_given(unknown):
    with pytest.raises(ValueError, match="'array', 'module', 'kernel'"):
        curvax.lars(0.1, layers=unknown)


def test_a_regular_expression_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"'\(head'.*no regular expression"):
        curvax.scale_by_lars(layers={"(head": "head"})


def test_pairs_cross_inject_hyperparams():
    w = {"head": jnp.array([3.0, 4.0]), "body": jnp.array([0.3, 0.4])}
    tx = optax.inject_hyperparams(curvax.mclr)(1.0, momentum=0.0, layers=(("^head", "head"), (".*", "rest")))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, w), tx.init(w), w)
    assert jnp.allclose(updates["head"] / updates["body"], 10)


def test_integer_keys_stand_alone_where_modules_are_told_by_paths():
    """A list of arrays says nothing of modules, but a list of layers does."""
    alone = grouped([jnp.ones((2, 2)), jnp.ones(2)], "module")
    assert [scaled for _, scaled in alone.values()] == [["0"], ["1"]]
    layers_of_list = grouped([{"w": jnp.ones((2, 2)), "b": jnp.ones(2)}], "module")
    assert [scaled for _, scaled in layers_of_list.values()] == [["0/b", "0/w"]]
    by_number = grouped({0: jnp.ones((2, 2)), 1: jnp.ones(2)}, "module")
    assert [scaled for _, scaled in by_number.values()] == [["0"], ["1"]]


def test_a_bare_array_is_a_layer():
    assert grouped(jnp.ones((2, 2)), "module") == {"": ([""], [""])}
    assert grouped(jnp.ones((2, 2)), "kernel") == {"": ([""], [""])}


def test_nnx_paths_end_in_value():
    nnx = pytest.importorskip("flax.nnx")
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert grouped(state, "kernel") == {"kernel": (["kernel"], ["bias", "kernel"])}
