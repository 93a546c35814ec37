"""The command `report`: one page of all figures that were made, from their numbers, as Markdown and as HTML."""

import re
from collections.abc import Sequence

from markdown_it import MarkdownIt

from experiments import records
from experiments.commands import FigureConfig, ReportConfig
from experiments.console import say, show_table
from experiments.errors import UsageError
from experiments.figures import command, statistics
from experiments.figures.base import Claim, Figure, Row
from experiments.options import line

COLORS = dict(zip(statistics.VERDICTS, ("#0a7d4f", "#b3261e", "#6b5a00"), strict=True))
STYLE = """body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100% } table { border-collapse: collapse; width: 100%; overflow-wrap: anywhere }
td, th { border: 1px solid #bbb; padding: .3em .6em; text-align: left; vertical-align: top }
code { background: #f3f3f3; padding: .1em .3em; overflow-wrap: anywhere }"""
INTRODUCTION = """# The paper's figures, made again

Gao & Zhong, "Study on the Large Batch Size Training of Neural Networks Based on the Second Order Gradient". Every claim
below is checked by a number with its 95 % interval (Student's, over seeds or points): it *held* where the whole
interval lies on the claim's side, *did not hold* where the whole interval lies on the other, and is *not decidable at
this scale* otherwise. Claims marked (ours) are not the paper's: they are controls that it lacks, or corrections of it.
Values are mean ± standard deviation over seeds."""


def report(config: ReportConfig):
    """Writes the page, draws the figures again, and prints the verdicts."""
    folder = command.results_folder(config)
    made = [figure for figure in command.FIGURES.values() if (folder / f"{figure.name}.jsonl").exists()]
    if not made:
        again = line("figure", FigureConfig(("all",), config.preset, out=config.out, results=config.results))
        raise UsageError(f"{folder} holds no figures: {again}")
    sections, verdicts = [], []
    for figure in sorted(made, key=lambda figure: figure.number):
        about, claims = command.draw(figure, folder / f"{figure.name}.jsonl", command.again(figure, config))
        sections.append(section(figure, about, claims))
        verdicts += [(figure, claim) for claim in claims]
    # The first picture comes before the long table, for those who scroll.
    page = "\n\n".join([INTRODUCTION, counts(verdicts), sections[0], summary(verdicts), *sections[1:]]) + "\n"
    records.write(folder / "report.md", page)
    records.write(folder / "report.html", as_html(page))
    rows = [(str(figure.number), claim.statement, claim.verdict) for figure, claim in verdicts]
    show_table(("figure", "claim", "verdict"), rows, text=range(3))
    say(f"page: {folder / 'report.html'}")


def section(figure: Figure, about: Row, claims: Sequence[Claim]) -> str:
    """One figure of the page."""
    rows = f"{figure.name}.jsonl"
    lines = [
        f"## {command.title(figure)}",
        f"The paper: {figure.claim}",
        f"![{figure.title}]({figure.name}.png)",
        markdown_table(("claim", "evidence", "verdict"), [(c.statement, c.evidence, c.verdict) for c in claims]),
        f"{about['settings']} {about['seconds']:.0f} s without what was shared. Numbers: [{rows}]({rows}).",
        f"`{about['command']}`",
    ]
    return "\n\n".join(lines)


def counts(verdicts: Sequence[tuple[Figure, Claim]]) -> str:
    """How often each verdict was given."""
    return ", ".join(f"{sum(c.verdict == v for _, c in verdicts)} {v}" for v in statistics.VERDICTS) + "."


def summary(verdicts: Sequence[tuple[Figure, Claim]]) -> str:
    """The table of all claims, with links to their figures."""
    rows = [(f"[{f.number}](#{anchor(command.title(f))})", c.statement, c.verdict) for f, c in verdicts]
    return "## All claims\n\n" + markdown_table(("figure", "claim", "verdict"), rows)


def anchor(heading: str) -> str:
    """The name under which GitHub, and this page, link to a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    cells = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def as_html(page: str) -> str:
    """A page that opens from the disk, on a phone too."""
    body = MarkdownIt().enable("table").render(page)
    body = re.sub("<h2>(.*?)</h2>", lambda match: f'<h2 id="{anchor(match[1])}">{match[1]}</h2>', body)
    for verdict, color in COLORS.items():
        body = body.replace(f"<td>{verdict}</td>", f'<td style="color: {color}; font-weight: bold">{verdict}</td>')
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Figures</title><style>{STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}</body></html>\n'
