"""Tries programs one after the other, shrinks what fails, and tells each kind of failure once."""

import collections
import dataclasses
import random
from collections.abc import Callable, Sequence

import jax

from tests.fuzz.programs import methods
from tests.fuzz.programs.build import Spec
from tests.fuzz.programs.judge import Case, Finding, judge, prepare
from tests.fuzz.programs.spec import random_spec, smaller, trim

# Programs tried for one finding, before the smallest so far is told.
ATTEMPTS = 40
# XLA's programs stay in memory; every so many of ours they go.
FORGET = 25


@dataclasses.dataclass
class Tally:
    """What happened so far: programs, methods by outcome, findings that were told, and those like them."""

    programs: int = 0
    unfit: int = 0
    outcomes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    told: list[tuple[Finding, frozenset[str]]] = dataclasses.field(default_factory=list)
    alike: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def line(self) -> str:
        """One line of counts."""
        names = sorted({name for name, _ in self.outcomes})
        rows = [
            f"{name} {'/'.join(str(self.outcomes[name, o]) for o in ('agrees', 'refuses', 'fails'))}" for name in names
        ]
        return (
            f"programs: {self.programs} ({self.unfit} unfit), agrees/refuses/fails: {', '.join(rows) or 'none'};"
            f" {len(self.told)} findings, {sum(self.alike.values())} like them"
        )


def search(seed: int, examples: int, only: Sequence[str], tell: Callable[[str], None]) -> Tally:
    """Programs of the seeds `seed, seed + 1, ...`; `only` are the methods to try, all of them if it is empty."""
    tally = Tally()
    for number in range(seed, seed + examples):
        case = _prepared(number, tell)
        tally.programs += 1
        if case is None:
            tally.unfit += 1
        else:
            findings, outcome = judge(case, _methods(case.spec, only))
            tally.outcomes.update(outcome.items())
            for finding in findings:
                _note(tally, case, finding, tell)
        if tally.programs % FORGET == 0:
            jax.clear_caches()
            tell(tally.line())
    return tally


def _prepared(seed: int, tell) -> Case | None:
    try:
        return prepare(random_spec(seed))
    except Exception as error:
        # A fault of the fuzzer's: a program that JAX itself does not take.
        tell(f"# seed {seed} is no program: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return None


def _methods(spec: Spec, only: Sequence[str]) -> list[str]:
    """`exact` and the default, which most people meet, always; of the others a few."""
    if only:
        return list(only)
    if "eager" in dict(spec.options):
        # Without `jit` every operation is compiled alone: dear, so that a few programs have to do.
        return ["exact"]
    seed = spec.seed
    rng = random.Random(seed)
    return [name for name in methods.METHODS if name in ("exact", "default") or rng.random() < 0.35]


def _note(tally: Tally, case: Case, finding: Finding, tell) -> None:
    if any(finding.key == other.key and parts <= features(case) for other, parts in tally.told):
        tally.alike[finding.key] += 1
        return
    case, finding = shrink(case, finding)
    parts = frozenset() if "error" in finding.kind else features(case)
    if any(finding.key == other.key and found <= parts for other, found in tally.told):
        tally.alike[finding.key] += 1
        return
    tally.told.append((finding, parts))
    tell(describe(case, finding))


def features(case: Case) -> frozenset[str]:
    """The names of what a program is made of."""
    spec = case.spec
    names = [piece.name for piece in case.program.layers] + [spec.loss.name, *(name for name, _ in spec.options)]
    names += [spec.penalty] if spec.penalty else []
    return frozenset(names)


def shrink(case: Case, finding: Finding) -> tuple[Case, Finding]:
    """The smallest program found, by dropping one choice after the other, that fails in the same way."""
    attempts, tried = ATTEMPTS, {case.program.text}
    found = True
    while found and attempts:
        found = False
        for spec in smaller(dataclasses.replace(case.spec, layers=case.program.layers)):
            if attempts == 0:
                break
            attempts -= 1
            again = _fails(spec, finding, tried)
            if again is not None:
                (case, finding), found = again, True
                break
    return case, finding


def _fails(spec: Spec, finding: Finding, tried: set[str]) -> tuple[Case, Finding] | None:
    try:
        case = prepare(spec)
    except Exception:
        # Dropped pieces may leave a program that is none.
        return None
    if case is None or case.program.text in tried:
        return None
    tried.add(case.program.text)
    same = [other for other in judge(case, [finding.method])[0] if other.key == finding.key]
    return (case, same[0]) if same else None


def describe(case: Case, finding: Finding) -> str:
    """The finding, as a program that shows it."""
    spec = case.spec
    written = dict(spec.options)
    options = "".join(f", {name}={written[name]}" for name in ("where", "has_aux") if name in written)
    method = methods.text(finding.method, written, 1000)
    drawn = "" if finding.method in methods.DETERMINISTIC else ", key=0"
    call = [f"print(curvax.hessian_diag(objective, params, {method}{drawn}{options}))"]
    dense = [
        "flat, unflatten = jax.flatten_util.ravel_pytree(params)",
        "print(unflatten(jnp.diag(jax.hessian(lambda flat: objective(unflatten(flat)))(flat))))",
    ]
    aux = ("has_aux", "True") in spec.options
    return "\n".join(
        [
            f"# {finding.kind} of {finding.method}, seed {spec.seed}: {finding.words}",
            "import curvax, jax",
            *(["jax.config.update('jax_enable_x64', True)"] if spec.double else []),
            trim(case.program.text),
            *call,
            *([] if aux or "gauss_newton" in finding.words else dense),
            "",
        ]
    )
