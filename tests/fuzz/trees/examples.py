"""Hypothesis draws a transformation, a tree of parameters and gradients, and a property to hold, all as text."""

import dataclasses
import math
import typing

import jax
import numpy as np
from hypothesis import strategies as st

HEADER = """\
import curvax, jax, jax.numpy as jnp, numpy as np
from numpy import inf, nan
from tests.fuzz.trees.examples import Pair, Point

def a(values, dtype, *shape):
    wide = np.array(values, complex if dtype.startswith("c") else float)
    return jnp.asarray(wide.astype(jnp.dtype(dtype)).reshape(shape))
"""


class Point(typing.NamedTuple):
    """A tuple with names."""

    kernel: object
    bias: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    """A dataclass that JAX knows as a tree."""

    first: object
    second: object


SHAPES = ((), (1,), (3,), (2, 2), (3, 1), (1, 3), (0,), (2, 0), (3, 1, 1), (4,), (2, 3))
DTYPES = ("float32", "float16", "bfloat16", "float64", "complex64")
# What examples of few forms are made of: less is compiled for them.
FEW_SHAPES, FEW_DTYPES = ((), (3,), (2, 2)), ("float32", "bfloat16")
MODES = ("values", "zero", "scale", "wrapped", "compiled")
# At the ends of the range, and where squares and quotients leave it.
ENDS = (
    0.0,
    -0.0,
    1e-45,
    1e-40,
    1e-37,
    1e-30,
    1e-20,
    1e19,
    1e20,
    1e30,
    3e38,
    65504.0,
    6e-8,
    math.inf,
    -math.inf,
    math.nan,
)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of parameters, with its gradient and curvature."""

    shape: tuple[int, ...]
    dtype: str
    w: tuple[complex, ...]
    g: tuple[complex, ...]
    h: tuple[float, ...]

    def text(self, which: str) -> str:
        values, dtype = getattr(self, which), self.dtype
        if which == "h":
            dtype = "float64" if dtype == "float64" else "float32"
        shape = "".join(f", {n}" for n in self.shape)
        return f'a([{", ".join(map(str, values))}], "{dtype}"{shape})'


@dataclasses.dataclass(frozen=True)
class Example:
    """A transformation by name, with its arguments, on a tree whose leaves are the numbers in `shape`."""

    name: str
    arguments: str
    structure: str
    leaves: tuple[Leaf, ...]
    mode: str
    detail: str
    wide: bool

    def tree(self, which: str) -> str:
        """The text of the tree of parameters (`w`), gradients (`g`) or curvature (`h`)."""
        return self.structure.format(*(leaf.text(which) for leaf in self.leaves))

    @property
    def transformation(self) -> str:
        return f"curvax.{self.name}({self.arguments})"

    def text(self) -> str:
        """The program of the example."""
        curved = ", hessian_diag=h" if needs_curvature(self.name) else ""
        lines = [
            HEADER,
            *(["jax.config.update('jax_enable_x64', True)"] if self.wide else []),
            f"w = {self.tree('w')}",
            f"g = {self.tree('g')}",
            *([f"h = {self.tree('h')}"] if curved else []),
            f"tx = {self.transformation}",
            f"print(tx.update(g, tx.init(w), w{curved})[0])",
            f"# {self.mode} {self.detail}".rstrip(),
        ]
        return "\n".join(lines) + "\n"


def needs_curvature(name: str) -> bool:
    return name in ("scale_by_curvature_radius", "cblr")


_LAYERS = ("array", "array", "module", "kernel")


@st.composite
def _arguments(draw, name: str) -> str:
    """Arguments under which a transformation is tried."""
    layers = f"layers={draw(st.sampled_from(_LAYERS))!r}"
    if draw(st.integers(0, 5)) == 5:
        layers = 'layers={".*": "all"}'
    return {
        "scale_by_lars": lambda: draw(st.sampled_from(["", "trust_coefficient=0.001, ", "eps=0.5, "])) + layers,
        "scale_by_percent_delta": lambda: layers,
        "scale_by_median_curvature": lambda: (
            draw(st.sampled_from(["", "median_of_ratios=True, ", "trust_coefficient=0.5, "])) + layers
        ),
        "scale_by_approximate_radius": lambda: draw(st.sampled_from(["", "max_radius=2.0"])),
        "scale_by_curvature_radius": lambda: (
            draw(st.sampled_from(["", "damping=0.5, ", "slope_term=False, ", "max_radius=4.0, "])) + layers
        ),
        "discard_small_gradients": lambda: draw(st.sampled_from(["0.5, ", "0.0, ", "0.3, ", "0.99, "])) + layers,
        "lars": lambda: draw(st.sampled_from(["0.5", "0.5, weight_decay=0.25", "0.5, momentum=0.0, nesterov=True"])),
        "mclr": lambda: draw(st.sampled_from(["0.5", "0.5, weight_decay=0.25"])),
        "percent_delta": lambda: draw(st.sampled_from(["0.5", "0.5, weight_decay=0.25"])),
        "lamb": lambda: draw(st.sampled_from(["0.5", "0.5, weight_decay=0.25"])),
        "cblr": lambda: (
            "0.5, eigenbasis=False"
            + draw(
                st.sampled_from(["", ", orthogonal=False, norm_ratio=False", ", orthogonal=False, weight_decay=0.25"])
            )
        ),
    }[name]()


NAMES = (
    "scale_by_lars",
    "scale_by_percent_delta",
    "scale_by_median_curvature",
    "scale_by_approximate_radius",
    "scale_by_curvature_radius",
    "discard_small_gradients",
    "lars",
    "mclr",
    "percent_delta",
    "lamb",
    "cblr",
)

_numbers = st.one_of(
    st.sampled_from([1.0, -1.0, 0.5, -2.0, 0.0, 3.0, 0.25, -0.75, 1.5]),
    st.floats(-4, 4, width=32).map(lambda x: float(np.float32(x))),
)


def _entries(size: int, dtype: str, ends: bool):
    def fits(x):
        return complex(x, 0.5 * x) if dtype.startswith("c") and math.isfinite(x) else float(x)

    one = st.one_of(_numbers, st.sampled_from(ENDS)) if ends else _numbers
    return st.lists(one.map(fits), min_size=size, max_size=size).map(tuple)


@st.composite
def _leaf(draw, ends: bool, wide: bool, few: bool) -> Leaf:
    shape = draw(st.sampled_from(FEW_SHAPES if few else SHAPES))
    dtypes = FEW_DTYPES if few else DTYPES
    dtype = draw(st.sampled_from(dtypes if wide else [d for d in dtypes if d != "float64"]))
    size = math.prod(shape)
    w, g = draw(_entries(size, dtype, ends)), draw(_entries(size, dtype, ends))
    return Leaf(shape, dtype, w, g, draw(_entries(size, "float32", ends)))


def _structures():
    """Texts with a `{}` for each leaf, of any nesting."""
    leaf = st.just("{}")
    keys = st.sampled_from(["a", "a/b", "kernel", "bias", "w.value", "", "0", "é", "scale"])

    def inner(children):
        dictionary = st.dictionaries(keys, children, min_size=1, max_size=3).map(
            lambda d: "{{" + ", ".join(f"{k!r}: {v}" for k, v in d.items()) + "}}"
        )
        numbered = st.lists(children, min_size=1, max_size=2).map(
            lambda v: "{{" + ", ".join(f"{i}: {x}" for i, x in enumerate(v)) + "}}"
        )
        several = st.lists(st.one_of(children, st.just("None")), max_size=3)
        return st.one_of(
            dictionary,
            numbered,
            several.map(lambda v: "[" + ", ".join(v) + "]"),
            several.map(lambda v: "(" + "".join(x + ", " for x in v) + ")"),
            st.tuples(children, children).map(lambda v: f"Point({v[0]}, {v[1]})"),
            st.tuples(children, children).map(lambda v: f"Pair({v[0]}, {v[1]})"),
        )

    return st.recursive(leaf, inner, max_leaves=5)


@st.composite
def examples(draw, name: str, few: bool = False) -> Example:
    """An example of a transformation; `few` keeps to a few forms of arrays."""
    mode = draw(st.sampled_from(MODES))
    wide = draw(st.booleans()) and not few
    structure = draw(_structures()) if mode != "compiled" else draw(st.sampled_from(FIXED))[0]
    count = structure.count("{}")
    ends = mode == "values" and draw(st.booleans())
    if mode == "compiled":
        shapes = dict(FIXED)[structure]
        leaves = tuple(draw(_fixed_leaf(shape, dtype)) for shape, dtype in shapes)
        wide = False
    else:
        leaves = tuple(draw(_leaf(ends, wide, few)) for _ in range(count))
    detail = draw(st.sampled_from(DETAILS[mode]))
    return Example(name, draw(_arguments(name)), structure, leaves, mode, detail, wide)


@st.composite
def _fixed_leaf(draw, shape, dtype) -> Leaf:
    size = math.prod(shape)
    return Leaf(shape, dtype, *(draw(_entries(size, dtype, False)) for _ in range(3)))


# Trees whose compiled functions are shared by all examples.
FIXED = (
    (
        "{{'dense': {{'kernel': {}, 'bias': {}}}, 'a/b': [{}]}}",
        (((2, 3), "float32"), ((3,), "float32"), ((4,), "float32")),
    ),
    ("Pair(Point({}, {}), ({}, None))", (((2, 2), "bfloat16"), ((), "float32"), ((0,), "float32"))),
    ("({}, {{'x': {}}})", (((4, 2), "float16"), ((4,), "float32"))),
)
DETAILS = {
    "values": ("",),
    "zero": ("",),
    "scale": tuple(str(k) for k in (-12, -3, 1, 5, 12)),
    "wrapped": (
        "chain",
        "named_chain",
        "masked",
        "partition",
        "inject_hyperparams",
        "MultiSteps",
        "apply_if_finite",
        "flatten",
        "with_probes",
        "skip_not_finite",
        "with_hessian_diag",
    ),
    "compiled": ("jit", "vmap", "scan", "donate", "mesh", "derivative"),
}
