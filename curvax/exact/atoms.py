"""What a loss is curved by, read off its trace.

Most losses are piecewise linear in the outputs but for a few operations of a known curvature:

    a softmax:              log(sum(exp(z))), with the Hessian diag(p) - p p^T, p the softmax of z;
    separate functions:     f_i(z_i) of single entries, with a diagonal Hessian.

By the chain rule the Hessian of the loss is the sum over these *atoms* of that of each, taken from z back to the
outputs, times the derivative of the loss in its result, of either sign. Whatever is folded into the loss before or
after (labels, masks, smoothing, temperatures, weights, means over tokens, sums over tasks) needs no rule of its own: it
is in z, or in the derivative. Where anything else is curved, nothing is claimed.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var

from curvax.exact.dataflow import Flow, added_curvature, rule_jaxpr
from curvax.exact.equations import is_complex
from curvax.exact.primitives import Entries, differentiable_slots, record


@dataclasses.dataclass(frozen=True)
class Softmax:
    """`log(sum(exp(logits)))`.

    Attributes:
        logits: what is exponentiated.
        exps: what is summed: the exponentials, zero where they are masked.
        total: their sum.
        axes: over which dimensions.
    """

    logits: Var
    exps: Var
    total: Var
    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Separate:
    """Functions of the single entries of a variable.

    Attributes:
        operand: the variable: the last from which all that bends is computed.
        equations: what computes the functions, by place.
        results: their values, as far as the rest of the loss reads them.
    """

    operand: Var
    equations: tuple[int, ...]
    results: tuple[Var, ...]


Atom = Softmax | Separate


class Structure(NamedTuple):
    """The atoms of a loss.

    Attributes:
        atoms: none, where the loss is piecewise linear in the outputs.
        simple: whether they all begin at variables that are piecewise linear in the outputs. Where atoms are made of
            others, their Hessians may cancel each other in part, and with them their precision.
    """

    atoms: tuple[Atom, ...]
    simple: bool


class State(NamedTuple):
    """Where a variable stands.

    Attributes:
        curved: whether it is not piecewise linear in the outputs.
        source: the first variable of which each of its entries is a function of the same entry; itself at least.
        bent: whether that function is not piecewise linear.
    """

    curved: bool
    source: Var
    bent: bool


def find_atoms(flow: Flow) -> Structure | str:
    """The atoms of a loss.

    Args:
        flow: a program and what is known of it; its outputs are where the loss begins.

    Returns:
        The atoms; or a text that says which operation stood in the way.
    """
    begin = flow.program.begin_of_loss
    softmaxes, inside = _softmaxes(flow, begin)
    states = {var: State(False, var, False) for var in flow.program.outputs}
    separate: dict[Var, list[int]] = {}
    for index, eqn, slots, results in flow.equations[begin:]:
        if index in softmaxes:
            if softmaxes[index].logits not in states:
                return "curved by a logarithm, of which the trace proves no structure"
            states |= {var: State(True, var, False) for var in results}
            continue
        if index in inside or not any(eqn.invars[slot] in states for slot in slots):
            continue
        found = _states(flow, index, states)
        if found is None:
            return f"curved by {eqn.primitive.name}, of which the trace proves no structure"
        states |= found
        for source in {state.source for state in found.values() if state.bent}:
            separate.setdefault(source, []).append(index)
    groups = [
        Separate(_begin(flow, places, states), tuple(places), _read_outside(flow, places))
        for places in separate.values()
    ]
    atoms = (*(softmaxes[index] for index in sorted(softmaxes)), *groups)
    begins = [atom.logits if isinstance(atom, Softmax) else atom.operand for atom in atoms]
    return Structure(atoms, not any(states[var].curved for var in begins))


def _states(flow: Flow, index: int, states: Mapping[Var, State]) -> dict[Var, State] | None:
    """What the results of an equation are, from what its operands are; None where nothing is known of them."""
    eqn, (slots, results) = flow.program.jaxpr.eqns[index], flow.links[index]
    slots = [slot for slot in slots if eqn.invars[slot] in states]
    operands = [states[eqn.invars[slot]] for slot in slots]
    bends = bool(added_curvature(eqn, slots, [1] * len(slots), flow.rules.get(index)))
    curved = bends or any(operand.curved for operand in operands)
    sources = {operand.source for operand in operands}
    if len(sources) == 1 and _entry_by_entry(eqn, slots, *sources):
        bent = bends or any(operand.bent for operand in operands)
        return dict.fromkeys(results, State(curved, *sources, bent))
    return None if bends else {var: State(curved, var, False) for var in results}


def _entry_by_entry(eqn: JaxprEqn, slots: Sequence[int], source: Var) -> bool:
    shapes = {var.aval.shape for var in (source, *eqn.outvars, *(eqn.invars[slot] for slot in slots))}
    apart = len(shapes) == 1 and _keeps_entries_apart(eqn, slots, source.aval.shape, frozenset())
    # The real and imaginary part of an entry are two.
    return apart and not is_complex(source)


def _keeps_entries_apart(eqn: JaxprEqn, slots: Sequence[int], shape: tuple[int, ...], outer: frozenset[str]) -> bool:
    """Whether entries meet only their like, in the operation and in its derivatives.

    What JAX differentiates of a `custom_jvp` is its rule. That may call the function itself (`outer`), or others.
    """
    if eqn.primitive.name == "broadcast_in_dim":
        return eqn.invars[0].aval.ndim == 0
    if eqn.primitive.name != "custom_jvp_call":
        apart = record(eqn).entries in (Entries.SAME, Entries.APART)
        return apart and eqn.outvars[0].aval.shape in (shape, ())
    body = str(eqn.params["call_jaxpr"])
    if body in outer:
        return True
    rule, outer = rule_jaxpr(eqn, slots, linear_only=False)[0].jaxpr, outer | {body}
    return all(_keeps_entries_apart(inner, differentiable_slots(inner), shape, outer) for inner in rule.eqns)


def _begin(flow: Flow, places: Sequence[int], states: Mapping[Var, State]) -> Var:
    """The last real variable from which everything that some equations of one source read is computed.

    Of `(z / 1e20) ** 2` that is the quotient, whose curvature float32 can hold.
    """
    makers = flow.program.makers
    operands = lambda place: {eqn.invars[slot] for eqn, slots in [flow.equations[place][1:3]] for slot in slots}
    begins = set().union(*map(operands, places)) & states.keys()
    begins -= {var for place in places for var in flow.links[place][1]}
    while len(begins) > 1 or any(map(is_complex, begins)):
        latest = max(begins, key=lambda var: makers.get(var, -1))
        begins = begins - {latest} | operands(makers[latest]) & states.keys()
    return begins.pop()


def _read_outside(flow: Flow, places: Sequence[int]) -> tuple[Var, ...]:
    """The results of some equations that others read, or that are the losses."""
    made = {var for place in places for var in flow.links[place][1]}
    read = {eqn.invars[slot] for index, eqn, slots, _ in flow.equations if index not in places for slot in slots} | {
        flow.program.losses
    }
    return tuple(
        var for var in dict.fromkeys(v for place in places for v in flow.links[place][1]) if var in made & read
    )


# Softmaxes.


def _softmaxes(flow: Flow, begin: int) -> tuple[dict[int, Softmax], set[int]]:
    """The softmaxes, by the place of their logarithm, and the places of the equations inside them."""
    reads = Counter(eqn.invars[slot] for _, eqn, slots, _ in flow.equations for slot in slots)
    reads[flow.program.losses] += 1
    found, inside = {}, set()
    for index, eqn, slots, _ in flow.equations[begin:]:
        if eqn.primitive.name == "log" and slots:
            chain: list[int] = []
            softmax = _softmax(flow, eqn.invars[0], begin, reads, chain)
            if softmax is not None:
                found[index] = softmax
                inside.update(chain)
    return found, inside


def _softmax(flow: Flow, var: Var, begin: int, reads, chain: list[int]) -> Softmax | None:
    """The softmax whose sum, or the same numbers in another shape, is `var`; `chain` collects what it is made of."""

    def back(var: Var, passes: Callable[[JaxprEqn, int], bool]) -> tuple[Var, JaxprEqn | None]:
        """Back through equations that are passed, to one that is not; all of them are read once."""
        while reads[var] == 1 and (index := flow.program.makers.get(var, -1)) >= begin:
            eqn, slots = flow.program.jaxpr.eqns[index], _varying(flow, index)
            chain.append(index)
            if len(slots) != 1 or not passes(eqn, slots[0]):
                return var, eqn
            var = eqn.invars[slots[0]]
        return var, None

    # Of a sum of exponentials `abs` is the same number.
    same = lambda eqn: eqn.primitive.name == "abs" or record(eqn).entries in (Entries.SAME, Entries.MOVED)
    total, summed = back(var, lambda eqn, _: same(eqn))
    if summed is None or summed.primitive.name != "reduce_sum":
        return None
    # A mask may stand between the exponentials and their sum, not after it.
    _, exponential = back(summed.invars[0], lambda eqn, slot: _masks(flow, eqn, slot))
    if exponential is None or exponential.primitive.name != "exp" or is_complex(exponential.invars[0]):
        return None
    return Softmax(exponential.invars[0], summed.invars[0], total, tuple(summed.params["axes"]))


def _varying(flow: Flow, index: int) -> list[int]:
    """The operands of an equation that depend on the parameters."""
    return [slot for slot in flow.links[index][0] if flow.depends.get(flow.program.jaxpr.eqns[index].invars[slot])]


def _masks(flow: Flow, eqn: JaxprEqn, slot: int) -> bool:
    """Whether an equation leaves an entry as it is or makes it zero."""
    if eqn.primitive.name == "convert_element_type":
        return True
    others = [atom for i, atom in enumerate(eqn.invars) if i not in (0, slot)]
    return eqn.primitive.name == "select_n" and slot > 0 and all(_is_zero(flow, atom) for atom in others)


def _is_zero(flow: Flow, atom: Var | Literal) -> bool:
    if isinstance(atom, Literal):
        return bool(np.all(atom.val == 0))
    if atom not in flow.program.makers:
        return False
    maker = flow.program.jaxpr.eqns[flow.program.makers[atom]]
    return maker.primitive.name in ("broadcast_in_dim", "convert_element_type") and _is_zero(flow, maker.invars[0])
