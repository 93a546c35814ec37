"""The methods that are compared: a name, a chain, and the learning rate that `tune` found for it.

All share their order, decay then radius then learning rate then momentum, and so their meaning of the learning rate:
the gamma of eq. 10 and 21. Its size does not carry over from one radius to another: each method has its own.
"""

from collections.abc import Callable

import jax
import optax

import curvax


def sgd(config, learning_rate, key, axis_name):
    """Gradient descent with heavy-ball momentum: a radius of 1."""
    del key, axis_name
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        # As in LARS, unlike `optax.sgd`, momentum averages steps: a decaying rate then means the same to all.
        optax.scale_by_learning_rate(learning_rate),
        optax.trace(config.momentum),
    )


def lars(config, learning_rate, key, axis_name):
    """norm2(w) / norm2(g), eq. 23."""
    del key, axis_name
    return curvax.lars(learning_rate, config.weight_decay, momentum=config.momentum, trust_coefficient=1.0)


def mclr(config, learning_rate, key, axis_name):
    """median(|w|) / median(|g|), eq. 20-22."""
    del key, axis_name
    return curvax.mclr(learning_rate, config.weight_decay, momentum=config.momentum)


def percent_delta(config, learning_rate, key, axis_name):
    """n / norm1(g / w), eq. 24."""
    del key, axis_name
    return curvax.percent_delta(learning_rate, config.weight_decay, momentum=config.momentum)


def cblr(config, learning_rate, key, axis_name):
    """The radius of curvature, eq. 9-11, damped, at the step length of LARS."""
    return curvax.cblr(
        learning_rate,
        config.damping,
        config.weight_decay,
        momentum=config.momentum,
        # Of the updates that are given `obj_fn`, which the training loop chooses.
        every=1,
        key=key,
        axis_name=axis_name,
    )


def lamb(config, learning_rate, key, axis_name):
    """LARS's radius after Adam."""
    del key, axis_name
    return curvax.lamb(learning_rate, b1=config.momentum, weight_decay=config.weight_decay)


METHODS: dict[str, Callable] = {make.__name__: make for make in (sgd, lars, mclr, percent_delta, cblr, lamb)}


def make(
    config, learning_rate: jax.typing.ArrayLike, key: jax.Array, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """The transformation of a configuration.

    Args:
        config: an `experiments.config.TrainConfig`.
        learning_rate: of this step; it may be traced, since no state depends on it.
        key: for the probes of `cblr`; the same in every step, which the state counts.
        axis_name: of `pmap`, where `obj_fn` is the loss on one device's share of the batch; each then has its probes.

    Returns:
        A transformation that accepts `obj_fn` and `hessian_diag`, whether it uses them or not.
    """
    tx = METHODS[config.optimizer](config, learning_rate, key, axis_name)
    # Quantiles of radii in every step would take longer than a small step itself.
    return curvax.with_probes(tx, quantiles=()) if config.probes else optax.with_extra_args_support(tx)
