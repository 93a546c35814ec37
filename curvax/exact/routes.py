"""Which route each parameter's Hessian diagonal takes, and what proves it.

Let `u` be a variable that every derivative from a parameter passes through (a cut), with the examples along an axis.
If `u` is piecewise linear in the parameter, the Hessian is `J^T H J`, with `H` the Hessian of what lies beyond, one
block for each example; if moreover the parameter meets the examples in a single linear operation, `J^T v` is for each
example a cotangent contracted with that operation's operand, and the diagonal costs a few backward passes. With `u` the
network's outputs this is the Gauss-Newton route, where the structure of the loss (`atoms`) gives the columns of `H`;
with an earlier `u` the loss has merely become longer. Where either proof fails, unit vectors remain.
"""

import dataclasses
import math
from collections.abc import Sequence

from jax.extend.core import Var

from curvax.exact.atoms import Atom, Softmax, Structure, find_atoms
from curvax.exact.columns import num_columns, origin
from curvax.exact.dataflow import Flow, cuts
from curvax.exact.factor import plan_columns
from curvax.exact.layers import supported
from curvax.exact.primitives import is_complex

# What turns a parameter into an operand without mixing its entries, by name; `chain_is_monomial` checks the rest.
MONOMIAL = frozenset(
    "add broadcast_in_dim convert_element_type copy div dynamic_slice mul neg pad reduce_precision reshape rev"
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


# Where columns start: at an atom of the loss, or at a cut, whose Hessian has no known structure.
Origin = Atom | Var


@dataclasses.dataclass(frozen=True)
class Route:
    """How one parameter's diagonal is computed.

    Attributes:
        path: the parameter.
        bit: its position among the parameters.
        name: "gauss-newton", "tail", "unit vectors" or "zero".
        reason: why this route and no cheaper one.
        origins: where the columns start; none for unit vectors.
        entry: where they end; None for unit vectors.
    """

    path: str
    bit: int
    name: str
    reason: str
    origins: tuple[Origin, ...] = ()
    entry: Entry | None = None


def plan(flow: Flow) -> list[Route]:
    """A route to the Hessian diagonal of every parameter."""
    origins = loss_origins(flow)
    routes = [_hessian_route(flow, bit, origins) for bit in range(len(flow.program.paths))]
    return [_cheaper(flow, route, routes) for route in routes]


def plan_gauss_newton(flow: Flow) -> list[Route]:
    """A route to the diagonal of `J^T H J` at the outputs: a product by definition, so nothing need be linear."""
    origins = loss_origins(flow)
    return [_gauss_newton_route(flow, bit, origins) for bit in range(len(flow.program.paths))]


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


def cost(flow: Flow, place: Origin) -> tuple[int, int]:
    """Backward passes and Hessian-vector products for the columns of an origin."""
    return plan_columns(flow, place)[:2] if isinstance(place, Var) else (num_columns(flow, place), 0)


def _price(flow: Flow, origins: Sequence[Origin]) -> int:
    """In backward passes; a Hessian-vector product is worth about two."""
    costs = [cost(flow, place) for place in origins]
    return sum(columns + 2 * products for columns, products in costs)


def _reached(flow: Flow, bit: int, origins: Sequence[Origin]) -> tuple[Origin, ...]:
    return tuple(place for place in origins if flow.depends.get(variable(place), 0) >> bit & 1)


def _proved(flow: Flow, bit: int, var: Var) -> bool:
    """Whether a variable is piecewise linear in a parameter, and tells the examples apart."""
    return not flow.curved[var] >> bit & 1 and flow.axes.get(var) is not None


def _hessian_route(flow: Flow, bit: int, origins: Sequence[Origin] | str) -> Route:
    path, entry = flow.program.paths[bit], _entry(flow, bit)
    if not isinstance(entry, Entry):
        return entry
    candidates = _tails(flow, bit)
    if not isinstance(origins, str):
        reached = _reached(flow, bit, origins)
        linear = all(not flow.curved[var] >> bit & 1 for var in flow.program.outputs if var in flow.curved)
        if linear and not reached:
            return Route(path, bit, "zero", "the loss is piecewise linear in it")
        if linear and all(_proved(flow, bit, variable(place)) for place in reached):
            reason = "piecewise linear up to the outputs"
            candidates.insert(0, Route(path, bit, "gauss-newton", reason, reached, entry))
    if not candidates:
        return Route(path, bit, "unit vectors", _curved_reason(flow, bit))
    return min(candidates, key=lambda route: _price(flow, route.origins))


def _tails(flow: Flow, bit: int) -> list[Route]:
    """The route of the smallest cut before the outputs, the latest of these, if any is proved."""
    found, outputs = list(cuts(flow, bit)), set(flow.program.outputs)
    before = next((place for place, cut in enumerate(found) if cut in outputs), len(found))
    proved = [cut for cut in found[:before] if _proved(flow, bit, cut)]
    if not proved:
        return []
    cut = min(reversed(proved), key=lambda cut: cut.aval.size)
    reason = f"piecewise linear up to {_describe(flow, cut)}"
    return [Route(flow.program.paths[bit], bit, "tail", reason, (cut,), _entry(flow, bit))]


def _gauss_newton_route(flow: Flow, bit: int, origins: Sequence[Origin] | str) -> Route:
    path, entry = flow.program.paths[bit], _entry(flow, bit)
    if not isinstance(entry, Entry):
        return entry
    if isinstance(origins, str):
        return Route(path, bit, "unit vectors", origins)
    reached = _reached(flow, bit, origins)
    if not reached:
        return Route(path, bit, "zero", "the loss is piecewise linear in the outputs that it reaches")
    if any(flow.axes.get(variable(place)) is None for place in reached):
        return Route(path, bit, "unit vectors", "the loss does not tell the examples apart")
    return Route(path, bit, "gauss-newton", "a product by definition", reached, entry)


def _cheaper(flow: Flow, route: Route, routes: Sequence[Route]) -> Route:
    """Unit vectors instead, where all the parameters that share columns are fewer than these."""
    if not route.origins:
        return route
    size = sum(flow.program.params[other.bit].aval.size for other in routes if other.origins == route.origins)
    columns = sum(cost(flow, place)[0] for place in route.origins)
    if size >= columns:
        return route
    reason = f"cheaper: {size} parameters share {columns} columns"
    return Route(route.path, route.bit, "unit vectors", reason)


def _entry(flow: Flow, bit: int) -> Entry | Route:
    """Where a parameter meets the examples, or the route that is left if there is no one such place."""
    path, var = flow.program.paths[bit], flow.program.params[bit]
    if var not in flow.axes or not all(v.aval.size for v in (var, *cuts(flow, bit))):
        return Route(path, bit, "zero", "no derivative reaches the losses")
    chain, doors = [], []
    for index, eqn, slots, results in flow.equations:
        shared = [slot for slot in slots if _shared(flow, eqn.invars[slot], bit)]
        if shared and any(flow.axes[var] is not None for var in results):
            doors += [(index, slot) for slot in shared]
        elif shared:
            chain.append(index)
    if not doors:
        return Route(path, bit, "unit vectors", "no operation tells the examples apart")
    names = [flow.program.jaxpr.eqns[index].primitive.name for index, _ in doors]
    if len(doors) > 1:
        return Route(path, bit, "unit vectors", f"enters {len(doors)} operations: {', '.join(names)}")
    (index, slot), eqn = doors[0], flow.program.jaxpr.eqns[doors[0][0]]
    result, num_examples = eqn.outvars[0], flow.program.num_examples
    if not supported(eqn, slot, flow.axes.get(result), num_examples) or flow.curved[result] >> bit & 1:
        return Route(path, bit, "unit vectors", f"enters through {names[0]}, whose structure is not known")
    return Entry(index, slot, tuple(chain), _is_monomial(flow, bit, chain, eqn.invars[slot]))


def _shared(flow: Flow, var: Var, bit: int) -> bool:
    return bool(flow.depends.get(var, 0) >> bit & 1) and flow.axes[var] is None


def _is_monomial(flow: Flow, bit: int, chain: Sequence[int], operand: Var) -> bool:
    """Whether the chain only moves, casts and scales: every variable used once, and no entry copied or combined."""
    current = flow.program.params[bit]
    for index in chain:
        eqn, (slots, _) = flow.program.jaxpr.eqns[index], flow.links[index]
        used = [slot for slot in slots if flow.depends.get(eqn.invars[slot], 0) >> bit & 1]
        if len(used) != 1 or eqn.invars[used[0]] is not current or eqn.primitive.name not in MONOMIAL:
            return False
        grows = eqn.primitive.name != "pad" and eqn.outvars[0].aval.size > current.aval.size
        if grows or (eqn.primitive.name in ("div", "pad") and used[0] != 0):
            return False
        current = eqn.outvars[0]
    return current is operand


def _curved_reason(flow: Flow, bit: int) -> str:
    for _, eqn, _, results in flow.equations:
        for var in results:
            if flow.curved[var] >> bit & 1:
                return f"curved from {eqn.primitive.name} on, before any cut that tells the examples apart"
    return "no cut tells the examples apart"


def _describe(flow: Flow, cut: Var) -> str:
    index = next(i for i, eqn in enumerate(flow.program.jaxpr.eqns) if cut in eqn.outvars)
    return f"{cut.aval.str_short()}, the result of {flow.program.jaxpr.eqns[index].primitive.name}"
