"""Curvature on meshes with Explicit axes, where an array's type says how it is divided between devices.

There an operation along a divided dimension is an error unless the division of its result is stated, and what curvax
computes on the way (slices of examples, unit vectors, factors) has none to state. So curvature is computed with every
Explicit axis turned to Auto, where the compiler divides, and comes back divided as the parameters are.

The user's functions may need their Explicit axes: they may name them (`out_sharding=`, `jax.sharding.reshard`), and use
arrays from outside whose types do. So they are traced on their own mesh, and then their equations are evaluated
without what they say of placement.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, reshard, use_abstract_mesh

from curvax.curvature.estimate import Estimate
from curvax.keys import Key, as_key
from curvax.objective import Objective
from curvax.placements import auto, evaluate, undivided

Specs = Sequence[PartitionSpec]


def on_auto_axes(method: Callable[..., Estimate]) -> Callable[..., Estimate]:
    """`method(objective, params, key, *others)` with Explicit axes turned to Auto; results are divided as `params`."""

    @functools.wraps(method)
    def on_any_axes(objective: Any, params: Any, key: Key | None, *others: Any) -> Estimate:
        mesh = _explicit_mesh((params, objective.data if isinstance(objective, Objective) else ()))
        if mesh is None:
            return method(objective, params, key, *others)
        with use_abstract_mesh(auto(mesh)):
            key = None if key is None else undivided(as_key(key))
            estimate = method(_on_auto_axes(objective, params, mesh), undivided(params), key, *undivided(others))
        like_params = lambda tree: jax.tree.map(lambda x, p: reshard(x, NamedSharding(mesh, _spec(p))), tree, params)
        error = None if estimate.standard_error is None else like_params(estimate.standard_error)
        value = reshard(estimate.value, NamedSharding(mesh, PartitionSpec()))
        return Estimate(value, like_params(estimate.grad), like_params(estimate.diag), error)

    return on_any_axes


def on_auto(function: Callable[..., Any], *args: Any, like: Any = None) -> Any:
    """`function(*args)` with Explicit axes turned to Auto.

    Args:
        function: of trees of arrays.
        *args: its arguments.
        like: a tree of arrays; the result is divided between devices as these are, without it not at all.

    Returns:
        What the function returns.
    """
    mesh = _explicit_mesh((args, like))
    if mesh is None:
        return function(*args)
    with use_abstract_mesh(auto(mesh)):
        found = function(*undivided(args))
    specs = jax.tree.map(lambda x: PartitionSpec() if like is None else _spec(x), found if like is None else like)
    return jax.tree.map(lambda x, spec: reshard(x, NamedSharding(mesh, spec)), found, specs)


def _on_auto_axes(objective: Any, params: Any, mesh: AbstractMesh) -> Any:
    """The objective as a function of arrays on Auto axes."""
    if not isinstance(objective, Objective):
        return _without_placements(objective, mesh, lambda: _specs(params))
    predict, loss, data, penalty = objective.predict, objective.loss, objective.data, objective.penalty

    @functools.cache
    def outputs_and_data() -> Specs:
        with use_abstract_mesh(mesh):
            outputs = jax.make_jaxpr(predict)(*_typed((params, data), _specs((params, data)), mesh)).out_avals
        return [*(aval.sharding.spec for aval in outputs), *_specs(data)]

    return dataclasses.replace(
        objective,
        predict=_without_placements(predict, mesh, lambda: _specs((params, data))),
        loss=_without_placements(loss, mesh, outputs_and_data),
        data=undivided(data),
        penalty=None if penalty is None else _without_placements(penalty, mesh, lambda: _specs(params)),
    )


def _without_placements(
    function: Callable[..., Any], mesh: AbstractMesh, specs: Callable[[], Specs]
) -> Callable[..., Any]:
    """`function`, traced for arguments that are divided by `specs` and evaluated for arguments on Auto axes."""

    def on_auto_axes(*args: Any) -> Any:
        try:
            with use_abstract_mesh(mesh):
                closed, out = jax.make_jaxpr(function, return_shape=True)(*_typed(args, specs(), mesh))
        except Exception as refusal:
            # Of a function that is for Auto axes only, leaving a division to the compiler: JAX has no name for this.
            try:
                return function(*args)
            except Exception:
                raise refusal from None
        return jax.tree.unflatten(jax.tree.structure(out), evaluate(closed, *jax.tree.leaves(args)))

    return on_auto_axes


def _explicit_mesh(tree: Any) -> AbstractMesh | None:
    """The mesh with Explicit axes over which the arrays of `tree` are divided, or which is set; None without one."""
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree)]
    return next((mesh for mesh in [*meshes, jax.sharding.get_abstract_mesh()] if mesh.explicit_axes), None)


def _spec(x: jax.Array) -> PartitionSpec:
    spec: PartitionSpec = jax.typeof(x).sharding.spec
    return spec


def _specs(tree: Any) -> list[PartitionSpec]:
    return [_spec(x) for x in jax.tree.leaves(tree)]


def _typed(tree: Any, specs: Specs, mesh: AbstractMesh) -> Any:
    """The types of the arrays of `tree`, divided by `specs`; not at all along a dimension that does not divide."""
    leaves, treedef = jax.tree.flatten(tree)

    def parts(names: Any) -> int:
        return math.prod(mesh.shape[name] for name in (names if isinstance(names, tuple) else (names,)))

    def typed(x: jax.Array, spec: PartitionSpec) -> Any:
        aval = jax.typeof(x)
        divides = [names is not None and n % parts(names) == 0 for names, n in zip(spec, aval.shape, strict=False)]
        spec = PartitionSpec(*(names if divided else None for names, divided in zip(spec, divides, strict=False)))
        return aval.update(sharding=NamedSharding(mesh, spec))

    return jax.tree.unflatten(treedef, [typed(x, spec) for x, spec in zip(leaves, specs, strict=True)])
