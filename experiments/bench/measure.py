"""Times that can be divided by one another, and the lines of a table that they make.

The speed of a machine drifts, so the programs of a ratio take turns in one process, and the medians of their times are
divided. The time to compile is another figure, and counts tracing too.

A part of a table is a generator `rows(say, repeats, quick)`: it tells `say` what it measures next, calls each program
`repeats` times, and does everything much smaller if it is to be `quick`.
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

Say = Callable[[str], None]


class Row(NamedTuple):
    """A line of a table.

    Attributes:
        what: was measured.
        reached: the figure.
        bars: what it has to reach, the next bar first and the last one last; none if it is only told.
        detail: the raw figures behind it.
        at_least: whether larger is better.
        data: what else the record keeps.
    """

    what: str
    reached: float
    bars: tuple[float, ...]
    detail: str
    at_least: bool = False
    data: Mapping[str, Any] = MappingProxyType({})

    def verdict(self) -> str:
        """How many of its bars the figure reaches, in a word."""
        met = sum(self.reached >= bar if self.at_least else self.reached <= bar for bar in self.bars)
        return "" if not self.bars else "missed" if not met else "met" if met == len(self.bars) else "first met"


def ratio(what: str, ours: float, theirs: float, bars: tuple[float, ...] = (), at_least: bool = False) -> Row:
    """A line of two times in seconds."""
    unit, name = (1e3, "ms") if max(ours, theirs) < 1 else (1, "s")
    return Row(what, ours / theirs, bars, f"{unit * ours:.3g} / {unit * theirs:.3g} {name}", at_least)


class Timed(NamedTuple):
    """By name: programs that are compiled for their arguments, their seconds, and those that they took to compile."""

    calls: dict[str, Callable[[], Any]]
    seconds: dict[str, float]
    compiling: dict[str, float]


def timed(
    functions: Mapping[str, tuple], repeats: int, *, warm_up: bool = True, compilations: int | None = None
) -> Timed:
    """Compiles functions and calls them, all in turn.

    Args:
        functions: by name, each with its arguments behind it.
        repeats: timed calls of each, of which the median counts.
        warm_up: see `in_turns`.
        compilations: if that is to be timed too, of each, of which the median counts.
    """
    if compilations:
        # What a process compiles first pays for starting the compiler.
        jax.jit(lambda x: x + 1).lower(1.0).compile()
    calls, compiling = {}, {name: [] for name in functions}
    for _ in range(compilations or 1):
        for name, (function, *arguments) in functions.items():
            if compilations:
                jax.clear_caches()
            start = time.perf_counter()
            calls[name] = functools.partial(jax.jit(function).lower(*arguments).compile(), *arguments)
            compiling[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in compiling.items()}
    return Timed(calls, in_turns(calls, repeats, warm_up=warm_up), medians)


def in_turns(calls: Mapping[str, Callable[[], Any]], repeats: int, *, warm_up: bool = True) -> dict[str, float]:
    """The median seconds of each call, by name, all called in turn.

    An untimed call is to `warm_up` before every timed one: what the call before has left in the caches is not its own
    doing. Or once, before all, where calls are long.

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


def seconds(call: Callable, *arguments: Any) -> float:
    """The time of one call."""
    start = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    return time.perf_counter() - start


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
