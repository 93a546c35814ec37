"""Runs a program's methods, compares them with the truth, and reports what does not hold."""

import dataclasses
import functools
import os
import re
import traceback
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from tests.fuzz.programs import methods
from tests.fuzz.programs.build import Skip, Spec
from tests.fuzz.programs.spec import Program, write
from tests.fuzz.programs.truth import EPS, PERTURBATION, Matrix, Truth, is_fit, truth

# Standard errors by which a mean may be off.
ERRORS = 5.5
# Relative error that is rounding.
RTOL = {True: 1e-8, False: 1e-4}
HOME = os.path.dirname(curvax.__file__)
CURES = re.compile(
    r"\b(pass|choose|use|leave|raise|put|split|call|give|name|write|wrap|take|replace|reduce|return|make|add|set|keep|move)\b"
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that does not hold: of which program and method, of what kind, and in what words."""

    spec: Spec
    method: str
    kind: str
    words: str

    @property
    def key(self) -> tuple[str, ...]:
        """Findings with the same key are likely to be one: errors by their words, numbers by their method."""
        return (
            self.kind,
            re.sub(r"[\d.]+|'.*?'|\(.*?\)|=\S*", "", self.words)[:90] if "error" in self.kind else self.method,
        )


@dataclasses.dataclass
class Case:
    """A program ready to run: its text, its namespaces with and without 64 bits, and the truth."""

    spec: Spec
    program: Program
    namespace: dict[str, Any]
    truth: Truth


def prepare(spec: Spec) -> Case | None:
    """The case of a spec; None where the program is of no use, or JAX itself does not take it."""
    try:
        program = write(spec)
    except Skip:
        return None
    with jax.enable_x64(True):
        wide = execute(program.text)
    with jax.enable_x64(spec.double):
        namespace = wide if spec.double else execute(program.text)
        case = Case(spec, program, namespace, truth(spec, program.traits, wide, namespace))
        if not is_fit(case.truth):
            return None
        return case if "mesh" not in dict(spec.options) or _runs_on_mesh(case) else None


def _runs_on_mesh(case: Case) -> bool:
    """Whether the program has a gradient under an explicit mesh, where JAX wants every sharding to be said."""
    options, namespace = dict(case.spec.options), case.namespace
    if case.spec.plain:
        return False
    objective = dataclasses.replace(namespace["objective"], has_aux="has_aux" in options)

    def gradient(params, keys, data):
        return jax.grad(dataclasses.replace(objective, data=data), has_aux=objective.has_aux)(params)

    try:
        _called(gradient, options, namespace["params"], None, namespace["data"])
    except Exception:
        return False
    return True


def execute(text: str) -> dict[str, Any]:
    """The names that a program's text defines."""
    namespace: dict[str, Any] = {}
    exec(text, namespace)
    return namespace


def judge(case: Case, names: Sequence[str], repeats: int = methods.REPEATS) -> tuple[list[Finding], dict[str, str]]:
    """What does not hold of these methods, and for each of them what happened: "agrees", "refuses" or "fails"."""
    with jax.enable_x64(case.spec.double):
        results, errors = _results(case, names, repeats)
    findings, outcome = [], {}
    for name in names:
        if name in errors:
            found = _judge_error(case, name, errors[name])
        else:
            found = _judge_result(case, name, results[name])
            if found and found[0].kind == "biased" and repeats == methods.REPEATS:
                # One in a million of so many entries is off by chance: ask again, of more draws.
                found, _ = judge(case, [name], 16 * repeats)
        findings += found
        outcome[name] = "fails" if found else "refuses" if name in errors else "agrees"
    return findings, outcome


def _results(case: Case, names: Sequence[str], repeats: int) -> tuple[dict[str, Any], dict[str, Exception]]:
    objective, params = case.namespace["objective"], case.namespace["params"]
    written = dict(case.spec.options)
    options = {name: eval(written[name], case.namespace) for name in ("where", "has_aux") if name in written}
    keys = jax.random.split(jax.random.key(case.spec.seed), repeats)
    errors: dict[str, Exception] = {}
    # The data cross `jit` as an argument, or are constants of the compiled program.
    by_argument = (case.spec.seed % 2 == 0 or "mesh" in written) and not case.spec.plain

    def everything(params, keys, data):
        whole = dataclasses.replace(objective, data=data) if by_argument else objective
        results = {}
        for name in names:
            try:
                method = eval(methods.text(name, written), {"curvax": curvax})
                # The default is met inside an optimizer, half of the time.
                wrapped = name == "default" and case.spec.seed % 4 < 2
                call = functools.partial(methods.run, method, whole, keys=keys, options=options, wrapped=wrapped)
                results[name] = _mapped(call, params) if "vmap" in written else call(params)
            except Exception as error:
                errors[name] = error
        return results

    data = case.namespace["data"] if by_argument else None
    try:
        return jax.tree.map(np.asarray, _called(everything, written, params, keys, data)), errors
    except Exception as error:
        if len(names) == 1:
            return {}, {names[0]: error}
        parts = [_results(case, [name], repeats) for name in names]
        return {k: v for part in parts for k, v in part[0].items()}, {
            k: v for part in parts for k, v in part[1].items()
        }


def _mapped(call, params):
    """The call, of one of two equal sets of parameters."""
    both = jax.vmap(call)(jax.tree.map(lambda x: jnp.stack([x, x]), params))
    return jax.tree.map(lambda x: x[1], both)


def _called(function, written: dict[str, str], *arguments):
    """The function's result, compiled or not, and on an explicit mesh of two devices if the options say so."""
    compiled = function if "eager" in written else jax.jit(function)
    if "mesh" not in written:
        return compiled(*arguments)
    explicit = jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((2,), ("x",), axis_types=(explicit,), devices=jax.devices()[:2])
    params, keys, data = arguments
    with jax.set_mesh(mesh):
        data = jax.tree.map(lambda x: _over(mesh, x), data)
        return compiled(params, keys, data)


def _over(mesh, x):
    """Examples divided between the devices of a mesh; every array whose first axis allows it is one of examples."""
    divides = isinstance(x, jax.Array) and x.ndim and x.shape[0] and x.shape[0] % 2 == 0
    if not divides or x.dtype == np.uint32:
        return x
    return jax.device_put(x, jax.NamedSharding(mesh, jax.P("x")))


def _judge_error(case: Case, name: str, error: Exception) -> list[Finding]:
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if not frame.filename.startswith(HOME) or not isinstance(error, ValueError | TypeError):
        ours = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(HOME)]
        where = f"{os.path.relpath(ours[-1].filename, HOME)}:{ours[-1].lineno}" if ours else "?"
        return [Finding(case.spec, name, "raw error", f"{said} [{where}]")]
    if not CURES.search(str(error)):
        return [Finding(case.spec, name, "refusal without a cure", said)]
    options = dict(case.spec.options)
    allowed = methods.MAY_REFUSE.get(name, set()) | (methods.NOT_SPLIT if "micro_batches" in options else set())
    traits = case.program.traits | {"any loss", "unproved"} | ({"plain"} if case.spec.plain else set())
    if not allowed & traits:
        return [Finding(case.spec, name, "refuses without need (error)", said)]
    return []


def _judge_result(case: Case, name: str, result: Any) -> list[Finding]:
    found = _judge_form(case, result)
    if found is not None:
        return [Finding(case.spec, name, "form", found)]
    value, grad, diag, error = result[:4]
    chosen = _chosen(case, diag)
    diag, error = _flat(case, diag), None if error is None else _flat(case, error)
    failures = []
    for matrix in _matrices(case, name):
        wanted: Matrix = getattr(case.truth, matrix)
        kind, words = _compare(case, name, diag, error, Matrix(*(x[chosen] for x in wanted)), case.truth.rare[chosen])
        if kind is None:
            break
        failures.append((kind, f"{matrix}: {words}"))
    else:
        return [Finding(case.spec, name, failures[0][0], failures[0][1])]
    if value is not None and (bad := _off(case, value, _flat(case, grad), chosen)):
        return [Finding(case.spec, name, "value or gradient", bad)]
    return []


def _matrices(case: Case, name: str) -> tuple[str, ...]:
    """Those whose diagonal the method may have returned: of the default, what its explanation says."""
    if name != "default":
        return methods.METHODS[name][1]
    written = dict(case.spec.options)
    options = {key: eval(written[key], case.namespace) for key in ("where", "has_aux") if key in written}
    with jax.enable_x64(case.spec.double):
        said = curvax.explain(case.namespace["objective"], case.namespace["params"], None, **options).method
    return ("gauss_newton",) if said.startswith("GaussNewton") else ("hessian",)


def _judge_form(case: Case, result: Any) -> str | None:
    """Whether the diagonal is a tree like the parameters, of the dtype of statistics."""
    params = case.namespace["params"]
    hole = lambda x: isinstance(x, optax.MaskedNode)
    for tree in (result.diag, result.standard_error):
        if tree is None:
            continue
        if jax.tree.structure(jax.tree.map(lambda x: 0, tree, is_leaf=hole)) != jax.tree.structure(params):
            return f"a tree {jax.tree.structure(tree)} for parameters {jax.tree.structure(params)}"
        for got, like in zip(jax.tree.leaves(tree, is_leaf=hole), jax.tree.leaves(params), strict=True):
            if not hole(got) and (got.shape[1:], got.dtype) != (like.shape, like.dtype):
                return f"{got.dtype}{got.shape[1:]} for a parameter {like.dtype}{like.shape}"
    return None


def _chosen(case: Case, diag: Any) -> np.ndarray:
    """Which entries of the flat vectors the method returned."""
    hole = lambda x: isinstance(x, optax.MaskedNode)
    holes = [hole(x) for x in jax.tree.leaves(diag, is_leaf=hole)]
    sizes = [np.size(x) for x in jax.tree.leaves(case.namespace["params"])]
    return np.concatenate([np.full(n, not gone) for n, gone in zip(sizes, holes, strict=True)] or [np.ones(0, bool)])


def _flat(case: Case, tree: Any) -> np.ndarray:
    rows = [np.asarray(x, np.float64).reshape(len(x), -1) for x in jax.tree.leaves(tree)]
    return np.concatenate(rows, 1) if rows else np.zeros((1, 0))


def _tolerance(case: Case, wanted: Matrix) -> np.ndarray:
    double = case.spec.double
    eps = EPS[double]
    rtol = 1e-4 if "rounds" in case.program.traits else RTOL[double]
    spread = 1e3 * eps / PERTURBATION if double else 300 * eps / PERTURBATION
    if "rounds" in case.program.traits:
        eps, spread = EPS[False], 300 * EPS[False] / PERTURBATION
    return rtol * np.abs(wanted.diagonal) + 200 * eps * wanted.terms + spread * wanted.noise + wanted.floor + 1e-30


def _compare(case: Case, name: str, diag, error, wanted: Matrix, rare) -> tuple[str | None, str]:
    tolerance = _tolerance(case, wanted)
    mean, count = np.mean(diag, 0), len(diag)
    if not np.all(np.isfinite(diag)):
        return "not finite", _show(mean, wanted.diagonal, ~np.all(np.isfinite(diag), 0))
    if name in methods.DETERMINISTIC:
        off = np.abs(mean - wanted.diagonal) > tolerance
        return ("wrong", _show(mean, wanted.diagonal, off)) if off.any() else (None, "")
    # The products of a random vector round like the largest entry, also where an entry is zero.
    tolerance = tolerance + 50 * EPS[case.spec.double] * np.max(np.abs(wanted.diagonal), initial=0.0)
    spread = np.sqrt(np.var(diag, 0) / (count - 1))
    reported = spread if error is None else np.sqrt(np.mean(error**2, 0) / count)
    # What is reported may be larger than the spread, as where the parts of a batch differ, but no smaller.
    off = (np.abs(mean - wanted.diagonal) > ERRORS * spread + tolerance) & ~rare
    if off.any():
        return "biased", _show(mean, wanted.diagonal, off, spread)
    # The estimates that XDiag takes from one set of probes judge each other: its errors are rough.
    low = (spread > 3 * reported + tolerance) & ~rare
    if name != "xdiag" and low.any():
        return "standard error", _show(reported, spread, low)
    return None, ""


def _off(case: Case, value, grad, chosen) -> str:
    rtol = 1e-9 if case.spec.double and "rounds" not in case.program.traits else 1e-3
    scale = np.max(np.abs(case.truth.grad), initial=0.0) + abs(case.truth.value)
    # A loss that is nearly 0 is a difference of numbers of the order of 1.
    rounding = 10 * EPS["rounds" not in case.program.traits and case.spec.double]
    if not np.allclose(value, case.truth.value, rtol=rtol, atol=rtol * scale + rounding):
        return f"value {value[0]}, want {case.truth.value}"
    want = case.truth.grad[chosen]
    off = ~np.isclose(grad[0], want, rtol=rtol, atol=rtol * scale)
    return "gradient " + _show(grad[0], want, off) if off.any() else ""


def _show(got, want, off, width=None) -> str:
    i = int(np.argmax(np.where(off, np.abs(got - want) / (np.abs(want) + 1e-300), -1)))
    more = "" if width is None else f" (standard error {width[i]:.3g})"
    return f"entry {i}: got {got[i]:.9g}{more}, want {want[i]:.9g}; {int(off.sum())} of {off.size} entries off"
