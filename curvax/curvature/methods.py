"""The methods whose work is done elsewhere: exact diagonals, Gauss-Newton diagonals, and the choice of a method."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from curvax.curvature.estimate import Estimate
from curvax.curvature.gauss_newton import explain_sampling, plan_sampling, sampled_gauss_newton
from curvax.curvature.hutchinson import Hutchinson
from curvax.curvature.method import Method
from curvax.curvature.scalar import plain
from curvax.exact import BUDGET, Explanation, exact_diag, explain, explain_ggn, explain_products, ggn_diag
from curvax.exact.derivatives import function_diag
from curvax.exact.diagonals import check_objective
from curvax.objective import Objective
from curvax.trees import at_least_float32


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

    def _estimate(self, objective: Any, params: Any, key: Any) -> Estimate:
        return _without_error(exact_diag(objective, params, budget=self.budget, chunk_size=self.chunk_size))

    def _explain(self, objective: Any, params: Any) -> Explanation:
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

    def _estimate(self, objective: Any, params: Any, key: Any) -> Estimate:
        return _without_error(function_diag(objective, params, self.chunk_size))

    def _explain(self, objective: Any, params: Any) -> Explanation:
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
      micro_batches: into how many parts the batch is split. By default 4 where the examples are proved to be
        independent, for squares of batches, since their variance falls, and for more than 16,384 outputs an example,
        since a sample holds several arrays of that size; else 1.

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
    squares: Literal["example", "batch"] | None = None

    def _check(self, name: str, value: Any) -> None:
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

    def _in_parts(self, objective: Any, params: Any, key: Any) -> Estimate:
        if self.num_samples is None:
            return super()._in_parts(objective, params, key)
        check_objective(objective, "ggn_mc")
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return sampled_gauss_newton(objective, params, key, **fields)

    def _estimate(self, objective: Any, params: Any, key: Any) -> Estimate:
        return _without_error(ggn_diag(objective, params, chunk_size=self.chunk_size))

    def _explain(self, objective: Any, params: Any) -> Explanation:
        if self.num_samples is None:
            return explain_ggn(objective, params)
        check_objective(objective, "ggn_mc")
        return explain_sampling(objective, params, self.num_samples, self.squares)


@dataclasses.dataclass(frozen=True)
class SquaredGradients:
    """The root of the mean squared gradient, which Adam and SOAP take for curvature: no pass, and no loss.

    Formula:
      `h_i = sqrt(mean g_i^2)`, with the mean over the refreshes of `with_hessian_diag`. It ranks parameters as
      curvature does where gradients are mostly noise, and has no fixed ratio to it: the learning rate means something
      else. For a single loss it is `|g_i|`.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import SquaredGradients, scale_by_curvature_radius, with_hessian_diag
      >>> tx = with_hessian_diag(scale_by_curvature_radius(slope_term=False), SquaredGradients())
      >>> w, g = jnp.zeros(2), jnp.array([2.0, -4.0])
      >>> tx.update(g, tx.init(w), w)[0].tolist()
      [1.0, -1.0]
    """

    name = "squares"
    stochastic = False

    def from_gradient(self, grad: Any) -> Any:
        """The estimate, from a gradient alone."""
        return jax.tree.map(lambda g: at_least_float32(jnp.abs(g)), grad)

    def mix(self, old: jax.Array, new: jax.Array, share: jax.Array) -> jax.Array:
        """The root of the mean square with this share of the new one, whose squares need not be floats."""
        return jnp.hypot(jnp.sqrt(1 - share) * old, jnp.sqrt(share) * new)

    def explain(self, objective: Any, params: Any) -> Explanation:
        """That it costs nothing where there is a gradient."""
        return explain_products(params, [], "squared gradients", "no curvature: the size of the gradient")

    def estimate(self, objective: Any, params: Any, key: Any = None) -> Estimate:
        """The same for a loss, as `hessian_diag` asks for it."""
        value, grad = jax.value_and_grad(plain(objective, params))(params)
        return Estimate(value, grad, self.from_gradient(grad))


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

    def choose(self, objective: Any, params: Any, *, rotated: bool = False) -> Method:
        """The method that is taken for this objective, or for it as a function of rotated parameters."""
        objective = plain(objective, params)
        options = {"chunk_size": self.chunk_size, "micro_batches": self.micro_batches}
        if isinstance(objective, Objective) and plan_sampling(objective, params).form in ("example", "batch"):
            # Squares by example would take the gradient of each example, to rotate it.
            return GaussNewton(self.num_samples, "batch" if rotated else None, **options)
        return Hutchinson(self.num_samples, **options)

    def _in_parts(self, objective: Any, params: Any, key: Any) -> Estimate:
        return self._estimate(objective, params, key)

    def _estimate(self, objective: Any, params: Any, key: Any) -> Estimate:
        return self.choose(objective, params).estimate(objective, params, key)

    def _explain(self, objective: Any, params: Any) -> Explanation:
        chosen = self.choose(objective, params)
        explanation = chosen.explain(objective, params)
        return dataclasses.replace(explanation, method=f"{chosen!r}, chosen by {self!r}")


def _without_error(found: tuple[jax.Array, Any, Any]) -> Estimate:
    value, grad, diag = found
    return Estimate(value, grad, diag, jax.tree.map(jnp.zeros_like, diag))
