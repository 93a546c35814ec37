"""Exact medians beside the sort of `jnp.median` and beside an L2 norm, the one pass that a median cannot go below."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from curvax import median
from experiments.bench.measure import compiled, in_turns
from experiments.bench.table import Row, Say

METHODS = {"jnp": lambda x: jnp.median(jnp.abs(x)), "curvax": median, "norm": jnp.linalg.norm}


def rows(say: Say, repeats: int, quick: bool) -> Iterator[Row]:
    """The median of four million normal numbers, and of the worst of six populations: ratios to the other two."""
    size = 40_000 if quick else 4_000_000
    say("medians: compilation")
    shape = jax.ShapeDtypeStruct((size,), jnp.float32)
    calls = {name: compiled(method, shape).call for name, method in METHODS.items()}
    times, unequal = {}, []
    for kind, x in populations(size).items():
        say(f"medians: {kind}")
        times[kind] = in_turns({name: functools.partial(call, x) for name, call in calls.items()}, repeats)
        unequal += [kind] * bool(calls["jnp"](x) != calls["curvax"](x))
    for line, worst in (
        (speedup, min(times, key=lambda kind: times[kind]["jnp"] / times[kind]["curvax"])),
        (norms, max(times, key=lambda kind: times[kind]["curvax"] / times[kind]["norm"])),
    ):
        yield line(times["normal"], f"{size:,} f32, normal")
        yield line(times[worst], f"worst of {len(times)} populations: {worst}")
    yield Row("medians that differ from jnp.median's", len(unequal), (0,), ", ".join(unequal) or "not a bit")


def speedup(times: dict[str, float], where: str) -> Row:
    """How many times faster than `jnp.median`."""
    detail = f"{1e3 * times['jnp']:.0f} / {1e3 * times['curvax']:.2f} ms"
    return Row(f"jnp.median / exact median, {where}", times["jnp"] / times["curvax"], (20, 50), detail, at_least=True)


def norms(times: dict[str, float], where: str) -> Row:
    """How many L2 norms."""
    detail = f"{1e3 * times['curvax']:.2f} / {1e3 * times['norm']:.2f} ms"
    return Row(f"exact median / L2 norm, {where}", times["curvax"] / times["norm"], (60, 20), detail)


def populations(size: int) -> dict[str, jax.Array]:
    """Arrays of several distributions: what gradients look like, and what a search by counting finds hard."""
    keys = jax.random.split(jax.random.key(0), 3)
    normal, uniform = jax.random.normal(keys[0], (size,)), jax.random.uniform(keys[2], (size,))
    return {
        "normal": normal,
        "log-normal": jnp.exp(3 * jax.random.normal(keys[1], (size,))),
        "40 % zeros": jnp.where(uniform < 0.4, 0, normal),
        "bfloat16 values": normal.astype(jnp.bfloat16).astype(jnp.float32),
        "powers of two": jnp.exp2(-jnp.floor(100 * uniform)),
        "constant": jnp.full(size, 0.3),
    }
