"""What is true of every variable of a program, decided by two passes over its equations.

Backwards from the losses: along which axis does a slice of this variable reach the loss of its own example alone?
Forwards from the parameters: which of them does this variable depend on, and in which is it curved? Both follow
derivatives, so whatever passes only through comparisons, integers or `stop_gradient` is a constant.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

from curvax.exact.equations import callee, derivative, evaluate, form_of, read
from curvax.exact.indices import Counted, counted_dimensions
from curvax.exact.primitives import Axis, Form, differentiable_slots, form, pull_axis, record
from curvax.exact.trace import Program, flattened, live, trace
from curvax.objective import Objective

# None is the axis of a variable of which one entry may reach several examples, as a parameter's does.
Axes = Mapping[Var, Axis | None]
# How often an objective is differentiated; a rule may call functions that have rules.
ORDER = 2
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
        next_cut: for each variable but the losses, the first that every derivative from it to them passes through.
    """

    program: Program
    axes: Axes
    links: Sequence[tuple[Slots, Results]]
    rules: Mapping[int, "CustomRule"]
    depends: Mapping[Var, int]
    curved: Mapping[Var, int]
    next_cut: Mapping[Var, Var]

    @functools.cached_property
    def equations(self) -> list[tuple[int, JaxprEqn, Slots, Results]]:
        """Every equation with its place, and the operands and results that a derivative passes between."""
        pairs = zip(self.program.jaxpr.eqns, self.links, strict=True)
        return [(index, eqn, *link) for index, (eqn, link) in enumerate(pairs)]

    @functools.cached_property
    def traced(self) -> dict[Hashable, Callable]:
        """What is traced once for all operations that are alike."""
        return {}


def analyse(program: Program) -> Flow:
    """Both passes over a program."""
    seeds = {program.losses: Axis(0)} if isinstance(program.losses, Var) else {}
    counted = counted_dimensions(program.jaxpr, program.consts)
    axes, rules = _Backward(program.num_examples).follow(program.jaxpr, seeds, ORDER, counted)
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
    return Flow(program, axes, links, rules, depends, curved, _next_cuts(program, links))


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
    """What a `custom_jvp` does.

    Attributes:
        axes: of the operands that its derivative reads.
        curved: whether that derivative varies.
        tangents: those of its results, from all operands and the tangents of those that have one; None where the rule
            does not say everything.
    """

    axes: Mapping[int, Axis | None]
    curved: bool
    tangents: ClosedJaxpr | None = None


class _Backward:
    """Follows the example axis back through programs, and through the rules in them, each of which is read once."""

    def __init__(self, num_examples: int):
        self.num_examples = num_examples
        self._known: dict[Any, CustomRule] = {}

    def follow(
        self, jaxpr: Jaxpr, seeds: Axes, order: int, counted: Counted
    ) -> tuple[dict[Var, Axis | None], dict[int, CustomRule]]:
        """From `seeds`, the axes of some results, to every variable that a derivative connects to them.

        Args:
            jaxpr: a flat jaxpr.
            seeds: the axes of some of its results.
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
                rules[index] = self._rule(eqn, results, order)
                operands = rules[index].axes
            else:
                slots = differentiable_slots(eqn)
                operands = operand_axes(eqn, slots, results, self.num_examples, counted.get(index, {}))
            for slot, axis in operands.items():
                axes[eqn.invars[slot]] = meet(axes, eqn.invars[slot], axis)
        return axes, rules

    def _rule(self, eqn: JaxprEqn, results: Mapping[int, Axis | None], order: int) -> "CustomRule":
        # The equation is kept with its rule: what is gone may leave its address to another.
        params = tuple((name, id(value)) for name, value in eqn.params.items())
        key = params, tuple(atom.aval for atom in eqn.invars), tuple(results.items()), order
        if key not in self._known:
            self._known[key] = self._read(eqn, results, order), eqn
        return self._known[key][0]

    def _read(self, eqn: JaxprEqn, results: Mapping[int, Axis | None], order: int) -> "CustomRule":
        """Reads the rule itself, not the function: it is what JAX differentiates, once and again.

        The tangents that the rule returns are linear in those it is given. If no derivative connects them to the primal
        values, the function is piecewise linear as far as JAX can tell. A rule may call its own function (softmax
        does), and so on for ever; but a Hessian takes two derivatives, and the second needs the inner rule's tangents
        alone.
        """
        slots = differentiable_slots(eqn)
        if not order:
            return CustomRule(dict.fromkeys(slots), curved=True)
        closed, primals, tangents = rule_jaxpr(eqn, slots, linear_only=order == 1)
        jaxpr = closed.jaxpr
        values, out_tangents = jaxpr.outvars[: len(eqn.outvars)], jaxpr.outvars[len(eqn.outvars) :]
        if not all(_calls_itself(jaxpr, eqn, value) for value in values):
            return CustomRule(dict.fromkeys(slots), curved=True)
        seeds = {out_tangents[r]: axis for r, axis in results.items() if isinstance(out_tangents[r], Var)}
        axes, _ = self.follow(jaxpr, seeds, order - 1, {})
        operand_axes = {}
        for slot, *roles in zip(slots, primals, tangents, strict=True):
            for var in roles:
                if var in axes:
                    operand_axes[slot] = meet(operand_axes, slot, axes[var])
        pushed = live(ClosedJaxpr(jaxpr.replace(outvars=out_tangents), closed.consts))
        return CustomRule(operand_axes, any(var in axes for var in primals), pushed if order > 1 else None)


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


def meet(axes: Mapping[Any, Axis | None], key: Any, axis: Axis | None) -> Axis | None:
    """`axis`, if `key` has that axis or none yet."""
    return axis if axes.get(key, axis) == axis else None


def rule_jaxpr(eqn: JaxprEqn, slots: Sequence[int], *, linear_only: bool) -> tuple[ClosedJaxpr, list[Var], list[Var]]:
    """The rule, values then tangents, as a function of its primals and tangents, and which inputs are which.

    With `linear_only` derivatives are stopped at the primals, which then are constants.
    """

    def rule(operands, tangents):
        return derivative(eqn, slots)(jax.lax.stop_gradient(operands) if linear_only else operands, tangents)

    # Abstract values rather than shapes: they know over which axes of a `shard_map` they vary.
    operands = [atom.aval for atom in eqn.invars]
    closed = jax.make_jaxpr(rule)(operands, [operands[slot] for slot in slots])
    closed = flattened(closed)
    invars = closed.jaxpr.invars
    return closed, [invars[slot] for slot in slots], invars[len(operands) :]


def _calls_itself(jaxpr: Jaxpr, eqn: JaxprEqn, value: Var) -> bool:
    """Whether a rule finds its value by calling its own function, as `defjvps` does and all of JAX's rules do.

    A second derivative goes through the rule's value, and then obeys the rule again. Found otherwise it would obey
    the value's own derivative, which need not agree with the rule (in a straight-through estimator it does not).
    """
    inner = next((inner for inner in jaxpr.eqns if value in inner.outvars), None)
    if inner is None or inner.primitive is not eqn.primitive:
        return False
    one, other = callee(inner).jaxpr, callee(eqn).jaxpr
    same = [form_of(jaxpr.eqns, (*jaxpr.invars, *jaxpr.outvars)) for jaxpr in (one, other)]
    return (same[0] is not None and same[0] == same[1]) or str(one) == str(other)


def _link(eqn, axes, rule: CustomRule | None) -> tuple[Slots, Results]:
    results = tuple(var for var in eqn.outvars if var in axes)
    slots = differentiable_slots(eqn) if results else []
    return tuple(slot for slot in slots if rule is None or slot in rule.axes), results


def added_curvature(eqn: JaxprEqn, slots: Sequence[int], masks: Sequence[int], rule: CustomRule | None) -> int:
    """The parameters in which the equation itself is not known to be piecewise linear, as the bits of an integer."""
    if rule is not None:
        return _union(masks) if rule.curved else 0
    match form(eqn):
        case Form.LINEAR | Form.PIECEWISE | Form.CONSTANT:
            return 0
        case Form.BILINEAR:
            return masks[0] & masks[1] if len(masks) == 2 else 0
        case Form.QUOTIENT:
            return _union([mask for slot, mask in zip(slots, masks, strict=True) if slot != record(eqn).numerator])
    return _union(masks)


def _union(masks: Sequence[int]) -> int:
    return functools.reduce(operator.or_, masks, 0)


def _next_cuts(program: Program, links: Sequence[tuple[Slots, Results]]) -> dict[Var, Var]:
    """For each variable, the first that every derivative from it to the losses passes through.

    The immediate post-dominators: of a variable that several results are made of, the first that all of their own
    chains have in common.
    """
    cuts: dict[Var, Var] = {}
    depth = {program.losses: 0}

    def common(one: Var, other: Var) -> Var:
        while one is not other:
            one, other = (one, cuts[other]) if depth[one] < depth[other] else (cuts[one], other)
        return one

    for eqn, (slots, results) in reversed(list(zip(program.jaxpr.eqns, links, strict=True))):
        depth |= {var: depth[cuts[var]] + 1 for var in results if var is not program.losses}
        for var in (eqn.invars[slot] for slot in slots):
            cuts[var] = functools.reduce(common, results, cuts.get(var, results[0]))
    return cuts


def between(
    flow: Flow, env: Mapping[Var, jax.Array], starts: Sequence[Var], stops: Sequence[Var]
) -> Callable[..., list[jax.Array]]:
    """`stops` as a function of `starts`, everything that does not depend on them held fixed."""
    reached, path = set(starts), []
    for _, eqn, slots, results in flow.equations:
        if any(eqn.invars[slot] in reached for slot in slots):
            path.append(eqn)
            reached.update(results)
    # A start may itself be computed from another one: it stays what it is given. The rest of the environment too,
    # such as the results of these equations that have no derivative.
    fixed = {var: value for var, value in env.items() if var not in reached}

    def function(*values):
        varying = evaluate(path, fixed | dict(zip(starts, values, strict=True)))
        return [read(varying, var) for var in stops]

    return function


def total_loss(flow: Flow, env: Mapping[Var, jax.Array], starts: Sequence[Var]) -> Callable[..., jax.Array]:
    """The sum of the losses as a function of `starts`."""
    losses = between(flow, env, starts, [flow.program.losses])
    return lambda *values: jnp.sum(losses(*values)[0])


def piecewise_linear(objective: Objective, params: Any) -> bool:
    """Whether every array is proved to enter the outputs piecewise linearly while all the others stay.

    Formula:
        Then `d^2 outputs / d params_i^2 = 0`, and the Hessian of the mean loss has the diagonal of its Gauss-Newton
        matrix, also where the loss couples the examples.

    Args:
        objective: an `Objective`; its penalty is not looked at.
        params: a pytree of floating-point arrays.

    Returns:
        True if it is proved, else False.

    Raises:
        ValueError: if the loss does not return one value per example.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from curvax import Objective
        >>> from curvax.exact import piecewise_linear
        >>> square = lambda outputs, x: outputs**2
        >>> relu = Objective(lambda w, x: jax.nn.relu(x @ w), square, jnp.ones((4, 2)))
        >>> tanh = Objective(lambda w, x: jnp.tanh(x @ w), square, jnp.ones((4, 2)))
        >>> piecewise_linear(relu, jnp.ones(2)), piecewise_linear(tanh, jnp.ones(2))
        (True, False)
    """
    flow = analyse(trace(objective, params))
    return flow.program.nonlinear_backward is None and not any(flow.curved.get(var, 0) for var in flow.program.outputs)
