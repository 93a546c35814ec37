"""Which parameters form a layer.

A radius is measured on some arrays and applied to some arrays. Usually they are the same ones, and a layer is a set of
parameters; but a bias is better scaled by its kernel's radius than by its own, because a bias that starts at zero has
no radius. So a layer is a pair, what it measures and what it scales, and every parameter is scaled by exactly one
layer. Nothing here knows what a radius is.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

#: How to group parameters into layers. Never a callable: `optax.inject_hyperparams` would take one for a schedule.
Layers = str | Mapping[str, str]


class Layer(NamedTuple):
    """A group of leaves that share a radius, as indices into the flattened parameters.

    Attributes:
      name: what errors and metrics call it.
      measured: the leaves on which the radius is measured; none if the layer has no radius of its own.
      scaled: the leaves whose update it multiplies.
    """

    name: str
    measured: tuple[int, ...]
    scaled: tuple[int, ...]


def group(leaves: Sequence[tuple[Any, Any]], layers: Layers) -> list[Layer]:
    """Partition leaves into layers.

    Formula:
      Gao & Zhong index the radius of eq. 21 by a "group (a layer in a NN for example)" and leave the group open. Here
      it is, for `layers`:

      - `"array"`: every array is a layer;
      - `"module"`: the arrays whose paths agree but for the last key. A leaf whose last key is an integer stands alone,
        since a list of arrays says nothing of modules;
      - `"kernel"`: every array of two or more dimensions is a layer, and the vectors and scalars of a module (biases,
        normalisation scales) follow the radius of that module's larger arrays, taken together. Where the module has
        none they have no measured leaves, and their radius is 1;
      - a mapping `{path regex: name}`: the first regular expression found in the path (`re.search`) names the layer.

      A trailing `.value`, which Flax NNX puts on every variable, is no part of a path.

    Args:
      leaves: `(path, array)` pairs, as `jax.tree_util.tree_leaves_with_path` returns them.
      layers: `"array"`, `"module"`, `"kernel"` or a mapping from path regex to layer name.

    Returns:
      The layers, in the order in which their first leaf appears. Each leaf is scaled by exactly one.

    Raises:
      ValueError: if `layers` is none of these, or if no rule of a mapping covers a parameter.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax import layers
      >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
      >>> leaves = jax.tree_util.tree_leaves_with_path(params)
      >>> layers.group(leaves, "kernel")
      [Layer(name='dense/kernel', measured=(1,), scaled=(0, 1))]
    """
    if isinstance(layers, Mapping):
        names = [_named_by_rule(path, layers) for path, _ in leaves]
    elif layers == "array":
        names = [path_name(path) for path, _ in leaves]
    elif layers == "module":
        names = [_module(path) for path, _ in leaves]
    elif layers == "kernel":
        return _kernels_and_followers(leaves)
    else:
        raise ValueError(
            f"layers={layers!r} is not a way to group parameters; pass 'array', 'module', 'kernel' or a mapping such as"
            " {'conv.*': 'features', '.*': 'rest'} from path regex to layer name."
        )
    return [Layer(name, members, members) for name, members in _members(names).items()]


def path_name(path: Sequence[Any]) -> str:
    """A leaf's path as people write it.

    Formula:
      The keys joined by `/`, without the trailing `.value` of a Flax NNX variable.

    Args:
      path: a key path, as `jax.tree_util.tree_leaves_with_path` returns it.

    Returns:
      The path, such as `"dense/kernel"`; empty for a tree that is a single leaf.

    Example:
      >>> import jax
      >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({"dense": {"kernel": 1.0}})
      >>> path_name(path)
      'dense/kernel'
    """
    return jax.tree_util.keystr(_without_value(path), simple=True, separator="/")


def _without_value(path):
    is_value = bool(path) and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
    return tuple(path[:-1] if is_value else path)


def _module(path) -> str:
    keys = _without_value(path)
    last = getattr(keys[-1], "key", getattr(keys[-1], "idx", None)) if keys else 0
    return path_name(keys if isinstance(last, int) else keys[:-1])


def _named_by_rule(path, rules: Mapping[str, str]) -> str:
    name = path_name(path)
    for pattern, layer in rules.items():
        if re.search(pattern, name):
            return layer
    raise ValueError(
        f"no rule in layers={dict(rules)!r} covers the parameter '{name}'; add a rule for it, or a last rule '.*'."
    )


def _members(names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    members: dict[str, tuple[int, ...]] = {}
    for index, name in enumerate(names):
        members[name] = (*members.get(name, ()), index)
    return members


def _kernels_and_followers(leaves) -> list[Layer]:
    """Each larger array for itself; the small ones of a module as one more layer, or in that of its only larger one."""
    layers = []
    for module, members in _members([_module(path) for path, _ in leaves]).items():
        larger = tuple(i for i in members if leaves[i][1].ndim > 1)
        small = tuple(i for i in members if leaves[i][1].ndim <= 1)
        if len(larger) == 1:
            layers.append(Layer(path_name(leaves[larger[0]][0]), larger, members))
            continue
        layers.extend(Layer(path_name(leaves[i][0]), (i,), (i,)) for i in larger)
        if small:
            layers.append(Layer(module, larger, small))
    return sorted(layers, key=lambda layer: layer.scaled[0])
