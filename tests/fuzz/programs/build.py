"""A random program as text: what was chosen, and the readable source that follows from it.

A `Spec` holds choices, not text, so that a program is shrunk by dropping a choice and writing it anew. Every piece
draws from a generator of its own, and so does every array: what stays, stays as it was.
"""

import dataclasses
import math
import random
from collections.abc import Callable

HEADER = """\
import jax, jax.numpy as jnp, numpy as np, optax
from jax import lax
from curvax import Objective

def normal(seed, *shape, scale=1.0):
    draws = scale * np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(np.asarray(np.asarray(draws, np.float32), float))

def integers(seed, high, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(high, size=shape))

def bools(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(2, size=shape) == 1)
"""
# More parameters than this make the dense Hessian dear, more numbers in an example the program.
PARAMETERS, FEATURES = 48, 40


class Skip(Exception):
    """Raised by a piece that does not fit what has been built so far."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A piece by name, and the seed of what it draws."""

    name: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Spec:
    """All that determines a program's text."""

    seed: int
    batch: int
    form: tuple[int, ...]
    layers: tuple[Choice, ...]
    loss: Choice
    penalty: str | None = None
    style: str = "dict"
    leaves: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    plain: bool = False
    double: bool = True


class Build:
    """The program while it is written: the tensor `h` that has been reached, and what the text needs so far."""

    def __init__(self, spec: Spec):
        self.spec, self.rng = spec, random.Random(spec.seed)
        self.shape = (spec.batch, *spec.form)
        self.lines: list[str] = []
        self.helpers: list[str] = []
        self.params: list[tuple[str, tuple[int, ...]]] = []
        self.data: dict[str, str] = {}
        self.traits: set[str] = set()
        self.names = 0
        self.result = "h"
        self.loss: list[str] = []

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def features(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.params)

    def need(self, *conditions: bool) -> None:
        if not all(conditions):
            raise Skip

    def number(self) -> int:
        return self.rng.randrange(1000)

    def pick(self, *options):
        return self.rng.choice(options)

    def maybe(self, share: float = 0.5) -> bool:
        return self.rng.random() < share

    def name(self, stem: str) -> str:
        self.names += 1
        return f"{stem}{self.names}"

    def emit(self, *lines: str) -> None:
        self.lines.extend(lines)

    def param(self, *shape: int, scale: float | None = None, text: str | None = None) -> str:
        """A new parameter array; the expression that reads it."""
        self.need(self.num_parameters + math.prod(shape) <= PARAMETERS)
        scale = round((math.prod(shape[:-1]) or 1) ** -0.5, 2) if scale is None else scale
        arguments = "".join(f", {n}" for n in shape)
        self.params.append((text or f"normal({self.number()}{arguments}, scale={scale})", shape))
        return read_param(self.spec.style, len(self.params) - 1)

    def datum(self, text: str) -> str:
        """A new entry of the data; the expression that reads it."""
        name = self.name("d")
        self.data[name] = text
        return f'd["{name}"]'

    def normal(self, *shape: int) -> str:
        """Data of one row per example."""
        arguments = "".join(f", {n}" for n in shape)
        return self.datum(f"normal({self.number()}, {self.batch}{arguments})")

    def integers(self, high: int, *shape: int) -> str:
        arguments = "".join(f", {n}" for n in shape)
        return self.datum(f"integers({self.number()}, {high}, {self.batch}{arguments})")

    def bools(self, *shape: int) -> str:
        arguments = "".join(f", {n}" for n in shape)
        return self.datum(f"bools({self.number()}, {self.batch}{arguments})")

    def became(self, *shape: int, most: int = FEATURES) -> None:
        """Declares the shape of `h` from here on."""
        self.need(math.prod(shape[1:]) <= most)
        self.shape = shape


Piece = Callable[[Build], None]


def collect(*modules: object) -> dict[str, Piece]:
    """The public functions of these modules: pieces by name."""
    return {
        name: piece
        for module in modules
        for name, piece in vars(module).items()
        if callable(piece) and not name.startswith("_") and getattr(piece, "__module__", "") == module.__name__
    }


def read_param(style: str, index: int) -> str:
    """The expression that reads a parameter, by the way the tree is nested."""
    if style == "dict":
        return f'p["w{index}"]'
    if style == "list":
        return f"p[{index}]"
    if style == "odd":
        return f'p["a/b"][{index // 2}]' if index % 2 else f'p["a"]["b"]["{index // 2}.value"]'
    if style == "named":
        return f"p.first[{index // 2}]" if index % 2 else f'p.second["w{index // 2}"]'
    raise ValueError(style)


def write_params(style: str, texts: list[str], extra: tuple[str, ...]) -> list[str]:
    """The lines that make the tree of parameters; `extra` are leaves and nodes that nothing reads."""
    even, odd = texts[0::2], texts[1::2]
    rest = [f'"rest{i}": {text}' for i, text in enumerate(extra)]
    if style == "dict":
        return ["params = {" + ", ".join([f'"w{i}": {text}' for i, text in enumerate(texts)] + rest) + "}"]
    if style == "list":
        return ["params = [" + ", ".join([*texts, *extra]) + "]"]
    if style == "odd":
        inner = ", ".join(f'"{i}.value": {text}' for i, text in enumerate(even))
        return [
            "params = {" + ", ".join(['"a": {"b": {' + inner + "}}", f'"a/b": [{", ".join(odd)}]', *rest]) + "}",
        ]
    inner = ", ".join([f'"w{i}": {text}' for i, text in enumerate(even)] + rest)
    return [
        "import typing",
        "Params = typing.NamedTuple('Params', [('first', tuple), ('second', dict)])",
        f"params = Params(({''.join(text + ', ' for text in odd)}), {{{inner}}})",
    ]
