"""Whether two traces are the same program, but that one has fewer examples.

Operation by operation, with the same numbers, read from the same places: a user's code may do anything with the size of
the batch.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from curvax.exact.dataflow import Axes
from curvax.exact.loops import bodies, over_examples
from curvax.exact.primitives import Role, record

# Parameters that say no more than the shapes of operands and results, which are compared.
SHAPES = frozenset("shape new_sizes sizes slice_sizes limit_indices out_sharding sharding length".split())
# The programs inside of loops and branches, which are compared with what is known of their variables.
BODIES = frozenset("jaxpr cond_jaxpr body_jaxpr branches".split())


def same_program(batch: ClosedJaxpr, part: ClosedJaxpr, axes: Axes, parts: int) -> bool:
    """Whether the program of a part is that of the batch, in shapes that are shorter where the examples are.

    Args:
      batch: the program of the batch, flat.
      part: that of one of so many equal parts.
      axes: the example axis of the batch's variables, those of loops included.
      parts: how many.
    """
    return _equal(batch.consts, part.consts) and _Comparison(axes, parts).of(batch.jaxpr, part.jaxpr)


class _Comparison:
    """Compares programs, and knows which variable of the one is which of the other."""

    def __init__(self, axes: Axes, parts: int):
        self._axes, self._parts = axes, parts
        self._partners: dict[Var, Var] = {}

    def of(self, batch: Jaxpr, part: Jaxpr) -> bool:
        """Whether these are the same."""
        pairs = zip(batch.eqns, part.eqns, strict=False)
        return (
            len(batch.eqns) == len(part.eqns)
            and self._bind([*batch.constvars, *batch.invars], [*part.constvars, *part.invars])
            and all(self._same(*pair) for pair in pairs)
            and self._read(batch.outvars, part.outvars)
        )

    def _same(self, ours: JaxprEqn, theirs: JaxprEqn) -> bool:
        if ours.primitive is not theirs.primitive or ours.params.keys() != theirs.params.keys():
            return False
        role, name = record(ours).role, ours.primitive.name
        # Rules left in a loop are not read, nor what Python computes.
        if role is Role.RULE or ("callback" in name and ours.outvars):
            return False
        if name == "scan" and ours.params["length"] != theirs.params["length"]:
            # As many steps, unless they are the examples.
            if not over_examples(ours, {i: self._axes.get(var) for i, var in enumerate(ours.outvars)}):
                return False
        if not self._read(ours.invars, theirs.invars):
            return False
        inside = zip(bodies(ours), bodies(theirs), strict=True) if role is Role.LOOP else ()
        left_out = SHAPES | (BODIES if role is Role.LOOP else frozenset())
        return (
            all(_equal(ours.params[key], theirs.params[key]) for key in ours.params.keys() - left_out)
            and all(_equal(a.consts, b.consts) and self.of(a.jaxpr, b.jaxpr) for a, b in inside)
            and self._bind(ours.outvars, theirs.outvars)
        )

    def _bind(self, ours: Sequence[Var], theirs: Sequence[Var]) -> bool:
        """Takes variables for each other, if their shapes are as they should be."""
        if len(ours) != len(theirs):
            return False
        self._partners |= zip(ours, theirs, strict=True)
        pairs = zip(ours, theirs, strict=True)
        return all(b.aval.shape == self._shape(a) for a, b in pairs if a in self._axes)

    def _read(self, ours: Sequence[Var | Literal], theirs: Sequence[Var | Literal]) -> bool:
        """Whether operands are the same variables, and the same numbers."""

        def alike(a: Var | Literal, b: Var | Literal) -> bool:
            if isinstance(a, Literal) or isinstance(b, Literal):
                return isinstance(a, Literal) and isinstance(b, Literal) and _equal(a.val, b.val)
            return self._partners.get(a) is b

        return len(ours) == len(theirs) and all(map(alike, ours, theirs))

    def _shape(self, var: Var) -> tuple[int, ...]:
        shape, axis = list(var.aval.shape), self._axes[var]
        if axis is not None:
            shape[axis.dim] //= self._parts
        return tuple(shape)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, ClosedJaxpr):
        return _equal(one.consts, other.consts) and _equal(one.jaxpr, other.jaxpr)
    if isinstance(one, jax.core.Tracer):
        return one is other
    if isinstance(one, Jaxpr):
        return _Comparison({}, 1).of(one, other)
    if callable(one):
        return True  # Functions have been traced.
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, jax.Array) and jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
        return _equal(jax.random.key_data(one), jax.random.key_data(other))
    if isinstance(one, np.ndarray | np.generic | jax.Array | float | complex):
        return np.array_equal(one, other, equal_nan=np.issubdtype(np.asarray(one).dtype, np.inexact))
    return bool(one == other)
