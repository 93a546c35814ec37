"""Second derivatives: Hessian-vector products, and the diagonal of the Hessian by several methods.

Everything rests on `H v = d/dt grad L(w + t v)`, forward over reverse: `jax.jvp` of `jax.grad`. A method decides with
which vectors to ask for it: with all unit vectors (exact), with random signs z, for which E[z * H z] = diag(H), or, for
the Gauss-Newton part of H, with none, since gradients for labels drawn from the model itself have that part as their
variance.

Each method is a function `(objective, params, options) -> Estimate`, and `_METHODS` names them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax.layers import path_name
from curvax.objective import Objective


class Estimate(NamedTuple):
    """What a method returns: the loss, its gradient, the diagonal of its Hessian and the standard error of that."""

    value: jax.Array
    grad: Any
    diag: Any
    standard_error: Any


class Options(NamedTuple):
    """The arguments of `hessian_diag` which methods share."""

    key: jax.Array | None
    num_samples: int
    micro_batches: int
    chunk_size: int


def hvp(objective: Callable[[Any], jax.Array], params: Any, v: Any) -> Any:
    """The Hessian of a scalar function times a vector.

    Formula:
      `H v = d/dt grad L(params + t v)` at `t = 0`: `jax.jvp` of `jax.grad` (Pearlmutter 1994), at the price of about
      two gradients.

    Args:
      objective: an `Objective`, or any function `params -> scalar`.
      params: a tree of real arrays.
      v: a tree like `params`.

    Returns:
      `H v`, a tree like `params`.

    Raises:
      ValueError: if a parameter is not real.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import hvp
      >>> hvp(lambda w: w[0] ** 2 * w[1], jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])).tolist()
      [4.0, 2.0]
    """
    _check_real(params)
    return jax.jvp(jax.grad(objective), (params,), (v,))[1]


def hessian_diag(
    objective: Callable[[Any], jax.Array],
    params: Any,
    *,
    method: str,
    key: jax.Array | None = None,
    num_samples: int = 1,
    standard_error: bool = False,
    where: Any = None,
    micro_batches: int = 4,
    chunk_size: int = 16,
) -> Any:
    """The diagonal of the Hessian of a loss.

    Formula:
      `diag_i = d^2 L / d params_i^2`, which eq. 9 of Gao & Zhong needs. By `method`:

      - `"basis"`: `e_i . H e_i` for every unit vector: exact, at one Hessian-vector product per parameter;
      - `"hutchinson"`: the mean of `z * H z` over random signs `z` (Bekas et al. 2007): unbiased, its standard error
        falls as `1 / sqrt(num_samples)`;
      - `"ggn_sampled"`: for a softmax cross-entropy, the diagonal of the Gauss-Newton matrix, which is H without the
        curvature of the network itself: labels are drawn from the model's own softmax, and the squares of the
        gradients of `micro_batches` micro-batches, each times its size, are averaged. Unbiased, never negative, and at
        the price of two gradients a far smaller variance than Hutchinson's. A `penalty` adds one Hutchinson probe of
        its own Hessian, exact where that is diagonal.

    Args:
      objective: an `Objective`, or any function `params -> scalar`; `"ggn_sampled"` needs an `Objective`.
      params: a tree of real arrays.
      method: `"basis"`, `"hutchinson"` or `"ggn_sampled"`.
      key: a `jax.random.key`; required by the stochastic methods.
      num_samples: number of independent samples over which a stochastic method averages.
      standard_error: whether to return the standard error of each entry as well. It is estimated from the samples, so
        there have to be two of them (counting micro-batches, which see different examples and so tell rather more).
      where: a tree of booleans like `params` (or a prefix of it), or a function from `params` to one: the leaves whose
        diagonal is wanted. Others are constants, cost nothing, and come back as `optax.MaskedNode()`.
      micro_batches: for `"ggn_sampled"`, into how many the batch is split: the largest divisor of its size up to this.
      chunk_size: for `"basis"`, how many unit vectors share a pass. Memory grows with it, time falls.

    Returns:
      A tree like `params` of float32 (float64 for float64 parameters), or `(diag, standard_error)`.

    Raises:
      ValueError: if `method` is unknown, `key` is missing, a parameter is not real, `num_samples` does not allow a
        standard error, or the objective is not what the method needs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax import hessian_diag
      >>> def loss(w):
      ...   return w[0] ** 2 * w[1] + w[1] ** 3
      >>> hessian_diag(loss, jnp.array([1.0, 2.0]), method="basis").tolist()
      [4.0, 12.0]
      >>> z = hessian_diag(loss, jnp.array([1.0, 2.0]), method="hutchinson", key=jax.random.key(0), num_samples=2)
      >>> z.shape
      (2,)
    """
    _, _, diag = value_grad_and_hessian_diag(
        objective,
        params,
        method=method,
        key=key,
        num_samples=num_samples,
        standard_error=standard_error,
        where=where,
        micro_batches=micro_batches,
        chunk_size=chunk_size,
    )
    return diag


def value_grad_and_hessian_diag(
    objective: Callable[[Any], jax.Array],
    params: Any,
    *,
    method: str,
    key: jax.Array | None = None,
    num_samples: int = 1,
    standard_error: bool = False,
    where: Any = None,
    micro_batches: int = 4,
    chunk_size: int = 16,
) -> tuple[jax.Array, Any, Any]:
    """The loss, its gradient and the diagonal of its Hessian, sharing the forward pass.

    Formula:
      As `hessian_diag`. The value and the gradient are those of the whole objective, penalty included.

    Args:
      objective: see `hessian_diag`, as for all arguments.
      params: a tree of real arrays.
      method: `"basis"`, `"hutchinson"` or `"ggn_sampled"`.
      key: a `jax.random.key`; required by the stochastic methods.
      num_samples: number of independent samples.
      standard_error: whether to return the standard error of each entry as well.
      where: the leaves whose diagonal, and gradient, is wanted.
      micro_batches: for `"ggn_sampled"`, into how many the batch is split.
      chunk_size: for `"basis"`, how many unit vectors share a pass.

    Returns:
      `(value, grad, diag)`, or `(value, grad, (diag, standard_error))`.

    Raises:
      ValueError: as `hessian_diag`.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import value_grad_and_hessian_diag
      >>> value, grad, diag = value_grad_and_hessian_diag(lambda w: w @ w, jnp.array([1.0, 2.0]), method="basis")
      >>> float(value), grad.tolist(), diag.tolist()
      (5.0, [2.0, 4.0], [2.0, 2.0])
    """
    if method not in _METHODS:
        raise ValueError(f"method={method!r} is unknown; pass one of {', '.join(map(repr, _METHODS))}.")
    if key is None and method in STOCHASTIC:
        raise ValueError(f"method={method!r} draws random numbers; pass key=jax.random.key(seed).")
    objective, params = _restrict(objective, params, where)
    _check_real(params)
    options = Options(key, num_samples, micro_batches, chunk_size)
    estimate = _METHODS[method](objective, params, options)
    if standard_error and estimate.standard_error is None:
        raise ValueError(f"a standard error takes two samples at least, {num_samples} given; raise num_samples.")
    diag = (estimate.diag, estimate.standard_error) if standard_error else estimate.diag
    return estimate.value, estimate.grad, diag


def _basis(objective, params, options: Options) -> Estimate:
    (value, grad), tangents = jax.linearize(jax.value_and_grad(objective), params)
    leaves, treedef = jax.tree.flatten(params)

    def entry(leaf: int, index):
        unit = [jnp.zeros_like(x) for x in leaves]
        unit[leaf] = unit[leaf].ravel().at[index].set(1).reshape(leaves[leaf].shape)
        _, product = tangents(treedef.unflatten(unit))
        return jax.tree.leaves(product)[leaf].ravel()[index]

    def diagonal(leaf: int, x):
        entries = functools.partial(entry, leaf)
        return jax.lax.map(entries, jnp.arange(x.size), batch_size=options.chunk_size).reshape(x.shape)

    diag = treedef.unflatten([_at_least_float32(diagonal(i, x)) for i, x in enumerate(leaves)])
    return Estimate(value, grad, diag, jax.tree.map(jnp.zeros_like, diag))


def _hutchinson(objective, params, options: Options) -> Estimate:
    (value, grad), tangents = jax.linearize(jax.value_and_grad(objective), params)

    def sample(key):
        z = optax.tree.random_like(key, params, jax.random.rademacher)
        _, product = tangents(z)
        return jax.tree.map(lambda a, b: _at_least_float32(a) * _at_least_float32(b), z, product)

    moments = _add_samples(sample, jax.random.split(options.key, options.num_samples), _no_samples(params))
    return Estimate(value, grad, moments.mean, moments.standard_error())


def _ggn_sampled(objective, params, options: Options) -> Estimate:
    _check_softmax_cross_entropy(objective, params)
    batches = _split(objective.data, options.micro_batches)
    keys = jax.random.split(options.key, (len(batches), options.num_samples))
    values, grads, moments = [], [], _no_samples(params)
    for data, batch_keys in zip(batches, keys, strict=True):
        value, grad, square = _squared_gradients(objective, params, data)
        moments = _add_samples(square, batch_keys, moments)
        values, grads = [*values, value], [*grads, grad]
    estimate = Estimate(_mean(values), _mean(grads), moments.mean, moments.standard_error())
    return estimate if objective.penalty is None else _add_penalty(estimate, objective.penalty, params, options)


def _squared_gradients(objective: Objective, params, data) -> tuple[jax.Array, Any, Callable[[jax.Array], Any]]:
    """A micro-batch's mean loss, its gradient, and a function from a key to the squared gradient for drawn labels."""
    outputs, pullback = jax.vjp(lambda p: objective.predict(p, data), params)
    total, slopes = jax.value_and_grad(lambda z: jnp.sum(objective.loss(z, data)))(outputs)
    size = outputs.shape[0]

    def square(key):
        (gradient,) = pullback(_drawn_slopes(objective, outputs, data, key) / size)
        return jax.tree.map(lambda g: size * jnp.square(_at_least_float32(g)), gradient)

    (grad,) = pullback(slopes / size)
    return total / size, grad, square


def _drawn_slopes(objective: Objective, outputs, data, key):
    """The loss's slope in the outputs had the labels been drawn from the model: mean 0, the loss's Hessian as variance.

    An example's loss may be weighted, so the Hessian is `a (diag(p) - p p^T)`. `a` comes from one product of the
    Hessian with a random vector; where the softmax is saturated both vanish, and so does the slope.
    """
    direction_key, label_key = jax.random.split(key)
    direction = jax.random.normal(direction_key, outputs.shape, outputs.dtype)
    slope = jax.grad(lambda z: jnp.sum(objective.loss(z, data)))
    actual = jax.jvp(slope, (outputs,), (direction,))[1]
    p = jax.nn.softmax(outputs, axis=-1)
    expected = p * (direction - jnp.sum(p * direction, axis=-1, keepdims=True))
    overlap = jnp.sum(actual * expected, axis=-1, keepdims=True)
    weight = overlap / jnp.maximum(jnp.sum(jnp.square(expected), axis=-1, keepdims=True), jnp.finfo(p.dtype).tiny)
    labels = jax.random.categorical(label_key, outputs, axis=-1)
    return jnp.sqrt(jnp.maximum(weight, 0)) * (p - jax.nn.one_hot(labels, p.shape[-1], dtype=p.dtype))


def _add_penalty(estimate: Estimate, penalty, params, options: Options) -> Estimate:
    options = options._replace(key=jax.random.fold_in(options.key, 0), num_samples=1)
    extra = _hutchinson(penalty, params, options)
    value, grad, diag = jax.tree.map(jnp.add, estimate[:3], extra[:3])
    return Estimate(value, grad, diag, estimate.standard_error)


def is_softmax_cross_entropy(objective: Callable[[Any], jax.Array], params: Any) -> bool:
    """Whether `"ggn_sampled"` allows this objective: an `Objective` with a softmax cross-entropy, weighted or not.

    Formula:
      The Hessian of a cross-entropy in the logits is `a (diag(p) - p p^T)` for some weight `a` per example. It is
      compared with the loss's own along random directions at random logits, on made-up data, while tracing: at no cost
      in the step.

    Args:
      objective: an `Objective`, or any function `params -> scalar`.
      params: a tree of arrays, or of their shapes.

    Returns:
      True or False.

    Raises:
      ValueError: if the loss cannot be evaluated on made-up data, as when it closes over arrays that are being traced.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from curvax import Objective, hessian
      >>> objective = Objective(lambda w, x: x @ w, optax.squared_error, jnp.ones((4, 2)))
      >>> hessian.is_softmax_cross_entropy(lambda w: w @ w, jnp.ones(2))
      False
    """
    if not isinstance(objective, Objective):
        return False
    outputs, data = jax.eval_shape(lambda p, d: (objective.predict(p, d), d), params, objective.data)
    if outputs.ndim < 2 or not jnp.issubdtype(outputs.dtype, jnp.floating):
        return False
    with jax.ensure_compile_time_eval():
        try:
            return _behaves_like_cross_entropy(objective.loss, outputs, data)
        except jax.errors.JAXTypeError as error:
            raise ValueError(
                "the loss of the Objective cannot be examined, because it closes over arrays that are being traced;"
                " pass them to it through data, or choose method='hutchinson'."
            ) from error


def _behaves_like_cross_entropy(loss, outputs: jax.ShapeDtypeStruct, data) -> bool:
    logits_key, direction_key, data_key = jax.random.split(jax.random.key(0), 3)
    examples = 4
    logits = jax.random.normal(logits_key, (examples, *outputs.shape[1:]))
    direction = jax.random.normal(direction_key, logits.shape)
    made_up = jax.tree.map(lambda x: _made_up(data_key, (examples, *x.shape[1:]), x.dtype), data)
    actual = jax.jvp(jax.grad(lambda z: jnp.sum(loss(z, made_up))), (logits,), (direction,))[1]
    p = jax.nn.softmax(logits, axis=-1)
    expected = p * (direction - jnp.sum(p * direction, axis=-1, keepdims=True))
    weight = jnp.sum(actual * expected, axis=-1, keepdims=True) / jnp.sum(jnp.square(expected), axis=-1, keepdims=True)
    return bool(jnp.all(weight >= 0)) and bool(jnp.allclose(actual, weight * expected, atol=1e-3))


def _made_up(key, shape, dtype):
    """Data on which any loss can be evaluated: positive reals, and integers that are valid labels."""
    if jnp.issubdtype(dtype, jnp.floating):
        return jax.random.uniform(key, shape).astype(dtype)
    return jnp.zeros(shape, dtype)


def _check_softmax_cross_entropy(objective, params):
    if not isinstance(objective, Objective):
        raise ValueError(
            "method='ggn_sampled' has to know where the network ends and the loss begins; pass a"
            " curvax.Objective(predict, loss, data) in place of the function, or choose method='hutchinson'."
        )
    if not is_softmax_cross_entropy(objective, params):
        raise ValueError(
            "method='ggn_sampled' draws labels from a softmax, but the loss of this Objective is not a softmax"
            " cross-entropy of outputs (B, ..., C); choose method='hutchinson'."
        )


def _split(data: Any, micro_batches: int) -> list[Any]:
    """Equal micro-batches of strided examples, so that each device's share of a sharded batch is in all of them."""
    size = jax.tree.leaves(data)[0].shape[0]
    count = next(n for n in range(min(micro_batches, size), 0, -1) if size % n == 0)
    rows = jax.tree.map(lambda x: x.reshape(size // count, count, *x.shape[1:]), data)
    return [jax.tree.map(lambda x, i=i: x[:, i], rows) for i in range(count)]


def _mean(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


class _Moments(NamedTuple):
    """The samples seen so far, by Welford's recurrence: their number, mean, and squared deviations from it."""

    count: int
    mean: Any
    deviations: Any

    def standard_error(self) -> Any:
        if self.count < 2:
            return None
        return jax.tree.map(lambda d: jnp.sqrt(d / ((self.count - 1) * self.count)), self.deviations)


def _no_samples(params: Any) -> _Moments:
    zeros = jax.tree.map(lambda x: jnp.zeros_like(_at_least_float32(x)), params)
    return _Moments(0, zeros, zeros)


def _add_samples(sample: Callable[[jax.Array], Any], keys: jax.Array, moments: _Moments) -> _Moments:
    def add(carry, step):
        key, number = step
        mean, deviations = carry
        off = jax.tree.map(jnp.subtract, sample(key), mean)
        new_mean = jax.tree.map(lambda m, d: m + d / number.astype(d.dtype), mean, off)
        share = (number - 1) / number
        return (new_mean, jax.tree.map(lambda v, d: v + share.astype(d.dtype) * d * d, deviations, off)), None

    count = len(keys)
    numbers = jnp.arange(moments.count + 1, moments.count + count + 1, dtype=jnp.float32)
    # XLA on CPU runs convolutions inside a loop many times slower, so that a few samples are better unrolled.
    unroll = count if count <= 8 else 1
    (mean, deviations), _ = jax.lax.scan(add, moments[1:], (keys, numbers), unroll=unroll)
    return _Moments(moments.count + count, mean, deviations)


def select(params: Any, where: Any) -> Any:
    """The leaves that `where` selects (see `hessian_diag`), with `optax.MaskedNode()` in place of the others."""
    if where is None:
        return params
    mask = jax.tree.broadcast(where(params) if callable(where) else where, params)
    return jax.tree.map(lambda use, x: x if use else optax.MaskedNode(), mask, params)


def _restrict(objective, params, where):
    """The objective as a function of the leaves that `where` selects, and those leaves."""
    if where is None:
        return objective, params
    chosen = select(params, where)

    def is_hole(x):
        return isinstance(x, optax.MaskedNode)

    def merge(chosen):
        return jax.tree.map(lambda x, whole: whole if is_hole(x) else x, chosen, params, is_leaf=is_hole)

    if not isinstance(objective, Objective):
        return lambda chosen: objective(merge(chosen)), chosen
    penalty = objective.penalty
    restricted = dataclasses.replace(
        objective,
        predict=lambda chosen, data: objective.predict(merge(chosen), data),
        penalty=None if penalty is None else lambda chosen: penalty(merge(chosen)),
    )
    return restricted, chosen


def _check_real(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"the parameter '{path_name(path)}' is {jnp.result_type(leaf)}, and has no second derivative; leave it"
                " out with where=..., or split a complex one into real and imaginary parts."
            )


def diag_dtype(dtype: Any) -> Any:
    """The dtype of a diagonal for parameters of this one: float32, or float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(diag_dtype(x.dtype))


_METHODS = {"basis": _basis, "hutchinson": _hutchinson, "ggn_sampled": _ggn_sampled}

#: The methods that need a key.
STOCHASTIC = frozenset({"hutchinson", "ggn_sampled"})
