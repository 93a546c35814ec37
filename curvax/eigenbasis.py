"""In which basis of a layer a radius is taken.

The entries of a kernel are coordinates in which somebody happened to write a linear map, and a diagonal, of curvature
or of squares, says little of a matrix in such coordinates. With G the gradient of a kernel W, inputs times outputs, and
U and V the eigenvectors of the second moments `E[G G^T]` and `E[G^T G]`, the entries of

    U^T G V

are nearly uncorrelated, where the covariance of the gradient is nearly a Kronecker product (Shampoo, Gupta et al. 2018;
EKFAC, George et al. 2018; SOAP, Vyas et al. 2024). There a diagonal means most. So the basis is an axis of its own,
beside the rule, the grouping into layers and the source of curvature:

- `with_eigenbasis` keeps the moments and the eigenvectors, and hands the basis on, as the extra argument `eigenbasis`;
- `in_eigenbasis` wraps whatever is taken entry by entry: it is given rotated updates and parameters, and what it
  returns is rotated back;
- `with_hessian_diag` computes the diagonal of curvature in it: that of the loss as a function of the rotated
  parameters, `W = U Q V^T`, by any method.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax.checks import check_number, check_transformation
from curvax.layers import path_name
from curvax.matrices import DimensionNumbers, Matrices, matrices_of, of_norm_one
from curvax.meshes import on_auto
from curvax.rotations import Rotation, Sides, rotated
from curvax.trees import all_finite, check_floats, in_float32, statistics_dtype
from curvax.varying import varies_over, varying_beyond

#: The most rows, or columns, of a kernel that have a basis unless the caller says: more would cost more than the step.
MAX_SIZE = 1024

#: From a shape and a dtype to the array of one side.
Make = Callable[[tuple[int, ...], Any], jax.Array]


class EigenbasisState(NamedTuple):
    """State of `with_eigenbasis`.

    Attributes:
      count: int32, the number of steps seen whose gradient was finite.
      moments: the averages of `G G^T` and of `G^T G`, each G of norm 1: two trees like the parameters, with an array of
        one 0 for each side that stays in coordinates, as `optax.scale_by_factored_rms` has it.
      vectors: the same of their eigenvectors, in columns.
      inner_state: that of the wrapped transformation.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from curvax import with_eigenbasis
      >>> state = with_eigenbasis(optax.sgd(0.1)).init({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
      >>> state.vectors.columns["w"].shape, state.vectors.columns["b"].shape
      ((1, 3, 3), (1,))
    """

    count: jax.Array  # type: ignore[assignment]  # As Optax's states have it; no one counts the fields of a state.
    moments: Sides
    vectors: Sides
    inner_state: optax.OptState


def with_eigenbasis(
    inner: optax.GradientTransformation,
    *,
    decay: jax.typing.ArrayLike = 0.95,
    every: jax.typing.ArrayLike = 10,
    max_size: int | None = None,
    weight_dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """Give a transformation the eigenbasis of each layer's gradient as the extra argument `eigenbasis`.

    Formula:
      `L <- decay L + (1 - decay) G G^T`, `R <- decay R + (1 - decay) G^T G` in every step, with G the gradient over its
      norm, so that no step outweighs the others; U and V are their eigenvectors in the first step, and then follow by
      one step of orthogonal iteration, `U = qr(L U)`, every `every` steps (Vyas et al. 2024, algorithm 4). A kernel
      whose gradient is zero in the first step stays in coordinates until the next of these that finds moments.

      A side of more than `max_size`, and all that is no matrix (biases, the scales of norms), stays in coordinates. The
      state takes `2 m^2 + 2 n^2` numbers, float32 or float64, for a kernel of m inputs and n outputs. A step whose
      gradient is not finite leaves no trace.

    Args:
      inner: what uses the basis, such as a chain with `in_eigenbasis`; `optax.MultiSteps` is accepted too, and sees the
        basis of the gradients of its mini-steps.
      decay: decay rate of the moments, in [0, 1).
      every: number of steps between two changes of the basis.
      max_size: the most rows, or columns, that have a basis of their own; by default 1,024.
      weight_dimension_numbers: which axes are rows and which columns, as for `optax.contrib.muon`: a tree like the
        parameters of `optax.contrib.MuonDimensionNumbers`, with `None` for what is no matrix, or a function that makes
        one. By default all axes of a kernel but the last are rows. The first counts matrices where modules are
        stacked, which is seen by vectors beside the kernels, norms or biases, with the same first axis: where these are
        elsewhere, or left to another optimizer, say `curvax.Stacked({"^blocks/": 0})`.

    Returns:
      A transformation. Where a transformation around it hands on an `eigenbasis`, that is used and nothing is computed.
      Inside `shard_map` each device needs whole kernels; under `jit` they may be divided. A `cblr` inside of one more
      `with_eigenbasis` keeps a state of its own, which is not used.

    Raises:
      ValueError: if an argument is out of range; from `update`, if dimension numbers do not fit, with `hessian_diag`
        and without `eigenbasis`, or inside `shard_map`, if a gradient is seen to differ between devices.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from curvax import in_eigenbasis, with_eigenbasis
      >>> tx = with_eigenbasis(in_eigenbasis(optax.scale_by_adam()))
      >>> w, g = jnp.ones((2, 2)), jnp.array([[0.0, 3.0], [-0.1, 0.0]])
      >>> print(tx.update(g, tx.init(w), w)[0].round(3) + 0.0)  # singular values of 1
      [[ 0.  1.]
       [-1.  0.]]
    """
    wrapped = check_transformation("inner", inner)
    check_number("decay", decay, "[0, 1)")
    check_number("every", every, "[1, inf)", whole=True)
    max_size = MAX_SIZE if max_size is None else max_size
    check_number("max_size", max_size, "[0, inf)", whole=True)
    if isinstance(max_size, jax.core.Tracer):
        raise ValueError("max_size is traced, and decides the shape of the state; name it in static_args.")

    def sides(tree: Any, make: Make) -> Sides:
        leaves, treedef = jax.tree.flatten(tree)
        shapes = matrices_of(tree, weight_dimension_numbers)
        return _together(treedef, [_sides(x, of, max_size, make) for x, of in zip(leaves, shapes, strict=True)])

    def init_fn(params: Any) -> EigenbasisState:
        identity = lambda shape, dtype: jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)
        moments, vectors = sides(params, jnp.zeros), sides(params, identity)
        return EigenbasisState(jnp.zeros([], jnp.int32), moments, vectors, wrapped.init(params))

    def follow(
        shapes: list[Matrices | None], updates: Any, count: jax.Array, moments: Sides, vectors: Sides
    ) -> tuple[jax.Array, Sides, Sides]:
        """The moments with this gradient in them, and the vectors, new ones where a change is due."""
        usable, number = all_finite(updates), count + 1
        leaves, treedef = jax.tree.flatten(updates)
        old = _apart(treedef, moments)
        new = [_averaged(*each, decay, number, usable) for each in zip(old, leaves, shapes, strict=True)]
        moments = _together(treedef, new)
        vectors = _if(usable & (count % every == 0), lambda: _changed(moments, vectors), lambda: vectors)
        return jnp.where(usable, optax.safe_increment(count), count), moments, vectors

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        eigenbasis: Any = None,
        hessian_diag: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, EigenbasisState]:
        check_floats(updates)
        extra_args |= {} if hessian_diag is None else {"hessian_diag": hessian_diag}
        if eigenbasis is not None:
            given = {"eigenbasis": eigenbasis, **extra_args}
            updates, inner_state = wrapped.update(updates, state.inner_state, params, **given)
            return updates, state._replace(inner_state=inner_state)
        if hessian_diag is not None:
            raise ValueError(
                "hessian_diag came without the eigenbasis in which it is. If with_hessian_diag is around this"
                " optimizer, put with_eigenbasis around that:"
                " curvax.with_eigenbasis(curvax.with_hessian_diag(optax.partition(...), key=0)); or leave the basis"
                " out, as in curvax.cblr(..., eigenbasis=False)."
            )
        _check_alike(updates, state.vectors)
        treedef, shapes = jax.tree.structure(updates), matrices_of(updates, weight_dimension_numbers)
        own = updates, state.count, state.moments, state.vectors
        count, moments, vectors = on_auto(functools.partial(follow, shapes), *own)
        known = [Sides(*(a if _has_basis(a) else None for a in each)) for each in _apart(treedef, vectors)]
        basis = jax.tree.unflatten(treedef, map(Rotation, known, shapes))
        updates, inner_state = wrapped.update(updates, state.inner_state, params, eigenbasis=basis, **extra_args)
        return updates, EigenbasisState(count, moments, vectors, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def in_eigenbasis(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Let a transformation that works entry by entry do so in the eigenbasis of each layer.

    Formula:
      `U inner(U^T G V, U^T W V) V^T` for each kernel, with the basis that `with_eigenbasis` hands on; other arrays are
      not rotated. The curvature that `with_hessian_diag` hands on inside of `with_eigenbasis` is in this basis already.

    Args:
      inner: such as `scale_by_curvature_radius`, `scale_by_approximate_radius`, `discard_small_gradients`, or optax's
        `scale_by_adam`. Its state stays as it is when the basis changes: momentum belongs outside, before it.

    Returns:
      A transformation whose `update` takes `eigenbasis`. What is inside sees float32 at least; updates keep their
      dtype.

    Raises:
      ValueError: from `update`, without `eigenbasis`.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import discard_small_gradients, in_eigenbasis, with_eigenbasis
      >>> tx = with_eigenbasis(in_eigenbasis(discard_small_gradients(0.75)))
      >>> w, g = jnp.ones((2, 2)), jnp.array([[2.0, 1.0], [1.0, 2.0]])
      >>> print(tx.update(g, tx.init(w), w)[0].round(2))  # of two singular values the larger one
      [[1.5 1.5]
       [1.5 1.5]]
    """
    wrapped = check_transformation("inner", inner)

    def rotate(
        updates: Any, state: Any, params: Any = None, *, eigenbasis: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        if eigenbasis is None:
            raise ValueError(
                "the eigenbasis of layers is missing; wrap the optimizer in curvax.with_eigenbasis, outermost."
            )
        into = lambda tree: None if tree is None else rotated(tree, eigenbasis, Rotation.into)
        found, state = wrapped.update(into(updates), state, into(params), **extra_args)
        return rotated(found, eigenbasis, Rotation.back), state

    return in_float32(optax.GradientTransformationExtraArgs(wrapped.init, rotate))


def _sides(x: Any, of: Matrices | None, max_size: int, make: Make) -> Sides:
    none = lambda: jnp.zeros((1,), jnp.float32)
    if of is None or not of.rows or jnp.issubdtype(x.dtype, jnp.complexfloating):
        return Sides(none(), none())
    count, *sizes = of.dims
    dtype = statistics_dtype(x.dtype)
    return Sides(*(make((count, n, n), dtype) if 1 < n <= max_size else none() for n in sizes))


def _has_basis(side: jax.Array) -> bool:
    return side.ndim == 3


def _together(treedef: Any, sides: list[Sides]) -> Sides:
    """Of the sides of each leaf two trees, for what takes a state for trees like the parameters, such as Flax NNX."""
    return Sides(treedef.unflatten([each.rows for each in sides]), treedef.unflatten([each.columns for each in sides]))


def _apart(treedef: Any, trees: Sides) -> list[Sides]:
    return [Sides(*each) for each in zip(*map(treedef.flatten_up_to, trees), strict=True)]


def _check_alike(updates: Any, vectors: Sides) -> None:
    """Raises a ValueError if a gradient is seen to differ between devices that share the bases."""
    known = [varies_over(a) for a in jax.tree.leaves(vectors) if _has_basis(a)]
    for path, own in varying_beyond(updates, frozenset.intersection(*known)) if known else ():
        raise ValueError(
            f"the gradient of '{path_name(path)}' differs between the devices along {own}, which have one basis for"
            " all; inside shard_map pass the mean of gradients (jax.lax.pmean) of whole parameters, or divide these"
            " under jit."
        )


def _averaged(old: Sides, g: jax.Array, of: Matrices | None, decay: Any, number: jax.Array, usable: jax.Array) -> Sides:
    """The moments after the gradient `g`, corrected for their bias as averages of so many."""
    if of is None or not any(map(_has_basis, old)):
        return old
    m = of_norm_one(of.split(g.astype(statistics_dtype(g.dtype))))
    decay = jnp.asarray(decay, m.dtype)
    share = (jnp.where(number == 1, 1, (1 - decay) / (1 - decay ** number.astype(m.dtype)))).astype(m.dtype)
    mean = lambda a, m: jnp.where(usable, a + share * (m @ m.mT - a), a) if _has_basis(a) else a
    return Sides(mean(old.rows, m), mean(old.columns, m.mT))


def _changed(moments: Any, vectors: Any) -> Any:
    """The eigenvectors of what has moments for the first time, and one step of orthogonal iteration."""
    each = lambda f, *trees: jax.tree.map(lambda a, *others: f(a, *others) if _has_basis(a) else others[-1], *trees)
    with_moments = lambda a: jnp.any(a != 0, axis=(1, 2), keepdims=True)
    # As `init` left them: where a later layer starts at zero, the first gradients are zeros.
    untouched = lambda u: jnp.all(u == jnp.eye(u.shape[-1], dtype=u.dtype)[None], axis=(1, 2), keepdims=True)
    is_new = each(lambda a, u: with_moments(a) & untouched(u), moments, vectors)
    some = functools.reduce(
        jnp.logical_or, (jnp.any(x) for x in jax.tree.leaves(is_new) if x.ndim == 3), jnp.array(False)
    )
    # Those with the largest eigenvalues come first, as the iteration leaves them.
    first = lambda a, new, u: jnp.where(new, _by_matrix(lambda a: jnp.linalg.eigh(a)[1][..., ::-1], a), u)
    vectors = _if(some, lambda: each(first, moments, is_new, vectors), lambda: vectors)
    return each(lambda a, u: jnp.where(with_moments(a), _orthonormal(a @ u), u), moments, vectors)


def _orthonormal(a: jax.Array) -> jax.Array:
    """The Q of QR whose R has no negative diagonal, so that vectors move without changing their signs."""
    q, r = _by_matrix(jnp.linalg.qr, a)
    signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1).astype(q.dtype)
    turned: jax.Array = q * signs[..., None, :]
    return turned


def _by_matrix(function: Callable[[jax.Array], Any], stack: jax.Array) -> Any:
    """A factorisation of each matrix of a stack."""
    # XLA on CPU lends a stack's matrices to its threads. Several stacks at once wait for each other's threads for ever.
    if jax.default_backend() == "cpu" and stack.shape[0] > 1:
        return jax.lax.map(function, stack)
    return function(stack)


def _if(condition: jax.Array, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """`lax.cond`; what is known is not compiled."""
    if isinstance(condition, jax.core.Tracer):
        return jax.lax.cond(condition, then, otherwise)
    return then() if condition else otherwise()
