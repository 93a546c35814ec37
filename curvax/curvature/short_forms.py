"""Strings that stand for methods, and options beside them for their fields.

`"hutchinson", num_samples=4` is `Hutchinson(num_samples=4)`, and `None` is `Auto()`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from curvax.curvature.hutchinson import Hutchinson
from curvax.curvature.method import Method
from curvax.curvature.methods import Auto, Basis, Exact, GaussNewton, SquaredGradients
from curvax.curvature.xdiag import XDiag

SHORT: Mapping[str | None, Callable[..., Method | SquaredGradients]] = {
    "exact": Exact,
    "basis": Basis,
    "ggn": GaussNewton,
    "ggn_mc": lambda num_samples=1, **options: GaussNewton(num_samples, **options),
    "hutchinson": Hutchinson,
    "xdiag": XDiag,
    "squares": SquaredGradients,
    None: Auto,
}


def as_method(method: Any, options: Mapping[str, Any]) -> Any:
    """The method that a string and options stand for; a method as it is.

    Args:
      method: a string of `SHORT`, `None` for `Auto`, or a method.
      options: fields of the method for which a string stands.

    Returns:
      A method.

    Raises:
      ValueError: if it is unknown, an option is not one of its, or is out of range.

    Example:
      >>> from curvax.curvature.short_forms import as_method
      >>> as_method("ggn_mc", {"num_samples": 3})
      GaussNewton(num_samples=3)
    """
    if method is None or isinstance(method, str):
        return _made(method, options)
    if isinstance(method, type) or not callable(getattr(method, "estimate", None)):
        raise ValueError(
            f"method={method!r} is no method; pass {_names()}, or an object with estimate(objective, params, key), as"
            " curvax.Hutchinson(num_samples=4) makes one: a class has to be called."
        )
    if options:
        raise ValueError(
            f"{_list(options)} cannot stand beside method={method!r}, which has its own options: give them to the"
            " method when it is made."
        )
    return method


def _made(method: str | None, options: Mapping[str, Any]) -> Method | SquaredGradients:
    if method not in SHORT:
        raise ValueError(f"method={method!r} is unknown; pass {_names()}, or a method such as curvax.Exact().")
    fields = [field.name for field in dataclasses.fields(SHORT[method]())]
    if method == "ggn":
        fields = [name for name in fields if name not in ("num_samples", "squares")]
    unknown = [name for name in options if name not in fields]
    if unknown:
        more = "; 'ggn_mc' takes it" if set(unknown) <= {"num_samples", "squares"} and method == "ggn" else ""
        raise ValueError(f"method={method!r} takes no {_list(unknown)}{more}; its options are {', '.join(fields)}.")
    return SHORT[method](**options)


def _names() -> str:
    return f"one of {', '.join(repr(name) for name in SHORT if name)}, or None"


def _list(names: Any) -> str:
    return ", ".join(f"{name}=..." for name in names)


def needs_key(method: Any) -> bool:
    """Whether a method draws random numbers."""
    return bool(getattr(method, "stochastic", False))
