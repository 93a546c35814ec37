"""The command `report`: one page of all figures that were made, from their numbers, as Markdown and as HTML."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from markdown_it import MarkdownIt
from rich.table import Table

from experiments.console import console
from experiments.errors import UsageError
from experiments.figures import command, render, statistics
from experiments.figures.base import Claim, Figure, Preset, Row

STYLE = """body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100% } table { border-collapse: collapse; width: 100% }
td, th { border: 1px solid #bbb; padding: .3em .6em; text-align: left; vertical-align: top }
code { background: #f3f3f3; padding: .1em .3em }"""
INTRODUCTION = """# The paper's figures, made again

Gao & Zhong, "Study on the Large Batch Size Training of Neural Networks Based on the Second Order Gradient". Every claim
below is checked by a number with its 95 % interval (Student's, over seeds or points): it *held* where the whole
interval lies on the claim's side, *did not hold* where the whole interval lies on the other, and is *not decidable at
this scale* otherwise. Claims marked (ours) are not the paper's: they are controls that it lacks, or corrections of it.
Values are mean ± standard deviation over seeds."""


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Write one page, Markdown and HTML, of the figures that were made."""

    preset: Preset = "smoke"
    """Of the figures."""
    out: Path = Path("runs")
    """The --out of the figures."""
    results: Path | None = None
    """Folder of the figures, and of the page; OUT/figures-PRESET if not given."""


def report(config: ReportConfig):
    """Writes the page, draws the figures again, and prints the verdicts."""
    folder = config.results or config.out / f"figures-{config.preset}"
    made = [figure for figure in command.FIGURES.values() if (folder / f"{figure.name}.jsonl").exists()]
    if not made:
        raise UsageError(f"{folder} holds no figures: python -m experiments figure all --preset {config.preset}")
    sections, verdicts = [], []
    for figure in made:
        about, rows = command.load(folder / f"{figure.name}.jsonl")
        claims = figure.judge(rows)
        path = folder / f"{figure.name}.png"
        render.save(figure.draw, figure.panels, rows, command.title(figure), about["settings"], path)
        sections.append(section(figure, about, claims))
        verdicts += [(figure.number, claim) for claim in claims]
    page = "\n\n".join([INTRODUCTION, summary(verdicts), *sections]) + "\n"
    (folder / "report.md").write_text(page)
    (folder / "report.html").write_text(as_html(page))
    console.print(shown(verdicts))
    console.print(f"page: {folder / 'report.html'}", soft_wrap=True)


def section(figure: Figure, about: Row, claims: Sequence[Claim]) -> str:
    """One figure of the page."""
    lines = [
        f"## {command.title(figure)}",
        f"The paper: {figure.claim}",
        f"![{figure.title}]({figure.name}.png)",
        markdown_table(("claim", "evidence", "verdict"), [(c.statement, c.evidence, c.verdict) for c in claims]),
        f"{about['settings']} {about['seconds']:.0f} s without what was shared. Numbers: `{figure.name}.jsonl`.",
        f"`{about['command']}`",
    ]
    return "\n\n".join(lines)


def summary(verdicts: Sequence[tuple[int, Claim]]) -> str:
    """The table at the head of the page."""
    rows = [(str(number), claim.statement, claim.verdict) for number, claim in verdicts]
    counts = [f"{sum(c.verdict == v for _, c in verdicts)} {v}" for v in statistics.VERDICTS]
    return f"{', '.join(counts)}.\n\n" + markdown_table(("figure", "claim", "verdict"), rows)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    cells = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def as_html(page: str) -> str:
    """A page that opens from the disk."""
    body = MarkdownIt().enable("table").render(page)
    head = f'<meta charset="utf-8"><title>Figures</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}</body></html>\n'


def shown(verdicts: Sequence[tuple[int, Claim]]) -> Table:
    """The verdicts for the terminal."""
    result = Table()
    for column in ("figure", "claim", "verdict"):
        result.add_column(column)
    for number, claim in verdicts:
        result.add_row(str(number), claim.statement, claim.verdict)
    return result
