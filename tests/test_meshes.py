"""Curvature on a mesh with Explicit axes is that of one device, and lies where the parameters do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.sharding import AxisType, NamedSharding, get_abstract_mesh, reshard
from jax.sharding import PartitionSpec as P

from curvax import GaussNewton, Hutchinson, Objective, XDiag, hessian_diag, value_grad_and_hessian_diag

METHODS = ["exact", "basis", "ggn", "ggn_mc", GaussNewton(1, "batch"), Hutchinson(2), XDiag(2)]
RNG = np.random.default_rng(1)
PARAMS = {name: jnp.asarray(RNG.normal(size=shape), jnp.float32) for name, shape in {"w": (6, 4), "h": (4, 2)}.items()}
DATA = problems.classification(examples=4, classes=2)


def mesh_of(**axes):
    devices = jax.devices()[: 2 ** len(axes)]
    return jax.make_mesh((2,) * len(axes), tuple(axes), axis_types=tuple(axes.values()), devices=devices)


def divided(tree, mesh, **specs):
    """The arrays of a dictionary, divided as `specs` say, and otherwise not at all."""
    return {name: jax.device_put(x, NamedSharding(mesh, specs.get(name, P()))) for name, x in tree.items()}


assert_close = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5))


def lie_alike(tree, params):
    return all(x.sharding.is_equivalent_to(params[name].sharding, x.ndim) for name, x in tree.items())


@pytest.mark.slow_but_for("exact-AxisType.Explicit")
@pytest.mark.parametrize(
    ("method", "second"), [(method, AxisType.Explicit) for method in METHODS] + [("exact", AxisType.Auto)], ids=str
)
def test_every_method_with_examples_and_parameters_divided(method, second):
    """The logits are divided by class, which the loss of optax takes on Auto axes only."""

    @jax.jit
    def compute(data, params):
        predict = lambda p, d: jax.nn.relu(d["x"] @ p["w"]) @ p["h"]
        penalty = (lambda p: jnp.sum(jnp.cos(p["w"]))) if method == "exact" else None
        objective = Objective(predict, problems.cross_entropy, data, penalty)
        estimate = value_grad_and_hessian_diag(objective, params, method, key=jax.random.key(3))
        return estimate[: 4 if isinstance(method, Hutchinson) else 3]

    mesh = mesh_of(x=AxisType.Explicit, y=second)
    data, params = divided(DATA, mesh, **dict.fromkeys(DATA, P("x"))), divided(PARAMS, mesh, h=P(None, "y"))
    with jax.set_mesh(mesh):
        value, *trees = compute(data, params)
    assert_close([value, *trees], list(compute(DATA, PARAMS)))
    assert all(lie_alike(tree, params) for tree in trees)


@jax.custom_vjp
def opaque(x, power):
    return jnp.sin(x) ** power


opaque.defvjp(lambda x, power: (jnp.sin(x) ** power, x), lambda x, cotangent: (jnp.sin(2 * x) * cotangent, None))


@jax.custom_jvp
def own_rule(x):
    return jnp.sin(x)


own_rule.defjvp(lambda primals, tangents: (own_rule(*primals), jnp.cos(*primals) * tangents[0]))

BODIES = {
    "scan": lambda u: jax.lax.scan(lambda c, _: (jnp.tanh(c), None), u, None, length=2)[0],
    "cond": lambda u: jax.lax.cond(jnp.sum(u) > 0, jnp.sin, jnp.cos, u),
    "checkpoint": jax.checkpoint(jnp.tanh),
    "custom_jvp": own_rule,
    "custom_vjp": lambda u: opaque(u, 2),
    "jit": jax.jit(jnp.tanh),
    "vmap": jax.vmap(jnp.sort),
}


@pytest.mark.slow_but_for("scan", "custom_vjp")
@pytest.mark.parametrize("body", BODIES)
def test_functions_that_name_their_axes_and_use_divided_arrays_from_outside(body):
    mesh = mesh_of(x=AxisType.Explicit)
    rows = {"rows": jnp.asarray(np.random.default_rng(4).normal(size=(4, 6)), jnp.float32)}

    def loss(rows, p):
        if get_abstract_mesh().explicit_axes:
            hidden = jnp.dot(rows, reshard(p["w"], P()), out_sharding=P("x", None))
            return jnp.mean(reshard(BODIES[body](hidden), P(None, "x")) ** 2)
        return jnp.mean(BODIES[body](rows @ p["w"]) ** 2)

    @jax.jit
    def compute(rows, w):
        return hessian_diag(functools.partial(loss, rows), {"w": w}, method="hutchinson", key=jax.random.key(5))

    params = divided(PARAMS, mesh, w=P(None, "x"))
    with jax.set_mesh(mesh):
        found = compute(divided(rows, mesh, rows=P("x"))["rows"], params["w"])
    assert_close(found, compute(rows["rows"], PARAMS["w"]))


def test_outside_jit_with_a_manual_function_inside():
    mesh = mesh_of(x=AxisType.Explicit)
    inside = lambda x, w: jax.nn.relu(x @ w)

    def compute(data, params, predict):
        objective = Objective(predict, problems.cross_entropy, data)
        return hessian_diag(objective, params, method="hutchinson", key=jax.random.key(6))

    mapped = jax.shard_map(inside, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    data, params = divided(DATA, mesh, x=P("x"), y=P("x")), {"w": divided(PARAMS, mesh)["w"]}
    with jax.set_mesh(mesh):
        found = compute(data, params, lambda p, d: mapped(d["x"], p["w"]))
    assert_close(found, compute(DATA, {"w": PARAMS["w"]}, lambda p, d: inside(d["x"], p["w"])))
