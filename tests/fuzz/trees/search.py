"""Tries examples of every transformation, lets Hypothesis shrink what fails, and goes on."""

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence

import hypothesis
import jax
from hypothesis import HealthCheck, settings

from tests.fuzz.trees.examples import NAMES, Example, examples
from tests.fuzz.trees.properties import check
from tests.fuzz.trees.run import Broken

# Examples of one transformation in a row: after a failure the rest of them is left to the next round.
ROUND = 250


@dataclasses.dataclass
class TreeTally:
    """What happened so far."""

    tried: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    told: list[str] = dataclasses.field(default_factory=list)
    known: set[tuple[str, ...]] = dataclasses.field(default_factory=set)
    alike: int = 0

    def line(self) -> str:
        """One line of counts."""
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.tried.items()))
        return f"trees: {sum(self.tried.values())} ({counts}); {len(self.told)} findings, {self.alike} like them"


def search_trees(seed: int, number: int, only: Sequence[str], tell: Callable[[str], None]) -> TreeTally:
    """So many examples, as many of each transformation; `only` are those to try, all of them if it is empty."""
    tally, names = TreeTally(), [name for name in NAMES if not only or name in only]
    share = -(-number // len(names))
    for start in range(0, share, ROUND):
        for index, name in enumerate(names):
            _round(tally, name, seed + start + 10**6 * index, min(ROUND, share - start), tell)
        jax.clear_caches()
        tell(tally.line())
    return tally


def _round(tally: TreeTally, name: str, seed: int, count: int, tell) -> None:
    """So many examples of one transformation, with those that fail in a known way passed by."""
    target = tally.tried[name] + count
    while tally.tried[name] < target:
        failed = _first_failure(tally, name, seed + tally.tried[name], target - tally.tried[name])
        if failed is None:
            return
        example, words, key = failed
        tally.known.add(key)
        report = f"# {name}, {example.mode} {example.detail}: {words}\n{example.text()}"
        tally.told.append(report)
        tell(report)


def _first_failure(tally: TreeTally, name: str, seed: int, count: int):
    """The smallest example of the first new failure; None if there is none."""
    latest: list[tuple[Example, str, tuple[str, ...]]] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(examples(name))
    def holds(example: Example) -> None:
        if not latest:
            tally.tried[name] += 1
        try:
            check(example)
        except Broken as broken:
            key = kind_of(example, str(broken))
            if key in tally.known:
                tally.alike += not latest
                return
            if latest and latest[0][2] != key:
                return
            latest[:] = [(example, str(broken), key)]
            raise

    try:
        holds()
    except Broken:
        return latest[0]
    return None


def kind_of(example: Example, words: str) -> tuple[str, ...]:
    """Failures of one kind are told once."""
    return (
        example.name,
        example.mode,
        example.detail if example.mode != "scale" else "",
        re.split(r"[:,\d\[]", words)[0],
        re.sub(r"[-\d.e+\[\], ]+", " ", words)[:40] if "raises" in words else "",
    )
