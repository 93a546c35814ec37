"""Docstrings as Griffe reads them: one `Example` is its `Examples`."""

import re

from griffe import Extension, Object


class OneExample(Extension):
    def on_object(self, *, obj: Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^(\s*)Example:$", r"\1Examples:", obj.docstring.value)
