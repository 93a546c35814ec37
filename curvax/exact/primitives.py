"""What each primitive operation does to a derivative, and to the axis that counts the examples.

Two tables, and a safe answer for whatever is in neither. The first says how an operation depends on its operands; an
unknown one is curved. The second follows the example axis from a result back to an operand; an unknown operation may
mix every example with every other. Both answers only ever cost time.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal, Var

Atom = Var | Literal

# Second derivatives vanish almost everywhere, in all operands jointly. Where one does not, at a tie or a kink, JAX
# differentiates the branch taken, and so do we. Of a complex number that is said of its two parts.
PIECEWISE_LINEAR = frozenset(
    "abs add add_any broadcast_in_dim clamp complex concatenate conj convert_element_type copy cummax cummin cumsum"
    " dynamic_slice dynamic_update_slice fft gather imag max min name neg pad pvary real reduce_max reduce_min"
    " reduce_precision reduce_sum reduce_window_max reduce_window_min reduce_window_sum rem reshape reshard rev scatter"
    " scatter-add scatter-sub select_n sharding_constraint slice sort split squeeze sub top_k transpose".split()
)
BILINEAR = frozenset({"mul", "dot_general", "conv_general_dilated"})
# Derivative zero almost everywhere, or by decree.
CONSTANT = frozenset("ceil floor round sign stop_gradient".split())
# Piecewise linear in real numbers alone: the modulus of a complex one is a square root.
PIECEWISE_LINEAR_IF_REAL = frozenset({"abs"})

ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp complex conj"
    " convert_element_type copy cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma"
    " igammac imag integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max min mul name ne neg nextafter"
    " not or polygamma pow pvary real reduce_precision regularized_incomplete_beta rem reshard round rsqrt select_n"
    " sharding_constraint sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta".split()
)
# Those of JAX 0.12.
ELEMENTWISE |= {"log2", "one_minus_square"}
REDUCTIONS = frozenset("argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum".split())
CUMULATIVE = frozenset("cumlogsumexp cummax cummin cumprod cumsum".split())
WINDOWS = frozenset({"reduce_window_max", "reduce_window_min", "reduce_window_sum"})
SCATTERS = frozenset({"scatter", "scatter-add", "scatter-sub"})


class Axis(NamedTuple):
    """Where the examples lie: dimension `dim`, of size `outer * B * inner`, holds example `(index // inner) % B`."""

    dim: int
    outer: int = 1
    inner: int = 1


def differentiable(eqn: JaxprEqn, slot: int) -> bool:
    """Whether a derivative can pass through operand `slot` of an equation."""
    atom = eqn.invars[slot]
    if not isinstance(atom, Var) or eqn.primitive.name in CONSTANT:
        return False
    return jnp.issubdtype(getattr(atom.aval, "dtype", bool), jnp.inexact)


def is_complex(atom: Atom) -> bool:
    """Whether a variable or literal is complex: it has no real cotangent, which is what columns are."""
    return jnp.issubdtype(getattr(atom.aval, "dtype", bool), jnp.complexfloating)


def piecewise_linear(eqn: JaxprEqn) -> bool:
    """Whether the second derivatives of an operation vanish almost everywhere, in all its operands jointly."""
    name = eqn.primitive.name
    if name in PIECEWISE_LINEAR_IF_REAL and any(map(is_complex, eqn.invars)):
        return False
    return name in PIECEWISE_LINEAR


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
    if name == "reshape":
        if eqn.params["dimensions"] is not None:
            return None
        return _axis_of_stride(operand.shape, _stride_of_axis(out.shape, axis), axis, num_examples)
    rule = _elementwise if name in ELEMENTWISE else _DIMENSION_RULES.get(name)
    dim = None if rule is None else rule(eqn, slot, axis.dim)
    # Every rule carries whole dimensions: a slice, a window or an expanded singleton is caught by its size here.
    if dim is None or operand.shape[dim] != out.shape[axis.dim]:
        return None
    return axis._replace(dim=dim)


def _stride_of_axis(shape: tuple[int, ...], axis: Axis) -> int:
    """Row-major, entry `f` of an array belongs to example `(f // stride) % B`; no reshape changes this stride."""
    return axis.inner * math.prod(shape[axis.dim + 1 :])


def _axis_of_stride(shape: tuple[int, ...], stride: int, like: Axis, num_examples: int) -> Axis | None:
    """The dimension within which an index steps from example to example.

    There is one at most, but for a single example, which is everywhere: then a dimension of its own is preferred.
    """
    found, above = [], math.prod(shape)
    for dim, size in enumerate(shape):
        below = above // size if size else 0
        if below and stride % below == 0 and above % (stride * num_examples) == 0:
            found.append(Axis(dim, outer=above // (stride * num_examples), inner=stride // below))
        above = below
    own = [axis for axis in found if axis[1:] == like[1:]]
    return (own or found or [None])[0]


def _elementwise(eqn, slot, dim):
    return dim if eqn.invars[slot].aval.ndim == eqn.outvars[0].aval.ndim else None


def _broadcast(eqn, slot, dim):
    dims = eqn.params["broadcast_dimensions"]
    return dims.index(dim) if slot == 0 and dim in dims else None


def _squeeze(eqn, slot, dim):
    return [d for d in range(eqn.invars[slot].aval.ndim) if d not in eqn.params["dimensions"]][dim]


def _fft(eqn, slot, dim):
    return dim if dim < eqn.outvars[0].aval.ndim - len(eqn.params["fft_lengths"]) else None


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


def _scatter(eqn, slot, dim):
    """The result is the operand with some windows changed: those of one index, or, by batches, one index for each."""
    numbers, ndim = eqn.params["dimension_numbers"], eqn.outvars[0].aval.ndim
    if slot == 0:
        return dim
    batched = dim in numbers.operand_batching_dims
    index_dim = numbers.scatter_indices_batching_dims[numbers.operand_batching_dims.index(dim)] if batched else None
    if slot == 1:
        return index_dim
    if batched:
        return [d for d in range(eqn.invars[2].aval.ndim) if d not in numbers.update_window_dims][index_dim]
    absent = numbers.inserted_window_dims + numbers.operand_batching_dims
    kept = [d for d in range(ndim) if d not in absent]
    return numbers.update_window_dims[kept.index(dim)] if dim in kept else None


_DIMENSION_RULES: dict[str, Callable[[JaxprEqn, int, int], int | None]] = {
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "fft": _fft,
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
    **dict.fromkeys(SCATTERS, _scatter),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(CUMULATIVE, _cumulative),
    **dict.fromkeys(WINDOWS, _window),
}
