"""Equations without what they say of placement: a jaxpr of arrays with Explicit axes, evaluated on Auto axes.

Most equations need no more than other parameters. Those that carry functions of the user's own, to be traced when they
are differentiated, have them traced on the user's mesh.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, reshard, use_abstract_mesh

from curvax.exact.equations import apply, callee, derivative, read


def auto(mesh: AbstractMesh) -> AbstractMesh:
    """The mesh with its Explicit axes turned to Auto."""
    return mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto)) if mesh.explicit_axes else mesh


def _on_auto(aval: Any) -> Any:
    return aval.update(sharding=NamedSharding(auto(aval.sharding.mesh), PartitionSpec(*[None] * aval.ndim)))


def undivided(tree: Any) -> Any:
    """The arrays of a tree, without Explicit axes in their types; where their parts lie does not change."""
    cast = lambda x: reshard(x, PartitionSpec()) if jax.typeof(x).sharding.mesh.explicit_axes else x
    return jax.tree.map(cast, tree)


def evaluate(closed: ClosedJaxpr, *inputs: jax.Array) -> list[jax.Array]:
    """The results of a jaxpr, each equation bound as if its Explicit axes were Auto."""
    env = dict(zip(closed.jaxpr.constvars, map(undivided, closed.consts), strict=True))
    env |= zip(closed.jaxpr.invars, inputs, strict=True)
    for eqn in closed.jaxpr.eqns:
        with eqn.ctx.manager, use_abstract_mesh(auto(jax.sharding.get_abstract_mesh())):
            results = _RULES.get(eqn.primitive.name, _bind)(eqn, *(read(env, atom) for atom in eqn.invars))
        env |= zip(eqn.outvars, results, strict=True)
    return [read(env, atom) for atom in closed.jaxpr.outvars]


def _bind(eqn: JaxprEqn, *operands: jax.Array) -> Sequence[jax.Array]:
    params = jax.tree.map(_without_placement, eqn.params)
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(params))
    return results if eqn.primitive.multiple_results else [results]


def _without_placement(param: Any) -> Any:
    """A parameter of an equation: no sharding, and no placement in the bodies of loops and branches."""
    if isinstance(param, ClosedJaxpr | Jaxpr):
        closed = param if isinstance(param, ClosedJaxpr) else ClosedJaxpr(param, ())
        traced = jax.make_jaxpr(functools.partial(evaluate, closed))(*map(_on_auto, closed.in_avals))
        return traced if isinstance(param, ClosedJaxpr) else traced.jaxpr
    return None if isinstance(param, NamedSharding) and param.mesh.abstract_mesh.explicit_axes else param


# Equations that need more than their parameters changed.


def _placement(eqn: JaxprEqn, operand: jax.Array) -> Sequence[jax.Array]:
    """A cast to Auto axes is done already; one to Explicit axes remains as advice to the compiler."""
    sharding = eqn.params["dst_sharding"]
    mesh = sharding.mesh.abstract_mesh
    advice = NamedSharding(auto(mesh), sharding.spec)
    return [jax.lax.with_sharding_constraint(operand, advice) if mesh.explicit_axes else operand]


def _constraint(eqn: JaxprEqn, operand: jax.Array) -> Sequence[jax.Array]:
    return [operand] if eqn.params["sharding"].mesh.abstract_mesh.explicit_axes else _bind(eqn, operand)


def _call(eqn: JaxprEqn, *operands: jax.Array) -> Sequence[jax.Array]:
    return evaluate(callee(eqn), *operands)


def _checkpoint(eqn: JaxprEqn, *operands: jax.Array) -> Any:
    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(functools.partial(evaluate, callee(eqn)), **options)(*operands)


def _shard_map(eqn: JaxprEqn, *operands: jax.Array) -> Any:
    names = ("in_specs", "out_specs", "check_vma")
    options = {name: eqn.params[name] for name in names} | {"axis_names": eqn.params["newly_manual_axes"]}
    mesh = auto(eqn.params["mesh"].abstract_mesh)
    options["in_specs"], options["out_specs"] = tuple(options["in_specs"]), list(options["out_specs"])
    return jax.shard_map(functools.partial(evaluate, callee(eqn)), mesh=mesh, **options)(*operands)


def _custom_jvp(eqn: JaxprEqn, *operands: jax.Array) -> Sequence[jax.Array]:
    """The user's own rule, traced where the user's function was."""
    avals, slots = _smooth(eqn.invars)

    @jax.custom_jvp
    def function(*operands: jax.Array) -> Sequence[jax.Array]:
        return _call(eqn, *operands)

    @function.defjvp
    def rule(operands: Any, tangents: Any) -> tuple[Any, Any]:
        with eqn.ctx.manager:
            closed = jax.make_jaxpr(derivative(eqn, slots))(avals, [avals[slot] for slot in slots])
        found = evaluate(closed, *operands, *(tangents[slot] for slot in slots))
        return found[: len(eqn.outvars)], found[len(eqn.outvars) :]

    return function(*operands)


def _custom_vjp(eqn: JaxprEqn, *operands: jax.Array) -> Any:
    """Forwards the value and what the pullback keeps, backwards the pullback, each traced as in `_custom_jvp`."""
    avals, slots = _smooth(eqn.invars)

    @functools.cache
    def forwards() -> tuple[ClosedJaxpr, Any]:
        with eqn.ctx.manager:
            return jax.make_jaxpr(lambda *xs: jax.vjp(functools.partial(apply, eqn), *xs), return_shape=True)(*avals)

    @jax.custom_vjp
    def function(*operands: jax.Array) -> Sequence[jax.Array]:
        return _call(eqn, *operands)

    def forward(*operands: jax.Array) -> Any:
        closed, out = forwards()
        return jax.tree.unflatten(jax.tree.structure(out), evaluate(closed, *operands))

    def backward(pullback: Any, cotangents: Any) -> tuple[jax.Array | None, ...]:
        kept, treedef = jax.tree.flatten(pullback)
        types = forwards()[0].out_avals
        results, kept_types = list(types[: len(eqn.outvars)]), types[len(eqn.outvars) :]

        def pull(kept: Any, cotangents: Any) -> list[jax.Array]:
            found = jax.tree.unflatten(treedef, kept)(cotangents)
            return [found[slot] for slot in slots]

        with eqn.ctx.manager:
            closed = jax.make_jaxpr(pull)(kept_types, results)
        found = dict(zip(slots, evaluate(closed, *kept, *cotangents), strict=True))
        return tuple(found.get(slot) for slot in range(len(avals)))

    function.defvjp(forward, backward)
    return function(*operands)


def _smooth(atoms: Sequence[Literal | Var]) -> tuple[list[Any], list[int]]:
    """The types of some variables, and which of them have a derivative."""
    avals: list[Any] = [atom.aval for atom in atoms]
    return avals, [slot for slot, aval in enumerate(avals) if jnp.issubdtype(aval.dtype, jnp.inexact)]


_RULES: dict[str, Callable[..., Sequence[jax.Array]]] = {
    "reshard": _placement,
    "sharding_constraint": _constraint,
    "shard_map": _shard_map,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "jit": _call,
    "closed_call": _call,
    "remat2": _checkpoint,
}
