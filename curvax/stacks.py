"""Arrays that hold many layers, as `lax.scan` and `vmap` over layers want them: each slice is a layer.

A kernel `(L, D, F)` of a scanned network is L kernels, experts `(E, D, F)` are E, and a bias `(L, F)` is L vectors.
Which axes count layers is said by rules on paths, or is what `layers="kernel"` sees by the shapes of a module. Rules of
radii are given arrays with one axis more in front, `(number of layers, ...)`; what holds a single layer has 1 there.
"""

import dataclasses
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

#: Of an array, the axes that count layers; of most arrays none.
Axes = tuple[int, ...]
#: Which axes count layers, from path regex to an axis or several.
Rules = Mapping[str, int | Axes] | Sequence[tuple[str, int | Axes]]


@dataclasses.dataclass(frozen=True)
class Stacked:
    """A grouping into layers for arrays that hold many of them: a radius, a norm, a median for each slice.

    Attributes:
      axes: from path regex to the axis that counts layers, or to several, as a mapping or pairs; the first regex that
        is found in a path (`re.search`) counts, and an array that none is found in holds one layer. `None` for the
        stacks that shapes show, which only `layers="kernel"` looks for.
      layers: how slices are grouped: `"array"`, `"module"`, `"kernel"` or rules from path regex to layer name, see
        `layers.group`. Arrays of one layer are stacks of as many.

    Raises:
      ValueError: if `axes` are no such rules.

    Example:
      >>> import jax.numpy as jnp, optax, curvax
      >>> tx = curvax.mclr(1.0, layers=curvax.Stacked({"^blocks/": 0}), momentum=0.0)
      >>> w = {"blocks": {"kernel": jnp.array([[[1.0, 1.0]], [[8.0, 8.0]]])}}
      >>> print(tx.update(w, tx.init(w), w)[0]["blocks"]["kernel"].ravel())
      [-1. -1. -8. -8.]
    """

    axes: Rules | None
    layers: Any = "kernel"

    def __post_init__(self) -> None:
        if self.axes is not None:
            # Hashable: it is part of states.
            object.__setattr__(self, "axes", _rules(self.axes))


def stack_axes(paths: Sequence[str], shapes: Sequence[tuple[int, ...]], rules: Rules) -> list[Axes]:
    """The axes of each array that count layers, by rules.

    Raises:
      ValueError: if an array has not the axes that a rule gives it.

    Example:
      >>> stack_axes(["blocks/kernel", "head"], [(4, 2, 3), (3, 5)], (("blocks", (0,)),))
      [(0,), ()]
    """
    pairs = _rules(rules)
    return [_of_array(path, shape, pairs) for path, shape in zip(paths, shapes, strict=True)]


def without(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    """The shape of a slice."""
    return tuple(n for i, n in enumerate(shape) if i not in axes)


def sizes(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    """How many layers there are along each of the axes."""
    return tuple(shape[i] for i in axes)


def slices(x: jax.Array, axes: Axes) -> jax.Array:
    """An array as `(number of layers, ...)`.

    Example:
      >>> import jax.numpy as jnp
      >>> slices(jnp.ones((2, 5, 3)), (1,)).shape, slices(jnp.ones(4), ()).shape
      ((5, 2, 3), (1, 4))
    """
    if not axes:
        return lax.expand_dims(x, (0,))
    x = jnp.moveaxis(x, axes, range(len(axes)))
    return x if len(axes) == 1 else x.reshape(-1, *x.shape[len(axes) :])


def joined(x: jax.Array, shape: tuple[int, ...], axes: Axes) -> jax.Array:
    """The array of which these are the slices."""
    if not axes:
        return lax.squeeze(x, (0,))
    x = x.reshape(*sizes(shape, axes), *x.shape[1:])
    return jnp.moveaxis(x, range(len(axes)), axes)


def for_each(function: Any, *columns: Sequence[jax.Array]) -> Any:
    """What `function` returns for the arrays of each layer, one below the other; compiled once.

    Example:
      >>> import jax.numpy as jnp
      >>> print(for_each(lambda x: jnp.sum(x[0]), [jnp.ones((4, 2, 3))]))
      [6. 6. 6. 6.]
    """
    if columns[0][0].shape[0] == 1:
        found = function(*([lax.squeeze(x, (0,)) for x in column] for column in columns))
        return jax.tree.map(lambda x: lax.expand_dims(x, (0,)), found)
    return lax.map(lambda of_layer: function(*of_layer), columns)


def _rules(axes: Any) -> tuple[tuple[str, Axes], ...]:
    try:
        pairs = tuple(axes.items() if isinstance(axes, Mapping) else axes)
        rules = tuple((pattern, _as_axes(said)) for pattern, said in pairs)
        for pattern, _ in rules:
            re.compile(pattern)
    except (TypeError, ValueError, re.error) as error:
        raise ValueError(
            f"axes={axes!r} do not say which axes count layers; pass a mapping from path regex to an axis, or to"
            f" several, such as {{'^blocks/': 0, 'experts': (0, 1)}}. {error}"
        ) from None
    return rules


def _as_axes(said: Any) -> Axes:
    return tuple(operator.index(i) for i in (said if isinstance(said, Sequence) else (said,)))


def _of_array(path: str, shape: tuple[int, ...], rules: tuple[tuple[str, Axes], ...]) -> Axes:
    said = next((axes for pattern, axes in rules if re.search(pattern, path)), ())
    if any(not -len(shape) <= i < len(shape) for i in said) or len({i % len(shape) for i in said}) < len(said):
        raise ValueError(
            f"'{path}' has the shape {shape}, of which axes {said} cannot count layers; give its own axes, each once,"
            " or put a rule before this one."
        )
    axes = tuple(i % len(shape) for i in said)
    # A stack of no layers is an empty array like others.
    return axes if math.prod(sizes(shape, axes)) else ()
