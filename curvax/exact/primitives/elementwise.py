"""Operations whose results have, in each place, what is computed from the operands there."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from curvax.exact.primitives.layers import ENTRIES
from curvax.exact.primitives.record import Entries, Form, Primitive, along, folded_by, records


def _dim(eqn: JaxprEqn, slot: int, dim: int) -> int | None:
    # A scalar may stand beside arrays, as the bounds of `clamp` do.
    return dim if eqn.invars[slot].aval.ndim == eqn.outvars[0].aval.ndim else None


def _modulus(eqn: JaxprEqn) -> Form:
    """That of a complex number is a square root."""
    return Form.PIECEWISE if eqn.invars[0].aval.dtype == eqn.outvars[0].aval.dtype else Form.CURVED


_FOLDS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "rem": np.fmod,
    "max": np.maximum,
    "min": np.minimum,
    "clamp": lambda low, value, high: np.minimum(np.maximum(value, low), high),
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "not": np.invert,
    "select_n": lambda which, *cases: np.choose(which.astype(int), cases),
    # The result is given its type.
    **dict.fromkeys(("convert_element_type", "copy", "pvary", "reshard", "sharding_constraint"), np.asarray),
}


def _records(form: Any, names: str, entries: Entries = Entries.APART, **facts: Any) -> Sequence[Primitive]:
    rules = {"entries": entries, "axis": along(_dim), "layer": ENTRIES}
    return [folded_by(record, _FOLDS) for record in records(form, names, **rules, **facts)]


RECORDS = [
    *_records(
        Form.LINEAR,
        "convert_element_type copy name pvary reduce_precision reshard sharding_constraint",
        Entries.SAME,
    ),
    *_records(Form.LINEAR, "add add_any complex conj imag neg real select_n sub"),
    *_records(Form.PIECEWISE, "clamp max min rem"),
    *_records(_modulus, "abs"),
    *_records(Form.BILINEAR, "mul"),
    *_records(Form.QUOTIENT, "div"),
    *_records(
        Form.CONSTANT,
        "and ceil eq eq_to floor ge gt is_finite le le_to lt lt_to ne not or round sign stop_gradient xor",
    ),
    *_records(
        Form.CURVED,
        "acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma erf erf_inv erfc exp exp2"
        " expm1 igamma igammac integer_pow lgamma log log1p logistic nextafter polygamma pow"
        " regularized_incomplete_beta rsqrt sin sinh sqrt square tan tanh zeta",
    ),
    *_records(Form.CURVED, "log2 one_minus_square", versions=((0, 12), (1000,))),
]
