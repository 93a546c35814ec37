"""A `value_fn` as the line searches of optax want it.

They pass it those of the extra arguments that are in its signature, and refuse whatever is left over. So the curvature
that a line search is handed, and does not look at, has to be in that signature.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def bound(value_fn: Callable[..., Any], extra_args: Mapping[str, Any]) -> Callable[..., Any]:
    """`value_fn` as a function of the parameters alone, with its other arguments from `extra_args`."""
    wanted = {name: extra_args[name] for name in _parameters(value_fn) if name in extra_args}
    return functools.partial(value_fn, **wanted) if wanted else value_fn


def tolerant(value_fn: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """`value_fn`, whose signature has these keywords too; they are ignored."""
    known = _parameters(value_fn)
    names = [name for name in names if name not in known]
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]

    def value(*args: Any, **kwargs: Any) -> Any:
        return value_fn(*args, **{name: x for name, x in kwargs.items() if name not in names})

    last = [parameter for parameter in known.values() if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    others = [parameter for parameter in known.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    signature = inspect.Signature([*others, *more, *last])
    value.__signature__ = signature  # type: ignore[attr-defined]  # What inspect looks for first.
    return value


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters
