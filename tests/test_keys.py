import jax
import numpy as np
import pytest

from curvax.keys import as_key


@pytest.mark.parametrize(
    "key", [7, np.int64(7), np.uint32(7), jax.numpy.int32(7), jax.random.PRNGKey(7), np.asarray(jax.random.PRNGKey(7))]
)
def test_every_form_of_a_key_is_the_same_key(key):
    np.testing.assert_array_equal(jax.random.key_data(as_key(key)), [0, 7])
    np.testing.assert_array_equal(jax.random.key_data(jax.jit(as_key)(key)), [0, 7])
    np.testing.assert_array_equal(jax.random.key_data(as_key(jax.random.key(7))), [0, 7])


def test_a_legacy_key_of_another_generator_is_its_key():
    typed = jax.random.key(7, impl="rbg")
    assert bool(as_key(jax.random.key_data(typed)) == typed)
    with jax.default_prng_impl("unsafe_rbg"):
        assert bool(as_key(jax.random.PRNGKey(7)) == jax.random.key(7))
        assert as_key(np.array([0, 7], np.uint32)).dtype == jax.random.key(7, impl="threefry2x32").dtype


@pytest.mark.parametrize(
    "key",
    [
        *(True, np.bool_(True), 0.5, None, "seed", 2**63, np.uint32, jax.numpy.uint32),
        *(np.ones(2), np.ones(3, np.uint32), jax.random.split(as_key(0))),
    ],
)
def test_what_is_no_key_is_refused(key):
    with pytest.raises(ValueError, match=r"key=.* is no random key; pass a seed such as key=0"):
        as_key(key)
