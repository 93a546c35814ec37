"""What a method is: a way to the diagonal of a Hessian, as a value.

A method is any object with

    estimate(objective, params, key) -> Estimate

which is all that `hessian_diag`, `with_hessian_diag` and `cblr` ask of it: users write their own. Beyond it, a method
may have

    stochastic                      whether it needs a key; `False` where it does not say
    explain(objective, params)      what it would do and what that costs, an `Explanation`, with nothing computed
    from_gradient(grad)             the diagonal from the gradient alone: then `with_hessian_diag` needs no loss
    mix(old, new, share)            how its average takes a new one, array by array; linearly where it does not say

Those of curvax are frozen dataclasses, checked when they are made.
"""

import abc
import dataclasses
import operator
from typing import Any, get_args

import jax

from curvax.checks import check_number
from curvax.curvature.estimate import Estimate
from curvax.curvature.micro_batches import mean_over_micro_batches
from curvax.curvature.scalar import aux_of, plain
from curvax.exact import Explanation
from curvax.keys import Key, as_key
from curvax.objective import Objective
from curvax.trees import check_real


@dataclasses.dataclass(frozen=True, repr=False)
class Method(abc.ABC):
    """What the methods of curvax share.

    Attributes:
      chunk_size: how many unit vectors, columns or probes share a pass. Memory grows with it, time falls. By default 16
        unit vectors, and one probe; of columns, so many as make 128 rows with the examples.
      micro_batches: into how many parts the batch is split (the largest divisor of its size up to this that leaves two
        examples in each), one after the other: memory falls in proportion, the result stays. The examples have to be
        independent, which is proved, and `predict` and `loss` treat them alike.
    """

    chunk_size: int | None = dataclasses.field(default=None, kw_only=True)
    micro_batches: int | None = dataclasses.field(default=None, kw_only=True)

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What the string is that stands for it, and the state of `with_hessian_diag` names it by."""

    @property
    def stochastic(self) -> bool:
        """Whether it draws random numbers."""
        return False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or type(None) not in get_args(field.type):
                self._check(field.name, value)

    def _check(self, name: str, value: Any) -> None:
        check_number(name, value, "[0, inf)" if name == "budget" else "[1, inf)", whole=True)
        if isinstance(value, jax.core.Tracer):
            raise ValueError(f"{name} is traced, and decides how much is computed; pass a number that is known before.")
        object.__setattr__(self, name, operator.index(value))

    def estimate(self, objective: Any, params: Any, key: Key | None = None) -> Estimate:
        """The diagonal of the Hessian of `objective` at `params`.

        Args:
          objective: an `Objective`, or any function `params -> scalar`.
          params: a tree of real arrays.
          key: of the stochastic methods.

        Returns:
          An `Estimate`.

        Raises:
          ValueError: as `hessian_diag`.
        """
        check_real(params)
        found = self._in_parts(plain(objective, params), params, as_key(key) if self.stochastic else None)
        return found._replace(aux=aux_of(objective, params, False))

    def explain(self, objective: Any, params: Any) -> Explanation:
        """What `estimate` would do, why, and at what cost; nothing is computed.

        Args:
          objective: an `Objective`, or any function `params -> scalar`.
          params: a tree of real arrays.

        Returns:
          An `Explanation`.

        Raises:
          ValueError: as `explain`.
        """
        return self._explain(plain(objective, params), params)

    def _in_parts(self, objective: Any, params: Any, key: Any) -> Estimate:
        """`estimate` by micro-batches."""
        parts = self.micro_batches or 1
        if parts == 1:
            return self._estimate(objective, params, key)
        if not isinstance(objective, Objective):
            raise ValueError(
                "micro_batches splits a batch, which a plain function does not show; pass a curvax.Objective, or leave"
                " micro_batches out."
            )
        part = lambda part, key: self._estimate(part, params, key)
        return mean_over_micro_batches(part, objective, params, key, parts)

    @abc.abstractmethod
    def _estimate(self, objective: Any, params: Any, key: Any) -> Estimate:
        """`estimate` of the whole batch at once, with a typed key, or None where the method draws nothing."""

    @abc.abstractmethod
    def _explain(self, objective: Any, params: Any) -> Explanation:
        """`explain` of an objective without other output."""

    def __repr__(self) -> str:
        fields = ((field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self))
        said = ", ".join(f"{name}={value!r}" for name, value, default in fields if value != default)
        return f"{type(self).__name__}({said})"
