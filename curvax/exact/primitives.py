"""What each primitive operation does to a derivative, and to the axis that counts the examples.

Two tables, and a safe answer for whatever is in neither. The first says how an operation depends on its operands; an
unknown one is curved. The second follows the example axis from a result back to an operand; an unknown operation may
mix every example with every other. Both answers only ever cost time.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Var

# Second derivatives vanish almost everywhere, in all operands jointly. Where one does not, at a tie or a kink, JAX
# differentiates the branch taken, and so do we.
PIECEWISE_LINEAR = frozenset(
    "abs add add_any broadcast_in_dim clamp concatenate convert_element_type copy copy_p cummax cummin cumsum"
    " dynamic_slice dynamic_update_slice gather max mesh_cast min neg pad pcast pvary reduce_max reduce_min"
    " reduce_precision reduce_sum reduce_window_max reduce_window_min reduce_window_sum reshape reshard rev select_n"
    " sharding_constraint slice sort split squeeze sub top_k transpose".split()
)
BILINEAR = frozenset({"mul", "dot_general", "conv_general_dilated"})
# Derivative zero almost everywhere, or by decree.
CONSTANT = frozenset("ceil floor round sign stop_gradient".split())

ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy copy_p cos"
    " cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p"
    " logistic lt max mesh_cast min mul ne neg nextafter not or pcast polygamma pow pvary reduce_precision rem"
    " reshard round rsqrt select_n sharding_constraint sign sin sinh sqrt square stop_gradient sub tan tanh xor".split()
)
REDUCTIONS = frozenset("argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum".split())
CUMULATIVE = frozenset("cumlogsumexp cummax cummin cumprod cumsum".split())
WINDOWS = frozenset({"reduce_window_max", "reduce_window_min", "reduce_window_sum"})
RESHAPES = frozenset({"reshape", "squeeze"})


class Axis(NamedTuple):
    """Where the examples lie: dimension `dim`, of size `outer * B * inner`, holds example `(index // inner) % B`."""

    dim: int
    outer: int = 1
    inner: int = 1


def differentiable(eqn: JaxprEqn, slot: int) -> bool:
    """Whether a derivative can pass through operand `slot` of an equation."""
    atom = eqn.invars[slot]
    return isinstance(atom, Var) and jnp.issubdtype(atom.aval.dtype, jnp.inexact) and eqn.primitive.name not in CONSTANT


def pull_axis(eqn: JaxprEqn, slot: int, result: int, axis: Axis, num_examples: int) -> Axis | None:
    """The axis of an operand along which each slice reaches only the same example of a result.

    Args:
        eqn: the operation.
        slot: which operand.
        result: which result.
        axis: the example axis of that result.
        num_examples: B.

    Returns:
        The operand's example axis, or None where one of its entries may reach several examples.
    """
    name, operand, out = eqn.primitive.name, eqn.invars[slot].aval, eqn.outvars[result].aval
    if name in RESHAPES:
        return _axis_of_stride(operand.shape, _stride_of_axis(out.shape, axis), num_examples)
    rule = _elementwise if name in ELEMENTWISE else _DIMENSION_RULES.get(name)
    dim = None if rule is None else rule(eqn, slot, axis.dim)
    # Every rule carries whole dimensions: a slice, a window or an expanded singleton is caught by its size here.
    if dim is None or operand.shape[dim] != out.shape[axis.dim]:
        return None
    return axis._replace(dim=dim)


def _stride_of_axis(shape: tuple[int, ...], axis: Axis) -> int:
    """Row-major, entry `f` of an array belongs to example `(f // stride) % B`; no reshape changes this stride."""
    return axis.inner * math.prod(shape[axis.dim + 1 :])


def _axis_of_stride(shape: tuple[int, ...], stride: int, num_examples: int) -> Axis | None:
    below = 1
    for dim in reversed(range(len(shape))):
        above = below * shape[dim]
        if stride % below == 0 and above and above % (stride * num_examples) == 0:
            return Axis(dim, outer=above // (stride * num_examples), inner=stride // below)
        below = above
    return None


def _elementwise(eqn, slot, dim):
    return dim if eqn.invars[slot].aval.ndim == eqn.outvars[0].aval.ndim else None


def _broadcast(eqn, slot, dim):
    dims = eqn.params["broadcast_dimensions"]
    return dims.index(dim) if slot == 0 and dim in dims else None


def _transpose(eqn, slot, dim):
    return eqn.params["permutation"][dim]


def _reduction(eqn, slot, dim):
    return [d for d in range(eqn.invars[slot].aval.ndim) if d not in eqn.params["axes"]][dim]


def _cumulative(eqn, slot, dim):
    return None if dim == eqn.params["axis"] else dim


def _dimension(eqn, slot, dim):
    return None if dim == eqn.params["dimension"] else dim


def _rev(eqn, slot, dim):
    return None if dim in eqn.params["dimensions"] else dim


def _top_k(eqn, slot, dim):
    last = eqn.invars[0].aval.ndim - 1
    return None if dim == eqn.params.get("axis", last) % (last + 1) or dim == last else dim


def _pad(eqn, slot, dim):
    return dim if slot == 0 and eqn.params["padding_config"][dim] == (0, 0, 0) else None


def _slice(eqn, slot, dim):
    # Of the same size as its operand, so starting at zero: a strided or shifted slice is shorter.
    return dim if eqn.invars[slot].aval.ndim == eqn.outvars[0].aval.ndim else None


def _window(eqn, slot, dim):
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    alone = all(eqn.params[name][dim] == 1 for name in names) and tuple(eqn.params["padding"][dim]) == (0, 0)
    return dim if alone else None


def _dot(eqn, slot, dim):
    contracting, batch = eqn.params["dimension_numbers"]
    if dim < len(batch[0]):
        return batch[slot][dim]
    free = [free_dims(eqn.invars[i].aval.ndim, contracting[i], batch[i]) for i in (0, 1)]
    position = dim - len(batch[0]) - (len(free[0]) if slot else 0)
    return free[slot][position] if 0 <= position < len(free[slot]) else None


def free_dims(ndim: int, contracting: tuple[int, ...], batch: tuple[int, ...]) -> list[int]:
    """The dimensions that a `dot_general` operand contributes to the result."""
    return [d for d in range(ndim) if d not in contracting and d not in batch]


def _conv(eqn, slot, dim):
    numbers = eqn.params["dimension_numbers"]
    images = slot == 0 and dim == numbers.out_spec[0] and eqn.params["batch_group_count"] == 1
    return numbers.lhs_spec[0] if images else None


def _gather(eqn, slot, dim):
    numbers, operand = eqn.params["dimension_numbers"], eqn.invars[0].aval
    batch_dims = [d for d in range(eqn.outvars[0].aval.ndim) if d not in numbers.offset_dims]
    if slot == 1:
        return batch_dims.index(dim) if dim in batch_dims else None
    if dim in numbers.offset_dims:
        absent = numbers.collapsed_slice_dims + numbers.operand_batching_dims
        kept = [d for d in range(operand.ndim) if d not in absent]
        return kept[numbers.offset_dims.index(dim)]
    position = batch_dims.index(dim)
    if position in numbers.start_indices_batching_dims:
        return numbers.operand_batching_dims[numbers.start_indices_batching_dims.index(position)]
    return None


_DIMENSION_RULES: dict[str, Callable[[JaxprEqn, int, int], int | None]] = {
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "concatenate": _dimension,
    "sort": _dimension,
    "split": _cumulative,
    "rev": _rev,
    "pad": _pad,
    "top_k": _top_k,
    "slice": _slice,
    "dynamic_slice": _slice,
    "dynamic_update_slice": _slice,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(CUMULATIVE, _cumulative),
    **dict.fromkeys(WINDOWS, _window),
}
