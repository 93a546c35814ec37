"""What has to be known of a primitive operation, in one record."""

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import JaxprEqn


class Form(enum.Enum):
    """How results depend on the operands that have a derivative, those of comparisons and the like held fixed.

    Where there is no derivative, at a tie or a kink, JAX differentiates the branch taken, and so do we. Of complex
    numbers each is said of their two parts.
    """

    CONSTANT = "derivative zero almost everywhere, or by decree"
    LINEAR = "linear in all operands together"
    PIECEWISE = "piecewise linear in all operands together"
    BILINEAR = "linear in each of two operands"
    QUOTIENT = "linear in one of two operands, the numerator"
    COLLECTIVE = "linear, but in what other devices hold too"
    CURVED = "anything else"


class Entries(enum.Enum):
    """Where each entry of a result comes from."""

    SAME = "the entry in its place, the same number"
    APART = "the entries in its place"
    MOVED = "one entry of the first operand, or a constant"
    MIXED = "anything else"


class Role(enum.Enum):
    """What sets an operation apart that is no plain function of arrays."""

    CALL = "a call that JAX differentiates through: it is inlined"
    RULE = "a call that has a derivative of its own"
    LOOP = "a loop or a branch"
    RANDOM = "random numbers"


class Axis(NamedTuple):
    """Where the examples lie: dimension `dim`, of size `outer * B * inner`, holds example `(index // inner) % B`."""

    dim: int
    outer: int = 1
    inner: int = 1


class LayerRule(NamedTuple):
    """How a parameter meets the examples in an operation.

    Attributes:
        fits: `fits(eqn, slot, axis, num_examples)`, whether operand `slot` is met by a known structure; `axis` has the
            examples of the result.
        build: `build(eqn, slot, axis, num_examples)`, the layer.
    """

    fits: Callable[[JaxprEqn, int, Axis, int], bool]
    build: Callable[[JaxprEqn, int, Axis, int], Any]


Pull = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Primitive:
    """A primitive operation; what is not said of it is the safe answer, which costs time.

    Attributes:
        name: JAX's.
        form: how its results depend on its operands; or a function of the equation.
        entries: where each entry of its result comes from.
        axis: `axis(eqn, slot, result, axis, num_examples)`, the axis of an operand along which each slice reaches only
            the same example of a result; None where one entry may reach several examples.
        layer: what it is to a parameter that meets the examples in it.
        fold: `fold(eqn, *values)`, its result in NumPy, where it computes indices.
        pullback: `pullback(eqn, values)`, on a CPU: from a cotangent to that of the first operand, where JAX's own
            would be slow for many columns.
        numerator: of a quotient, the operand in which it is linear.
        role: what sets it apart.
        versions: of JAX, from the first that has it to the first that has it no more.
    """

    name: str
    form: Form | Callable[[JaxprEqn], Form] = Form.CURVED
    entries: Entries = Entries.MIXED
    axis: Callable[[JaxprEqn, int, int, Axis, int], Axis | None] | None = None
    layer: LayerRule | None = None
    fold: Callable[..., np.ndarray] | None = None
    pullback: Callable[[JaxprEqn, Sequence[jax.Array]], Pull | None] | None = None
    numerator: int = 0
    role: Role | None = None
    versions: tuple[tuple[int, ...], tuple[int, ...]] = ((0,), (1000,))


def along(rule: Callable[[JaxprEqn, int, int], int | None]):
    """The rule for axes of an operation that carries whole dimensions: `rule(eqn, slot, dim)` says which.

    A slice, a window or an expanded singleton is caught by its size here.
    """

    def pull(eqn: JaxprEqn, slot: int, result: int, axis: Axis, num_examples: int) -> Axis | None:
        dim = rule(eqn, slot, axis.dim)
        same = dim is not None and eqn.invars[slot].aval.shape[dim] == eqn.outvars[result].aval.shape[axis.dim]
        return axis._replace(dim=dim) if same else None

    return pull


def records(form: Form, names: str, **facts: Any) -> list[Primitive]:
    """Records of operations of which the same is known."""
    return [Primitive(name, form, **facts) for name in names.split()]


def folded_by(record: Primitive, folds: Mapping[str, Callable[..., np.ndarray]]) -> Primitive:
    """A record with the NumPy function of its name, if there is one; it takes the operands alone."""
    function = folds.get(record.name)
    return dataclasses.replace(record, fold=function and (lambda eqn, *values: function(*values)))
