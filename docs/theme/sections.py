"""Docstrings as Griffe reads them: one `Example` is its `Examples`, and a colon in `Returns` ends no type."""

import re

from griffe import Extension, Object

RETURNS = re.compile(r"(?ms)^Returns:\n(?:  .*?\n|\n)+")
COLON = re.compile(r"(`[^`]*`)|:(?=\s)")


class Sections(Extension):
    def on_object(self, *, obj: Object, **_) -> None:
        if obj.docstring is not None:
            text = RETURNS.sub(_without_types, obj.docstring.value + "\n")
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", text)


def _without_types(section: re.Match) -> str:
    title, text = section[0].split("\n", 1)
    return title + "\n" + COLON.sub(lambda found: found[1] or "&#58;", text)
