"""Mathematics becomes MathML when the site is built: readers need no script for it, and builders no network."""

import html
import re

from latex2mathml.converter import convert
from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor

MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


class MathML(Postprocessor):
    def run(self, text: str) -> str:
        return MATH.sub(_converted, text)


class MathMLExtension(Extension):
    def extendMarkdown(self, md) -> None:
        # After everything else, so that what `pymdownx.arithmatex` found is in the text.
        md.postprocessors.register(MathML(md), "mathml", -1)


def makeExtension(**options) -> MathMLExtension:
    return MathMLExtension(**options)


def _converted(match: re.Match) -> str:
    return convert(html.unescape(match[2]), display="block" if match[1] == "div" else "inline")
