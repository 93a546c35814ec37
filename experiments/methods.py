"""The methods that are compared, each a chain; SOAP is written for it, and Sophia has a step of its own.

The size of a learning rate does not carry over from one method to another: each has its own. Muon and SOAP are for
matrices, where all axes of a kernel but the last are rows; the other parameters have AdamW, as their authors advise.
"""

import jax
import jax.numpy as jnp
import optax

import curvax
from experiments.soap import scale_by_soap


def make(config, learning_rate: jax.typing.ArrayLike, key: jax.Array) -> optax.GradientTransformationExtraArgs:
    """The transformation of a `TrainConfig`, which accepts `obj_fn`, whether it uses it or not.

    Args:
        config: of the run.
        learning_rate: of this step; it may be traced, since no state depends on it.
        key: for the probes of curvature; the same in every step, which the state counts.
    """
    rate, decay, b1, b2 = learning_rate, config.weight_decay, config.momentum, config.b2
    every = config.curvature_every
    usual = {"weight_decay": decay, "momentum": b1, "nesterov": config.nesterov}
    makers = {
        "sgd": lambda: sgd(rate, **usual),
        "adamw": lambda: adamw(config, rate),
        "lars": lambda: optax.lars(rate, trust_coefficient=1.0, **usual),
        "lamb": lambda: optax.lamb(rate, b1=b1, b2=b2, weight_decay=decay),
        "muon": lambda: muon(config, rate),
        "muon_lars": lambda: muon_lars(config, rate),
        "soap": lambda: soap(config, rate),
        "sophia": lambda: sophia(config, rate, key),
        "mclr": lambda: curvax.mclr(rate, **usual),
        "percent_delta": lambda: curvax.percent_delta(rate, **usual),
        # Curvature is that of the updates that are given `obj_fn`, which the training loop chooses.
        "cblr": lambda: curvax.cblr(rate, damping=config.damping, every=1, basis_every=every, key=key, **usual),
        # The control: the same, with squared gradients in place of curvature.
        "cblr_squares": lambda: curvax.cblr(rate, method=curvax.SquaredGradients(), basis_every=every, **usual),
    }
    tx = makers[config.optimizer]()
    # Quantiles of radii in every step would take longer than a small step itself.
    return curvax.with_probes(tx, quantiles=()) if config.probes else optax.with_extra_args_support(tx)


def sgd(learning_rate, weight_decay, momentum, nesterov) -> optax.GradientTransformation:
    """Gradient descent with momentum: a radius of 1."""
    # As in LARS, unlike `optax.sgd`, momentum averages steps: a decaying rate then means the same to all.
    parts = optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)
    return optax.chain(*parts, optax.trace(momentum, nesterov))


def adamw(config, learning_rate) -> optax.GradientTransformation:
    """optax's, with the decays of the configuration."""
    decays = {"b1": config.momentum, "b2": config.b2, "weight_decay": config.weight_decay}
    return optax.adamw(learning_rate, **decays)


def dimension_numbers(params):
    """Which axes of a matrix, or of a kernel, are rows and which columns, as optax's Muon says it."""
    numbers = lambda x: optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)
    return jax.tree.map(lambda x: numbers(x) if x.ndim > 1 else None, params)


def muon(config, learning_rate) -> optax.GradientTransformation:
    """optax's, with the root mean square of Adam's steps (Liu et al. 2025): one learning rate for all parameters."""
    return optax.contrib.muon(
        learning_rate,
        beta=config.momentum,
        weight_decay=config.weight_decay,
        adam_b2=config.b2,
        adam_weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=dimension_numbers,
        consistent_rms=0.2,
    )


def muon_lars(config, learning_rate) -> optax.GradientTransformation:
    """Muon's direction at LARS's length."""
    direction = optax.contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=dimension_numbers)
    return of_matrices(config, learning_rate, direction, curvax.scale_by_lars())


def soap(config, learning_rate) -> optax.GradientTransformation:
    """Adam in the eigenbasis of the gradient's second moments."""
    return of_matrices(config, learning_rate, scale_by_soap(config.momentum, config.b2, 1e-8, config.curvature_every))


def of_matrices(config, learning_rate, *parts: optax.GradientTransformation) -> optax.GradientTransformation:
    """These transformations for matrices and kernels, AdamW for the rest."""
    rest = optax.add_decayed_weights(config.weight_decay), optax.scale_by_learning_rate(learning_rate)
    transforms = {"matrix": optax.chain(*parts, *rest), "rest": adamw(config, learning_rate)}
    return optax.partition(transforms, lambda params: jax.tree.map(lambda x: ("rest", "matrix")[x.ndim > 1], params))


def sophia(config, learning_rate, key) -> optax.GradientTransformationExtraArgs:
    """Sophia with the diagonal of the Gauss-Newton matrix (Liu et al. 2023): `clip(m / (gamma h), 1)`.

    `optax.contrib.sophia` would estimate it in a branch, where XLA's convolutions are slow on a CPU.
    """
    newton = lambda m, h: jnp.clip(m / jnp.maximum(config.damping * h, 1e-12), -1, 1)
    clipped = lambda updates, state, params=None, *, hessian_diag, **_: (
        jax.tree.map(newton, updates, hessian_diag),
        state,
    )
    parts = optax.add_decayed_weights(config.weight_decay), optax.scale_by_learning_rate(learning_rate)
    radius = optax.GradientTransformationExtraArgs(optax.init_empty_state, clipped)
    inner = optax.chain(optax.ema(config.momentum), radius, *parts)
    # One sample of drawn labels, as its authors take.
    method = curvax.GaussNewton(num_samples=1)
    return curvax.with_hessian_diag(inner, method=method, every=1, decay=0.99, key=key)
