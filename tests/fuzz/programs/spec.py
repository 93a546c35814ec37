"""Specs at random, and the text of a spec."""

import copy
import dataclasses
import random
import re
from collections.abc import Iterator

from tests.fuzz.programs.build import HEADER, Build, Choice, Skip, Spec, collect, write_params
from tests.fuzz.programs.pieces import (
    indexing,
    kernels,
    layers,
    loops,
    moves,
    odd_losses,
    other_losses,
    softmax_losses,
    transformed,
)
from tests.fuzz.programs.pieces.penalties import PENALTIES

WITH_PARAMETERS = collect(kernels, layers)
LAYERS = collect(kernels, layers, moves, indexing, loops, transformed)
LOSSES = collect(softmax_losses, other_losses, odd_losses)
FORMS = ((3,), (2,), (1,), (4,), (2, 3), (3, 2), (1, 2), (4, 1), (3, 3, 2), (2, 2, 1), (1, 1, 2), (3, 2, 4))
WHERE = (
    "lambda p: jax.tree.map(lambda w: w.ndim > 1, p)",
    "lambda p: jax.tree.map(lambda w: w.size < 5, p)",
)
EMPTY = ("jnp.zeros((0, 3))", "jnp.zeros(0)", "None", "{}", "jnp.ones(2)", "jnp.ones(())")


@dataclasses.dataclass(frozen=True)
class Program:
    """The text of a spec, in parts; `traits` are facts that decide what may be refused."""

    text: str
    traits: frozenset[str]
    layers: tuple[Choice, ...]
    num_parameters: int


def random_spec(seed: int) -> Spec:
    """The program of a seed: the first that fits together."""
    rng = random.Random(seed)
    while True:
        spec = _draw(seed, rng)
        try:
            write(spec)
        except Skip:
            continue
        return spec


def _draw(seed: int, rng: random.Random) -> Spec:

    def choice(names) -> Choice:
        return Choice(rng.choice(sorted(names)), rng.randrange(10**6))

    options = []
    if rng.random() < 0.2:
        options.append(("chunk_size", str(rng.choice((1, 2, 3, 50)))))
    if rng.random() < 0.12:
        options.append(("micro_batches", str(rng.choice((2, 3)))))
    if rng.random() < 0.1:
        options.append(("where", rng.choice(WHERE)))
    if rng.random() < 0.06:
        options.append(("has_aux", "True"))
    where = rng.random()
    options += [
        (name, "True") for name, at in (("mesh", 0.0), ("eager", 0.06), ("vmap", 0.1)) if at <= where < at + 0.05
    ]
    # Half of the pieces have parameters: without them there is nothing to differentiate.
    pieces = [choice(rng.choice((WITH_PARAMETERS, LAYERS))) for _ in range(rng.choice((1, 1, 2, 2, 3, 3, 4, 5)))]
    return Spec(
        seed=seed,
        batch=rng.choice((1, 2, 2, 3, 3, 4, 6)),
        form=rng.choice(FORMS),
        layers=tuple(pieces),
        loss=choice(LOSSES),
        penalty=choice(PENALTIES).name if rng.random() < 0.15 else None,
        style=rng.choice(("dict", "dict", "list", "odd", "named")),
        leaves=tuple(rng.sample(EMPTY, rng.choice((1, 2)))) if rng.random() < 0.1 else (),
        options=tuple(options),
        plain=rng.random() < 0.12,
        double=rng.random() < 0.8,
    )


def write(spec: Spec) -> Program:
    """The text; pieces that do not fit are left out.

    Raises:
        Skip: if the loss does not fit, or nothing is left to differentiate.
    """
    build, used = Build(spec), []
    x = f"normal({spec.seed % 1000}, {', '.join(map(str, build.shape))})"
    build.data["x"] = x
    build.emit('h = d["x"]')
    for piece in spec.layers:
        attempt = _apply(LAYERS[piece.name], piece.seed, build)
        if attempt is not None:
            build, used = attempt, [*used, piece]
    if not build.params:
        raise Skip
    before = build
    build = _apply(LOSSES[spec.loss.name], spec.loss.seed, before)
    if build is None:
        raise Skip
    return Program(_text(spec, build), frozenset(build.traits), tuple(used), build.num_parameters)


def _apply(piece, seed: int, build: Build) -> Build | None:
    attempt = copy.deepcopy(build)
    attempt.rng = random.Random(seed)
    try:
        piece(attempt)
    except Skip:
        return None
    return attempt


def _text(spec: Spec, build: Build) -> str:
    aux = ', {"mean": jnp.mean(h), "sizes": jnp.arange(2)}' if ("has_aux", "True") in spec.options else ""
    predict = ["def predict(p, d):", *_indent([*build.lines, f"return {build.result}{aux}"]), ""]
    loss = ["def loss(z, d):", *_indent(build.loss), ""]
    body = "\n".join(predict + loss)
    data = {name: text for name, text in build.data.items() if f'd["{name}"]' in body}
    penalty = []
    if spec.penalty is not None:
        penalty = ["def penalty(p):", f"    return {PENALTIES[spec.penalty]}", ""]
    lines = [
        HEADER,
        *build.helpers,
        *write_params(spec.style, [text for text, _ in build.params], spec.leaves),
        "data = {" + ", ".join(f'"{name}": {text}' for name, text in data.items()) + "}",
        "",
        *predict,
        *loss,
        *penalty,
        *_objective(spec),
    ]
    return "\n".join(lines) + "\n"


def _objective(spec: Spec) -> list[str]:
    if not spec.plain:
        return [f"objective = Objective(predict, loss, data{', penalty' if spec.penalty else ''})"]
    aux = ("has_aux", "True") in spec.options
    outputs = f"predict(p, data){'[0]' if aux else ''}"
    value = f"jnp.mean(loss({outputs}, data)){' + penalty(p)' if spec.penalty else ''}"
    return ["def objective(p):", f"    return {value}{', predict(p, data)[1]' if aux else ''}"]


def _indent(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]


def smaller(spec: Spec) -> Iterator[Spec]:
    """Specs with one choice less, the boldest first."""
    change = lambda **what: dataclasses.replace(spec, **what)
    if len(spec.layers) > 2:
        half = len(spec.layers) // 2
        yield change(layers=spec.layers[:half])
        yield change(layers=spec.layers[half:])
    for i in range(len(spec.layers)):
        yield change(layers=spec.layers[:i] + spec.layers[i + 1 :])
    if spec.penalty is not None:
        yield change(penalty=None)
    for i in range(len(spec.options)):
        yield change(options=spec.options[:i] + spec.options[i + 1 :])
    for i in range(len(spec.leaves)):
        yield change(leaves=spec.leaves[:i] + spec.leaves[i + 1 :])
    if spec.style != "dict":
        yield change(style="dict")
    if not spec.double:
        yield change(double=True)
    for i, piece in enumerate(spec.layers):
        if piece != Choice("dense", 1):
            yield change(layers=(*spec.layers[:i], Choice("dense", 1), *spec.layers[i + 1 :]))
    for loss in (Choice("squared", 1), Choice("cross_entropy", 4)):
        if spec.loss.name not in ("squared", "cross_entropy"):
            yield change(loss=loss)
    for batch in (1, 2, 3):
        if batch < spec.batch:
            yield change(batch=batch)
    for form in ((1,), (2,), (1, 2)):
        if len(form) < len(spec.form) or (len(form) == len(spec.form) and form < spec.form):
            yield change(form=form)


def trim(text: str) -> str:
    """The text without the helpers that it does not call."""
    for name in ("normal", "integers", "bools"):
        if len(re.findall(rf"\b{name}\(", text)) == 1:
            text = re.sub(rf"def {name}\(.*?\n\n", "", text, flags=re.S)
    return text
