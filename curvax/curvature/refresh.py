"""When curvature is computed, how it is averaged, and to whom it is handed on.

Curvature is dearer than a gradient and drifts slowly, so it is refreshed every few steps and averaged in between. This
wrapper is the only place that owns it: the scalers inside read `hessian_diag` from the extra arguments of `update`,
which optax hands down through `chain`, `masked`, `partition` and `MultiSteps`. One wrapper, outermost, serves them all.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax.curvature import hessian
from curvax.curvature.estimate import diag_dtype
from curvax.gauss_newton import is_softmax_cross_entropy
from curvax.varying import varying_over


class HessianDiagState(NamedTuple):
    """State of `with_hessian_diag`.

    Attributes:
      count: int32, the number of steps seen; under `MultiSteps`, of real ones.
      num_refreshes: int32, how many times the curvature has been computed.
      hessian_diag: a float32 tree like the parameters, the average so far, corrected for its bias.
      inner_state: that of the wrapped transformation.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from curvax import cblr
      >>> state = cblr(0.1, key=0).init({"w": jnp.ones(2)})
      >>> optax.tree.get(state, "hessian_diag"), int(optax.tree.get(state, "num_refreshes"))
      ({'w': Array([0., 0.], dtype=float32)}, 0)
    """

    count: jax.typing.ArrayLike
    num_refreshes: jax.typing.ArrayLike
    hessian_diag: optax.Updates
    inner_state: optax.OptState


def with_hessian_diag(
    inner: optax.GradientTransformation | optax.MultiSteps,
    method: str | None = None,
    *,
    every: jax.typing.ArrayLike = 1,
    decay: jax.typing.ArrayLike = 0.0,
    key: jax.typing.ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Give a transformation the diagonal of the Hessian as the extra argument `hessian_diag`.

    Formula:
      `H_n = decay * H_(n-1) + (1 - decay) * diag(d^2 L)` at the n-th refresh, over `1 - decay^n` to correct the bias;
      the average keeps the sign. Eq. 9 of Gao & Zhong takes the diagonal anew in each step: `every=1, decay=0`.

    Args:
      inner: what uses the curvature, such as a chain with `scale_by_curvature_radius`. `optax.MultiSteps(inner, k)` is
        accepted too, and refreshed at the first of the k mini-steps of a real step, from the `obj_fn` of that one.
      method: see `hessian_diag`; `None` for `"ggn_sampled"` where the objective allows it, and `"hutchinson"`
      elsewhere.
      every: number of steps between two refreshes; the first step has one.
      decay: decay rate of the average, in [0, 1).
      key: a seed or a `jax.random.key`, required by the stochastic methods. Refresh n draws from its n-th successor
        (`fold_in`), so that a run which resumes from its state draws the same numbers.
      axis_name: mesh axes (of `shard_map` or `pmap`) that split examples: the curvature is their mean, and each device
        draws numbers of its own.
      **options: further arguments of `hessian_diag`: `num_samples`, `where`, `micro_batches`, `chunk_size`,
        `budget`, `has_aux`.

    Returns:
      A transformation whose `update` takes `obj_fn=` (or optax's `value_fn=`), the loss whose gradient is passed, as an
      `Objective` or a function `params -> scalar`. Where the caller passes `hessian_diag=`, that is handed on instead
      and nothing is computed or averaged.

    Raises:
      ValueError: if the method is unknown or its key is missing; from `update`, without any of the three.

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
    if key is None and (method is None or method in hessian.STOCHASTIC):
        raise ValueError(f"method={method!r} draws random numbers; pass key=0 or another seed.")
    multi_steps = isinstance(inner, optax.MultiSteps)
    inner = inner if multi_steps else optax.with_extra_args_support(inner)

    def init_fn(params):
        chosen = hessian.select(params, options.get("where"))
        average = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=diag_dtype(x.dtype)), chosen)
        return HessianDiagState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32), average, inner.init(params))

    def refresh(objective, params, num_refreshes, average):
        draw = None if key is None else jax.random.fold_in(_as_key(key), num_refreshes)
        fresh = _mean_over_devices(objective, params, method, draw, axis_name, options)
        number = optax.safe_increment(num_refreshes)
        share = (1 - decay) / (1 - decay ** number.astype(jnp.float32))
        average = jax.tree.map(lambda h, new: h + (share * (new - h)).astype(h.dtype), average, fresh)
        return number, average

    def refresh_if_due(objective, params, state):
        due = state.count % every == 0
        if multi_steps:
            due = due & (state.inner_state.mini_step == 0)
        held = (state.num_refreshes, state.hessian_diag)
        # XLA on CPU runs convolutions inside a branch many times slower, so that none is made without need.
        if isinstance(every, int) and every == 1 and not multi_steps:
            return refresh(objective, params, *held)
        return jax.lax.cond(due, lambda: refresh(objective, params, *held), lambda: held)

    def update_fn(updates, state, params=None, *, hessian_diag=None, obj_fn=None, value_fn=None, **extra_args):
        count, num_refreshes, average, inner_state = state
        if params is None:
            raise ValueError("curvature depends on the parameters; call update(updates, state, params, obj_fn=...).")
        objective = value_fn if obj_fn is None else obj_fn
        if hessian_diag is None:
            if objective is None:
                raise ValueError(
                    "curvature needs the loss: pass obj_fn=..., an Objective or a function params -> scalar, to update;"
                    " or hessian_diag=..., if you have it."
                )
            num_refreshes, average = refresh_if_due(objective, params, state)
            hessian_diag = average
        given = {"hessian_diag": hessian_diag, "obj_fn": obj_fn, "value_fn": value_fn, **extra_args}
        given = {name: value for name, value in given.items() if value is not None}
        updates, inner_state = inner.update(updates, inner_state, params, **given)
        count = inner_state.gradient_step if multi_steps else optax.safe_increment(count)
        return updates, HessianDiagState(count, num_refreshes, average, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _mean_over_devices(objective, params, method, key, axis_name, options):
    if method is None:
        method = "ggn_sampled" if is_softmax_cross_entropy(objective, params) else "hutchinson"
    if axis_name is None:
        return hessian.value_grad_and_hessian_diag(objective, params, method=method, key=key, **options)[2]
    # A gradient of replicated parameters is summed over the mesh by shard_map itself. Parameters that are marked as
    # different on each device keep every device's curvature apart until the mean.
    params = jax.tree.map(lambda x: varying_over(x, axis_name), params)
    key = None if key is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    diag = hessian.value_grad_and_hessian_diag(objective, params, method=method, key=key, **options)[2]
    return jax.lax.pmean(diag, axis_name)


def _as_key(seed):
    is_key = isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    return seed if is_key else jax.random.key(seed)
