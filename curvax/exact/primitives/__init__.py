"""What each primitive operation does to a derivative, to the axis that counts the examples, and to a parameter.

One record for each, in the module of its theme; every proof reads them here, and an operation without a record gets the
safe answers, which only ever cost time. To add one is to write its record.
"""

from collections.abc import Sequence

from jax.extend.core import JaxprEqn, Var

from curvax.exact.equations import is_complex, is_inexact
from curvax.exact.primitives import elementwise, indexing, moves, sums, windows
from curvax.exact.primitives.layers import Layer, Lookup, examples_first
from curvax.exact.primitives.record import Axis, Entries, Form, Primitive, Pull, Role, records

__all__ = [
    "TABLE",
    "Axis",
    "Entries",
    "Form",
    "Layer",
    "Lookup",
    "Primitive",
    "Pull",
    "Role",
    "differentiable_slots",
    "examples_first",
    "form",
    "is_layer",
    "is_linear",
    "pull_axis",
    "record",
]

# What holds programs of its own, and random numbers.
_CALLS = [
    *records(Form.CURVED, "jit remat2", role=Role.CALL),
    *records(Form.CURVED, "closed_call", role=Role.CALL, versions=((0,), (0, 12))),
    *records(Form.CURVED, "custom_jvp_call custom_vjp_call", role=Role.RULE),
    *records(Form.CURVED, "cond scan while", role=Role.LOOP),
    *records(Form.CURVED, "random_bits random_split rng_bit_generator rng_uniform threefry2x32", role=Role.RANDOM),
]
_THEMES = (elementwise.RECORDS, moves.RECORDS, sums.RECORDS, windows.RECORDS, indexing.RECORDS, _CALLS)
TABLE: dict[str, Primitive] = {each.name: each for theme in _THEMES for each in theme}
_UNKNOWN = Primitive("")


def record(eqn: JaxprEqn) -> Primitive:
    """What is known of the operation of an equation."""
    return TABLE.get(eqn.primitive.name, _UNKNOWN)


def form(eqn: JaxprEqn) -> Form:
    """How an equation's results depend on its operands."""
    known = record(eqn).form
    return known if isinstance(known, Form) else known(eqn)


def is_linear(eqn: JaxprEqn, slots: Sequence[int]) -> bool:
    """Whether an equation's results are linear in the operands `slots` together, while all others stay."""
    match form(eqn):
        case Form.LINEAR | Form.COLLECTIVE:
            return all(is_inexact(eqn.invars[slot].aval) for slot in slots)
        case Form.BILINEAR:
            return len(slots) == 1
        case Form.QUOTIENT:
            return list(slots) == [record(eqn).numerator]
    return False


def differentiable_slots(eqn: JaxprEqn) -> list[int]:
    """The operands through which a derivative passes."""
    if form(eqn) is Form.CONSTANT:
        return []
    return [slot for slot, atom in enumerate(eqn.invars) if isinstance(atom, Var) and is_inexact(atom.aval)]


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
    rule = record(eqn).axis
    return None if rule is None else rule(eqn, slot, result, axis, num_examples)


def is_layer(eqn: JaxprEqn, slot: int, axis: Axis, num_examples: int) -> bool:
    """Whether a parameter in operand `slot` meets the examples, which `axis` of the result counts, in a known layer."""
    layer = record(eqn).layer
    # A complex layer has no real columns.
    real = not is_complex(eqn.invars[slot]) and not is_complex(eqn.outvars[0])
    return real and layer is not None and layer.fits(eqn, slot, axis, num_examples)
