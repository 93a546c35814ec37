import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from curvax import discard_random_losses, discard_small_losses

DISCARD = jax.jit(discard_small_losses)


def reference(losses, fraction):
    """A stable sort, smallest first, of which the first are left out."""
    size = len(losses)
    discarded = int(np.floor(fraction * size + 1e-6))
    weights = np.full(size, size / (size - discarded))
    weights[np.argsort(losses, kind="stable")[:discarded]] = 0
    return weights


FRACTIONS = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 0.99])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    fraction=FRACTIONS,
    distinct=st.sampled_from([2, 5, 1000]),
    low=st.sampled_from([0, -3]),
)
def test_keeps_exactly_the_largest(seed, fraction, distinct, low):
    """With ties, and with negative losses, such as log-likelihoods of densities have."""
    losses = (np.random.default_rng(seed).integers(0, distinct, 40) / 7 + low).astype(np.float32)
    np.testing.assert_allclose(DISCARD(losses, fraction), reference(losses, fraction), rtol=1e-6)


def test_nothing_is_changed_by_a_fraction_of_zero():
    losses = jax.random.normal(jax.random.key(0), (37,)) ** 2
    np.testing.assert_array_equal(DISCARD(losses, 0.0) * losses, losses)


def test_no_gradient_flows_through_the_weights():
    losses = jnp.array([1.0, 2.0, 3.0, 4.0])
    gradient = jax.grad(lambda x: jnp.mean(discard_small_losses(x, 0.5) * x))(losses)
    np.testing.assert_allclose(gradient, [0, 0, 0.5, 0.5])


def test_nan_is_seen():
    losses = jnp.array([1.0, jnp.nan, 3.0])
    assert np.isnan(jnp.mean(DISCARD(losses, 0.4) * losses))


MESH = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
BY_NAME = functools.partial(discard_small_losses, axis_name="x")
BY_NAME = jax.jit(jax.shard_map(BY_NAME, mesh=MESH, in_specs=(P("x"), P()), out_specs=P("x")))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), fraction=FRACTIONS, distinct=st.sampled_from([3, 1000]))
def test_the_smallest_of_all_devices(seed, fraction, distinct):
    losses = (np.random.default_rng(seed).integers(0, distinct, 40) / 7).astype(np.float32)
    expected = reference(losses, fraction)
    spread = jax.device_put(losses, NamedSharding(MESH, P("x")))
    np.testing.assert_allclose(DISCARD(spread, fraction), expected, rtol=1e-6)
    np.testing.assert_allclose(BY_NAME(losses, jnp.float32(fraction)), expected, rtol=1e-6)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
def test_the_control_keeps_as_many_at_random(fraction):
    losses = jnp.arange(1000.0)
    draw = functools.partial(discard_random_losses, losses=losses, fraction=fraction)
    weights = jax.jit(jax.vmap(lambda key: draw(key)))(jax.random.split(jax.random.key(0), 200))
    np.testing.assert_allclose(weights.mean(1), 1, rtol=1e-5)
    np.testing.assert_array_equal((weights == 0).sum(1), round(1000 * fraction))
    # Every example is kept alike: its mean weight has the standard error of 200 draws.
    error = np.sqrt(fraction / (1 - fraction) / 200)
    assert np.all(np.abs(weights.mean(0) - 1) <= 5 * error + 1e-6)


def test_errors_say_what_to_pass():
    with pytest.raises(ValueError, match=r"\(2, 3\).*one loss per example"):
        discard_small_losses(jnp.ones((2, 3)), 0.1)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        discard_small_losses(jnp.ones(3), 1.0)


ENDS = [-np.inf, -3e38, -1e8, -1.0, -1e-30, -0.0, 0.0, 1e-30, 0.1, 0.5, 1.0, 1e8, 3e38, np.inf]


@settings(max_examples=30, deadline=None)
@given(losses=st.lists(st.sampled_from(ENDS), min_size=40, max_size=40), fraction=FRACTIONS)
def test_losses_are_ranked_as_they_are_given(losses, fraction):
    """However far apart, of either sign and infinite: nothing rounds, and 0 ties with -0."""
    losses = np.array(losses, np.float32)
    np.testing.assert_allclose(DISCARD(losses, fraction), reference(losses, fraction), rtol=1e-6)
    np.testing.assert_allclose(BY_NAME(losses, jnp.float32(fraction)), reference(losses, fraction), rtol=1e-6)


def test_losses_on_an_explicit_mesh():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    losses = np.random.default_rng(0).normal(size=40).astype(np.float32)
    with jax.set_mesh(mesh):
        weights = jax.jit(lambda x: discard_small_losses(x, 0.3))(jax.device_put(losses, NamedSharding(mesh, P("x"))))
    np.testing.assert_allclose(weights, reference(losses, 0.3), rtol=1e-6)


@pytest.mark.parametrize("fraction", [np.nan, -0.1, np.float32(1), jnp.array(1.5), np.inf, "0.5", True, None])
def test_fractions_that_are_none_are_refused(fraction):
    for discard in (discard_small_losses, functools.partial(discard_random_losses, jax.random.key(0))):
        with pytest.raises(ValueError, match=r"fraction=.*\[0, 1\)"):
            discard(jnp.ones(3), fraction)


def test_integers_are_ranked_and_weighted_by_fractions():
    weights = discard_small_losses(jnp.arange(8), 0.25)
    np.testing.assert_allclose(weights, [0, 0] + [8 / 6] * 6, rtol=1e-6)
    assert discard_random_losses(0, jnp.arange(8), 0.25).dtype == np.float32


@pytest.mark.parametrize(
    ("losses", "said"),
    [(jnp.array([True, False]), "bool, which have no order"), (jnp.ones(2) * 1j, "complex64"), (8, "int")],
)
def test_what_has_no_order_is_refused(losses, said):
    for discard in (discard_small_losses, functools.partial(discard_random_losses, 0)):
        with pytest.raises(ValueError, match=f"losses are .*{said}"):
            discard(losses, 0.5)
