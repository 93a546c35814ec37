"""Ways to the diagonal of a Hessian, as values.

A method is any object with

    estimate(objective, params, key) -> Estimate

which is all that `hessian_diag`, `with_hessian_diag` and `cblr` ask of it: users write their own. Those of curvax are
frozen dataclasses, checked when they are made. A string stands for one of them, and options beside the string for its
fields: `"hutchinson", num_samples=4` is `Hutchinson(num_samples=4)`. Beyond `estimate`, a method may have

    stochastic                      whether it needs a key; `False` where it does not say
    explain(objective, params)      what it would do and what that costs, an `Explanation`, with nothing computed
"""

import abc
import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from curvax.checks import check_number
from curvax.curvature.basis import basis
from curvax.curvature.estimate import Estimate, check_real
from curvax.curvature.gauss_newton import explain_sampling, plan_sampling, sampled_gauss_newton
from curvax.curvature.hutchinson import hutchinson
from curvax.curvature.micro_batches import mean_over_micro_batches
from curvax.curvature.products import product_matrix
from curvax.curvature.xdiag import xdiag
from curvax.exact import BUDGET, Explanation, exact_diag, explain, explain_ggn, explain_products, ggn_diag
from curvax.exact.diagonals import check_objective
from curvax.keys import Key, as_key
from curvax.objective import Objective


@dataclasses.dataclass(frozen=True, repr=False)
class Method(abc.ABC):
    """What the methods of curvax share.

    Attributes:
      chunk_size: how many unit vectors, columns or probes share a pass. Memory grows with it, time falls. By default 16
        unit vectors, and one probe; of columns, so many as make 128 rows with the examples.
      micro_batches: into how many parts the batch is split (the largest divisor of its size up to this), one after the
        other: memory falls in proportion, the result stays. The examples have to be independent, which is proved, and
        `predict` and `loss` treat them alike.
    """

    chunk_size: int | None = dataclasses.field(default=None, kw_only=True)
    micro_batches: int | None = dataclasses.field(default=None, kw_only=True)

    #: What the string is that stands for it, and the state of `with_hessian_diag` names it by.
    name: ClassVar[str]
    stochastic: ClassVar[bool] = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or not isinstance(None, field.type):
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
        key = as_key(key) if self.stochastic else None
        if (self.micro_batches or 1) == 1:
            return self._estimate(objective, params, key)
        if not isinstance(objective, Objective):
            raise ValueError(
                "micro_batches splits a batch, which a plain function does not show; pass a curvax.Objective, or leave"
                " micro_batches out."
            )
        part = lambda part, key: self._estimate(part, params, key)
        return mean_over_micro_batches(part, objective, params, key, self.micro_batches)

    @abc.abstractmethod
    def _estimate(self, objective: Any, params: Any, key: jax.Array | None) -> Estimate:
        """`estimate` of the whole batch at once."""

    @abc.abstractmethod
    def explain(self, objective: Any, params: Any) -> Explanation:
        """What `estimate` would do, why, and at what cost; nothing is computed."""

    def __repr__(self) -> str:
        fields = ((field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self))
        said = ", ".join(f"{name}={value!r}" for name, value, default in fields if value != default)
        return f"{type(self).__name__}({said})"


@dataclasses.dataclass(frozen=True, repr=False)
class Exact(Method):
    """The exact diagonal, by the cheapest route that the traced computation proves, array by array.

    Formula:
      `h_i = d^2 L / d params_i^2`; which route, why and at what cost is what `explain` says. Unit vectors where nothing
      is proved, and an error where those are too many.

    Args:
      budget: the most backward passes and Hessian-vector products to spend; `None` for no limit.
      chunk_size: how many columns or unit vectors share a pass.
      micro_batches: into how many parts the batch is split.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import Exact, hessian_diag
      >>> hessian_diag(lambda w: jnp.sum(w**3), jnp.array([1.0, 2.0]), Exact(budget=2)).tolist()
      [6.0, 12.0]
    """

    budget: int | None = BUDGET

    name = "exact"

    def _estimate(self, objective, params, key):
        return _without_error(exact_diag(objective, params, budget=self.budget, chunk_size=self.chunk_size))

    def explain(self, objective, params):
        return explain(objective, params)


@dataclasses.dataclass(frozen=True, repr=False)
class Basis(Method):
    """The exact diagonal by unit vectors, for any function.

    Formula:
      `e_i . H e_i` for every unit vector `e_i`, at one Hessian-vector product per parameter.

    Args:
      chunk_size: how many unit vectors share a pass.
      micro_batches: into how many parts the batch is split.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import Basis, hessian_diag
      >>> hessian_diag(lambda w: w[0] ** 2 * w[1], jnp.array([1.0, 2.0]), Basis()).tolist()
      [4.0, 0.0]
    """

    name = "basis"

    def _estimate(self, objective, params, key):
        return basis(objective, params, chunk_size=self.chunk_size)

    def explain(self, objective, params):
        sizes = [jnp.size(x) for x in jax.tree.leaves(params)]
        return explain_products(params, sizes, "unit vectors", "one product for each parameter")


@dataclasses.dataclass(frozen=True, repr=False)
class GaussNewton(Method):
    """The diagonal of the Gauss-Newton matrix, which is the Hessian without the curvature of the network itself.

    Formula:
      `mean_b J_b^T H_b J_b` with `J_b` the Jacobian of example b's outputs and `H_b` the Hessian of its loss in them:
      exactly, one backward pass for each column of a factor of `H_b`; or in expectation, one for each sample, which is
      a random sum `v_b` of these columns. `squares` says of what the square is taken: of each example's `J_b^T v_b`, so
      that only the columns are noise; or of the sum over a micro-batch, where the examples are noise too, which needs
      no proof of where a parameter meets the examples. The columns follow from the traced loss, whatever that is;
      where they do not, a product with the matrix and random signs, `z * G z`, takes the place of the square.

    Args:
      num_samples: how many samples are averaged; `None` for the exact diagonal.
      squares: `"example"` or `"batch"`; `None` for the former where every parameter is followed to the examples, else
        the latter.
      chunk_size: how many columns, or samples, share a pass.
      micro_batches: into how many parts the batch is split; for squares of batches 4 by default, since their variance
        falls, if the examples are proved to be independent.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import GaussNewton, Objective, hessian_diag
      >>> objective = Objective(lambda w, x: x @ w, lambda out, x: out**2, jnp.array([[1.0, 2.0], [3.0, 0.0]]))
      >>> hessian_diag(objective, jnp.zeros(2), GaussNewton()).round(4).tolist()
      [10.0, 4.0]
      >>> GaussNewton(num_samples=0)
      Traceback (most recent call last):
      ValueError: num_samples=0 is out of range; pass a whole number in [1, inf).
    """

    num_samples: int | None = None
    squares: str | None = None

    def _check(self, name, value):
        if name != "squares":
            return super()._check(name, value)
        if value not in ("example", "batch") or self.num_samples is None:
            raise ValueError(f"squares={value!r} is no choice here; pass 'example' or 'batch', and num_samples=... .")

    @property
    def name(self) -> str:
        return "ggn" if self.num_samples is None else "ggn_mc"

    @property
    def stochastic(self) -> bool:
        return self.num_samples is not None

    def estimate(self, objective, params, key=None):
        if self.num_samples is None:
            return super().estimate(objective, params, key)
        check_real(params)
        check_objective(objective, "ggn_mc")
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return sampled_gauss_newton(objective, params, as_key(key), **fields)

    def _estimate(self, objective, params, key):
        return _without_error(ggn_diag(objective, params, chunk_size=self.chunk_size))

    def explain(self, objective, params):
        if self.num_samples is None:
            return explain_ggn(objective, params)
        check_objective(objective, "ggn_mc")
        return explain_sampling(objective, params, self.num_samples, self.squares)


@dataclasses.dataclass(frozen=True, repr=False)
class Hutchinson(Method):
    """The mean of `z * H z` over random signs z (Bekas et al. 2007), for any function.

    Formula:
      Unbiased; the standard error falls as `1 / sqrt(num_samples)`. Where the trace proves that the Gauss-Newton matrix
      has the same diagonal, as for a ReLU network, that matrix takes the place of H, at fewer operations.

    Args:
      num_samples: how many products are averaged.
      chunk_size: how many of them share a pass.
      micro_batches: into how many parts the batch is split.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import Hutchinson, hessian_diag
      >>> hessian_diag(lambda w: jnp.sum(w**3), jnp.array([1.0, 2.0]), Hutchinson(num_samples=4), key=0).tolist()
      [6.0, 12.0]
    """

    num_samples: int = 1

    name = "hutchinson"
    stochastic = True

    def _estimate(self, objective, params, key):
        return hutchinson(objective, params, key, num_samples=self.num_samples, chunk_size=self.chunk_size)

    def explain(self, objective, params):
        matrix, why = product_matrix(objective, params)
        return explain_products(params, [self.num_samples], f"signs, {matrix} products", why)


@dataclasses.dataclass(frozen=True, repr=False)
class XDiag(Method):
    """Hutchinson's estimate of what a few products leave unknown of the Hessian (Epperly, Tropp and Webber 2024).

    Formula:
      `k = num_samples` probes, each judged by the others: `2 k` products, and memory for several copies of the
      parameters for each. Where the spectrum decays its error falls faster than Hutchinson's.

    Args:
      num_samples: how many probes.
      chunk_size: how many of them share a pass.
      micro_batches: into how many parts the batch is split.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import XDiag, hessian_diag
      >>> loss = lambda w: (w[0] + w[1] + w[2]) ** 2
      >>> hessian_diag(loss, jnp.ones(3), XDiag(num_samples=2), key=0).round(3).tolist()
      [2.0, 2.0, 2.0]
    """

    num_samples: int = 5

    name = "xdiag"
    stochastic = True

    def _estimate(self, objective, params, key):
        return xdiag(objective, params, key, num_samples=self.num_samples, chunk_size=self.chunk_size)

    def explain(self, objective, params):
        matrix, why = product_matrix(objective, params)
        return explain_products(params, [2 * self.num_samples], f"probes, {matrix} products", why)


@dataclasses.dataclass(frozen=True, repr=False)
class Auto(Method):
    """What `method=None` stands for: the estimate that the objective allows, by the fewest passes.

    Formula:
      `GaussNewton(num_samples=1)` for an `Objective` of which the trace proves random columns (see
      `curvax.exact.atoms`; a softmax or functions of single outputs, weighted or not, or few outputs for an example),
      `Hutchinson` elsewhere. What is chosen, and why, can be read from `explain` and from the state of
      `with_hessian_diag`.

    Args:
      num_samples: how many samples are averaged.
      chunk_size: how many of them share a pass.
      micro_batches: into how many parts the batch is split.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import Auto
      >>> Auto(num_samples=2).choose(lambda w: jnp.sum(w**2), jnp.ones(2))
      Hutchinson(num_samples=2)
    """

    num_samples: int = 1

    name = "auto"
    stochastic = True

    def choose(self, objective: Any, params: Any) -> Method:
        """The method that is taken for this objective."""
        options = {"chunk_size": self.chunk_size, "micro_batches": self.micro_batches}
        if isinstance(objective, Objective) and plan_sampling(objective, params).form != "product":
            return GaussNewton(self.num_samples, **options)
        return Hutchinson(self.num_samples, **options)

    def estimate(self, objective, params, key=None):
        return self.choose(objective, params).estimate(objective, params, key)

    def _estimate(self, objective, params, key):
        return self.estimate(objective, params, key)

    def explain(self, objective, params):
        chosen = self.choose(objective, params)
        explanation = chosen.explain(objective, params)
        return dataclasses.replace(explanation, method=f"{chosen!r}, chosen by {self!r}")


def _without_error(found: tuple[jax.Array, Any, Any]) -> Estimate:
    value, grad, diag = found
    return Estimate(value, grad, diag, jax.tree.map(jnp.zeros_like, diag))


SHORT: Mapping[str | None, Callable[..., Method]] = {
    "exact": Exact,
    "basis": Basis,
    "ggn": GaussNewton,
    "ggn_mc": lambda num_samples=1, **options: GaussNewton(num_samples, **options),
    "hutchinson": Hutchinson,
    "xdiag": XDiag,
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
      >>> from curvax.curvature.methods import as_method
      >>> as_method("ggn_mc", {"num_samples": 3})
      GaussNewton(num_samples=3)
    """
    if method is None or isinstance(method, str):
        return _made(method, options)
    if isinstance(method, type) or not callable(getattr(method, "estimate", None)):
        raise ValueError(
            f"method={method!r} is no method; pass {_names()}, or an object with estimate(objective, params, key) such"
            " as curvax.Hutchinson(num_samples=4)."
        )
    if options:
        raise ValueError(
            f"{_list(options)} cannot stand beside method={method!r}, which has its own options: give them to the"
            " method when it is made."
        )
    return method


def _made(method: str | None, options: Mapping[str, Any]) -> Method:
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
