"""Which arrays are stacks of layers, read off the trace of the network: those over whose slices a scan runs."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Var

from curvax.exact.loops import bodies, scan_numbers
from curvax.exact.primitives import Entries, record
from curvax.exact.trace import flattened
from curvax.layers import Layers, checked, path_name
from curvax.objective import Objective
from curvax.stacks import Axes, Stacked


def find_stacks(objective: Objective, params: Any, layers: Layers = "kernel") -> Stacked:
    """The stacks of a network that scans over its layers, for the `layers` of any optimizer.

    Formula:
      An axis of an array counts layers if the network reads the array by `lax.scan` along it alone, whatever casts and
      transpositions come before; of a scan in a scan two axes do. Nothing is said of experts and heads, along which
      products run all at once: name these by `Stacked`.

    Args:
      objective: network, loss and data; only traced.
      params: a pytree of arrays, or of their shapes.
      layers: how the slices are grouped.

    Returns:
      The grouping, with a rule for each array that is a stack.

    Raises:
      ValueError: if a stack and an array that is none have paths that read alike.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> def predict(params, x):
      ...   return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["blocks"])[0] @ params["head"]
      >>> objective = curvax.Objective(predict, lambda z, x: jnp.sum(z**2, 1), jnp.ones((4, 3)))
      >>> params = {"blocks": jnp.ones((5, 3, 3)), "head": jnp.ones((3, 2))}
      >>> curvax.find_stacks(objective, params)
      Stacked(axes=(('^blocks$', (0,)),), layers='kernel')
    """
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return stacked_at(paths, scanned_axes(objective, params), checked(layers).layers)


def stacked_at(paths: Sequence[str], axes: Sequence[Axes], layers: Layers) -> Stacked:
    """The grouping by rules for single paths.

    Raises:
      ValueError: if two paths read alike, and their axes differ.
    """
    by_path: dict[str, Axes] = {}
    for path, of_array in zip(paths, axes, strict=True):
        if by_path.setdefault(path, of_array) != of_array:
            raise ValueError(
                f"'{path}' is the path of two arrays, of which one is a stack of layers and the other not, or along"
                " other axes; give one of their keys another name."
            )
    return Stacked(tuple((f"^{re.escape(path)}$", of_array) for path, of_array in by_path.items() if of_array), layers)


def scanned_axes(objective: Objective, params: Any) -> list[Axes]:
    """For each leaf of the parameters the axes along which scans run; none where it is read otherwise, too."""
    jaxpr = flattened(jax.make_jaxpr(objective.predict)(params, objective.data)).jaxpr
    leaves = jax.tree.leaves(params)
    return [_axes(jaxpr, var, range(jnp.ndim(x))) for x, var in zip(leaves, jaxpr.invars, strict=False)]


def _axes(jaxpr: Jaxpr, var: Var, dims: Sequence[int]) -> Axes:
    """The axes of an array along which scans run, if all do that read `var`, whose dimensions are these of it."""
    reads = [(eqn, slot) for eqn in jaxpr.eqns for slot, atom in enumerate(eqn.invars) if atom is var]
    found = {_read(jaxpr, eqn, slot, dims) for eqn, slot in reads}
    return found.pop() if len(found) == 1 and var not in jaxpr.outvars else ()


def _read(jaxpr: Jaxpr, eqn: JaxprEqn, slot: int, dims: Sequence[int]) -> Axes:
    """The same, if `eqn` reads the variable."""
    name = eqn.primitive.name
    if name == "scan" and slot >= sum(scan_numbers(eqn)):
        body = bodies(eqn)[0].jaxpr
        # A scan in the scan, over what one step reads, has an axis more.
        return (dims[0], *_axes(body, body.invars[slot], dims[1:]))
    # A barrier has several operands, each of which it returns.
    if record(eqn).entries is Entries.SAME or name == "optimization_barrier":
        return _axes(jaxpr, eqn.outvars[slot], dims)
    if name == "transpose":
        return _axes(jaxpr, eqn.outvars[0], [dims[i] for i in eqn.params["permutation"]])
    return ()
