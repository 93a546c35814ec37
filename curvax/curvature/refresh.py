"""When curvature is computed, how it is averaged, and how the scalers get it.

Curvature is dearer than a gradient and drifts slowly, so it is refreshed every few steps and averaged in between. This
wrapper is the only place that owns it: the scalers inside read `hessian_diag` from the extra arguments of `update`,
which optax hands down through `chain`, `masked`, `partition` and `MultiSteps`. One wrapper, outermost, serves them all.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvax.checks import check_number, check_transformation
from curvax.curvature.eager import once
from curvax.curvature.hessian import check_method_key, estimated
from curvax.curvature.line_search import bound, tolerant
from curvax.curvature.methods import Auto
from curvax.curvature.scalar import check_function, returns_aux, scalar_objective, select
from curvax.curvature.short_forms import as_method
from curvax.keys import Key, as_key
from curvax.layers import path_name
from curvax.rotations import rotated
from curvax.trees import all_finite, diag_dtype, is_hole
from curvax.varying import AxisName, is_bound, varies_over, varying_beyond, varying_over

NOTHING_STORED = (
    "curvature needs the loss: pass obj_fn=..., an Objective or a function params -> scalar, to update; or"
    " hessian_diag=..., if you have it. Nothing is stored yet that could be used in its place."
)

#: What `HessianDiagState.method` counts.
METHODS = ("none", "exact", "basis", "ggn", "ggn_mc", "hutchinson", "xdiag", "squares", "other")


class HessianDiagState(NamedTuple):
    """State of `with_hessian_diag`.

    Attributes:
      count: int32, the number of steps seen whose gradient was finite; under `MultiSteps`, of real ones.
      next_refresh: int32, the count from which on a refresh is due.
      num_refreshes: int32, how many times the curvature has been computed and averaged.
      num_skipped: int32, how many times it was computed and discarded, because it or the gradient was not finite.
      method: int32, the method of the last refresh, as an index into `METHODS`; `method_name` reads it.
      hessian_diag: a float32 tree like the parameters, the average so far, corrected for its bias; zeros at first.
      inner_state: that of the wrapped transformation.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from curvax import cblr
      >>> state = cblr(0.1, key=0, eigenbasis=False).init({"w": jnp.ones(2)})
      >>> optax.tree.get(state, "hessian_diag"), int(state.num_refreshes), state.method_name
      ({'w': Array([0., 0.], dtype=float32)}, 0, 'none')
    """

    count: jax.Array  # type: ignore[assignment]  # As Optax's states have it; no one counts the fields of a state.
    next_refresh: jax.Array
    num_refreshes: jax.Array
    num_skipped: jax.Array
    method: jax.Array
    hessian_diag: optax.Updates
    inner_state: optax.OptState

    @property
    def method_name(self) -> str:
        """The method that was taken for the last refresh, such as "hutchinson"; "none" before the first."""
        return METHODS[int(self.method)]


def with_hessian_diag(
    inner: optax.GradientTransformation | optax.MultiSteps,
    method: Any = None,
    *,
    every: int | jax.Array = 1,
    decay: jax.typing.ArrayLike = 0.0,
    key: Key | None = None,
    where: Any = None,
    has_aux: bool = False,
    axis_name: AxisName = None,
    param_axis_name: AxisName = None,
    hessian_dtype: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Give a transformation the diagonal of the Hessian as the extra argument `hessian_diag`.

    Formula:
      `H_n = decay * H_(n-1) + (1 - decay) * diag(d^2 L)` at the n-th refresh, over `1 - decay^n` to correct the bias;
      the average keeps the sign. Eq. 9 of Gao & Zhong takes the diagonal anew in each step: `every=1, decay=0`.

      A refresh in which any entry is not finite is discarded as a whole and counted, and the next is due after `every`
      steps as always. A step whose gradient is not finite leaves no trace, so that a guard inside may skip it: the
      refresh, if one was due, is still due in the next step. Before the first good refresh zeros are handed on, for
      which `scale_by_curvature_radius` has radius 1, or its `max_radius`. Inside of `with_eigenbasis` all this is of
      the diagonal in the eigenbasis of each layer.

    Args:
      inner: what uses the curvature, such as a chain with `scale_by_curvature_radius`. `optax.MultiSteps(inner, k)` is
        accepted too, and refreshed at most once in a real step, from the `obj_fn` of its first mini-step.
      method: as in `hessian_diag`; `None` for the estimate that the objective allows (`Auto`).
      every: number of steps between two refreshes; the first step has one.
      decay: decay rate of the average, in [0, 1).
      key: a seed or a `jax.random.key`, required by the stochastic methods. Refresh n draws from its n-th successor
        (`fold_in`), so that a run which resumes from its state draws the same numbers.
      where: the parameters whose curvature is computed, as in `hessian_diag`. The others have `optax.MaskedNode()` in
        its place, which `scale_by_curvature_radius` passes by, with radius 1.
      has_aux: whether the function returns other output too; an `Objective` may say so itself.
      axis_name: mesh axes (of `shard_map` or `pmap`) that split examples: the curvature is their mean, and each device
        draws numbers of its own.
      param_axis_name: mesh axes that split parameters; all devices decide as one whether a refresh is good.
      hessian_dtype: in which the average is stored, such as `jnp.bfloat16` for half the memory; `None` for float32, or
        float64 for float64 parameters.
      **options: of the method that a string or `None` stands for, such as `num_samples=4`.

    Returns:
      A transformation whose `update` takes `obj_fn=` (or optax's `value_fn=`), the loss whose gradient is passed, as an
      `Objective` or a function `params -> scalar`. Without it the step uses the average that is stored, and a refresh
      that is due waits for the next step that has it. Before any refresh was tried there is nothing to use: an error,
      or, under `jit`, where that is not known before the program runs, a RuntimeWarning and updates that are NaN. Where
      the caller passes `hessian_diag=`, that is handed on instead and nothing is computed or averaged.

    Raises:
      ValueError: if the method, its options, its key, `every` or `decay` are wrong; from `update`, without `params`,
        with a value in place of the loss, with neither the loss nor `hessian_diag` before anything is stored, or where
        `optax.masked` or `optax.partition` around it hides parameters that the loss needs.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from curvax import scale_by_curvature_radius, with_hessian_diag
      >>> newton = with_hessian_diag(scale_by_curvature_radius(slope_term=False), "basis")
      >>> loss = lambda w: jnp.sum(jnp.array([1.0, 50.0]) * w**2)
      >>> w = jnp.array([3.0, -2.0])
      >>> updates, _ = newton.update(jax.grad(loss)(w), newton.init(w), w, obj_fn=loss)
      >>> updates.tolist()
      [3.0, -2.0]
    """
    method = as_method(method, options)
    check_method_key(method, key)
    check_number("every", every, "[1, inf)", whole=True)
    check_number("decay", decay, "[0, 1)")
    _check_dtype(hessian_dtype)
    every = every if isinstance(every, jax.core.Tracer) else int(every)
    wrapped = check_transformation("inner", inner)
    multi_steps = isinstance(wrapped, optax.MultiSteps)
    of_gradient, mix = hasattr(method, "from_gradient"), getattr(method, "mix", _mean)

    def init_fn(params: Any) -> HessianDiagState:
        zero = lambda: jnp.zeros([], jnp.int32)
        dtype = lambda x: diag_dtype(jnp.result_type(x)) if hessian_dtype is None else hessian_dtype
        average = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=dtype(x)), select(params, where))
        return HessianDiagState(zero(), zero(), zero(), zero(), zero(), average, wrapped.init(params))

    def compute(source: Any, params: Any, key: jax.Array | None, basis: Any) -> tuple[Any, jax.Array]:
        if of_gradient:
            chosen = jax.tree.map(lambda x, g: x if is_hole(x) else g, select(params, where), source, is_leaf=is_hole)
            gradient = chosen if basis is None else rotated(chosen, basis)
            return method.from_gradient(gradient), _number_of(method)
        objective = source
        if axis_name is None:
            found: tuple[Any, jax.Array] = once(_fresh, method, where, has_aux, objective, params, key, basis)
            _check_alike(found[0], params)
            return found
        # A gradient of replicated parameters is summed over the mesh by `shard_map` itself. Parameters that are marked
        # as different on each device keep every device's curvature apart until the mean.
        params = jax.tree.map(lambda x: varying_over(x, axis_name), params)
        key = None if key is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        diag, taken = _fresh(method, where, has_aux, objective, params, key, basis)
        return jax.lax.pmean(diag, axis_name), taken

    def refresh(state: HessianDiagState, source: Any, params: Any, usable: jax.Array, basis: Any) -> HessianDiagState:
        draw = None if key is None else jax.random.fold_in(as_key(key), state.num_refreshes)
        fresh, taken = compute(source, params, draw, basis)
        good = usable & all_finite(fresh, param_axis_name)
        number = optax.safe_increment(state.num_refreshes)
        # Without overflow, however large `every` is.
        later = state.count + jnp.minimum(every, jnp.iinfo(jnp.int32).max - state.count).astype(jnp.int32)
        return state._replace(
            next_refresh=jnp.where(usable, later, state.next_refresh),
            num_refreshes=jnp.where(good, number, state.num_refreshes),
            num_skipped=jnp.where(good, state.num_skipped, optax.safe_increment(state.num_skipped)),
            method=jnp.where(good, taken, state.method),
            hessian_diag=_averaged(mix, state.hessian_diag, fresh, number, decay, good),
        )

    def refresh_if_due(state: HessianDiagState, *others: Any) -> HessianDiagState:
        due = state.count >= state.next_refresh
        # XLA on CPU runs convolutions inside a branch many times slower, so that none is made without need.
        if not isinstance(every, jax.core.Tracer) and every == 1 and not multi_steps:
            return refresh(state, *others)
        if not isinstance(due, jax.core.Tracer):
            return refresh(state, *others) if due else state
        found: HessianDiagState = jax.lax.cond(due, lambda: refresh(state, *others), lambda: state)
        return found

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        hessian_diag: Any = None,
        obj_fn: Any = None,
        value_fn: Any = None,
        eigenbasis: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, HessianDiagState]:
        if params is None:
            raise ValueError("curvature depends on the parameters; call update(updates, state, params, obj_fn=...).")
        if axis_name is not None:
            _check_bound(axis_name)
        own, inner_state = state._replace(inner_state=()), state.inner_state
        usable = all_finite(updates, axis_name, param_axis_name)
        stored: jax.Array | bool = True
        objective = obj_fn if obj_fn is not None else value_fn
        if obj_fn is None and callable(value_fn):
            objective = bound(value_fn, extra_args)
        if hessian_diag is not None:
            kept = own
        elif of_gradient:
            kept = refresh_if_due(own, updates, params, usable, eigenbasis)
        elif objective is None:
            stored, kept = _stored(own), own
        else:
            check_function("obj_fn" if obj_fn is not None else "value_fn", objective)
            _check_whole(params)
            kept = refresh_if_due(own, objective, params, usable, eigenbasis)
        diag = kept.hessian_diag if hessian_diag is None else hessian_diag
        given = {"hessian_diag": diag, "obj_fn": obj_fn, "eigenbasis": eigenbasis}
        given = {name: value for name, value in given.items() if value is not None}
        value_fn = value_fn if value_fn is not None or returns_aux(obj_fn, has_aux) else obj_fn
        if value_fn is not None:
            given["value_fn"] = tolerant(value_fn, given)
        updates, new_inner = wrapped.update(updates, inner_state, params, **given, **extra_args)
        updates = updates if stored is True else jax.tree.map(lambda x: _nan_unless(stored, x), updates)
        if multi_steps:
            # A mini-step that `should_skip_update_fn` left out.
            moved = (new_inner.mini_step != inner_state.mini_step) | (
                new_inner.gradient_step != inner_state.gradient_step
            )
            kept = jax.tree.map(lambda new, old: jnp.where(moved, new, old), kept, own)
            count = new_inner.gradient_step
        else:
            count = jnp.where(usable, optax.safe_increment(state.count), state.count)
        return updates, kept._replace(count=count, inner_state=new_inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _fresh(
    method: Any, where: Any, has_aux: bool, objective: Any, params: Any, key: Any, basis: Any
) -> tuple[Any, jax.Array]:
    """The diagonal, and the index in `METHODS` of the method that it was computed by."""
    objective, chosen = scalar_objective(objective, params, where, has_aux)
    taken = method.choose(objective, chosen, rotated=basis is not None) if isinstance(method, Auto) else method
    return estimated(taken, objective, chosen, key, basis).diag, _number_of(taken)


def _number_of(method: Any) -> jax.Array:
    name = getattr(method, "name", "other")
    return jnp.asarray(METHODS.index(name if name in METHODS else "other"), jnp.int32)


def _mean(old: jax.Array, new: jax.Array, share: jax.Array) -> jax.Array:
    return (1 - share) * old + share * new


@functools.partial(jax.jit, static_argnums=0)
def _averaged(mix: Callable[..., Any], average: Any, fresh: Any, number: jax.Array, decay: Any, good: jax.Array) -> Any:
    """The average after the `number`-th refresh, if that was good."""
    decay = jnp.asarray(decay, jnp.float32)
    share = jnp.where(number == 1, 1, (1 - decay) / (1 - decay ** number.astype(jnp.float32)))

    def mean(old: jax.Array, new: jax.Array) -> jax.Array:
        part = share.astype(new.dtype)
        # At share 1 the new one to the bit, however far it is from the old one.
        mixed = jnp.where(part == 1, new, mix(old.astype(new.dtype), new, part))
        return jnp.where(good, mixed.astype(old.dtype), old)

    return jax.tree.map(mean, average, fresh)


def _check_dtype(dtype: Any) -> None:
    if dtype is not None and jnp.dtype(dtype) not in map(jnp.dtype, ("bfloat16", "float32", "float64")):
        raise ValueError(
            f"hessian_dtype={dtype!r} has not the range of curvature; pass jnp.bfloat16, jnp.float32 or jnp.float64."
        )


def _check_bound(axis_name: AxisName) -> None:
    if not is_bound(axis_name):
        raise ValueError(
            f"axis_name={axis_name!r} names no mesh axis here; call update inside of the shard_map or pmap that splits"
            " the examples along it, or leave axis_name out: under jit nothing needs a name."
        )


def _check_alike(diag: Any, params: Any) -> None:
    """Raises a ValueError if devices are seen to have curvatures of their own for parameters that they share."""
    for path, own in varying_beyond(diag, frozenset().union(*map(varies_over, jax.tree.leaves(params)))):
        raise ValueError(
            f"the curvature of '{path_name(path)}' differs between the devices along {own}, as if these split the"
            f" examples; pass axis_name={(own[0] if len(own) == 1 else own)!r} to cblr or with_hessian_diag, which"
            " then takes the mean."
        )


def _stored(state: HessianDiagState) -> jax.Array | bool:
    """Whether a refresh was ever tried; if not, an error, or under `jit` a warning when the program runs."""
    tried = state.num_refreshes + state.num_skipped
    if not isinstance(tried, jax.core.Tracer):
        if tried == 0:
            raise ValueError(NOTHING_STORED)
        return True
    jax.lax.cond(tried == 0, lambda: jax.debug.callback(_warn, tried), lambda: None)
    return tried > 0


def _warn(tried: Any) -> None:
    # Under `vmap` both branches of a `cond` run, so that this is called without need. So is the whole step where a
    # caller chooses between steps with and without the loss: an exception would end a program that is right.
    # By NumPy: the device may be busy with the program that waits for this.
    if np.asarray(tried) == 0:
        warnings.warn(f"{NOTHING_STORED} The updates are NaN.", RuntimeWarning, stacklevel=1)


def _nan_unless(condition: jax.Array | bool, x: Any) -> Any:
    x = jnp.asarray(x)
    return jnp.where(condition, x, jnp.full_like(x, jnp.nan)) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def _check_whole(params: Any) -> None:
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_masked):
        if is_masked(leaf):
            raise ValueError(
                f"the parameter '{path_name(path)}' is hidden by optax.masked or optax.partition, so that the loss"
                " cannot be evaluated here; put with_hessian_diag outermost:"
                " curvax.with_eigenbasis(curvax.with_hessian_diag(optax.partition({'a': curvax.cblr(0.1), 'b': ...},"
                " labels), key=0)), which give the basis and the curvature to the cblr inside; where=... says for which"
                " parameters."
            )
