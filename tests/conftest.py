"""Eight CPU devices and quick compilation for every test, and JAX made strict for those of the library."""

import atexit
import gc
import os
import shutil
import tempfile

# What several tests compile, or several processes of one, is compiled once. Read when JAX is imported, here and in all
# processes that this one starts.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="curvax-tests-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest

# The tests compile far longer than they compute. Read when the CPU backend starts, after the tests are collected.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    # Later ones end the process, for they do not know it.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_num_cpu_devices", 8)
# Tracing makes many objects and few cycles.
gc.set_threshold(50_000, 20, 100)

# Where other people's code runs, which promises nothing of the kind: Flax, optax's Adam, schedules and MultiSteps.
NOT_STRICT = {
    "contract",
    "experiments",
    "fuzz",
    "test_devices.py",
    "test_noise_scale.py",
    "test_optimizers.py",
    "test_refresh.py",
    "test_with_hessian_diag.py",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What is slow beside what says so itself: what is seen once, pages, and most cases of some tests."""
    for item in items:
        but_for = item.get_closest_marker("slow_but_for")
        if (
            item.get_closest_marker("once")
            or item.path.suffix == ".md"
            or (but_for and not any(part in item.name for part in but_for.args))
        ):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """Silent promotion of dtypes or ranks is an error in curvax."""
    if NOT_STRICT & set(request.path.parts):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    """Double precision, for what is compared to more digits than float32 has."""
    with jax.enable_x64(True):
        yield
