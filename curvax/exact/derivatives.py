"""Products with Jacobians and Hessians, also of functions that JAX differentiates in reverse only.

A `custom_vjp` has no forward derivative. But the product with a Jacobian from the right is the transpose of that from
the left, and a Hessian is symmetric. `jax.linearize` is silent until the product is computed, so it is traced and read.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.exact.equations import equations
from curvax.trees import diag_dtype
from curvax.varying import varying_like

Product = Callable[[Any], Any]
# Unit vectors at once, where the caller does not say.
CHUNK = 16


def hessian_product(function: Callable[[Any], jax.Array], x: Any) -> tuple[jax.Array, Any, Product]:
    """The value of a scalar function of a tree, its gradient, and `v -> H v`: forward over reverse if there is forward.

    Raises:
        ValueError: if JAX can differentiate the function once, but not twice.
    """
    try:
        (value, grad), tangents = jax.linearize(jax.value_and_grad(function), x)
    except Exception as refusal:
        return _reverse_over_reverse(function, x, refusal)
    if not _has_forward(tangents, x):
        return _reverse_over_reverse(function, x, TypeError("a jax.custom_vjp has no forward derivative"))
    return value, grad, lambda vector: tangents(vector)[1]


@jax.custom_jvp
def without_derivative(x: Any) -> Any:
    """`x`, of which no derivative is taken: it may be found by roots of zero, or at random by changing chances.

    Raises:
        ValueError: if it is differentiated.
    """
    return x


@without_derivative.defjvp
def _(primals, tangents):
    raise ValueError(
        "the derivative of a diagonal by columns of the loss's Hessian is not known; choose curvax.Basis() or"
        " curvax.Hutchinson(), which have one (method=... of cblr and with_hessian_diag), or pass"
        " jax.lax.stop_gradient(params) to what computes the diagonal, if it is meant to be a constant."
    )


def _reverse_over_reverse(function, x, refusal: Exception) -> tuple[jax.Array, Any, Product]:
    # Raises what JAX says of the first derivative, if there is none either.
    value, grad = jax.value_and_grad(function)(x)
    try:
        pull = jax.vjp(jax.grad(function), x)[1]
        jax.eval_shape(pull, grad)
    except Exception:
        raise ValueError(
            "this objective can be differentiated once, but not twice, as its Hessian must be"
            f" ({type(refusal).__name__}: {refusal}). Give the operation behind this, such as a jax.custom_vjp, rules"
            ' that JAX can differentiate; or, if it is part of the network, choose method="ggn" or "ggn_mc", which'
            " differentiate the network once."
        ) from refusal
    return value, grad, lambda vector: pull(vector)[0]


def jacobian_products(function: Callable[[Any], Any], x: Any) -> tuple[Any, Product, Product]:
    """The value of a function from a tree to a tree, `v -> J v`, and `u -> J^T u`."""
    linearized = _linearize(function, x)
    if linearized is None:
        out, pull = jax.vjp(function, x)
        # Pulling back is linear: its own transpose pushes forward.
        push = lambda vector: jax.linear_transpose(lambda u: pull(u)[0], out)(vector)[0]
    else:
        out, push = linearized
        pull = jax.linear_transpose(push, x)
    return out, push, lambda cotangent: pull(cotangent)[0]


def _linearize(function, x) -> tuple[Any, Product] | None:
    try:
        out, push = jax.linearize(function, x)
    except Exception:
        return None
    return (out, push) if _has_forward(push, x) else None


def _has_forward(product: Product, x: Any) -> bool:
    return all(eqn.primitive.name != "custom_lin" for eqn in equations(jax.make_jaxpr(product)(x).jaxpr))


# Unit vectors: exact for any function, at one Hessian-vector product per parameter.


def function_diag(
    function: Callable[[Any], jax.Array], params: Any, chunk_size: int | None = None
) -> tuple[jax.Array, Any, Any]:
    """The value, the gradient and the Hessian diagonal of a scalar function of a tree: `e_i . H e_i` for every i."""
    value, grad, product = hessian_product(function, params)
    leaves, treedef = jax.tree.flatten(params)

    def diagonal(leaf: int):
        def entry(unit, index):
            vector = [unit if i == leaf else jnp.zeros_like(x) for i, x in enumerate(leaves)]
            return jax.tree.leaves(product(treedef.unflatten(vector)))[leaf].ravel()[index]

        return along_units(entry, leaves[leaf], chunk_size)

    return value, grad, treedef.unflatten([diagonal(leaf) for leaf in range(len(leaves))])


def second_derivatives(function: Callable[[jax.Array], jax.Array], x: jax.Array, chunk_size: int | None) -> jax.Array:
    """The Hessian diagonal of a scalar function of one array.

    Args:
        function: from an array like `x` to a scalar.
        x: where.
        chunk_size: unit vectors at once.

    Returns:
        An array like `x`, at least float32.
    """
    product = hessian_product(function, x)[2]
    return along_units(lambda unit, index: product(unit).ravel()[index], x, chunk_size)


def along_units(
    function: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, chunk_size: int | None
) -> jax.Array:
    """`function(unit, index)` of each unit vector of the space of `x` and its index, arranged like `x`."""
    dtype = diag_dtype(x.dtype)

    def at(index):
        unit = jax.nn.one_hot(index, x.size, dtype=x.dtype).reshape(x.shape)
        return function(varying_like(unit, x), index).astype(dtype)

    if not x.size:
        return jnp.zeros(x.shape, dtype)
    return jax.lax.map(at, jnp.arange(x.size), batch_size=chunk_size or CHUNK).reshape(x.shape)
