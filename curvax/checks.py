"""Checks of arguments, made where they are given."""

import numbers
from typing import Any

import jax
import numpy as np
import optax


def check_number(name: str, value: Any, interval: str, *, whole: bool = False) -> None:
    """Refuse an argument that is no number of an interval.

    Args:
      name: of the argument, for the message.
      value: a number of Python, NumPy or JAX. A traced one passes if it is a scalar: its value is not known yet.
      interval: such as `"[0, 1)"` or `"(0, inf)"`; a square bracket belongs to it, a round one does not.
      whole: whether integers are meant. Truth values are numbers nowhere, and 2.0 is no integer.

    Raises:
      ValueError: if `value` is no scalar number, is NaN, or is outside.

    Example:
      >>> from curvax.checks import check_number
      >>> check_number("decay", 1.0, "[0, 1)")
      Traceback (most recent call last):
      ValueError: decay=1.0 is out of range; pass a number in [0, 1).
    """
    if isinstance(value, jax.core.Tracer) and value.ndim == 0:
        return
    # `item` makes a number of Python of every scalar, the halves included, which NumPy does not count among the reals.
    number = value.item() if isinstance(value, np.generic | np.ndarray | jax.Array) and np.ndim(value) == 0 else value
    wanted = f"pass a {'whole ' * whole}number in {interval}."
    fits = isinstance(number, numbers.Integral if whole else numbers.Real) and not isinstance(number, bool)
    if not fits:
        raise ValueError(f"{name}={value!r} is no {'whole ' * whole}number; {wanted}")
    low, high = (float(end) for end in interval[1:-1].split(","))
    # What float32, in which it is computed, cannot tell from an open end is not inside.
    rounded = float(np.float32(float(number))) if not whole and abs(number) < 1e30 else number
    above = number >= low if interval[0] == "[" else rounded > low
    below = number <= high if interval[-1] == "]" else rounded < high
    if not (above and below):
        raise ValueError(f"{name}={value} is out of range; {wanted}")


def check_transformation(name: str, inner: Any) -> Any:
    """Refuse what is no optax transformation, such as the function that makes one.

    Args:
      name: of the argument, for the message.
      inner: what should have an `update`.

    Returns:
      A transformation that takes extra arguments. `MultiSteps.gradient_transformation()` drops them: the `MultiSteps`
      behind it, whose `update` it is.

    Raises:
      ValueError: if it has none.

    Example:
      >>> import optax
      >>> check_transformation("inner", optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation())
      <optax...MultiSteps object at ...>
    """
    if not hasattr(inner, "update"):
        raise ValueError(f"{name}={inner!r} is no optax transformation; call its factory, as in optax.sgd(0.1).")
    owner = getattr(inner.update, "__self__", None)
    return owner if isinstance(owner, optax.MultiSteps) else optax.with_extra_args_support(inner)
