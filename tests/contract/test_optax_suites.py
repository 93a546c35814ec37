"""The suites to which optax holds its own optimizers, run on those of curvax.

optax ships them in its wheel. A suite looks a factory up by its name, and is parametrised over optimizers, targets and
dtypes: here the cases of one of its optimizers, the stand-in, are run again with a factory of curvax in its place.

Left out, as `test_what_is_left_out` asserts: `cblr` in the alias suite, which passes `obj_fn` to no optimizer; the
tests of each suite that name one optimizer of optax's; and layers of single arrays for `mclr` (see `FIRST_ORDER`).
"""

import collections
import importlib
import inspect
from unittest import mock

import jax
import optax
import pytest
from absl.testing import absltest

import curvax

alias = importlib.import_module("optax._src.alias")
# Modules, not the classes in them, which pytest would collect.
alias_test = importlib.import_module("optax._src.alias_test")
contrib_test = importlib.import_module("optax.contrib._common_test")
sharding_test = importlib.import_module("optax._src.sharding_test")
float64_test = importlib.import_module("optax._src.float64_test")


def percent_delta_per_array(learning_rate: optax.ScalarOrSchedule):
    return curvax.percent_delta(learning_rate, layers="array")


# A learning rate at which each reaches the suites' minima. Their targets are bare vectors, which by default have no
# kernel to follow, and a radius of at most 1; LARS, LAMB and the per-array PercentDelta take them for layers. MCLR
# cannot: once two of three entries have converged, the median gradient is next to zero, and the radius throws the third
# about.
FIRST_ORDER = {
    "lars": (curvax.lars, 1.0),
    "lamb": (curvax.lamb, 1e-3),
    "mclr": (curvax.mclr, 1e-3),
    "percent_delta": (curvax.percent_delta, 1e-3),
    "percent_delta_per_array": (percent_delta_per_array, 2e-3),
}
# The contrib suite passes `obj_fn` to the optimizer named sophia, and to no other.
CURVATURE = {"sophia": (curvax.cblr, 1e-2)}


class Unskippable(absltest.TestCase):
    """A case that cannot skip: what does not run must be left out by name."""

    def skipTest(self, reason):
        self.fail(f"skipped: {reason}")


def cases(suite):
    """`(name, test, arguments)` for every parametrised case of a suite, with empty arguments for plain tests."""
    for name, test in inspect.getmembers(suite, inspect.isfunction):
        if name.startswith("test"):
            arguments = inspect.getclosurevars(test).nonlocals.get("testcase_params", {})
            yield name, inspect.unwrap(test), arguments if isinstance(arguments, dict) else {}


def runs(suite, stand_in, factories):
    for name, test, arguments in cases(suite):
        if arguments.get("opt_name") == stand_in:
            for opt_name, (factory, learning_rate) in factories.items():
                ours = {**arguments, "opt_name": opt_name, "opt_kwargs": {"learning_rate": learning_rate}}
                yield pytest.param(test, ours, factory, id=f"{suite.__name__}-{name}-{opt_name}")


RUNS = [
    *runs(alias_test.AliasTest, "lars", FIRST_ORDER),
    *runs(contrib_test.ContribTest, "muon", FIRST_ORDER),
    *runs(contrib_test.ContribTest, "sophia", CURVATURE),
]


@pytest.mark.slow_but_for("AliasTest-test_optimization")
@pytest.mark.parametrize(("test", "arguments", "factory"), RUNS)
def test_generic_suite(test, arguments, factory):
    home = optax.contrib if arguments["opt_name"] in CURVATURE else alias
    with mock.patch.object(home, arguments["opt_name"], factory, create=True):
        try:
            test(Unskippable(), **arguments)
        except absltest.SkipTest as skip:
            pytest.fail(f"skipped: {skip}")


def test_what_is_left_out():
    left_out = collections.defaultdict(set)
    for suite in (alias_test.AliasTest, contrib_test.ContribTest):
        for _, test, arguments in cases(suite):
            left_out[suite.__name__].add(test.__name__)
            if arguments.get("opt_name") in ("lars", "muon", "sophia"):
                left_out[suite.__name__].discard(test.__name__)
    ran = {run.values[0].__name__ for run in RUNS}
    assert left_out["AliasTest"] - ran == {"test_explicit_dtype"}
    assert left_out["ContribTest"] - ran == set()


OPTIMIZERS = {name: factory(rate) for name, (factory, rate) in FIRST_ORDER.items()} | {"cblr": curvax.cblr(1.0)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_init_with_abstract_input(name):
    inspect.unwrap(sharding_test.ShardingTest.test_init_with_abstract_input_adam)(Unskippable(), OPTIMIZERS[name])


# cblr is left out: these call `update` without `obj_fn`. tests/test_devices.py does the same for it.
@pytest.mark.slow_but_for("lars")
@pytest.mark.parametrize("name", FIRST_ORDER)
@pytest.mark.parametrize(
    "test", ["test_state_sharding_type_init_match_update", "test_state_sharding_type_preserved_with_jit"]
)
def test_sharding_suite(name, test):
    raw = inspect.unwrap(getattr(sharding_test.ShardingTest, test + "_adam"))
    # The suite compares versions as strings, and takes jax 0.10 for older than 0.7.2.
    with mock.patch.object(jax, "__version__", "9"):
        raw(Unskippable(), OPTIMIZERS[name])


SCALERS = [
    curvax.scale_by_approximate_radius,
    curvax.scale_by_lars,
    curvax.scale_by_median_curvature,
    curvax.scale_by_percent_delta,
    lambda: curvax.discard_small_gradients(0.5),
]


@pytest.mark.parametrize("scaler", SCALERS)
def test_float64_suite(scaler):
    raw = inspect.unwrap(float64_test.Float64Test.test_mixed_dtype_input_outputs_adam)
    case = float64_test.Float64Test()
    try:
        raw(case, scaler, {})
    finally:
        jax.config.update("jax_enable_x64", False)
