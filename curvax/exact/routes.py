"""Which route each parameter's Hessian diagonal takes, and what proves it.

Let `u` be a variable that every derivative from a parameter passes through (a cut), with the examples along an axis.
If `u` is piecewise linear in the parameter, the Hessian is `J^T H J`, with `H` the Hessian of what lies beyond, one
block for each example; if moreover the parameter meets the examples in a single linear operation, `J^T v` is for each
example a cotangent contracted with that operation's operand, and the diagonal costs a few backward passes. With `u` the
network's outputs this is the Gauss-Newton route, where the structure of the loss (`atoms`) gives the columns of `H`;
with an earlier `u` the loss has merely become longer. Where either proof fails, unit vectors remain.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import ClassVar

from jax.extend.core import Var

from curvax.exact.atoms import Atom, Softmax, Structure, find_atoms
from curvax.exact.columns import num_columns, origin
from curvax.exact.dataflow import Flow
from curvax.exact.equations import is_complex
from curvax.exact.factor import plan_columns
from curvax.exact.primitives import Entries, Form, form, is_layer, is_linear, record

# Where columns start: at an atom of the loss, or at a cut, whose Hessian has no known structure.
Origin = Atom | Var


@dataclasses.dataclass(frozen=True)
class Entry:
    """The one operation through which a parameter meets the examples.

    Attributes:
        index: which equation.
        slot: which operand of it.
        chain: the equations that make this operand out of the parameter.
        monomial: whether each entry of the operand is a fixed multiple of its own entry of the parameter.
    """

    index: int
    slot: int
    chain: tuple[int, ...]
    monomial: bool


@dataclasses.dataclass(frozen=True)
class Route:
    """How one parameter's diagonal is computed.

    Attributes:
        path: the parameter.
        bit: its position among the parameters.
        reason: why this route and no cheaper one.
        origins: where the columns start that it needs, if any; parameters with the same origins share them.
        entry: where they end.
    """

    path: str
    bit: int
    reason: str
    origins: tuple[Origin, ...] = ()
    entry: Entry | None = None
    name: ClassVar[str]

    def cost(self, flow: Flow, origins: Sequence[Origin] | None = None) -> tuple[int, int]:
        """Backward passes and Hessian-vector products: for the columns of all origins, or of some."""
        places = self.origins if origins is None else origins
        costs = [plan_columns(flow, p)[:2] if isinstance(p, Var) else (num_columns(flow, p), 0) for p in places]
        return sum(columns for columns, _ in costs), sum(products for _, products in costs)


class Zero(Route):
    """No derivative of the derivative reaches the parameter."""

    name = "zero"


class UnitVectors(Route):
    """One product for each entry."""

    name = "unit vectors"

    def cost(self, flow: Flow, origins: Sequence[Origin] | None = None) -> tuple[int, int]:
        """See `Route.cost`."""
        return 0, flow.program.params[self.bit].aval.size


class GaussNewton(Route):
    """Columns of the loss's Hessian, swept back."""

    name = "gauss-newton"


class Tail(Route):
    """Columns of the Hessian of what lies beyond a cut, swept back."""

    name = "tail"


def plan(flow: Flow) -> list[Route]:
    """A route to the Hessian diagonal of every parameter."""
    planner = _Planner(flow)
    routes = [planner.hessian(bit) for bit in range(len(flow.program.paths))]
    sharing = Counter()
    for route in routes:
        sharing[route.origins] += flow.program.params[route.bit].aval.size
    return [_cheaper(flow, route, sharing[route.origins]) for route in routes]


def plan_gauss_newton(flow: Flow) -> list[Route]:
    """A route to the diagonal of `J^T H J` at the outputs: a product by definition, so nothing need be linear."""
    planner = _Planner(flow)
    return [planner.gauss_newton(bit) for bit in range(len(flow.program.paths))]


def loss_origins(flow: Flow) -> tuple[Origin, ...] | str:
    """Where the columns of the loss's Hessian start: its atoms, or the outputs; a text where there are no columns."""
    structure, outputs = find_atoms(flow), flow.program.outputs
    known = isinstance(structure, Structure)
    alone = len(outputs) == 1 and not is_complex(outputs[0])
    factored = alone and flow.axes.get(outputs[0]) is not None and plan_columns(flow, outputs[0]).factored
    if known and (structure.simple or not factored):
        return tuple(atom for atom in structure.atoms if not _is_constant(atom))
    return tuple(outputs) if alone else f"{structure}, and the outputs are not one real array"


def _is_constant(atom: Atom) -> bool:
    """Whether it is a softmax of one class, or of nothing."""
    shape = origin(atom).aval.shape
    alone = isinstance(atom, Softmax) and math.prod(shape[d] for d in atom.axes) == 1
    return alone or 0 in shape


def variable(place: Origin) -> Var:
    """Of which an origin's columns are cotangents."""
    return place if isinstance(place, Var) else origin(place)


def _price(route: Route, flow: Flow) -> int:
    """In backward passes; a Hessian-vector product is worth about two."""
    columns, products = route.cost(flow)
    return columns + 2 * products


def _cheaper(flow: Flow, route: Route, size: int) -> Route:
    """Unit vectors instead, where all the parameters that share columns, of `size` entries, are fewer than these."""
    columns, _ = route.cost(flow)
    if size >= columns:
        return route
    return UnitVectors(route.path, route.bit, f"cheaper: {size} parameters share {columns} columns")


@dataclasses.dataclass(frozen=True)
class _Planner:
    """Finds routes. What several parameters ask of a program is found once, in one pass over it."""

    flow: Flow
    _tails: dict[Var, Var | None] = dataclasses.field(default_factory=dict)
    _empty: dict[Var, bool] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def origins(self) -> tuple[Origin, ...] | str:
        return loss_origins(self.flow)

    @functools.cached_property
    def outputs(self) -> frozenset[Var]:
        return frozenset(self.flow.program.outputs)

    def hessian(self, bit: int) -> Route:
        """By the cheapest route that is proved."""
        flow, entry = self.flow, self._entry(bit)
        if not isinstance(entry, Entry):
            return entry
        path, candidates = flow.program.paths[bit], []
        if not isinstance(self.origins, str):
            reached = self._reached(bit)
            linear = all(not flow.curved[var] >> bit & 1 for var in flow.program.outputs if var in flow.curved)
            if linear and not reached:
                return Zero(path, bit, "the loss is piecewise linear in it")
            if linear and all(self._proved(bit, variable(place)) for place in reached):
                candidates.append(GaussNewton(path, bit, "piecewise linear up to the outputs", reached, entry))
        tail = self._tail(bit)
        if tail is not None:
            candidates.append(Tail(path, bit, f"piecewise linear up to {self._describe(tail)}", (tail,), entry))
        if not candidates:
            return UnitVectors(path, bit, self._curved_reasons.get(bit, "no cut tells the examples apart"))
        return min(candidates, key=lambda route: _price(route, flow))

    def gauss_newton(self, bit: int) -> Route:
        """From the loss, whatever the network is."""
        path, entry = self.flow.program.paths[bit], self._entry(bit)
        if not isinstance(entry, Entry):
            return entry
        if isinstance(self.origins, str):
            return UnitVectors(path, bit, self.origins)
        reached = self._reached(bit)
        if not reached:
            return Zero(path, bit, "the loss is piecewise linear in the outputs that it reaches")
        if any(self.flow.axes.get(variable(place)) is None for place in reached):
            return UnitVectors(path, bit, "the loss does not tell the examples apart")
        return GaussNewton(path, bit, "a product by definition", reached, entry)

    def _reached(self, bit: int) -> tuple[Origin, ...]:
        return tuple(place for place in self.origins if self.flow.depends.get(variable(place), 0) >> bit & 1)

    def _proved(self, bit: int, var: Var) -> bool:
        """Whether a variable is piecewise linear in a parameter, and tells the examples apart."""
        return not self.flow.curved[var] >> bit & 1 and self.flow.axes.get(var) is not None

    def _tail(self, bit: int) -> Var | None:
        """The smallest cut before the outputs that is proved, the latest of these.

        From one cut to the next all parameters before it depend on it alone: whether the next is linear in them, if
        this is, is the same for all, and so is the best of those that follow.
        """
        flow, passed = self.flow, []
        linear = lambda var: var is not None and var not in self.outputs and not flow.curved[var] >> bit & 1
        cut = flow.next_cut.get(flow.program.params[bit])
        while linear(cut) and cut not in self._tails:
            passed.append(cut)
            cut = flow.next_cut.get(cut)
        best = self._tails[cut] if linear(cut) else None
        for cut in reversed(passed):
            apart = flow.axes[cut] is not None and not is_complex(cut)
            best = cut if apart and (best is None or cut.aval.size < best.aval.size) else best
            self._tails[cut] = best
        return best

    def _entry(self, bit: int) -> Entry | Route:
        """Where a parameter meets the examples, or the route that is left if there is no one such place."""
        flow = self.flow
        path, var, eqns = flow.program.paths[bit], flow.program.params[bit], flow.program.jaxpr.eqns
        if var not in flow.axes or self._is_empty(var):
            return Zero(path, bit, "no derivative reaches the losses")
        entries, chain = (found.get(bit, []) for found in self._meetings)
        if not entries:
            return UnitVectors(path, bit, "no operation tells the examples apart")
        names = [eqns[index].primitive.name for index, _ in entries]
        if len(entries) > 1:
            return UnitVectors(path, bit, f"enters {len(entries)} operations: {', '.join(names)}")
        (index, slot), eqn = entries[0], eqns[entries[0][0]]
        result, num_examples = eqn.outvars[0], flow.program.num_examples
        known = flow.axes.get(result) is not None and is_layer(eqn, slot, flow.axes[result], num_examples)
        if not known or flow.curved[result] >> bit & 1:
            return UnitVectors(path, bit, f"enters through {names[0]}, whose structure is not known")
        return Entry(index, slot, tuple(chain), _is_monomial(flow, bit, chain, eqn.invars[slot]))

    @functools.cached_property
    def _meetings(self) -> tuple[dict[int, list[tuple[int, int]]], dict[int, list[int]]]:
        """For each parameter, the operands where it meets the examples, and the equations before that."""
        entries, chains = {}, {}
        for index, eqn, slots, results in self.flow.equations:
            shared = [slot for slot in slots if self.flow.axes[eqn.invars[slot]] is None]
            if shared and any(self.flow.axes[var] is not None for var in results):
                for slot in shared:
                    for bit in _bits(self.flow.depends.get(eqn.invars[slot], 0)):
                        entries.setdefault(bit, []).append((index, slot))
            elif shared:
                masks = [self.flow.depends.get(eqn.invars[slot], 0) for slot in shared]
                for bit in {bit for mask in masks for bit in _bits(mask)}:
                    chains.setdefault(bit, []).append(index)
        return entries, chains

    def _is_empty(self, var: Var) -> bool:
        """Whether a variable, or a cut after it, has no entries."""
        passed = []
        while var is not None and var.aval.size and var not in self._empty:
            passed.append(var)
            var = self.flow.next_cut.get(var)
        empty = var is not None and self._empty.get(var, True)
        self._empty.update(dict.fromkeys(passed, empty))
        return empty

    @functools.cached_property
    def _curved_reasons(self) -> dict[int, str]:
        found, seen = {}, 0
        for _, eqn, _, results in self.flow.equations:
            for var in results:
                reason = f"curved from {eqn.primitive.name} on, before any cut that tells the examples apart"
                found |= dict.fromkeys(_bits(self.flow.curved[var] & ~seen), reason)
                seen |= self.flow.curved[var]
        return found

    def _describe(self, cut: Var) -> str:
        program = self.flow.program
        return f"{cut.aval.str_short()}, the result of {program.jaxpr.eqns[program.makers[cut]].primitive.name}"


def _bits(mask: int) -> Iterator[int]:
    """The places of the ones of an integer."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _is_monomial(flow: Flow, bit: int, chain: Sequence[int], operand: Var) -> bool:
    """Whether the chain only moves, casts and scales: every variable used once, and no entry copied or combined."""
    current = flow.program.params[bit]
    for index in chain:
        eqn, (slots, _) = flow.program.jaxpr.eqns[index], flow.links[index]
        used = [slot for slot in slots if flow.depends.get(eqn.invars[slot], 0) >> bit & 1]
        if len(used) != 1 or eqn.invars[used[0]] is not current or not _scales(eqn, used[0]):
            return False
        current = eqn.outvars[0]
    return current is operand


def _scales(eqn, slot: int) -> bool:
    """Whether every entry of the result is an entry of an operand times a number, and none is copied."""
    result, operand, name = eqn.outvars[0], eqn.invars[slot], eqn.primitive.name
    if is_complex(result) or is_complex(operand) or name in ("gather", "tile"):
        return False
    if record(eqn).entries is Entries.MOVED:
        return slot == 0 and (name == "pad" or result.aval.size <= operand.aval.size)
    if record(eqn).entries is Entries.MIXED or result.aval.size > operand.aval.size:
        return False
    return form(eqn) is Form.PIECEWISE or is_linear(eqn, [slot])
