"""The price of an exact median, in L2 norms of the same array.

`jnp.median` sorts; `curvax.order_statistics.median` counts. All are timed in one process, in turn, so that a ratio
compares like with like on a machine whose speed drifts.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from curvax.order_statistics import median


def rows(size: int = 4_000_000, repeats: int = 7) -> list[dict[str, Any]]:
    """Times of `jnp.median`, curvax's median and an L2 norm, on arrays of several distributions.

    Args:
        size: the number of float32 elements.
        repeats: the number of timed calls, of which the median is reported.

    Returns:
        A row per distribution: milliseconds per call (`jnp_ms`, `curvax_ms`, `norm_ms`), the ratios of the medians,
        seconds to compile, and whether both medians agree to the bit.
    """
    methods = {"jnp": lambda x: jnp.median(jnp.abs(x)), "curvax": median, "norm": jnp.linalg.norm}
    compiled = {name: _compiled(method, size) for name, method in methods.items()}
    return [_row(kind, x, compiled, repeats) for kind, x in _populations(size).items()]


def _populations(size: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    normal = jax.random.normal(keys[0], (size,))
    return {
        "normal": normal,
        "log-normal": jnp.exp(3 * jax.random.normal(keys[1], (size,))),
        "gradient, 40 % zeros": jnp.where(jax.random.uniform(keys[2], (size,)) < 0.4, 0, normal),
        "bfloat16 values": normal.astype(jnp.bfloat16).astype(jnp.float32),
        "powers of two": jnp.exp2(-jnp.floor(100 * jax.random.uniform(keys[2], (size,)))),
        "constant": jnp.full(size, 0.3),
    }


def _compiled(method, size: int):
    start = time.perf_counter()
    call = jax.jit(method).lower(jax.ShapeDtypeStruct((size,), jnp.float32)).compile()
    return call, time.perf_counter() - start


def _row(kind: str, x: jax.Array, compiled: dict, repeats: int) -> dict[str, Any]:
    times = {name: [] for name in compiled}
    for _ in range(repeats):
        for name, (call, _) in compiled.items():
            times[name].append(_milliseconds(call, x))
    ms = {name: statistics.median(values) for name, values in times.items()}
    return {
        "population": kind,
        **{f"{name}_ms": value for name, value in ms.items()},
        "speedup": ms["jnp"] / ms["curvax"],
        "norms": ms["curvax"] / ms["norm"],
        **{f"{name}_compile_s": seconds for name, (_, seconds) in compiled.items()},
        "equal": bool(compiled["jnp"][0](x) == compiled["curvax"][0](x)),
    }


def _milliseconds(call, x: jax.Array) -> float:
    # An untimed call first: what the method before has left in the caches is not its own doing.
    jax.block_until_ready(call(x))
    start = time.perf_counter()
    jax.block_until_ready(call(x))
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4_000_000, help="number of float32 elements")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls; their median is reported")
    table = rows(**vars(parser.parse_args()))
    print("  ".join(f"{name:>{_width(name)}}" for name in table[0]))
    for row in table:
        print("  ".join(f"{_cell(value):>{_width(name)}}" for name, value in row.items()))


def _width(name: str) -> int:
    return 20 if name == "population" else max(8, len(name))


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
