"""Doctests of a page as programs to copy: without prompts, and what they print in a block of its own."""

import doctest
import re

from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

FENCE = re.compile(r"(?ms)^```python\n(>>> .*?)^```$")
FLAGS = re.compile(r"\s*# doctest:.*$", re.MULTILINE)


class Doctests(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return FENCE.sub(_as_program, "\n".join(lines)).split("\n")


class DoctestExtension(Extension):
    def extendMarkdown(self, md) -> None:
        # After `pymdownx.snippets`, and before `pymdownx.superfences`.
        md.preprocessors.register(Doctests(md), "doctests", 28)


def makeExtension(**options) -> DoctestExtension:
    return DoctestExtension(**options)


def _as_program(match: re.Match) -> str:
    blocks, source = [], ""
    for example in doctest.DocTestParser().get_examples(match[1]):
        source += FLAGS.sub("", example.source)
        if example.want:
            blocks += [f"```python\n{source}```", _as_output(example.want)]
            source = ""
    return "\n\n".join(blocks + [f"```python\n{source}```"] * bool(source))


def _as_output(want: str) -> str:
    return "``` { .text .output }\n" + want.replace("<BLANKLINE>\n", "\n").rstrip() + "\n```"
