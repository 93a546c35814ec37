"""Order statistics of magnitudes against sorting, jnp.median and jnp.quantile, on one device and on meshes."""

import functools
import re
import subprocess
import sys

import chex
import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from curvax.order_statistics import count_of, median, order_statistics, quantile, zeros

# Odd and even sizes for each way of computing: sorted, searched in one row, searched in 32 rows.
SIZES = [1, 2, 65, 4097, 65536]
DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32]
COLLECTIVE = re.compile(r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")

jnp_median = jax.jit(lambda x: jnp.median(jnp.abs(x)))
jnp_quantile = jax.jit(lambda x, q: jnp.quantile(jnp.abs(x), q))


def population(kind, size, dtype=jnp.float32, seed=0):
    """Magnitudes of one awkward kind; the positions are random, so that the strided sample is one."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=size).astype(np.float32)
    x = {
        "normal": lambda: x,
        "log-normal": lambda: rng.lognormal(0, 3, size),
        "zeros": lambda: x * (rng.uniform(size=size) > 0.45),
        "mostly zeros": lambda: x * (rng.uniform(size=size) > 0.6),
        "ties": lambda: np.round(3 * x),
        "constant": lambda: np.full(size, -0.3),
        "two points": lambda: rng.permutation(np.arange(size) % 2) + 1.0,
        "gap": lambda: np.where(rng.uniform(size=size) < 0.5, 1e-20 * x, 1e20 * x),
        "geometric": lambda: 2.0 ** -rng.integers(0, 120, size),
        "infinities": lambda: np.where(rng.uniform(size=size) < 0.5, -np.inf, x),
        "denormals": lambda: 1e-39 * x.astype(np.float64),
    }[kind]()
    with np.errstate(over="ignore"):
        return jnp.asarray(x).astype(dtype)


KINDS = "normal,log-normal,zeros,mostly zeros,ties,constant,two points,gap,geometric,infinities,denormals".split(",")


def assert_same_bits(actual, expected):
    chex.assert_trees_all_equal_dtypes(actual, expected)
    actual, expected = np.asarray(actual), np.asarray(expected)
    # NaNs have many patterns, of which none is meant.
    assert actual.tobytes() == expected.tobytes() or (np.isnan(actual) and np.isnan(expected)), (actual, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("left_out", [0.0, 0.4, 0.52, 1.0])
def test_a_median_without_zeros_is_that_of_the_others(size, left_out):
    rng = np.random.default_rng(size)
    x = rng.normal(size=size).astype(np.float32)
    x[rng.permutation(size)[: round(left_out * size)]] = 0
    rest = x[x != 0]
    expected = jnp_median(rest) if rest.size else 0
    np.testing.assert_array_equal(median(x, without=zeros(x)), expected)


@pytest.mark.slow_but_for("[1-", "[2-", "65-", "4097-")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_median_and_quantile_are_those_of_jax_numpy(size, dtype):
    for kind in KINDS:
        x = population(kind, size, dtype)
        assert_same_bits(median(x), jnp_median(x))
        for q in [0.3, 0.77, 1.0]:
            assert_same_bits(quantile(x, q), jnp_quantile(x, q))


@pytest.mark.parametrize("size", [65, 9001])
def test_every_rank_is_that_of_a_sort(size):
    ranks = jnp.array(np.unique(np.linspace(0, size - 1, 37).astype(np.int32)))
    statistics = jax.jit(lambda x: jax.lax.map(lambda k: order_statistics(x, k), ranks))
    for kind in KINDS:
        x = population(kind, size)
        # Sorted as integers: NumPy's order of denormals is safe, but this needs no trust.
        patterns = np.sort(np.abs(np.asarray(x)).view(np.int32))
        found, above = (np.asarray(a).view(np.int32) for a in statistics(x))
        np.testing.assert_array_equal(found, patterns[ranks])
        np.testing.assert_array_equal(above, patterns[np.minimum(ranks + 1, size - 1)])


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    values=hypothesis.extra.numpy.arrays(np.float32, 33, elements=st.floats(width=32, allow_nan=False)),
    repeats=st.sampled_from([1, 300]),
    q=st.floats(0, 1, width=32),
)
def test_any_floats(values, repeats, q):
    # Repeated 300 times they exceed the size that is sorted, and every value is a tie.
    x = np.tile(values, repeats)
    found, above = order_statistics(jnp.asarray(x), int(q * (x.size - 1)))
    patterns = np.sort(np.abs(x).view(np.int32))
    assert int(np.asarray(found).view(np.int32)) == patterns[int(q * (x.size - 1))]
    assert int(np.asarray(above).view(np.int32)) == patterns[min(int(q * (x.size - 1)) + 1, x.size - 1)]
    assert_same_bits(median(jnp.asarray(x)), jnp_median(x))
    assert_same_bits(quantile(jnp.asarray(x), q), jnp_quantile(x, q))


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpolation_is_rounded_as_in_jax_numpy(dtype):
    # Short factors meet ties of the rounding, where a product rounded too early or too late shows.
    pairs = jax.random.normal(jax.random.key(0), (200, 2)).astype(dtype)
    for q in np.float32([0.3, 0.1, 0.7, 0.9]):
        for pair in pairs[:50]:
            assert_same_bits(quantile(pair, q), jnp_quantile(pair, q))


@pytest.mark.parametrize("size", [3, 9001])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_one_nan_or_many_give_nan(size, share):
    x = np.asarray(population("normal", size)).copy()
    x[: max(1, int(share * size))] = -np.nan
    assert np.isnan(median(x)) and np.isnan(quantile(x, 0.0))


@pytest.mark.parametrize("x", [[], (), None, jnp.zeros((0, 3)), [jnp.zeros(0), jnp.zeros((2, 0))]])
def test_no_magnitudes_have_median_zero(x):
    assert_same_bits(median(x), np.float32(0))
    assert_same_bits(quantile(x, 0.3), np.float32(0))


def test_integers_scalars_and_complex_numbers():
    assert_same_bits(median(jnp.array([-3, 1, 2, 8])), np.float32(2.5))
    assert_same_bits(median(jnp.array([True, False])), np.float32(0.5))
    assert_same_bits(median(-2.0), np.float32(2))
    assert_same_bits(median(jnp.array([3 + 4j, 1j, -2])), np.float32(2))


def test_the_dtype_is_the_promotion_of_the_arrays():
    low = [jnp.ones(3, jnp.bfloat16), 2 * jnp.ones(3, jnp.bfloat16)]
    assert_same_bits(median(low), jnp.bfloat16(1.5))
    assert_same_bits(median([*low, jnp.zeros((), jnp.float16)]), np.float32(1))
    assert_same_bits(quantile([*low, jnp.zeros((), jnp.int32)], 1.0), jnp.bfloat16(2))


@pytest.mark.parametrize("scale", [1, 20])
def test_several_arrays_are_one_population(scale):
    arrays = [population(kind, scale * 500) for kind in ["normal", "zeros", "ties"]]
    tree = {"w": arrays[0].reshape(scale, 500), "b": [arrays[1], jnp.zeros(0)], "c": arrays[2].reshape(-1, 5, 4)}
    together = jnp.concatenate(arrays)
    assert_same_bits(median(tree), jnp_median(together))
    assert_same_bits(quantile(tree, 0.9), jnp_quantile(together, 0.9))


def test_quantile_of_a_traced_level_is_monotone_and_joins_minimum_to_maximum():
    x = population("log-normal", 20_001)
    levels = jnp.linspace(0, 1, 65)
    values = jax.jit(lambda qs: jax.lax.map(lambda q: quantile(x, q), qs))(levels)
    assert jnp.all(values[1:] >= values[:-1])
    assert values[0] == x.min() and values[-1] == x.max()
    # The CDF inverts the quantile: position q (n - 1) has that many elements below it.
    below = jnp.sum(x[None] < values[:, None], axis=1)
    np.testing.assert_allclose(below, levels * 20_000, atol=1)


@pytest.mark.slow
def test_double_precision():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        for size in [4, 9001]:
            x = jnp.asarray(rng.lognormal(0, 3, size))
            assert x.dtype == jnp.float64
            assert_same_bits(median(x), jnp_median(x))
            assert_same_bits(quantile(x, 0.3), jnp_quantile(x, 0.3))
            tiny = x * 1e-310
            patterns = np.sort(np.asarray(tiny).view(np.int64))
            assert int(np.asarray(order_statistics(tiny, size // 3)[0]).view(np.int64)) == patterns[size // 3]
            assert_same_bits(median(x.astype(jnp.float32)), jnp_median(x.astype(jnp.float32)))


# Ranks that floats, or signed integers, would round.


@pytest.mark.slow
def test_ranks_beyond_those_of_float32():
    # Element k has pattern 2**29 + 4 k, and so rank k; four, so that no rounding hides a wrong rank.
    size = 2**24 + 4
    x = jax.lax.bitcast_convert_type(2**29 + 4 * jnp.arange(size, dtype=jnp.int32), jnp.float32)
    found, above = (int(np.asarray(a).view(np.int32)) for a in order_statistics(x, 2**24 + 1))
    assert (found, above) == (2**29 + 4 * (2**24 + 1), 2**29 + 4 * (2**24 + 2))
    # (1 - 2**-24) (n - 1) lies between rank 2**24 + 1, odd, and the next, nearer to which than float32 can tell.
    assert abs(int(np.asarray(quantile(x, np.float32(1 - 2**-24))).view(np.int32)) - (2**29 + 4 * (2**24 + 2))) <= 1
    # (n - 1) / 2 lies halfway between ranks 2**23 + 1 and 2**23 + 2.
    assert abs(int(np.asarray(quantile(x, 0.5)).view(np.int32)) - (2**29 + 4 * (2**23 + 1) + 2)) <= 1
    assert abs(int(np.asarray(median(x)).view(np.int32)) - (2**29 + 4 * (2**23 + 1) + 2)) <= 1


def test_ranks_around_those_of_float32():
    """64 copies of an element each, by their axis."""
    x = jax.lax.bitcast_convert_type(2**29 + 4 * jnp.arange(2**18 + 1, dtype=jnp.int32), jnp.float32)
    last = 64 * x.size - 1
    copies = lambda function: np.asarray(jax.vmap(function, axis_name="copies", axis_size=64)())[..., 0].view(np.int32)
    for rank in [0, 2**24 - 65, 2**24 - 1, 2**24, 2**24 + 1, last]:
        found = copies(lambda rank=rank: order_statistics(x, rank, "copies"))
        assert found.tolist() == [2**29 + 4 * (rank // 64), 2**29 + 4 * (min(rank + 1, last) // 64)]
    ends = [copies(lambda q=q: quantile(x, q, "copies")) for q in (0.0, 1.0)]
    assert ends == [2**29, 2**29 + 4 * 2**18]


@pytest.mark.slow
def test_ranks_beyond_those_of_signed_integers():
    # Copies of 2**21 elements, which vmap adds up but does not store: of 1600, element k has ranks from 1600 k on.
    x = jax.lax.bitcast_convert_type(jnp.arange(2**21, dtype=jnp.int32), jnp.float32)

    @functools.partial(jax.jit, static_argnames="copies")
    def statistics(rank, copies):
        def ranked(_):
            return order_statistics(x, rank, "copies")

        return jax.vmap(ranked, axis_name="copies")(jnp.zeros(copies))

    for rank in [2**31 - 1, 2**31 + 5, 1600 * 2**21 - 1601]:
        found, above = (int(np.asarray(a)[0].view(np.int32)) for a in statistics(np.uint32(rank), 1600))
        assert (found, above) == (rank // 1600, (rank + 1) // 1600)
    with pytest.raises(OverflowError, match="Enable 64-bit types"):
        statistics(np.uint32(0), 2048)


def test_long_multiplication_is_that_of_python():
    from curvax.order_statistics import _rank_and_fraction

    rng = np.random.default_rng(0)
    for last in [2**24, 2**31 + 12345, 2**32 - 2]:
        levels = np.concatenate([rng.uniform(2**-8, 1, 50).astype(np.float32), [np.float32(1 - 2**-24), 1, 0]])
        rank, fraction = jax.jit(jax.vmap(lambda q: _rank_and_fraction(q, last)))(levels)  # noqa: B023
        for q, i, f in zip(levels, rank, fraction, strict=True):
            exact = int(float(q) * 2**32) * last
            assert int(i) == exact >> 32
            assert abs(float(f) - (exact & 0xFFFFFFFF) / 2**32) <= 2**-16


# Transformations and meshes.


@pytest.mark.parametrize("x64", [False, True])
def test_a_fraction_is_the_decimal_that_it_stands_for(x64):
    """As a number of Python, as an array, known or traced; what is below a whole number by less is not taken for it."""
    with jax.enable_x64(x64):
        traced = jax.jit(count_of, static_argnums=1)
        for size in (7, 10, 100, 50_000, 2**31 + 5):
            hundredths = np.arange(0, 101, 1 if size == 100 else 7)
            want = [int(k) * size // 100 for k in hundredths]
            assert [int(count_of(float(k) / 100, size)) for k in hundredths] == want
            if size < 2**20:  # A float32 stands for more than one part in 2**24.
                fractions = jnp.asarray((hundredths / 100).astype(np.float32))
                assert [int(x) for x in traced(fractions, size)] == want
                scalar = jnp.asarray(size, jnp.uint32)
                assert [int(x) for x in jax.jit(count_of)(fractions, scalar)] == want
        below = np.nextafter(np.float32(1), np.float32(0))
        assert int(count_of(0.9999999, 10)) == 9 == int(count_of(below, 10))


def test_under_vmap_and_cond():
    for shape in [(100, 64), (3, 9000)]:
        x = population("zeros", shape[0] * shape[1]).reshape(shape)
        np.testing.assert_array_equal(jax.vmap(median)(x), jnp.median(jnp.abs(x), axis=1))
    chosen = jax.jit(lambda flag, x: jax.lax.cond(flag, median, lambda x: x[0], x))(True, x[0])
    assert_same_bits(chosen, jnp_median(x[0]))


def test_pmap_and_vmap_axes_split_the_population():
    x = population("zeros", 8 * 9000)
    for mapped in [jax.pmap, jax.vmap]:
        medians = mapped(lambda shard: median(shard, "i"), axis_name="i")(x.reshape(8, 9000))
        np.testing.assert_array_equal(medians, jnp.full(8, jnp_median(x)))


SPECS = [P("a"), P("a", "b"), P(None, ("a", "b")), P()]


def sharded(x, kind, spec):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))
    return jax.device_put(x, NamedSharding(mesh, spec)), mesh


def largest_collective(compiled):
    """Elements in the largest result of a collective of the compiled program."""
    results = COLLECTIVE.findall(compiled.as_text())
    shapes = [shape for result in results for shape in re.findall(r"\[([\d,]*)\]", result)]
    return max((int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_sharded_under_jit(kind, spec):
    w, v = population("zeros", 256 * 512), population("normal", 512)
    x, _ = sharded(w.reshape(256, 512), kind, spec)
    y, _ = sharded(v.reshape(8, 64), kind, spec)
    compiled = jax.jit(lambda t: (median(t), quantile(t, 0.3))).lower([x, y]).compile()
    together = jnp.concatenate([w, v])
    assert_same_bits(compiled([x, y])[0], jnp_median(together))
    assert_same_bits(compiled([x, y])[1], jnp_quantile(together, 0.3))
    assert largest_collective(compiled) <= 8


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_sharded_under_shard_map(spec):
    w = population("zeros", 256 * 512)
    x, mesh = sharded(w.reshape(256, 512), AxisType.Auto, spec)
    names = tuple(np.concatenate([np.ravel(entry) for entry in spec if entry] or [np.array([], str)]).tolist())
    mapped = jax.jit(jax.shard_map(lambda x: median(x, names or None), mesh=mesh, in_specs=spec, out_specs=P()))
    assert_same_bits(mapped(x), jnp_median(w))
    assert largest_collective(mapped.lower(x).compile()) <= 8


def test_axes_that_do_not_split_the_population_keep_their_own_medians():
    w = population("zeros", 256 * 512).reshape(256, 512)
    x, mesh = sharded(w, AxisType.Auto, P("a", "b"))
    halves = jax.shard_map(lambda x: median(x, "b")[None], mesh=mesh, in_specs=P("a", "b"), out_specs=P("a"))
    np.testing.assert_array_equal(jax.jit(halves)(x), jnp.stack([jnp_median(half) for half in jnp.split(w, 2)]))


def test_shards_whose_samples_disagree():
    # Every device holds another decade: no local quantile is near the global one.
    w = population("normal", 8 * 20_000).reshape(8, 20_000) * 10.0 ** jnp.arange(8, dtype=jnp.float32)[:, None]
    x, mesh = sharded(w, AxisType.Auto, P(("a", "b")))
    names = ("a", "b")
    mapped = jax.shard_map(lambda x: median(x, names), mesh=mesh, in_specs=P(names), out_specs=P())
    assert_same_bits(jax.jit(mapped)(x), jnp_median(w))


PROGRAM_256 = """
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 256)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from curvax.order_statistics import median
mesh = jax.make_mesh((2, 128), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))
x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=NamedSharding(mesh, P("a", "b")))
print(jax.jit(median).lower(x).compile().as_text())
"""


@pytest.mark.slow
def test_what_moves_between_256_devices():
    program = subprocess.run([sys.executable, "-c", PROGRAM_256], capture_output=True, text=True, check=True).stdout
    results = COLLECTIVE.findall(program)
    sizes = [int(n) for result in results for n in re.findall(r"\[(\d*)\]", result) if n]
    assert len(results) > 0 and "all-gather" not in program
    assert max(sizes, default=1) <= 8
