"""Operations that move entries about and compute nothing."""

import math

import numpy as np
from jax.extend.core import JaxprEqn

from curvax.exact.primitives.layers import ENTRIES
from curvax.exact.primitives.record import Axis, Entries, Form, Primitive, along


def _broadcast(eqn, slot, dim):
    dims = eqn.params["broadcast_dimensions"]
    return dims.index(dim) if slot == 0 and dim in dims else None


def _fold_broadcast(eqn, value):
    shape = eqn.outvars[0].aval.shape
    dims = eqn.params["broadcast_dimensions"]
    ones = [value.shape[dims.index(d)] if d in dims else 1 for d in range(len(shape))]
    return np.broadcast_to(value.reshape(ones), shape)


def _fold_iota(eqn):
    shape, dim = eqn.outvars[0].aval.shape, eqn.params["dimension"]
    return np.broadcast_to(np.arange(shape[dim]).reshape([-1 if d == dim else 1 for d in range(len(shape))]), shape)


def _reshape(eqn: JaxprEqn, slot: int, result: int, axis: Axis, num_examples: int) -> Axis | None:
    """Row-major, entry `f` of an array belongs to example `(f // stride) % B`; no reshape changes this stride.

    There is one dimension at most within which an index steps from example to example, but for a single example, which
    is everywhere: then a dimension of its own is preferred.
    """
    if eqn.params["dimensions"] is not None:
        return None
    shape, stride = eqn.invars[slot].aval.shape, axis.inner * math.prod(eqn.outvars[0].aval.shape[axis.dim + 1 :])
    found, above = [], math.prod(shape)
    for dim, size in enumerate(shape):
        below = above // size if size else 0
        if below and stride % below == 0 and above % (stride * num_examples) == 0:
            found.append(Axis(dim, outer=above // (stride * num_examples), inner=stride // below))
        above = below
    own = [other for other in found if other[1:] == axis[1:]]
    return (own or found or [None])[0]


def _fold_reshape(eqn, value):
    return np.transpose(value, eqn.params["dimensions"]).reshape(eqn.outvars[0].aval.shape)


def _kept(eqn, slot, dim):
    return [d for d in range(eqn.invars[slot].aval.ndim) if d not in eqn.params["dimensions"]][dim]


def _transpose(eqn, slot, dim):
    return eqn.params["permutation"][dim]


def _not_dimension(eqn, slot, dim):
    return None if dim == eqn.params["dimension"] else dim


def _not_axis(eqn, slot, dim):
    return None if dim == eqn.params["axis"] else dim


def _not_dimensions(eqn, slot, dim):
    return None if dim in eqn.params["dimensions"] else dim


def _stack(eqn, slot, dim):
    axis = eqn.params["axis"]
    return None if dim == axis else dim - (dim > axis)


def _unstack(eqn, slot, dim):
    return dim + (dim >= eqn.params["axis"])


def _tile(eqn, slot, dim):
    return dim if eqn.params["reps"][dim] == 1 else None


def _pad(eqn, slot, dim):
    return dim if slot == 0 and eqn.params["padding_config"][dim] == (0, 0, 0) else None


def _slice(eqn, slot, dim):
    # Of the same size as its operand, so starting at zero: a strided or shifted slice is shorter.
    return dim if eqn.invars[slot].aval.ndim == eqn.outvars[0].aval.ndim else None


def _fold_slice(eqn, value):
    names = ("start_indices", "limit_indices", "strides")
    starts, limits, strides = (eqn.params[name] or [None] * value.ndim for name in names)
    return value[tuple(map(slice, starts, limits, strides))]


def _move(name, axis, fold=None, entries=Entries.MOVED, layer=None) -> Primitive:
    return Primitive(name, Form.LINEAR, entries, axis, layer, fold)


RECORDS = [
    Primitive("iota", Form.CONSTANT, fold=_fold_iota),
    _move("broadcast_in_dim", along(_broadcast), _fold_broadcast, layer=ENTRIES),
    _move("reshape", _reshape, _fold_reshape),
    _move("squeeze", along(_kept), lambda eqn, value: value.reshape(eqn.outvars[0].aval.shape)),
    _move("transpose", along(_transpose), lambda eqn, value: np.transpose(value, eqn.params["permutation"])),
    _move("rev", along(_not_dimensions), lambda eqn, value: np.flip(value, eqn.params["dimensions"])),
    _move("pad", along(_pad)),
    _move("slice", along(_slice), _fold_slice),
    _move("dynamic_slice", along(_slice)),
    _move("tile", along(_tile)),
    # Several results, or operands: an entry has no one place.
    _move("split", along(_not_axis), entries=Entries.MIXED),
    _move("unstack", along(_unstack), entries=Entries.MIXED),
    _move(
        "concatenate",
        along(_not_dimension),
        lambda eqn, *values: np.concatenate(values, eqn.params["dimension"]),
        Entries.MIXED,
    ),
    _move("stack", along(_stack), lambda eqn, *values: np.stack(values, eqn.params["axis"]), Entries.MIXED),
    _move("dynamic_update_slice", along(_slice), entries=Entries.MIXED),
]
