"""One step of an example, and what holds of every step: nothing is raised, and trees keep their form."""

import os
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvax
from tests.fuzz.trees.examples import HEADER, Example, needs_curvature

HOME = os.path.dirname(curvax.__file__)


class Broken(AssertionError):
    """Something that must hold does not; its words say what."""


class Ran:
    """An example that was run: its trees, its state before and after, and its update."""

    def __init__(self, example: Example):
        self.example = example
        names: dict[str, Any] = {}
        exec(HEADER, names)
        with silenced():
            self.w, self.g, self.h = (eval(example.tree(which), names) for which in "wgh")
        self.tx = eval(example.transformation, names)
        self.extra = {"hessian_diag": self.h} if needs_curvature(example.name) else {}
        self.updates, self.before, self.after = self.step(self.tx, self.g)

    def step(self, tx, g, **extra):
        """`(updates, state before, state after)` of one step."""
        before = tx.init(self.w)
        updates, after = tx.update(g, before, self.w, **{**self.extra, **extra})
        return updates, before, after


def run(example: Example) -> Ran | None:
    """The step of an example; None where the example is one of the few that are rightly refused."""
    try:
        return Ran(example)
    except Exception as error:
        innermost = traceback.extract_tb(error.__traceback__)[-1].filename
        is_complex = any(leaf.dtype == "complex64" for leaf in example.leaves)
        if (
            needs_curvature(example.name)
            and is_complex
            and isinstance(error, ValueError)
            and innermost.startswith(HOME)
        ):
            return None
        raise Broken(said(error)) from error


def said(error: Exception) -> str:
    """An error in a line."""
    return f"raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def check_form(updates, g, before, after) -> None:
    """Updates are like gradients, and the state stays as it was made."""
    if _form(updates) != _form(g):
        raise Broken(f"updates have the form {_form(updates)}, gradients {_form(g)}")
    if _form(before) != _form(after):
        raise Broken(f"the state was {_form(before)}, and is {_form(after)}")


def _form(tree):
    return jax.tree.structure(tree), [(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)]


def silenced():
    """Overflow is what is tried."""
    return np.errstate(all="ignore")


def leaves(tree) -> list[np.ndarray]:
    """The leaves as NumPy has them."""
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def wide(x: np.ndarray) -> np.ndarray:
    """The same numbers in the widest floats."""
    return x.astype(np.clongdouble) if np.iscomplexobj(x) else x.astype(np.float64).astype(np.longdouble)


def check_same(want, got, rtol: float, words: str) -> None:
    """Two trees agree; small entries to the rounding of the large ones beside them, unless bit by bit."""
    for i, (x, y) in enumerate(zip(leaves(want), leaves(got), strict=True)):
        with silenced():
            a, b = wide(x), wide(y)
            largest = np.max(np.abs(a[np.isfinite(a)]), initial=0.0)
            same = (a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= rtol * largest + 4 * tiny(x.dtype))
        if not same.all():
            raise Broken(f"leaf {i}: {y.tolist()} {words}, {x.tolist()} without")


def tiny(dtype) -> float:
    """The smallest normal number."""
    return float(jnp.finfo(dtype).tiny)
