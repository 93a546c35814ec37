"""The methods that are compared, each a chain.

All share their order, decay then radius then learning rate then momentum, and so their meaning of the learning rate:
the gamma of eq. 10 and 21. Its size does not carry over from one radius to another: each method has its own.
"""

import jax
import optax

import curvax


def make(config, learning_rate: jax.typing.ArrayLike, key: jax.Array) -> optax.GradientTransformationExtraArgs:
    """The transformation of a `TrainConfig`, which accepts `obj_fn`, whether it uses it or not.

    Args:
        config: of the run.
        learning_rate: of this step; it may be traced, since no state depends on it.
        key: for the probes of `cblr`; the same in every step, which the state counts.
    """
    usual = {"weight_decay": config.weight_decay, "momentum": config.momentum}
    makers = {
        "sgd": lambda: sgd(learning_rate, **usual),
        "lars": lambda: curvax.lars(learning_rate, trust_coefficient=1.0, **usual),
        "mclr": lambda: curvax.mclr(learning_rate, **usual),
        "percent_delta": lambda: curvax.percent_delta(learning_rate, **usual),
        # Curvature is that of the updates that are given `obj_fn`, which the training loop chooses.
        "cblr": lambda: curvax.cblr(learning_rate, damping=config.damping, every=1, key=key, **usual),
        "lamb": lambda: curvax.lamb(learning_rate, b1=config.momentum, weight_decay=config.weight_decay),
    }
    tx = makers[config.optimizer]()
    # Quantiles of radii in every step would take longer than a small step itself.
    return curvax.with_probes(tx, quantiles=()) if config.probes else optax.with_extra_args_support(tx)


def sgd(learning_rate, weight_decay, momentum) -> optax.GradientTransformation:
    """Gradient descent with heavy-ball momentum: a radius of 1."""
    # As in LARS, unlike `optax.sgd`, momentum averages steps: a decaying rate then means the same to all.
    parts = optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)
    return optax.chain(*parts, optax.trace(momentum))
