"""Named methods. Each is a chain, and adds no arithmetic of its own.

| method          | radius of a layer                              | source               |
|-----------------|------------------------------------------------|----------------------|
| `cblr`          | `1 / (abs(h) + damping * mean(abs(h)))` in the layer's basis | Gao & Zhong, eq. 9-11 |
| `mclr`          | `median(abs(w)) / median(abs(g))`              | Gao & Zhong, eq. 20-22 |
| `lars`          | `norm2(w) / norm2(g)`                          | eq. 23; You et al. 2017 |
| `percent_delta` | `n / norm1(g / w)`                             | eq. 24; Abu-El-Haija 2017 |
| `lamb`          | LARS's, after Adam and decay                   | You et al. 2019      |

gamma of eq. 10 and 21 is the learning rate. It does not carry over from one rule to another: each needs its own search.
"""

import operator
from typing import Any

import jax
import numpy as np
import optax

from curvax.checks import check_number
from curvax.curvature.refresh import with_hessian_diag
from curvax.curvature.short_forms import as_method
from curvax.eigenbasis import in_eigenbasis, with_eigenbasis
from curvax.keys import Key
from curvax.layers import Layers
from curvax.matrices import DimensionNumbers
from curvax.orthogonal import orthogonalize
from curvax.stacks import Stacked
from curvax.transforms import (
    Mask,
    scale_by_curvature_radius,
    scale_by_lars,
    scale_by_median_curvature,
    scale_by_percent_delta,
)
from curvax.trees import in_float32
from curvax.varying import AxisName


def cblr(
    learning_rate: optax.ScalarOrSchedule,
    *,
    damping: jax.typing.ArrayLike = 0.3,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Mask = None,
    momentum: jax.typing.ArrayLike = 0.9,
    nesterov: bool = True,
    max_radius: jax.typing.ArrayLike | None = None,
    slope_term: bool = False,
    eigenbasis: bool = True,
    orthogonal: bool = True,
    norm_ratio: bool = True,
    layers: Layers = "kernel",
    basis_every: jax.typing.ArrayLike = 10,
    max_size: int | None = None,
    weight_dimension_numbers: DimensionNumbers = None,
    method: Any = None,
    every: int | jax.Array | None = None,
    hessian_decay: jax.typing.ArrayLike | None = None,
    hessian_dtype: Any = None,
    key: Key = 0,
    where: Any = None,
    has_aux: bool = False,
    axis_name: AxisName = None,
    param_axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Curvature-based learning rates: damped Newton in each layer's own basis, spread evenly, at LARS's length.

    Formula:
      With G the gradient's momentum in a kernel W, U and V the basis of the layer (`with_eigenbasis`) and h the
      curvature in it, `D = polar(U [U^T G V / (|h| + damping * mean|h|)] V^T)` and `W <- W - learning_rate * (D *
      norm2(W) / norm2(D) + weight_decay * W)`: the radius of Gao & Zhong, eq. 9-11, made to work. In coordinates the
      diagonal means little; undamped, most curvatures are next to nothing; the polar factor spends a step evenly on all
      directions; and LARS's ratio, which eq. 23 shows to be a radius too, sets its length. The order is momentum,
      radius, polar factor, length, decay, learning rate.

      A bias, and whatever else is no kernel, is scaled by its own curvature in coordinates, damped by the mean of its
      kernel, and then by its own norm. Its kernel's ratio multiplies it; what belongs to no kernel has the ratio of all
      kernels together. No array's step is longer than `3 * learning_rate` times its kernel's parameters in root mean
      square, see `bounds`. A side of a kernel wider than `max_size`, as those of embeddings are, stays in coordinates.
      `cblr(gamma, damping=0, slope_term=True, eigenbasis=False, orthogonal=False, norm_ratio=False, momentum=0,
      method="exact", every=1, hessian_decay=0)` is eq. 9-11. Since momentum comes first, entries that ever had a
      gradient count in the norm ratio, such as an embedding's rows that were looked up before.

    Args:
      learning_rate: gamma, a number or a schedule. With the norm ratio, the relative change of a layer in a step.
      damping: dimensionless, as a fraction of the layer's mean absolute curvature; 0.03 to 1.
      weight_decay: decoupled: it is added after the length.
      weight_decay_mask: which parameters decay, as in `optax.add_decayed_weights`.
      momentum: decay rate of the momentum, which comes before the radius.
      nesterov: whether to use Nesterov momentum.
      max_radius: the largest radius of a parameter, before the polar factor and the norm ratio.
      slope_term: whether to keep the factor `(1 + g^2)^(3/2)` of eq. 9, which depends on the scale of the loss.
      eigenbasis: whether the radius is taken in the eigenbasis of each layer, or in coordinates.
      orthogonal: whether the polar factor follows the radius (`orthogonalize`).
      norm_ratio: whether LARS's radius (`scale_by_lars`) comes last.
      layers: the layers of the norm ratio and of the mean curvature; without `"kernel"` nothing is bounded.
      basis_every: number of steps between two changes of the basis.
      max_size: the most rows, or columns, of a kernel that have an eigenbasis; by default 1,024.
      weight_dimension_numbers: which axes are rows and which columns, as in `with_eigenbasis`; by default what `layers`
        says of stacks decides.
      method: how curvature is computed, as in `hessian_diag`: a string, or a method such as
        `curvax.Hutchinson(num_samples=4)`; `None` for the estimate that the objective allows (`curvax.Auto`). With
        `curvax.SquaredGradients()` no loss is needed, and `cblr` takes the place of `optax.adamw` in a line.
      every: number of steps between two computations of the curvature; by default 10, and 1 for squared gradients.
      hessian_decay: decay rate of the average of curvature over its refreshes; by default 0.5, and 0.95 for squared
        gradients.
      hessian_dtype: in which that is stored, as in `with_hessian_diag`.
      key: a seed or a `jax.random.key` for the stochastic methods.
      where: the parameters whose curvature is computed, as in `hessian_diag`; the others have radius 1 before the polar
        factor and the norm ratio.
      has_aux: whether an objective that is a function returns other output too; an `Objective` says so itself.
      axis_name: mesh axes (of `shard_map` or `pmap`) that split examples, over which curvature is averaged.
      param_axis_name: mesh axes that split parameters; without the eigenbasis and the polar factor, which need whole
        kernels. Under `jit` parameters may be divided at will.

    Returns:
      A transformation whose `update` takes `params` and either `obj_fn=` (an `Objective` or a function `params ->
      scalar`, the loss whose gradient is passed) or `hessian_diag=` (with `eigenbasis=False`, or together with the
      `eigenbasis=` in which it is). A step without both uses the curvature that is stored; compiled, and before
      anything is stored, it warns when it runs, and its updates are NaN.

    Raises:
      ValueError: from `update`, without `params` or, for a method that needs it, without any of the two; if parameters
        are split and their basis or polar factor is wanted.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> loss = lambda w: jnp.sum(jnp.array([[1.0, 100.0]]) * (w - 1) ** 2)
      >>> w, tx = jnp.array([[2.0, 3.0]]), curvax.cblr(optax.cosine_decay_schedule(0.1, 60))
      >>> state = tx.init(w)
      >>> for _ in range(60):
      ...   updates, state = tx.update(jax.grad(loss)(w), state, w, obj_fn=loss)
      ...   w = optax.apply_updates(w, updates)
      >>> bool(loss(w) < 1e-2 * loss(jnp.array([[2.0, 3.0]])))
      True
    """
    if param_axis_name is not None and (eigenbasis or orthogonal):
        raise ValueError(
            f"param_axis_name={param_axis_name!r} splits kernels, which the eigenbasis and the polar factor need whole;"
            " pass eigenbasis=False, orthogonal=False, or divide parameters under jit, without param_axis_name."
        )
    _check_rate(learning_rate)
    _check_flags(nesterov=nesterov, slope_term=slope_term, eigenbasis=eigenbasis)
    _check_flags(orthogonal=orthogonal, norm_ratio=norm_ratio)
    check_number("momentum", momentum, "[0, 1)")
    check_number("weight_decay", weight_decay, "[0, inf)")
    if weight_dimension_numbers is None and isinstance(layers, Stacked):
        weight_dimension_numbers = layers
    radius = scale_by_curvature_radius(
        damping, max_radius, slope_term=slope_term, layers=layers, param_axis_name=param_axis_name
    )
    # What the polar factor leaves of a step is its direction; else it is a Newton step, and 1 is its length.
    length = scale_by_lars(follow_all=orthogonal, layers=layers, param_axis_name=param_axis_name)
    steps = optax.chain(
        optax.trace(momentum, nesterov),
        in_eigenbasis(radius) if eigenbasis else radius,
        orthogonalize(weight_dimension_numbers=weight_dimension_numbers) if orthogonal else optax.identity(),
        length if norm_ratio else optax.identity(),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    method = as_method(method, {})
    # Squares of the gradient cost nothing, and are noise for one step.
    usual_every, usual_decay = (1, 0.95) if hasattr(method, "from_gradient") else (10, 0.5)
    tx = with_hessian_diag(
        in_float32(steps),
        method=method,
        every=usual_every if every is None else every,
        decay=usual_decay if hessian_decay is None else hessian_decay,
        hessian_dtype=hessian_dtype,
        key=key,
        where=where,
        has_aux=has_aux,
        axis_name=axis_name,
        param_axis_name=param_axis_name,
    )
    if not eigenbasis:
        return tx
    return with_eigenbasis(tx, every=basis_every, max_size=max_size, weight_dimension_numbers=weight_dimension_numbers)


def mclr(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Mask = None,
    momentum: jax.typing.ArrayLike = 0.9,
    nesterov: bool = False,
    *,
    trust_coefficient: jax.typing.ArrayLike = 1.0,
    median_of_ratios: bool = False,
    layers: Layers = "kernel",
    param_axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Median-curvature learning rates.

    Formula:
      `w <- w - trace(learning_rate * R * (g + weight_decay * w))` with `R = median|w| / median|g + weight_decay * w|`;
      Gao & Zhong, eq. 20-22. The paper finds it as good as LARS below a batch of 8192, and does not recommend it above.

    Args:
      learning_rate: gamma, a number or a schedule.
      weight_decay: beta of eq. 22.
      weight_decay_mask: which parameters decay, as in `optax.add_decayed_weights`.
      momentum: decay rate of heavy-ball momentum.
      nesterov: whether to use Nesterov momentum.
      trust_coefficient: factor inside the radius; it multiplies gamma, but for degenerate layers, whose radius is 1.
      median_of_ratios: whether to take the median of `|w / g|` instead.
      layers: `"array"`, `"module"`, `"kernel"` or rules from path regex to layer name, see `layers.group`.
      param_axis_name: mesh axes (of `shard_map` or `pmap`) that split parameters.

    Returns:
      A transformation whose `update` takes `params`.

    Raises:
      ValueError: from `update`, without `params`.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> tx = curvax.mclr(0.5)
      >>> w, g = jnp.array([[1.0, -4.0, 9.0]]), jnp.array([[-1.0, 2.0, 3.0]])
      >>> print(tx.update(g, tx.init(w), w)[0])
      [[ 1. -2. -3.]]
    """
    radius = scale_by_median_curvature(
        weight_decay,
        weight_decay_mask,
        trust_coefficient=trust_coefficient,
        median_of_ratios=median_of_ratios,
        layers=layers,
        param_axis_name=param_axis_name,
    )
    return optax.chain(radius, *_rate_and_trace(learning_rate, momentum, nesterov))


def lars(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Mask = None,
    momentum: jax.typing.ArrayLike = 0.9,
    nesterov: bool = False,
    *,
    trust_coefficient: jax.typing.ArrayLike = 0.001,
    eps: jax.typing.ArrayLike = 0.0,
    trust_ratio_mask: Mask = True,
    layers: Layers = "array",
    param_axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Layer-wise adaptive rate scaling; `optax.lars` to float32 rounding where no gradient is exactly zero.

    Formula:
      `w <- w - trace(learning_rate * R * (g + weight_decay * w))` with
      `R = trust_coefficient * norm2(w) / (norm2(g + weight_decay * w) + eps)`; Gao & Zhong, eq. 23; You et al. 2017.
      Entries without a gradient, such as the weights of pixels that are always dark, count in neither norm: where they
      are many the radius is smaller than optax's, and wants a larger learning rate.

    Args:
      learning_rate: a number or a schedule. gamma of eq. 23 is `learning_rate * trust_coefficient`.
      weight_decay: strength of the decay, added before the radius.
      weight_decay_mask: which parameters decay, as in `optax.add_decayed_weights`.
      momentum: decay rate of heavy-ball momentum.
      nesterov: whether to use Nesterov momentum.
      trust_coefficient: factor inside the radius; a layer with a zero norm has radius 1 without it.
      eps: added to the norm of the gradient.
      trust_ratio_mask: which parameters have a radius, as in `optax.masked`; the others have 1.
      layers: `"array"`, `"module"`, `"kernel"` or rules from path regex to layer name, see `layers.group`.
      param_axis_name: mesh axes (of `shard_map` or `pmap`) that split parameters.

    Returns:
      A transformation whose `update` takes `params`.

    Raises:
      ValueError: from `update`, without `params`.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> tx = curvax.lars(0.5, trust_coefficient=1.0)
      >>> w, g = jnp.array([3.0, 4.0]), jnp.array([0.3, -0.4])
      >>> print(tx.update(g, tx.init(w), w)[0])
      [-1.5  2. ]
    """
    radius = scale_by_lars(
        weight_decay,
        weight_decay_mask,
        trust_coefficient=trust_coefficient,
        eps=eps,
        layers=layers,
        param_axis_name=param_axis_name,
    )
    decay = optax.add_decayed_weights(weight_decay, weight_decay_mask)

    def others(params: Any) -> Any:
        mask = trust_ratio_mask(params) if callable(trust_ratio_mask) else trust_ratio_mask
        return jax.tree.map(operator.not_, mask)

    return optax.chain(
        optax.masked(radius, trust_ratio_mask),
        optax.masked(decay, others),
        *_rate_and_trace(learning_rate, momentum, nesterov),
    )


def percent_delta(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Mask = None,
    momentum: jax.typing.ArrayLike = 0.9,
    nesterov: bool = False,
    *,
    trust_coefficient: jax.typing.ArrayLike = 1.0,
    layers: Layers = "kernel",
    param_axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """PercentDelta: every layer changes by the same percentage in a step.

    Formula:
      `w <- w - trace(learning_rate * R * (g + weight_decay * w))` with
      `R = trust_coefficient * n / norm1((g + weight_decay * w) / w)`; Gao & Zhong, eq. 24; Abu-El-Haija 2017.

    Args:
      learning_rate: gamma, a number or a schedule: the mean relative change of a layer's parameters in a step.
      weight_decay: strength of the decay, added before the radius.
      weight_decay_mask: which parameters decay, as in `optax.add_decayed_weights`.
      momentum: decay rate of heavy-ball momentum.
      nesterov: whether to use Nesterov momentum.
      trust_coefficient: factor inside the radius; it multiplies gamma, but for degenerate layers, whose radius is 1.
      layers: `"array"`, `"module"`, `"kernel"` or rules from path regex to layer name, see `layers.group`.
      param_axis_name: mesh axes (of `shard_map` or `pmap`) that split parameters.

    Returns:
      A transformation whose `update` takes `params`.

    Raises:
      ValueError: from `update`, without `params`.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> tx = curvax.percent_delta(0.5)
      >>> w, g = jnp.array([[1.0, -2.0]]), jnp.array([[1.0, 2.0]])
      >>> print(tx.update(g, tx.init(w), w)[0])
      [[-0.5 -1. ]]
    """
    radius = scale_by_percent_delta(
        weight_decay,
        weight_decay_mask,
        trust_coefficient=trust_coefficient,
        layers=layers,
        param_axis_name=param_axis_name,
    )
    return optax.chain(radius, *_rate_and_trace(learning_rate, momentum, nesterov))


def lamb(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    eps_root: jax.typing.ArrayLike = 0.0,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    layers: Layers = "array",
    param_axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """LAMB: LARS's radius after Adam; `optax.lamb` to float32 rounding where no step is exactly zero.

    Formula:
      `u = adam(g) + weight_decay * w`, `w <- w - learning_rate * u * norm2(w) / norm2(u)`; You et al. 2019.

    Args:
      learning_rate: a number or a schedule.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the root of the second moment.
      eps_root: added to the second moment inside the root.
      weight_decay: strength of the decay, added before the radius.
      mask: which parameters decay, as in `optax.add_decayed_weights`.
      layers: `"array"`, `"module"`, `"kernel"` or rules from path regex to layer name, see `layers.group`.
      param_axis_name: mesh axes (of `shard_map` or `pmap`) that split parameters.

    Returns:
      A transformation whose `update` takes `params`.

    Raises:
      ValueError: from `update`, without `params`.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> tx = curvax.lamb(0.1)
      >>> w, g = jnp.array([3.0, 4.0]), jnp.array([1.0, -2.0])
      >>> print(tx.update(g, tx.init(w), w)[0].round(4))
      [-0.3536  0.3536]
    """
    _check_rate(learning_rate)
    for name, value, interval in (
        ("b1", b1, "[0, 1)"),
        ("b2", b2, "[0, 1)"),
        ("eps", eps, "[0, inf)"),
        ("eps_root", eps_root, "[0, inf)"),
    ):
        check_number(name, value, interval)
    return in_float32(
        optax.chain(
            optax.scale_by_adam(b1, b2, eps, eps_root),
            scale_by_lars(weight_decay, mask, layers=layers, param_axis_name=param_axis_name),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def _check_rate(learning_rate: Any) -> None:
    """Raises a ValueError unless this is a schedule or a number."""
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate, "[0, inf)")


def _check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name}={value!r} is neither True nor False; pass one of them.")


def _rate_and_trace(
    learning_rate: optax.ScalarOrSchedule, momentum: jax.typing.ArrayLike, nesterov: bool
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """The order of `optax.lars`: momentum averages updates, not gradients."""
    _check_rate(learning_rate)
    check_number("momentum", momentum, "[0, 1)")
    _check_flags(nesterov=nesterov)
    return optax.scale_by_learning_rate(learning_rate), optax.trace(momentum, nesterov)
