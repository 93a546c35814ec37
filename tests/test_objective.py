import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

from curvax import Objective


def penalty(params):
    return 0.5 * sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params))


def test_is_mean_loss_plus_penalty():
    data, params = problems.classification(), problems.mlp_params()
    objective = Objective(problems.mlp, problems.cross_entropy, data, penalty)
    logits = np.asarray(problems.mlp(params, data), np.float64)
    log_p = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    squares = sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(params))
    expected = -np.mean(log_p[np.arange(len(logits)), data["y"]]) + squares / 2
    np.testing.assert_allclose(objective(params), expected, rtol=1e-6)


def test_crosses_jit_as_an_argument_without_retracing():
    traces = []

    @jax.jit
    def value(objective, params):
        traces.append(None)
        return objective(params)

    params = problems.mlp_params()
    first, second = (problems.mlp_objective(seed=seed) for seed in (0, 1))
    np.testing.assert_allclose(value(first, params), first(params), rtol=1e-6)
    np.testing.assert_allclose(value(second, params), second(params), rtol=1e-6)
    assert len(traces) == 1


def test_a_loss_that_is_averaged_already_is_refused():
    objective = Objective(
        problems.mlp, lambda z, data: jnp.mean(problems.cross_entropy(z, data)), problems.classification()
    )
    with pytest.raises(ValueError, match=r"scalar.*one loss per example, a vector \(B,\)"):
        objective(problems.mlp_params())
