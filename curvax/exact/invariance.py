"""One column fewer: proof that a loss does not notice a common shift of its logits.

Softmax cross-entropy has `loss(u + t) = loss(u)`, hence `H 1 = 0`, and a factor of `C - 1` columns. Rather than know
which losses are so, follow what a shift of `u` by `t` does to every variable: it adds `slope * t`, or multiplies by
`exp(power * t)`, or neither. `exp` turns the first into the second, `log` the second into the first, and a difference
of two equal slopes is invariant.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var

from curvax.exact.dataflow import Flow


class Shift(NamedTuple):
    """`v` becomes `exp(power * t) * v + slope * t`, at most one of the two being non-zero."""

    slope: float = 0.0
    power: float = 0.0


INVARIANT = Shift()
# Operations that only move entries, or choose among them: what is true of every operand is true of the result.
MOVES = frozenset(
    "broadcast_in_dim concatenate convert_element_type copy gather max min reduce_max reduce_min reshape rev select_n"
    " slice dynamic_slice squeeze transpose split sort".split()
)


def shift_invariant(flow: Flow, cut: Var) -> bool:
    """Whether every loss is unchanged when one number is added to all entries of its example's slice of `cut`."""
    shifts = {cut: Shift(slope=1.0)}
    for _, eqn, slots, results in flow.equations:
        if any(eqn.invars[slot] in shifts for slot in slots):
            shift = _shift(eqn, [shifts.get(eqn.invars[slot], INVARIANT) for slot in slots], slots)
            if shift is None:
                return False
            shifts |= dict.fromkeys(results, shift)
    return shifts.get(flow.program.losses, INVARIANT) == INVARIANT


def _shift(eqn: JaxprEqn, operands: Sequence[Shift], slots: Sequence[int]) -> Shift | None:
    name = eqn.primitive.name
    if all(shift == INVARIANT for shift in operands):
        return INVARIANT
    if name in MOVES and len(slots) == _num_moved(eqn) and len(set(operands)) == 1:
        return operands[0]
    if name in ("add", "sub", "mul", "div"):
        return _arithmetic(name, eqn, dict(zip(slots, operands, strict=True)))
    (shift,) = operands if len(operands) == 1 else (None,)
    if shift is None:
        return None
    if name == "neg":
        return shift._replace(slope=-shift.slope)
    if name == "exp" and not shift.power:
        return Shift(power=shift.slope)
    if name == "log" and not shift.slope:
        return Shift(slope=shift.power)
    if name in ("abs", "reduce_sum") and not shift.slope:
        return shift
    return None


def _num_moved(eqn) -> int:
    """How many operands are moved: all but indices, predicates and the `-inf` of `max(x, -inf)`, as JAX writes x."""
    floats = [atom for atom in eqn.invars if np.issubdtype(atom.aval.dtype, np.inexact)]
    return sum(not (eqn.primitive.name == "max" and _scalar(atom) == -np.inf) for atom in floats)


def _arithmetic(name, eqn, operands: dict[int, Shift]) -> Shift | None:
    left, right = (operands.get(slot, INVARIANT) for slot in (0, 1))
    powers, slopes = left.power or right.power, left.slope or right.slope
    if name in ("add", "sub"):
        if powers:
            return left if left == right else None
        return Shift(slope=left.slope + right.slope if name == "add" else left.slope - right.slope)
    if not slopes:
        return Shift(power=left.power + right.power if name == "mul" else left.power - right.power)
    factor = _scalar(eqn.invars[1] if left.slope else eqn.invars[0])
    if factor is None or (name == "div" and right.slope):
        return None
    return Shift(slope=slopes * factor if name == "mul" else slopes / factor)


def _scalar(atom) -> float | None:
    return float(atom.val) if isinstance(atom, Literal) and np.ndim(atom.val) == 0 else None
