"""Operations along whole dimensions: sums, maxima and sorting, products of matrices, transforms."""

import numpy as np
from jax.extend.core import JaxprEqn

from curvax.exact.primitives.layers import Layer, each_itself, examples_first
from curvax.exact.primitives.record import Form, LayerRule, Primitive, along, records


def _reduction(eqn, slot, dim):
    return [d for d in range(eqn.invars[slot].aval.ndim) if d not in eqn.params["axes"]][dim]


def _cumulative(eqn, slot, dim):
    return None if dim == eqn.params["axis"] else dim


def _sort(eqn, slot, dim):
    return None if dim == eqn.params["dimension"] else dim


def _top_k(eqn, slot, dim):
    last = eqn.invars[0].aval.ndim - 1
    return None if dim == eqn.params.get("axis", last) % (last + 1) or dim == last else dim


def _fft(eqn, slot, dim):
    return dim if dim < eqn.outvars[0].aval.ndim - len(eqn.params["fft_lengths"]) else None


# Products of matrices, and what divides by them.


def _free_dims(ndim: int, contracting: tuple[int, ...], batch: tuple[int, ...]) -> list[int]:
    """The dimensions that an operand contributes to the result."""
    return [d for d in range(ndim) if d not in contracting and d not in batch]


def _dot(eqn: JaxprEqn, slot: int, dim: int) -> int | None:
    contracting, batch = eqn.params["dimension_numbers"]
    if dim < len(batch[0]):
        return batch[slot][dim]
    free = [_free_dims(eqn.invars[i].aval.ndim, contracting[i], batch[i]) for i in (0, 1)]
    position = dim - len(batch[0]) - (len(free[0]) if slot else 0)
    return free[slot][position] if 0 <= position < len(free[slot]) else None


_dot_axis = along(_dot)


def _fits(eqn, slot, axis, num_examples) -> bool:
    own, other = (_dot_axis(eqn, i, 0, axis, num_examples) for i in (slot, 1 - slot))
    return own is None and other is not None


def _dense(eqn, slot, axis, num_examples) -> Layer:
    contracting, batch = eqn.params["dimension_numbers"]
    shapes = [atom.aval.shape for atom in eqn.invars]
    free = [_free_dims(len(shape), contracting[i], batch[i]) for i, shape in enumerate(shapes)]
    first = len(batch[0])
    split = first + len(free[0])
    free_in_result = [range(first, split), range(split, split + len(free[1]))]
    other, other_axis = 1 - slot, _dot_axis(eqn, 1 - slot, 0, axis, num_examples)
    positions = [d for d in free_in_result[other] if d != axis.dim]

    def operand(values):
        own = [d for d in free[other] if d != other_axis.dim]
        return examples_first(values[other], other_axis, num_examples, own, batch[other], contracting[other])

    def fold(cotangent):
        return examples_first(cotangent, axis, num_examples, positions, range(first), free_in_result[slot])

    def unfold(matrix):
        order = [*batch[slot], *contracting[slot], *free[slot]]
        sizes = [shapes[slot][d] for d in order]
        return matrix.reshape(sizes).transpose(np.argsort(order))

    return Layer(operand, each_itself(eqn.outvars[0].aval.shape, axis, positions), fold, unfold)


def _of_stacks(eqn, slot, dim):
    return dim if dim < eqn.outvars[0].aval.ndim - 2 else None


def _solve(eqn, slot, dim):
    """Each right-hand side, a column if the matrix is on the left, has a solution of its own."""
    sides = eqn.outvars[0].aval.ndim - (1 if eqn.params["left_side"] else 2)
    return dim if slot == 1 and dim == sides else _of_stacks(eqn, slot, dim)


RECORDS = [
    *records(Form.LINEAR, "reduce_sum", axis=along(_reduction)),
    *records(Form.PIECEWISE, "reduce_max reduce_min", axis=along(_reduction)),
    *records(Form.CONSTANT, "argmax argmin reduce_and reduce_or", axis=along(_reduction)),
    *records(Form.CURVED, "reduce_prod", axis=along(_reduction)),
    *records(Form.LINEAR, "cumsum", axis=along(_cumulative)),
    *records(Form.PIECEWISE, "cummax cummin", axis=along(_cumulative)),
    *records(Form.CURVED, "cumlogsumexp cumprod", axis=along(_cumulative)),
    Primitive("sort", Form.PIECEWISE, axis=along(_sort)),
    Primitive("top_k", Form.PIECEWISE, axis=along(_top_k)),
    Primitive("fft", Form.LINEAR, axis=along(_fft)),
    # What other devices hold is not in the trace: nothing is proved through it, but that it is linear.
    Primitive("psum", Form.COLLECTIVE),
    Primitive("dot_general", Form.BILINEAR, axis=_dot_axis, layer=LayerRule(_fits, _dense)),
    Primitive("cholesky", axis=along(_of_stacks)),
    Primitive("triangular_solve", Form.QUOTIENT, axis=along(_solve), numerator=1),
]
