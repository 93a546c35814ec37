"""Eight CPU devices for every test, and JAX made strict for those of the library."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# Where other people's code runs, which promises nothing of the kind: Flax, optax's Adam, schedules and MultiSteps.
NOT_STRICT = {"contract", "experiments", "test_devices.py", "test_optimizers.py", "test_refresh.py"}


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """Silent promotion of dtypes or ranks is an error in curvax."""
    if NOT_STRICT & set(request.path.parts):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
