"""Which axes of a `shard_map` an array varies over, where that has to be said.

Under `shard_map`'s checks an array made of constants is the same on every device, as far as JAX knows. A loop that adds
to it what differs between devices, or a derivative with respect to replicated parameters, has to begin with an array
that is marked as varying. Elsewhere, `pmap` included, nothing varies and these functions do nothing.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import jax

#: The name of a mesh axis, or names of several; `None` for none.
AxisName = str | tuple[str, ...] | None


def is_bound(axis_name: AxisName) -> bool:
    """Whether this runs inside of the `shard_map` or `pmap` that has these axes."""
    try:
        jax.lax.axis_size(axis_name)
    except NameError:
        return False
    return True


def varying_over(x: jax.Array, axis_name: str | tuple[str, ...]) -> jax.Array:
    """`x`, marked as varying over these axes."""
    return _varying(x, (axis_name,) if isinstance(axis_name, str) else axis_name)


def varying_like(x: jax.Array, like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """`x`, marked as varying over the axes that `like` varies over."""
    return _varying(x, varies_over(like))


def varies_over(x: jax.Array | jax.ShapeDtypeStruct) -> frozenset[str]:
    """The axes over which `x` varies."""
    axes: frozenset[str] = jax.typeof(x).manual_axis_type.varying
    return axes


def varying_beyond(tree: Any, axes: frozenset[str]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """The leaves that vary over other axes than these: their paths, and which axes."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if own := varies_over(x) - axes:
            yield path, tuple(sorted(own))


def _varying(x: jax.Array, names: Iterable[str]) -> jax.Array:
    missing = tuple(name for name in names if name not in varies_over(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
