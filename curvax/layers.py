"""Which parameters form a layer.

A radius is measured on some arrays and applied to some arrays. Usually they are the same ones, and a layer is a set of
parameters; but a bias is better scaled by its kernel's radius than by its own, because a bias that starts at zero has
no radius. So a layer is a pair, what it measures and what it scales, and every parameter is scaled by exactly one
layer. An array may hold many layers, one for each slice (`stacks`). Nothing here knows what a radius is.
"""

import dataclasses
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from curvax.stacks import Axes, Stacked, sizes, stack_axes, without

#: How to group parameters into layers. Never a callable: `optax.inject_hyperparams` would take one for a schedule.
Layers = str | Mapping[str, str] | Sequence[tuple[str, str]] | Stacked

WAYS = ("array", "module", "kernel")
Members = dict[Any, tuple[int, ...]]
Path = tuple[Any, ...]
Shape = tuple[int, ...]


class Layer(NamedTuple):
    """A group of leaves that share a radius, as indices into the flattened parameters; or many such, one per slice.

    Attributes:
      name: what errors and metrics call it, unlike any other of its tree.
      measured: the leaves on which the radius is measured; none if the layer has no radius of its own.
      scaled: the leaves whose update it multiplies, the measured ones among them.
      axes: for each of these the axes that count layers, none where the layer is a single one.
    """

    name: str
    measured: tuple[int, ...]
    scaled: tuple[int, ...]
    axes: tuple[Axes, ...]


def group(leaves: Sequence[tuple[Any, Any]], layers: Layers) -> list[Layer]:
    """Partition leaves into layers.

    Formula:
      Gao & Zhong index the radius of eq. 21 by a "group (a layer in a NN for example)" and leave the group open. Here
      it is, for `layers`:

      - `"array"`: every array is a layer;
      - `"module"`: the arrays whose paths agree but for the last key. A leaf whose last key is an integer stands alone,
        since a list of arrays says nothing of modules;
      - `"kernel"`: every kernel is a layer, and an array that is none follows the one kernel that it fits: the only
        such kernel of its module, where that holds arrays alone. What follows nothing has no measured leaves: an
        embedding's neighbours, the scale and bias of a norm;
      - rules `{path regex: name}` or `((path regex, name), ...)`: the first regular expression found in the path
        (`re.search`) names the layer;
      - `Stacked(axes, layers)`: any of these, of arrays each of whose slices is a layer of its own.

      An array fits another of its module if it has fewer axes longer than one, all of them found in the other, in the
      same order: (C,) or (C, 1, 1) in (H, W, I, C), (heads, width) in (D, heads, width), (L, F) in (L, D, F). One with
      as many of these axes, but fewer in all, fits too: (C,) in (1, C). A kernel is an array that fits no other and has
      two axes, or two that are longer than one, or more than two and another array that fits it. The first axis is left
      out of all this, and counts layers, where every array of a module has the same one, as `scan` and `vmap` over
      modules make them, and some of them are vectors without it and some are not: kernels of convolutions alone are no
      stack, nor are vectors. `Stacked` says what shapes do not show.

      Nothing depends on what a key is called, and layers are told apart by their keys: two paths that read alike are
      two layers. A trailing `.value`, which Flax NNX puts on every variable, is no part of a path.

    Args:
      leaves: `(path, array)` pairs, as `jax.tree_util.tree_leaves_with_path` returns them.
      layers: `"array"`, `"module"`, `"kernel"`, rules from path regex to layer name, or `Stacked`.

    Returns:
      The layers, in the order in which their first leaf appears. Each leaf is scaled by exactly one.

    Raises:
      ValueError: if `layers` is none of these, if no rule covers a parameter, or if arrays of one layer are stacks of
        different numbers of layers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax import layers
      >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
      >>> leaves = jax.tree_util.tree_leaves_with_path(params)
      >>> layers.group(leaves, "kernel")
      [Layer(name='dense/kernel', measured=(1,), scaled=(0, 1), axes=((), ()))]
    """
    how = checked(layers)
    paths, shapes = [_without_value(path) for path, _ in leaves], [leaf.shape for _, leaf in leaves]
    axes = _axes(paths, shapes, how)
    if how.layers == "kernel":
        return _kernels_and_followers(paths, shapes, axes)
    if how.layers in WAYS:
        members = _members(paths if how.layers == "array" else map(_module, paths))
        return _named(members, members, shapes, axes)
    by_name = _members(_name_by_rule(path, how.layers) for path in paths)
    return [_layer(name, members, members, shapes, axes) for name, members in by_name.items()]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class WholeLayers:
    """The layers as the shapes of whole parameters show them, for devices that hold parts of these.

    Attributes:
      paths: the key path of each leaf.
      shapes: the shape of each leaf.
      layers: the groups, as indices into `paths`.
    """

    paths: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]
    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, leaves: Sequence[tuple[Any, jax.Array]], layers: Layers) -> "WholeLayers":
        """The layers of `(path, array)` pairs."""
        paths, shapes = zip(*((path, leaf.shape) for path, leaf in leaves), strict=True) if leaves else ((), ())
        return cls(paths, shapes, tuple(group(leaves, layers)))

    def among(self, leaves: Sequence[tuple[Any, jax.Array]]) -> list[Layer]:
        """The same layers, of those leaves that are there.

        Raises:
          ValueError: if a device holds some of the layers of a stack only.
        """
        places = {path: i for i, (path, _) in enumerate(leaves)}
        found = []
        for layer in self.layers:
            kept = [(i, axes) for i, axes in zip(layer.scaled, layer.axes, strict=True) if self.paths[i] in places]
            for i, axes in kept:
                part, whole = (sizes(shape, axes) for shape in (leaves[places[self.paths[i]]][1].shape, self.shapes[i]))
                if part != whole:
                    raise ValueError(
                        f"'{path_name(self.paths[i])}' is a stack of {whole} layers, of which a device holds {part};"
                        f" split another axis than {axes} between devices, or divide parameters under jit, without"
                        " param_axis_name."
                    )
            at = lambda members: tuple(places[self.paths[i]] for i in members if self.paths[i] in places)
            if kept:
                found.append(Layer(layer.name, at(layer.measured), at(layer.scaled), tuple(axes for _, axes in kept)))
        return found


def of_parts(leaves: Sequence[tuple[Any, jax.Array]], layers: Layers, number: int) -> list[Layer]:
    """The layers of arrays of which each device holds one of so many equal parts.

    Raises:
      ValueError: if the layers differ between arrays that are split along their first axis, along their last and not;
        or if there are stacks, of which a device may hold some layers only.
    """
    as_if = jax.ShapeDtypeStruct
    parts = list(leaves)
    first = [(path, as_if((number * x.shape[0], *x.shape[1:]) if x.shape else (), x.dtype)) for path, x in leaves]
    last = [(path, as_if((*x.shape[:-1], number * x.shape[-1]) if x.shape else (), x.dtype)) for path, x in leaves]
    found = [group(shapes, layers) for shapes in (parts, first, last)]
    for i, axes in ((i, axes) for layer in found[0] for i, axes in zip(layer.scaled, layer.axes, strict=True)):
        if axes:
            raise ValueError(
                f"'{path_name(leaves[i][0])}' is a stack of layers, of which a device sees parts here; call"
                " init(params) outside of shard_map, on whole parameters, and pass its state in."
            )
    kernels = {tuple(sorted(i for layer in groups for i in layer.measured)) for groups in found}
    if len(kernels) == 1 and len(*kernels) == 1:
        return found[0]  # What follows no kernel follows all of them: the same one.
    for path, of_each in ((path, [_layer_of(i, groups) for groups in found]) for i, (path, _) in enumerate(leaves)):
        if of_each.count(of_each[0]) < len(of_each):
            raise ValueError(
                f"which kernel '{path_name(path)}' belongs to is told by the shapes of whole arrays, of which a device"
                " sees parts here; call init(params) outside of shard_map, on whole parameters, and pass its state in,"
                " or give layers as rules, such as layers={'dense.*': 'dense', '.*': 'rest'}."
            )
    return found[0]


def _layer_of(index: int, layers: Sequence[Layer]) -> Layer:
    return next(layer for layer in layers if index in layer.scaled)


def checked(layers: Layers) -> Stacked:
    """The grouping, rules as pairs, with the axes that count layers, `None` where shapes say which.

    Raises:
      ValueError: if `layers` is no way to group parameters.

    Example:
      >>> checked({"^head": "head", ".*": "rest"})
      Stacked(axes=(), layers=(('^head', 'head'), ('.*', 'rest')))
    """
    if isinstance(layers, Stacked):
        inside = checked(layers.layers)
        if isinstance(layers.layers, Stacked):
            raise ValueError(f"layers={layers!r} has a Stacked in a Stacked; give all axes in one.")
        return dataclasses.replace(inside, axes=inside.axes if layers.axes is None else layers.axes)
    if isinstance(layers, str) and layers in WAYS:
        return Stacked(None if layers == "kernel" else (), layers)
    try:
        given: Any = layers.items() if isinstance(layers, Mapping) else layers
        # A name of two letters is no pair.
        pairs = not isinstance(layers, str) and not any(isinstance(rule, str) for rule in given)
        rules = tuple((pattern, name) for pattern, name in given) if pairs else ()
    except (TypeError, ValueError):
        rules = ()
    if not rules or not all(isinstance(text, str) for rule in rules for text in rule):
        raise ValueError(
            f"layers={layers!r} is not a way to group parameters; pass 'array', 'module', 'kernel', rules from path"
            " regex to layer name, as a mapping {'conv.*': 'features', '.*': 'rest'} or as pairs, or curvax.Stacked."
        )
    for pattern, _ in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} in layers={layers!r} is no regular expression: {error}.") from None
    return Stacked((), rules)


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


def _without_value(path: Sequence[Any]) -> Path:
    is_value = bool(path) and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
    return tuple(path[:-1] if is_value else path)


def _module(path: Path) -> Path:
    last = getattr(path[-1], "key", getattr(path[-1], "idx", None)) if path else 0
    return path if isinstance(last, int) else path[:-1]


def _name_by_rule(path: Path, rules: tuple[tuple[str, str], ...]) -> str:
    name = path_name(path)
    for pattern, layer in rules:
        if re.search(pattern, name):
            return layer
    raise ValueError(
        f"no rule in layers={rules!r} covers the parameter '{name}'; add a rule for it, or a last rule '.*'."
    )


def _members(keys: Iterable[Hashable]) -> Members:
    members: Members = {}
    for index, key in enumerate(keys):
        members[key] = (*members.get(key, ()), index)
    return members


def names_of(paths: Sequence[Any]) -> list[str]:
    """The names of paths, each another: where two of them read alike, all are written in full."""
    names = [path_name(path) for path in paths]
    return names if len(set(names)) == len(names) else [jax.tree_util.keystr(path) for path in paths]


def _axes(paths: Sequence[Path], shapes: Sequence[Shape], how: Stacked) -> list[Axes]:
    """The axes of each array that count layers."""
    if how.axes is not None:
        return stack_axes([path_name(path) for path in paths], shapes, how.axes)
    stacked = _stacked(paths, shapes) if how.layers == "kernel" else set()
    return [(0,) if i in stacked else () for i in range(len(paths))]


def _named(scaled: Members, measured: Members, shapes: Sequence[Shape], axes: Sequence[Axes]) -> list[Layer]:
    """Layers named by their paths."""
    names = names_of(list(scaled))
    layers = [
        _layer(name, measured[path], scaled[path], shapes, axes) for name, path in zip(names, scaled, strict=True)
    ]
    return sorted(layers, key=lambda layer: layer.scaled[0])


def _layer(
    name: str, measured: tuple[int, ...], scaled: tuple[int, ...], shapes: Sequence[Shape], axes: Sequence[Axes]
) -> Layer:
    counts = {sizes(shapes[i], axes[i]) for i in scaled}
    if len(counts) > 1:
        raise ValueError(
            f"the arrays of the layer '{name}' are stacks of {' and of '.join(map(str, sorted(counts)))} layers; give"
            " them axes that count as many (curvax.Stacked), or different layers."
        )
    return Layer(name, measured, scaled, tuple(axes[i] for i in scaled))


def _kernels_and_followers(paths: Sequence[Path], shapes: Sequence[Shape], axes: Sequence[Axes]) -> list[Layer]:
    counts = [sizes(shape, each) for shape, each in zip(shapes, axes, strict=True)]
    inner = [without(shape, each) for shape, each in zip(shapes, axes, strict=True)]
    holds_modules = {path[:k] for path in paths for k in range(len(path) - 1)}
    scaled: Members = {}
    measured: Members = {}
    for module, members in _members(path[:-1] for path in paths).items():
        for alike in _members(counts[i] for i in members).values():
            alike = tuple(members[k] for k in alike)
            kernel_of = _kernel_of(alike, inner, arrays_alone=module not in holds_modules)
            alone = [i for i in alike if i not in kernel_of]
            # What follows nothing and is a stack of another size has a layer of its own.
            rest = module if module not in scaled else paths[alone[0]] if alone else None
            for i in alike:
                layer = paths[kernel_of[i]] if i in kernel_of else rest
                scaled[layer] = (*scaled.get(layer, ()), i)
                measured[layer] = (kernel_of[i],) if i in kernel_of else ()
    return _named(scaled, measured, shapes, axes)


def _kernel_of(members: Sequence[int], shapes: Sequence[Shape], arrays_alone: bool) -> dict[int, int]:
    """The kernel that each array of a module follows; kernels follow themselves."""
    fits = {i: [j for j in members if _fits(shapes[i], shapes[j])] for i in members}
    hosts = {j for found in fits.values() for j in found}

    def is_kernel(i: int) -> bool:
        return not fits[i] and (len(shapes[i]) == 2 or len(_long(shapes[i])) > 1 or (i in hosts and len(shapes[i]) > 2))

    kernels = {i: i for i in members if is_kernel(i)}
    found = {i: [j for j in fits[i] if j in kernels] for i in members if arrays_alone}
    return kernels | {i: hosts[0] for i, hosts in found.items() if len(hosts) == 1}


def _long(shape: Shape) -> list[int]:
    return [size for size in shape if size != 1]


def _fits(shape: Shape, other: Shape) -> bool:
    small, large = _long(shape), iter(_long(other))
    is_smaller = (len(small), len(shape)) < (len(_long(other)), len(other))
    # Each search goes on where the last one ended.
    return is_smaller and all(size in large for size in small)


def _stacked(paths: Sequence[Path], shapes: Sequence[Shape]) -> set[int]:
    """The arrays of all modules that may be stacks of modules: see the last sentence on kernels in `group`."""
    below: dict[Any, list[int]] = {}
    for i, path in enumerate(paths):
        for k in range(len(path)):
            below.setdefault(path[:k], []).append(i)

    def is_stack(members: Sequence[int]) -> bool:
        same_first_axis = len({shapes[i][:1] for i in members}) == 1
        further_axes = [shapes[i][1:] for i in members]
        sizes = [len(_long(axes)) for axes in further_axes]
        return same_first_axis and all(further_axes) and min(sizes) <= 1 < max(sizes)

    return {i for members in below.values() if is_stack(members) for i in members}
