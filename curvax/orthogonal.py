"""The polar factor of an update: every direction of a layer goes as far as every other."""

import functools
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from curvax.checks import check_number
from curvax.matrices import DimensionNumbers, Matrices, matrices_of, of_norm_one
from curvax.meshes import on_auto
from curvax.trees import check_floats, is_hole, statistics_dtype

#: The coefficients of the iteration in `optax.contrib.muon`.
JORDAN = (3.4445, -4.7750, 2.0315)


def orthogonalize(
    ns_steps: int = 5, *, weight_dimension_numbers: DimensionNumbers = None
) -> optax.GradientTransformationExtraArgs:
    """Replace each kernel's update by its polar factor, and every other array's by its direction.

    Formula:
      `G -> U V^T` for the singular value decomposition `G = U S V^T`, by the Newton-Schulz iteration of
      `optax.contrib.scale_by_muon` (Jordan 2024), after which singular values lie between 0.68 and 1.21 but for those
      below a 500th of the norm, which are smaller; `g -> g / norm2(g)` for vectors, whose polar factor this is. Zeros
      stay zeros. The length of the result says nothing: let `scale_by_lars` follow.

    Args:
      ns_steps: steps of the iteration, each three products of matrices.
      weight_dimension_numbers: which axes are rows and which columns, as for `with_eigenbasis`, which says it for what
        is inside of it.

    Returns:
      A transformation. It computes in float32 at least; updates keep their dtype. Inside `shard_map` parameters have to
      be whole.

    Raises:
      ValueError: if `ns_steps` is out of range; from `update`, if dimension numbers do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import orthogonalize
      >>> tx = orthogonalize(10)
      >>> g = {"w": jnp.array([[2.0, 0.0], [0.0, -0.1]]), "b": jnp.array([3.0, 4.0])}
      >>> updates, _ = tx.update(g, tx.init(g))
      >>> print(updates["b"], jnp.abs(jnp.diag(updates["w"])) > 0.6)
      [0.6 0.8] [ True  True]
    """
    check_number("ns_steps", ns_steps, "[1, inf)", whole=True)
    dims = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    # The same coefficients in every step, as a list of them: a loop, where a number of steps would be written out.
    muon = optax.contrib.scale_by_muon(
        (JORDAN,) * ns_steps, ns_steps, beta=0.0, nesterov=False, weight_dimension_numbers=dims
    )

    # Compiled once, where the iteration by itself would be compiled in each step that is not.
    @functools.partial(jax.jit, static_argnames="of")
    def direction(g: jax.Array, of: Matrices | None) -> jax.Array:
        x = g.astype(statistics_dtype(g.dtype))
        if of is None:
            return g
        # No square overflows after this, nor does the iteration's own epsilon count.
        x = of_norm_one(of.split(x))
        if not of.rows:
            return of.join(x).astype(g.dtype)
        # Without momentum it has no state.
        with jax.numpy_dtype_promotion("standard"):
            turned: Any = muon.update(x, muon.init(x))[0]
        return of.join(turned).astype(g.dtype)

    def update_fn(
        updates: Any, state: Any, params: Any = None, *, eigenbasis: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del params, extra_args
        check_floats(updates)
        leaves, treedef = jax.tree.flatten(updates)
        if eigenbasis is None:
            shapes = matrices_of(updates, weight_dimension_numbers)
        else:
            # What a stack is, whole trees show better than the parts of them that `partition` hands on.
            whole: Any  # Of jaxlib, which says nothing of types.
            nodes, whole = jax.tree.flatten(updates, is_leaf=is_hole)
            known = zip(nodes, whole.flatten_up_to(eigenbasis), strict=True)
            shapes = [rotation.matrices for node, rotation in known if not is_hole(node)]
        found = [on_auto(lambda x, of=of: direction(x, of), x, like=x) for x, of in zip(leaves, shapes, strict=True)]
        return jax.tree.unflatten(treedef, found), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
