"""How a report is shown: as text of at most 100 columns, with rich where it is installed, and as HTML in a notebook."""

import html
import importlib.util
import io
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from curvax.reports.report import Report

WIDTH = 100
NAME = 20

Rows = Sequence[Mapping[str, Any]]


class Column(NamedTuple):
    """A column of a table: its head, and the text of a row of the report."""

    head: str
    text: Callable[[Any], str]


def number(x: float) -> str:
    """Three digits, short."""
    if np.isnan(x):
        return ""
    if np.isinf(x):
        return str(x)
    if x == 0 or 1e-3 <= abs(x) < 1e4:
        return f"{x:.3g}" if abs(x) < 999.5 else f"{x:.0f}"
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def count(x: float) -> str:
    """A number of things, with a letter for thousands and more."""
    if not np.isfinite(x):
        return "inf"
    for least, unit, letter in ((9.995e8, 1e9, "G"), (9.995e5, 1e6, "M"), (9999.5, 1e3, "k")):
        if x >= least:
            x /= unit
            return f"{x:.3g}{letter}" if x < 999.5 else f"{x:.0f}{letter}"
    return f"{x:.0f}"


def _share(x: float) -> str:
    return "" if x == 0 else "<1" if x < 0.005 else f"{100 * x:.0f}"


def _with_error(row: Any) -> str:
    error, value = row["curvature_error"], row["curvature"]
    relative = " ±?" if np.isnan(error) else f" ±{100 * error / abs(value):.0f}%" if error and value else ""
    return number(value) + relative


def _short(name: str) -> str:
    return name if len(name) <= NAME else f"{name[: NAME // 2 - 1]}…{name[-NAME // 2 :]}"


def _name(row: Any) -> str:
    return _short(row["layer"] or "(all)")


def _rate_of(name: str) -> Callable[[Any], str]:
    return lambda row: number(row[f"rate_{name}"])


LAYERS = (
    Column("layer", _name),
    Column("params", lambda row: count(row["params"])),
    Column("|w|", lambda row: number(row["weight_norm"])),
    Column("|g|", lambda row: number(row["gradient_norm"])),
    Column("curvature", _with_error),
    Column("<0 %", lambda row: _share(row["negative"])),
    Column("=0 %", lambda row: _share(row["zero"])),
    Column("dead %", lambda row: _share(row["dead"])),
    Column("batch", lambda row: "" if row["critical_batch_size"] is None else count(row["critical_batch_size"])),
)
RATES = (
    Column("layer", _name),
    Column("med|w|", lambda row: number(row["weight_median"])),
    Column("med|g|", lambda row: number(row["gradient_median"])),
    Column("R 5%", lambda row: number(row["radius_5"])),
    Column("R 50%", lambda row: number(row["radius_50"])),
    Column("R 95%", lambda row: number(row["radius_95"])),
    *(
        Column(head, _rate_of(name))
        for head, name in (("lars", "lars"), ("mclr", "mclr"), ("p.delta", "percent_delta"))
    ),
)


def text(report: "Report", color: bool | None = None) -> str:
    """The report as text; in colour on a terminal."""
    tables = [(title, columns, report.layers) for title, columns in _tables(report)]
    lines = [_heading(report), ""]
    draw = _rich if importlib.util.find_spec("rich") else _plain
    color = sys.stdout.isatty() if color is None else color
    for title, columns, rows in tables:
        lines += [draw(title, columns, rows, color), ""]
    said = [line for sentence in report.findings for line in _wrapped(f"- {sentence}")]
    return "\n".join([*lines, *said, *([""] if said else []), report.cost])


def _tables(report: "Report") -> Iterator[tuple[str, Sequence[Column]]]:
    matrix = "Gauss-Newton matrix" if report.method.startswith("GaussNewton") else "Hessian"
    yield f"Layers. Curvature is the mean of the {matrix}'s diagonal, by {report.method}.", LAYERS
    yield (
        "Radii R = 1 / (|h| + 0.1 mean|h|) of parameters; each optimizer's rate for a layer over that for all. cblr"
        " goes as far as lars.",
        RATES,
    )


def _heading(report: "Report") -> str:
    noise = report.critical_batch_size
    batch = f", batch {report.num_examples:,}" if report.num_examples else ""
    scale = "" if noise is None else f", noise scale about {count(noise)} examples"
    return f"loss {number(report.loss)}, {count(report.params)} parameters{batch}{scale}"


def _cells(columns: Sequence[Column], rows: Rows) -> list[list[str]]:
    return [[column.text(row) for column in columns] for row in rows]


def _plain(title: str, columns: Sequence[Column], rows: Rows, color: bool) -> str:
    del color
    table = [[column.head for column in columns], *_cells(columns, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in table]
    return "\n".join([*_wrapped(title), lines[0], "-" * len(lines[0]), *lines[1:]])


def _rich(title: str, columns: Sequence[Column], rows: Rows, color: bool) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), collapse_padding=True, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column.head, justify="right" if i else "left", no_wrap=True, style=None if i else "bold")
    for line in _cells(columns, rows):
        table.add_row(*line)
    stream = io.StringIO()
    console = Console(file=stream, width=WIDTH, force_terminal=color, no_color=not color, markup=False, highlight=False)
    console.print(*_wrapped(title), sep="\n")
    console.print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines() if line.strip())


def _wrapped(sentence: str) -> list[str]:
    return textwrap.wrap(sentence, WIDTH, subsequent_indent="  " if sentence.startswith("- ") else "")


def markup(report: "Report") -> str:
    """The report as HTML."""
    parts = [f"<p><b>{html.escape(_heading(report))}</b></p>"]
    for title, columns in _tables(report):
        head = "".join(f"<th>{html.escape(column.head)}</th>" for column in columns)
        rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in _cells(columns, report.layers))
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        parts.append(f"<p>{html.escape(title)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in report.findings)
    return "".join([*parts, f"<ul>{said}</ul>" if said else "", f"<p>{html.escape(report.cost)}</p>"])
