"""The pages say what the source does: every public name has its place, and no link leads nowhere."""

import ast
import builtins
import re
from collections import Counter
from pathlib import Path

import pytest

import curvax

ROOT = Path(__file__).parents[1]


def test_the_reference_has_every_public_name_once():
    pages = "".join(page.read_text("utf-8") for page in (ROOT / "docs/reference").glob("*.md"))
    found = Counter(re.findall(r"(?m)^::: curvax\.(\S+)$", pages))
    assert found == Counter(curvax.__all__)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_outside_of_the_site_lead_to_a_file(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text("utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_block_of_python_is_executed():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    blocks = [
        block for page in pages for block in re.findall(r"(?m)^```(?:python|pycon)\n(.*)$", page.read_text("utf-8"))
    ]
    assert blocks
    assert [block for block in blocks if not block.startswith(">>> ")] == []


def test_every_message_has_its_cure():
    page = (ROOT / "docs/errors.md").read_text("utf-8")
    found = Counter("\n\n".join(re.findall(r"(?ms)^``` \{ \.text \.message \}\n(.*?)\n```$", page)).split("\n\n"))
    wanted = set().union(*(messages(ast.parse(path.read_text("utf-8"))) for path in (ROOT / "curvax").rglob("*.py")))
    # Where a message has changed, docs/errors.md has to change with it, and where one is new, it wants a cure there.
    assert found == Counter(wanted)


HOLE = "…"


def messages(module: ast.Module) -> set[str]:
    """What the exceptions and warnings of a module say, with a hole for whatever is known only when they do."""
    found = set()

    def walk(node, names, caught):
        if isinstance(node, ast.FunctionDef):
            names = {**names, **_texts(node)}
        said = node.exc if isinstance(node, ast.Raise) else node
        says = isinstance(node, ast.Raise) and isinstance(said, ast.Call) and not caught
        warns = isinstance(said, ast.Call) and ast.unparse(said.func) == "warnings.warn"
        # An exception of a class of curvax's own, or one that is caught where it is raised, does not reach a user.
        if (says and hasattr(builtins, ast.unparse(said.func))) or warns:
            found.add(re.sub(f"{HOLE}+", HOLE, _text(said.args[0], names)))
        for field, value in ast.iter_fields(node):
            tried = isinstance(node, ast.Try) and field == "body" and any(map(_catches_all, node.handlers))
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    walk(child, names, caught or tried)

    walk(module, _texts(module), False)
    return found


def _catches_all(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or ast.unparse(handler.type) == "Exception"


def _texts(scope: ast.AST) -> dict[str, ast.expr]:
    """The names that are given a text in this scope, constants of a module and messages of a function."""
    assigned = (
        [node for node in scope.body if isinstance(node, ast.Assign)]
        if isinstance(scope, ast.Module)
        else [node for node in ast.walk(scope) if isinstance(node, ast.Assign)]
    )
    kinds = ast.Constant, ast.JoinedStr, ast.BinOp
    return {ast.unparse(node.targets[0]): node.value for node in assigned if isinstance(node.value, kinds)}


def _text(node: ast.expr, names: dict[str, ast.expr]) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part, names) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left, names) + _text(right, names)
        case ast.Name(id=name) if name in names:
            return _text(names[name], names)
    return HOLE
