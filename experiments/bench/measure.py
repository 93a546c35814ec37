"""Times that can be divided by one another.

The speed of a machine drifts, so the programs of a ratio take turns in one process, and the medians of their times are
divided. The time to compile is another figure, and counts tracing too.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache


class Program(NamedTuple):
    """A compiled function, and the seconds it took to trace and to compile."""

    call: Callable
    compile_seconds: float


def compiled(function: Callable, *arguments: Any) -> Program:
    """Traces and compiles a function for arguments of these shapes."""
    start = time.perf_counter()
    call = jax.jit(function).lower(*arguments).compile()
    return Program(call, time.perf_counter() - start)


def seconds(call: Callable, *arguments: Any) -> float:
    """The time of one call."""
    start = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    return time.perf_counter() - start


def in_turns(calls: Mapping[str, Callable[[], Any]], repeats: int, *, warm_up: bool = True) -> dict[str, float]:
    """The median time of each call, all called in turn.

    Args:
        calls: what is timed, by name.
        repeats: timed calls of each.
        warm_up: whether an untimed call precedes every timed one: what the call before has left in the caches is not
            its own doing. Once, before all, where calls are long.

    Returns:
        Seconds by name.

    Example:
        >>> times = in_turns({"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.03)}, repeats=3)
        >>> times["long"] > times["short"]
        True
    """
    times = {name: [] for name in calls}
    for repeat in range(repeats):
        for name, call in calls.items():
            if warm_up or repeat == 0:
                jax.block_until_ready(call())
            times[name].append(seconds(call))
    return {name: statistics.median(values) for name, values in times.items()}


def compile_in_turns(
    functions: Mapping[str, tuple[Callable, tuple]], repeats: int
) -> tuple[dict[str, Callable], dict[str, float]]:
    """Compiles each function for its arguments, all in turn: the programs, and the median seconds, both by name."""
    # What a process compiles first pays for starting the compiler.
    compiled(lambda x: x + 1, 1.0)
    programs, times = {}, {name: [] for name in functions}
    for _ in range(repeats):
        for name, (function, arguments) in functions.items():
            jax.clear_caches()
            programs[name] = compiled(function, *arguments)
            times[name].append(programs[name].compile_seconds)
    calls = {name: program.call for name, program in programs.items()}
    return calls, {name: statistics.median(values) for name, values in times.items()}


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Turns the cache on the disk off, which would be timed in place of the compiler."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    # Whether there is a cache is decided once per process otherwise.
    reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()
