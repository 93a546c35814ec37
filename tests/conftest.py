"""Eight CPU devices for every test, and JAX made strict for those of the library."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """Silent promotion of dtypes or ranks is an error in curvax; Flax and the experiments do not promise as much."""
    if "experiments" in request.path.parts:
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
