"""Random keys, in each of the forms that JAX has had."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

#: A seed, a `jax.random.key`, or a legacy `jax.random.PRNGKey`.
Key = jax.typing.ArrayLike


def as_key(key: Key | None) -> jax.Array:
    """The typed key that is meant.

    Args:
      key: an integer of Python, NumPy or JAX, traced or not; a scalar `jax.random.key`; or a `jax.random.PRNGKey`, a
        vector of uint32.

    Returns:
      A scalar typed key.

    Raises:
      ValueError: if it is none of these.

    Example:
      >>> import jax
      >>> from curvax.keys import as_key
      >>> bool(as_key(3) == as_key(jax.random.PRNGKey(3)))
      True
    """
    check_key(key)
    if isinstance(key, numbers.Integral):
        return jax.random.key(key)
    array = jnp.asarray(key)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return array
    if not array.ndim:
        return jax.random.key(array)
    own = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    # Of another length than the keys of the generator that JAX is set to, it is one of the other's.
    other = "threefry2x32" if array.shape == (2,) else "rbg"
    wrapped: jax.Array = jax.random.wrap_key_data(array, impl=None if array.shape == own.shape else other)
    return wrapped


def check_key(key: Any) -> None:
    """Raises a ValueError if this is no key, without computing anything."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is None:
        right = isinstance(key, int) and not isinstance(key, bool) and -(2**63) <= key < 2**63
    elif shape == ():
        right = jnp.issubdtype(dtype, jax.dtypes.prng_key) or jnp.issubdtype(dtype, np.integer)
    else:
        # The lengths of JAX's generators, threefry and rbg.
        right = dtype == np.uint32 and shape in ((2,), (4,))
    if right:
        return
    said = f"an array {dtype}{list(shape)}" if isinstance(shape, tuple) else repr(key)
    raise ValueError(f"key={said} is no random key; pass a seed such as key=0, or one jax.random.key(seed).")
