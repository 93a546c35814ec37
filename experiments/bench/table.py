"""One line per figure: what was measured, what came out, and the bar it has to reach.

A part of a table is a generator `rows(say, repeats, quick)`: it tells `say` what it measures next, calls each program
`repeats` times, and does everything much smaller if it is to be `quick`.
"""

import os
import platform
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from rich.table import Table
from rich.text import Text

Say = Callable[[str], None]
COLORS = {"met": "green", "first met": "yellow", "missed": "red"}


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
        """How many of its bars the figure reaches, in a word.

        Example:
            >>> Row("speed", 30.0, (20.0, 50.0), "", at_least=True).verdict()
            'first met'
        """
        met = sum(self.reached >= bar if self.at_least else self.reached <= bar for bar in self.bars)
        return "" if not self.bars else "missed" if not met else "met" if met == len(self.bars) else "first met"

    def record(self) -> dict[str, Any]:
        """The line as JSON values."""
        return {"kind": "row", **self._asdict(), "data": dict(self.data), "verdict": self.verdict()}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}, {device.device_kind}" if device.platform != "cpu" else "cpu",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def empty(title: str) -> Table:
    """A table without lines, its caption the machine."""
    what = machine()
    caption = f"{what['device']}, {what['cores']} cores, jax {what['jax']}, Python {what['python']}"
    table = Table(title=title, caption=caption)
    table.add_column("what")
    for column in ("reached", "bar"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    table.add_column("detail")
    return table


def cells(row: Row) -> list[str | Text]:
    """A line of the table as it is shown."""
    verdict = Text(row.verdict(), COLORS.get(row.verdict(), ""))
    bars = ", ".join(number(bar) for bar in row.bars)
    return [row.what, number(row.reached), bars and f"{'≥' if row.at_least else '≤'} {bars}", verdict, row.detail]


def number(value: float) -> str:
    """Three digits, and those before the point.

    Example:
        >>> [number(x) for x in (0.012345, 1.0449, 2345.6)]
        ['0.0123', '1.04', '2346']
    """
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
