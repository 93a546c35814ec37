"""Eight CPU devices for every test, and JAX made strict for those of the library."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# Other people's code, which promises nothing of the kind: optax's own suites, and Flax.
NOT_STRICT = {"contract", "experiments"}


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """Silent promotion of dtypes or ranks is an error in curvax."""
    if NOT_STRICT & set(request.path.parts):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
