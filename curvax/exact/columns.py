"""Columns of the atoms of a loss, in closed form: all of them, or one random combination of them.

The Hessian of a loss is `sum_c s_c v_c v_c^T` for some signed columns `v_c`. Those of a separate function are unit
vectors; those of a softmax with probabilities p and tails `t_j = p_j + p_(j+1) + ...` are, for all classes j but the
last,

    v_j = sqrt(p_j t_(j+1) / t_j) (e_j - (p restricted to the classes after j) / t_(j+1)):

a label drawn class by class, "is it j, given that it is none before?", has independent parts, and these are their
standard deviations. No number in them is a difference of larger ones, so that a class of probability 1e-8 keeps its
curvature, which the eigenvectors of `diag(p) - p p^T` lose. For one random combination of columns, with `E[v v^T]` the
Hessian, no tails are needed: the most likely class is decided first, as above, and of the others, with probabilities q
that sum to Q,

    v = sqrt(q) * r - q (sqrt(q) . r) / Q          for random signs r.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var

from curvax.exact.atoms import Atom, Separate, Softmax
from curvax.exact.dataflow import Flow, between
from curvax.exact.equations import is_complex
from curvax.exact.primitives import Axis, examples_first
from curvax.exact.sweep import sweep
from curvax.trees import diag_dtype

# Entries of logits of which a random column is drawn at once.
PART = 2**22


class Columns(NamedTuple):
    """Signed cotangents of some variables: `values`, one `(C, *variable)` for each of them, and `signs (C, B)`."""

    values: tuple[jax.Array, ...]
    signs: jax.Array


@dataclasses.dataclass(frozen=True)
class Source:
    """Columns to be had a few at a time.

    Attributes:
        variables: of which they are cotangents.
        steps: how many indices there are.
        width: columns for each index.
        at: the columns for some indices; zero for an index past the last.
    """

    variables: tuple[Var, ...]
    steps: int
    width: int
    at: Callable[[jax.Array], Columns]


class Curved(NamedTuple):
    """An atom and its numbers: for a softmax by row of logits, for separate functions by entry.

    Attributes:
        atom: the atom.
        curvature: the derivative of the loss in the result of a softmax, with its summed dimensions kept at length one;
            or the second derivative of the loss in each entry.
        exps: of a softmax, its exponentials; None for separate functions.
        total: their sum.
        axis: where the examples lie, in both; None where they are not told apart.
    """

    atom: Atom
    curvature: jax.Array
    exps: jax.Array | None
    total: jax.Array | None
    axis: Axis | None

    @property
    def variable(self) -> Var:
        """Of which its columns are cotangents."""
        return origin(self.atom)


def origin(atom: Atom) -> Var:
    """The variable of which an atom's columns are cotangents."""
    return atom.logits if isinstance(atom, Softmax) else atom.operand


def num_columns(flow: Flow, atom: Atom) -> int:
    """How many columns an atom has for each example."""
    shape = origin(atom).aval.shape
    classes = math.prod(shape[d] for d in atom.axes) if isinstance(atom, Softmax) else 0
    entries = math.prod(shape) // flow.program.num_examples
    return entries // classes * (classes - 1) if classes else entries


def evaluate_atoms(
    flow: Flow, env: Mapping[Var, jax.Array], atoms: Sequence[Atom], pulls: dict | None = None
) -> list[Curved]:
    """The numbers of all atoms, from sweeps back through what follows them, which `pulls` may share with others."""
    losses, totals = flow.program.losses, [atom.total for atom in atoms if isinstance(atom, Softmax)]

    def back(targets, skipped=()):
        slopes = sweep(flow, env, [losses], targets, skipped, pulls)([jnp.ones_like(env[losses])])
        return dict(zip(targets, slopes, strict=True))

    of_totals = back(totals)
    found = []
    for atom in atoms:
        if isinstance(atom, Softmax):
            numbers = _softmax_numbers(flow, env, atom, of_totals)
        else:
            # Its results may lead to one another, but that is inside of it.
            numbers = _separate_numbers(flow, env, atom, back(atom.results, atom.equations))
        found.append(Curved(atom, *numbers, flow.axes[origin(atom)]))
    return found


def _softmax_numbers(flow, env, atom: Softmax, slope):
    dtype = diag_dtype(atom.exps.aval.dtype)
    total = jnp.expand_dims(env[atom.total].astype(dtype), atom.axes)
    weight = jnp.expand_dims(slope[atom.total].astype(dtype), atom.axes)
    # The derivative in the logarithm of the sum; a row that is masked as a whole has none.
    empty = total == 0
    weight = jnp.where(empty, 0, weight * total)
    return weight, env[atom.exps].astype(dtype), jnp.where(empty, 1, total)


def _separate_numbers(flow, env, atom: Separate, slope):
    value = env[atom.operand]
    functions = between(flow, env, [atom.operand], atom.results)
    along = lambda function: lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),))[1]
    second = along(along(functions))(value)
    dtype = diag_dtype(value.dtype)

    def curvature(var, bent):
        # Of a complex function of real entries: a cotangent times a tangent is real, in JAX, up to what is left out.
        if is_complex(var):
            return jnp.real(slope[var] * bent).astype(dtype)
        return slope[var].astype(dtype) * bent.astype(dtype)

    parts = [curvature(*part) for part in zip(atom.results, second, strict=True)]
    return sum(parts[1:], parts[0]), None, None


# All columns, example by example.


def source(flow: Flow, curved: Curved) -> Source:
    """All columns of an atom whose examples are told apart."""
    return (_softmax_source if isinstance(curved.atom, Softmax) else _separate_source)(flow, curved)


def _separate_source(flow: Flow, curved: Curved) -> Source:
    variable, examples = curved.variable, flow.program.num_examples
    layout = Layout(curved.axis, examples, variable.aval.shape)
    entries = layout.rows(curved.curvature)
    size, lengths = entries.shape[1], jnp.sqrt(jnp.abs(entries))

    def column(index):
        chosen = lengths * jax.nn.one_hot(index, size, dtype=lengths.dtype)[None]
        signs = jnp.sign(entries).at[:, index].get(mode="fill", fill_value=0)
        return (layout.unrows(chosen).astype(variable.aval.dtype),), signs

    return Source((variable,), size, 1, lambda indices: Columns(*jax.vmap(column)(indices)))


def _softmax_source(flow: Flow, curved: Curved) -> Source:
    variable, examples = curved.variable, flow.program.num_examples
    layout = Layout(curved.axis, examples, variable.aval.shape, curved.atom.axes)
    p, weight = layout.rows(curved.exps / curved.total), layout.rows(curved.curvature)[..., 0]
    rows, classes = p.shape[1:]
    tails = jnp.flip(jnp.cumsum(jnp.flip(p, -1), -1), -1)
    after = jnp.concatenate([tails[..., 1:], jnp.zeros_like(tails[..., :1])], -1)
    lengths = jnp.sqrt(jnp.abs(weight))[..., None] * jnp.sqrt(p * _quotient(after, tails))

    def column(index):
        row, label = index // (classes - 1), index % (classes - 1)
        pick = lambda x: jnp.take(x, label, -1)[..., None]
        places = jnp.arange(classes)[None, None]
        others = jnp.where(places > label, -_quotient(p, pick(after)), 0)
        values = pick(lengths) * jnp.where(places == label, 1, others).astype(p.dtype)
        values *= jax.nn.one_hot(row, rows, dtype=p.dtype)[None, :, None]
        signs = jnp.sign(weight).at[:, row].get(mode="fill", fill_value=0)
        return (layout.unrows(values).astype(variable.aval.dtype),), signs

    return Source((variable,), rows * (classes - 1), 1, lambda indices: Columns(*jax.vmap(column)(indices)))


def _quotient(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Zero where the denominator is: no probability is left."""
    return jnp.where(denominator == 0, 0, numerator / jnp.where(denominator == 0, 1, denominator))


@dataclasses.dataclass(frozen=True)
class Layout:
    """An array, or one that has length one in its last group of dimensions, as `(B, rows)` or `(B, rows, last)`."""

    axis: Axis
    num_examples: int
    shape: tuple[int, ...]
    last: tuple[int, ...] = ()

    def rows(self, array: jax.Array) -> jax.Array:
        """The array laid out."""
        groups = [self._others(array.ndim), self.last] if self.last else [self._others(array.ndim)]
        return examples_first(array, self.axis, self.num_examples, *groups)

    def unrows(self, array: jax.Array) -> jax.Array:
        """Back, for an array of full size."""
        axis = self.axis
        sizes = [*self.shape[: axis.dim], axis.outer, self.num_examples, axis.inner, *self.shape[axis.dim + 1 :]]
        moved = [d if d < axis.dim else d + 2 for d in (*self._others(len(self.shape)), *self.last)]
        order = [axis.dim + 1, axis.dim, axis.dim + 2, *moved]
        return array.reshape([sizes[d] for d in order]).transpose(np.argsort(order)).reshape(self.shape)

    def _others(self, ndim: int) -> list[int]:
        return [d for d in range(ndim) if d != self.axis.dim and d not in self.last]


# One random column.


@dataclasses.dataclass(frozen=True)
class RandomColumns:
    """Columns of which the signed squares are, in expectation, those of all the columns of the atoms together.

    A square has one sign, and curvature has two. Each group of examples, or the batch as a whole, takes its curvature
    of one sign only, drawn in proportion to what there is of it; where there is one sign, nothing is drawn.
    """

    flow: Flow
    curved: Sequence[Curved]

    @property
    def variables(self) -> tuple[Var, ...]:
        """Of which the columns are cotangents."""
        return tuple(dict.fromkeys(curved.variable for curved in self.curved))

    def draw(self, key: jax.Array, by_example: bool) -> Columns:
        """One column, without its leading axis.

        Args:
            key: a PRNG key.
            by_example: whether each example draws the sign of its curvature, or one sign is drawn for all.

        Returns:
            The values, and the signs `(B,)`.
        """
        part_key, *keys = jax.random.split(key, 1 + len(self.curved))
        part, scale = self._part(part_key, by_example)
        values: dict[Var, jax.Array] = {}
        for curved, key in zip(self.curved, keys, strict=True):
            mine, scaled = (self._spread(curved, x) for x in (part, scale))
            # Not "where the sign is mine": NaN has none, and must be seen.
            lengths = jnp.where(jnp.sign(curved.curvature) == -mine, 0, jnp.sqrt(jnp.abs(curved.curvature)) * scaled)
            column = _random_column(curved, key, lengths).astype(curved.variable.aval.dtype)
            values[curved.variable] = values[curved.variable] + column if curved.variable in values else column
        return Columns(tuple(values.values()), jnp.broadcast_to(part, (self.flow.program.num_examples,)))

    def _part(self, key, by_example):
        sums = [self._sums(curved, by_example) for curved in self.curved]
        positive, everything = (sum(column[1:], column[0]) for column in zip(*sums, strict=True))
        return draw_part(key, positive, everything)

    def _sums(self, curved: Curved, by_example: bool) -> tuple[jax.Array, jax.Array]:
        magnitude = jnp.abs(curved.curvature)
        parts = jnp.where(curved.curvature > 0, magnitude, 0), magnitude
        if not by_example:
            return tuple(jnp.sum(x) for x in parts)
        layout = Layout(curved.axis, self.flow.program.num_examples, magnitude.shape)
        return tuple(jnp.sum(layout.rows(x), 1) for x in parts)

    def _spread(self, curved: Curved, x: jax.Array) -> jax.Array:
        """One number for each example, or for all, in the shape of an atom's curvature."""
        if not x.ndim:
            return x
        axis, ndim = curved.axis, curved.curvature.ndim
        copies = jnp.broadcast_to(x[None, :, None], (axis.outer, x.size, axis.inner)).ravel()
        return jnp.expand_dims(copies, [d for d in range(ndim) if d != axis.dim])


def draw_part(key: jax.Array, positive: jax.Array, everything: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sign of the curvature that is taken, and the factor by which its columns are longer for being drawn.

    Args:
        key: a PRNG key.
        positive: how much positive curvature there is.
        everything: how much there is of both signs, in whatever measure.

    Returns:
        Signs and factors of the shape of these.
    """
    share = jnp.where(everything > 0, positive / jnp.where(everything > 0, everything, 1), 1)
    part = jnp.where(jax.random.uniform(key, share.shape, share.dtype) < share, 1, -1).astype(share.dtype)
    return part, jax.lax.rsqrt(jnp.where(part > 0, share, 1 - share))


def _random_column(curved: Curved, key: jax.Array, lengths: jax.Array) -> jax.Array:
    if curved.exps is None:
        return lengths * random_signs(key, lengths.shape, lengths.dtype)
    column = functools.partial(_softmax_column, axes=curved.atom.axes)
    return _in_parts(column, key, curved.exps, curved.total, lengths, axes=curved.atom.axes)


def _softmax_column(key, exps, total, lengths, *, axes):
    sum_of = lambda x: jnp.sum(x, axes, keepdims=True)
    largest = jnp.max(exps, axes, keepdims=True)
    rest = sum_of(jnp.where(exps == largest, 0, exps))
    # Of several classes that are the most likely none is set apart.
    apart = jnp.round((total - rest) / largest) == 1
    rest = jnp.where(apart, rest, total)
    top = apart & (exps == largest)
    key, top_key = jax.random.split(key)
    signs, one = random_signs(key, exps.shape, exps.dtype), random_signs(top_key, rest.shape, exps.dtype)
    steps = jnp.sqrt(_quotient(jnp.where(top, 0, exps), rest)) * signs
    likely = jnp.where(apart, jnp.sqrt(largest / total * (rest / total)), 0) * one
    length = jnp.sqrt(rest / total)
    slope = likely + length * sum_of(steps)
    # `likely (top - share) + length (steps - share sum(steps))`, whose share is the square of a step.
    return lengths * jnp.where(top, likely, steps * (length - slope * steps))


def _in_parts(function, key, like, *rows, axes):
    """`function(key, like, *rows)`, like `like`: part by part where it is large, so that what it needs is not.

    The parts are along the last dimension that is not summed, of an array of logits the positions of the examples.
    """
    dims = [d for d in range(like.ndim) if d not in axes]
    length = like.shape[dims[-1]] if dims else 1
    size = next(n for n in range(length, 0, -1) if length % n == 0 and (n == 1 or like.size * n <= PART * length))
    if size == length:
        return function(key, like, *rows)

    def step(index, array):
        pick = lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size, dims[-1]) if x.shape[dims[-1]] > 1 else x
        part = function(jax.random.fold_in(key, index), *map(pick, (array, *rows)))
        return jax.lax.dynamic_update_slice_in_dim(array, part, index * size, dims[-1])

    # Each part takes the place of what it is made of: no second array is needed.
    return jax.lax.fori_loop(0, length // size, step, like)


def random_signs(key: jax.Array, shape: Sequence[int], dtype) -> jax.Array:
    """Random signs, from one random bit each: a thirty-second of the numbers that `jax.random.rademacher` draws."""
    if not shape:
        return jax.random.rademacher(key, (), dtype)
    *rows, size = shape
    words = jax.random.bits(key, (*rows, -(-size // 32)), jnp.uint32)
    places = jax.lax.broadcasted_iota(jnp.uint32, (*words.shape, 32), words.ndim)
    bits = (words[..., None] >> places) & jnp.uint32(1)
    bits = bits.reshape(*rows, -1)[..., :size]
    return 1 - 2 * bits.astype(dtype)
