"""Which route each parameter's Hessian diagonal takes, and what proves it.

Let `u` be a variable that every derivative from a parameter passes through (a cut), with the examples along an axis.
If `u` is piecewise linear in the parameter, the Hessian is `J^T H J`, with `H` the Hessian of what lies beyond, one
block for each example; if moreover the parameter meets the examples in a single linear operation, each example's `J^T v`
is a cotangent contracted with that operation's operand, and the diagonal costs a few backward passes. With `u` the
network's outputs this is the Gauss-Newton route; with an earlier `u` the loss has merely become longer. Where either
proof fails, unit vectors remain.
"""

import dataclasses
from collections.abc import Sequence

from jax.extend.core import Var

from curvax.exact.dataflow import Flow, cuts
from curvax.exact.invariance import shift_invariant
from curvax.exact.layers import supported
from curvax.exact.primitives import Axis
from curvax.exact.trace import Program

# What turns a parameter into an operand without mixing its entries, by name; `chain_is_monomial` checks the rest.
MONOMIAL = frozenset(
    "add broadcast_in_dim convert_element_type copy copy_p div dynamic_slice mul neg pad reduce_precision reshape rev"
    " select_n slice squeeze sub transpose".split()
)


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
        name: "gauss-newton", "tail", "unit vectors" or "zero".
        reason: why this route and no cheaper one.
        cut: where the columns start; None for unit vectors.
        entry: where they end; None for unit vectors.
    """

    path: str
    bit: int
    name: str
    reason: str
    cut: Var | None = None
    entry: Entry | None = None


def plan(program: Program, flow: Flow, *, gauss_newton: bool = False) -> list[Route]:
    """A route for every parameter: of the Hessian, or with `gauss_newton` of `J^T H J` at the outputs.

    The latter is by definition a product, so the network need not be piecewise linear.
    """
    routes = [_route(program, flow, bit, gauss_newton) for bit in range(len(program.paths))]
    for cut in {route.cut for route in routes if route.cut is not None}:
        sharing = [route for route in routes if route.cut is cut]
        size = sum(program.params[route.bit].aval.size for route in sharing)
        if size < num_columns(program, flow, cut):
            reason = f"cheaper: {size} parameters, where the cut has {slice_size(program, cut)} entries per example"
            for route in sharing:
                routes[route.bit] = Route(route.path, route.bit, "unit vectors", reason)
    return routes


def slice_size(program: Program, cut: Var) -> int:
    """Entries of one example's slice of a cut."""
    return cut.aval.size // program.num_examples


def num_columns(program: Program, flow: Flow, cut: Var) -> int:
    """Columns of the factor at a cut, after what can be proved of its rank."""
    size = slice_size(program, cut)
    return size - 1 if size > 1 and shift_invariant(program, flow, cut) else size


def _route(program: Program, flow: Flow, bit: int, gauss_newton: bool) -> Route:
    path, var = program.paths[bit], program.params[bit]
    if var not in flow.axes or not var.aval.size:
        return Route(path, bit, "zero", "no derivative reaches the losses")
    entry = _entry(program, flow, bit)
    if isinstance(entry, str):
        return Route(path, bit, "unit vectors", entry)
    found = list(cuts(program, flow, bit))
    if gauss_newton:
        proved = [cut for cut in found if cut is program.outputs]
    else:
        until = found.index(program.outputs) + 1
        proved = [cut for cut in found[:until] if not flow.curved[cut] >> bit & 1]
    proved = [cut for cut in proved if isinstance(flow.axes[cut], Axis)]
    if not proved:
        return Route(path, bit, "unit vectors", _curved_reason(program, flow, bit))
    cut = min(reversed(proved), key=lambda cut: cut.aval.size)
    if cut is program.outputs:
        kind = "by definition" if gauss_newton else "piecewise linear up to the outputs"
        return Route(path, bit, "gauss-newton", kind, cut, entry)
    return Route(path, bit, "tail", f"piecewise linear up to {_describe(program, cut)}", cut, entry)


def _entry(program: Program, flow: Flow, bit: int) -> Entry | str:
    """Where a parameter meets the examples, or why there is no such place."""
    chain, doors = [], []
    for index, (eqn, (slots, results)) in enumerate(zip(program.jaxpr.eqns, flow.links, strict=True)):
        shared = [slot for slot in slots if _shared(flow, eqn.invars[slot], bit)]
        if shared and any(flow.axes[var] is not None for var in results):
            doors += [(index, slot) for slot in shared]
        elif shared:
            chain.append(index)
    if not doors:
        return "no operation tells the examples apart"
    names = [program.jaxpr.eqns[index].primitive.name for index, _ in doors]
    if len(doors) > 1:
        return f"enters {len(doors)} operations: {', '.join(names)}"
    (index, slot), eqn = doors[0], program.jaxpr.eqns[doors[0][0]]
    if flow.curved[eqn.outvars[0]] >> bit & 1 or not supported(eqn, slot):
        return f"enters the examples through {names[0]}, whose structure is not known"
    return Entry(index, slot, tuple(chain), _is_monomial(program, flow, bit, chain, eqn.invars[slot]))


def _shared(flow: Flow, var: Var, bit: int) -> bool:
    return bool(flow.depends.get(var, 0) >> bit & 1) and flow.axes[var] is None


def _is_monomial(program: Program, flow: Flow, bit: int, chain: Sequence[int], operand: Var) -> bool:
    """Whether the chain only moves, casts and scales: every variable used once, and no entry copied or combined."""
    current = program.params[bit]
    for index in chain:
        eqn, (slots, _) = program.jaxpr.eqns[index], flow.links[index]
        used = [slot for slot in slots if flow.depends.get(eqn.invars[slot], 0) >> bit & 1]
        if len(used) != 1 or eqn.invars[used[0]] is not current or eqn.primitive.name not in MONOMIAL:
            return False
        grows = eqn.primitive.name != "pad" and eqn.outvars[0].aval.size > current.aval.size
        if grows or (eqn.primitive.name in ("div", "pad") and used[0] != 0):
            return False
        current = eqn.outvars[0]
    return current is operand


def _curved_reason(program: Program, flow: Flow, bit: int) -> str:
    for eqn, (_, results) in zip(program.jaxpr.eqns, flow.links, strict=True):
        for var in results:
            if flow.curved[var] >> bit & 1:
                return f"curved from {eqn.primitive.name} on, before any cut that tells the examples apart"
    return "no cut tells the examples apart"


def _describe(program: Program, cut: Var) -> str:
    index = next(i for i, eqn in enumerate(program.jaxpr.eqns) if cut in eqn.outvars)
    return f"{cut.aval.str_short()}, the result of {program.jaxpr.eqns[index].primitive.name}"
