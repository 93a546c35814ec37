"""What is true of every variable of a program, decided by two passes over its equations.

Backwards from the losses: along which axis does a slice of this variable reach the loss of its own example alone?
Forwards from the parameters: which of them does this variable depend on, and in which is it curved? Both follow
derivatives, so whatever passes only through comparisons, integers or `stop_gradient` is a constant.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Var

from curvax.exact.indices import Counted, counted_dimensions
from curvax.exact.primitives import BILINEAR, Axis, differentiable, is_complex, piecewise_linear, pull_axis
from curvax.exact.trace import Program, apply, derivative, flattened, read

# None is the axis of a variable of which one entry may reach several examples, as a parameter's does.
Axes = Mapping[Var, Axis | None]
Slots = tuple[int, ...]
Results = tuple[Var, ...]


@dataclasses.dataclass(frozen=True)
class Flow:
    """The facts about a program's variables on which every proof rests.

    Attributes:
        program: the program.
        axes: the example axis of each variable from which a derivative reaches the losses; None where one entry may
            reach several examples.
        links: for each equation, the operands and results that a derivative passes between.
        rules: what each `custom_jvp` does, by its place among the equations.
        depends: for each variable, the parameters it depends on, as the bits of an integer.
        curved: for each variable, the parameters in which it is not known to be piecewise linear.
    """

    program: Program
    axes: Axes
    links: Sequence[tuple[Slots, Results]]
    rules: Mapping[int, "CustomRule"]
    depends: Mapping[Var, int]
    curved: Mapping[Var, int]

    @functools.cached_property
    def equations(self) -> list[tuple[int, JaxprEqn, Slots, Results]]:
        """Every equation with its place, and the operands and results that a derivative passes between."""
        pairs = zip(self.program.jaxpr.eqns, self.links, strict=True)
        return [(index, eqn, *link) for index, (eqn, link) in enumerate(pairs)]


def analyse(program: Program) -> Flow:
    """Both passes over a program."""
    seeds = {program.losses: Axis(0)} if isinstance(program.losses, Var) else {}
    counted = counted_dimensions(program.jaxpr, program.consts)
    axes, rules = backward(program.jaxpr, seeds, program.num_examples, counted=counted)
    if program.num_examples == 1:
        axes |= dict.fromkeys(_shared_by_a_single_example(program, axes))
    links = [_link(eqn, axes, rules.get(index)) for index, eqn in enumerate(program.jaxpr.eqns)]
    depends = {var: 1 << bit for bit, var in enumerate(program.params) if var in axes}
    curved = dict.fromkeys(depends, 0)
    for index, (eqn, (slots, results)) in enumerate(zip(program.jaxpr.eqns, links, strict=True)):
        masks = [depends.get(eqn.invars[slot], 0) for slot in slots]
        bend = added_curvature(eqn, slots, masks, rules.get(index))
        for slot in slots:
            bend |= curved.get(eqn.invars[slot], 0)
        depends |= dict.fromkeys(results, _union(masks))
        curved |= dict.fromkeys(results, bend)
    return Flow(program, axes, links, rules, depends, curved)


def _shared_by_a_single_example(program: Program, axes: Axes) -> list[Var]:
    """What is made of parameters alone: any of its axes may be called that of one example, but more would share it."""
    made = set(program.params)
    for eqn in program.jaxpr.eqns:
        variables = [atom for atom in eqn.invars if isinstance(atom, Var)]
        if variables and made.issuperset(variables):
            made.update(eqn.outvars)
    return [var for var in made if var in axes and var not in program.outputs and var is not program.losses]


@dataclasses.dataclass(frozen=True)
class CustomRule:
    """What a `custom_jvp` does: the axes of the operands its derivative reads, and whether that derivative varies."""

    axes: Mapping[int, Axis | None]
    curved: bool


def backward(
    jaxpr: Jaxpr, seeds: Axes, num_examples: int, order: int = 2, counted: Counted | None = None
) -> tuple[dict[Var, Axis | None], dict[int, CustomRule]]:
    """Follows the example axis from `seeds` back to every variable that a derivative connects to them.

    Args:
        jaxpr: a flat jaxpr.
        seeds: the axes of some of its results.
        num_examples: B.
        order: how many more derivatives will be taken of a `custom_jvp`.
        counted: what is known of the indices of its gathers.

    Returns:
        The axes, and the rule of each `custom_jvp` by its place among the equations.
    """
    axes, rules = dict(seeds), {}
    for index, eqn in reversed(list(enumerate(jaxpr.eqns))):
        results = {r: axes[var] for r, var in enumerate(eqn.outvars) if var in axes}
        if not results:
            continue
        if eqn.primitive.name == "custom_jvp_call":
            rules[index] = _custom_rule(eqn, results, num_examples, order)
            operands = rules[index].axes
        else:
            counts = (counted or {}).get(index, {})
            operands = operand_axes(eqn, differentiable_slots(eqn), results, num_examples, counts)
        for slot, axis in operands.items():
            axes[eqn.invars[slot]] = meet(axes, eqn.invars[slot], axis)
    return axes, rules


def operand_axes(
    eqn: JaxprEqn,
    slots: Sequence[int],
    results: Mapping[int, Axis | None],
    num_examples: int,
    counted: Mapping[int, int],
) -> dict[int, Axis | None]:
    """The axes of some operands of an equation, from those of its results."""
    axes = {}
    for slot in slots:
        for result, axis in results.items():
            pulled = None if axis is None else pull_axis(eqn, slot, result, axis, num_examples)
            if axis is not None and slot == 0 and axis.dim in counted:
                pulled = axis._replace(dim=counted[axis.dim])
            axes[slot] = meet(axes, slot, pulled)
    return axes


def differentiable_slots(eqn: JaxprEqn) -> list[int]:
    """The operands through which a derivative passes."""
    return [slot for slot in range(len(eqn.invars)) if differentiable(eqn, slot)]


def meet(axes: Mapping[Any, Axis | None], key: Any, axis: Axis | None) -> Axis | None:
    """`axis`, if `key` has that axis or none yet."""
    return axis if axes.get(key, axis) == axis else None


def _custom_rule(eqn: JaxprEqn, results: Mapping[int, Axis | None], num_examples: int, order: int) -> CustomRule:
    """Reads the rule itself, not the function: it is what JAX differentiates, once and again.

    The tangents that the rule returns are linear in those it is given. If no derivative connects them to the primal
    values, the function is piecewise linear as far as JAX can tell. A rule may call its own function (softmax does),
    and so on for ever; but a Hessian takes two derivatives, and the second needs the inner rule's tangents alone.
    """
    slots = differentiable_slots(eqn)
    if not order:
        return CustomRule(dict.fromkeys(slots), curved=True)
    jaxpr, primals, tangents = rule_jaxpr(eqn, slots, linear_only=order == 1)
    values, out_tangents = jaxpr.outvars[: len(eqn.outvars)], jaxpr.outvars[len(eqn.outvars) :]
    if not all(_calls_itself(jaxpr, eqn, value) for value in values):
        return CustomRule(dict.fromkeys(slots), curved=True)
    seeds = {out_tangents[r]: axis for r, axis in results.items() if isinstance(out_tangents[r], Var)}
    axes, _ = backward(jaxpr, seeds, num_examples, order - 1)
    operand_axes = {}
    for slot, *roles in zip(slots, primals, tangents, strict=True):
        for var in roles:
            if var in axes:
                operand_axes[slot] = meet(operand_axes, slot, axes[var])
    return CustomRule(operand_axes, curved=any(var in axes for var in primals))


def rule_jaxpr(eqn: JaxprEqn, slots: Sequence[int], *, linear_only: bool) -> tuple[Jaxpr, list[Var], list[Var]]:
    """The rule, values then tangents, as a function of its primals and tangents, and which inputs are which.

    With `linear_only` derivatives are stopped at the primals, which then are constants.
    """

    def rule(operands, tangents):
        return derivative(eqn, slots)(jax.lax.stop_gradient(operands) if linear_only else operands, tangents)

    # Abstract values rather than shapes: they know over which axes of a `shard_map` they vary.
    operands = [atom.aval for atom in eqn.invars]
    closed = jax.make_jaxpr(rule)(operands, [operands[slot] for slot in slots])
    jaxpr = flattened(closed).jaxpr
    return jaxpr, [jaxpr.invars[slot] for slot in slots], jaxpr.invars[len(operands) :]


def _calls_itself(jaxpr: Jaxpr, eqn: JaxprEqn, value: Var) -> bool:
    """Whether a rule finds its value by calling its own function, as `defjvps` does and all of JAX's rules do.

    A second derivative goes through the rule's value, and then obeys the rule again. Found otherwise it would obey
    the value's own derivative, which need not agree with the rule (in a straight-through estimator it does not).
    """
    inner = next((inner for inner in jaxpr.eqns if value in inner.outvars), None)
    if inner is None or inner.primitive is not eqn.primitive:
        return False
    return str(inner.params["call_jaxpr"]) == str(eqn.params["call_jaxpr"])


def _link(eqn, axes, rule: CustomRule | None) -> tuple[Slots, Results]:
    results = tuple(var for var in eqn.outvars if var in axes)
    slots = differentiable_slots(eqn) if results else []
    return tuple(slot for slot in slots if rule is None or slot in rule.axes), results


def added_curvature(eqn: JaxprEqn, slots: Sequence[int], masks: Sequence[int], rule: CustomRule | None) -> int:
    """The parameters in which the equation itself is not known to be piecewise linear, as the bits of an integer."""
    name = eqn.primitive.name
    if piecewise_linear(eqn) or (rule is not None and not rule.curved):
        return 0
    if name in BILINEAR:
        return masks[0] & masks[1] if len(masks) == 2 else 0
    if name == "div":
        return sum(mask for slot, mask in zip(slots, masks, strict=True) if slot == 1)
    return _union(masks)


def _union(masks: Sequence[int]) -> int:
    union = 0
    for mask in masks:
        union |= mask
    return union


def cuts(flow: Flow, bit: int) -> Iterator[Var]:
    """The real variables that every derivative from parameter `bit` to the losses passes through, in order.

    Just after such a variable is computed, nothing computed before it is needed again.
    """
    program = flow.program
    last_use = {program.losses: len(flow.links)}
    for index, eqn, slots, _ in flow.equations:
        last_use |= {eqn.invars[slot]: max(index, last_use.get(eqn.invars[slot], 0)) for slot in slots}
    horizon = last_use.get(program.params[bit], 0)
    for index, _, _, results in flow.equations:
        reached = [var for var in results if flow.depends[var] >> bit & 1]
        if len(reached) == 1 and horizon <= index and not is_complex(reached[0]):
            yield reached[0]
        horizon = max([horizon, *(last_use[var] for var in reached)])


def between(
    flow: Flow, env: Mapping[Var, jax.Array], starts: Sequence[Var], stops: Sequence[Var]
) -> Callable[..., list[jax.Array]]:
    """`stops` as a function of `starts`, everything that does not depend on them held fixed."""

    def function(*values):
        varying = dict(zip(starts, values, strict=True))
        for _, eqn, slots, results in flow.equations:
            if any(eqn.invars[slot] in varying for slot in slots):
                values = [varying[v] if isinstance(v, Var) and v in varying else read(env, v) for v in eqn.invars]
                out = dict(zip(eqn.outvars, apply(eqn, *values), strict=True))
                # A start may itself be computed from another one: it stays what it is given.
                varying |= {var: out[var] for var in results if var not in starts}
        return [varying[var] if var in varying else read(env, var) for var in stops]

    return function


def total_loss(flow: Flow, env: Mapping[Var, jax.Array], starts: Sequence[Var]) -> Callable[..., jax.Array]:
    """The sum of the losses as a function of `starts`."""
    losses = between(flow, env, starts, [flow.program.losses])
    return lambda *values: jnp.sum(losses(*values)[0])
