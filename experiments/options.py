"""A dataclass as the options of a command, by the standard library's parser: help in groups, errors in one line."""

import argparse
import dataclasses
import difflib
import functools
import shlex
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from experiments.errors import UsageError

PROGRAM = "python -m experiments"
KINDS = {int: ("N", "a whole number"), float: ("X", "a number"), str: ("NAME", "a name"), Path: ("PATH", "a path")}


def option(default: Any, help: str, group: str = "options", usual: Any = None, metavar: str | None = None) -> Any:
    """A field of a dataclass that `parse` offers as an option.

    Args:
        default: if it is not given; without one the field takes a place, not a name.
        help: one sentence or a few.
        group: heading in the help.
        usual: what the dataclass takes for None, where the option applies.
        metavar: what stands for the value in the help, if not its kind.
    """
    about = {"help": help, "group": group, "usual": usual, "metavar": metavar}
    return dataclasses.field(default=default, metadata=about)


def group(name: str) -> Callable[..., Any]:
    """`option` under a heading of its own in the help."""
    return functools.partial(option, group=name)


def parse(kind: type, command: str, arguments: Sequence[str]) -> Any:
    """A dataclass from the arguments of a command.

    Raises:
        UsageError: if they are not accepted, by the parser or by the dataclass.
        SystemExit: after printing the help.
    """
    places = [field.name.upper() for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    usage = " ".join([PROGRAM, command, *places, "[options]"])
    parser = Parser(usage=usage, description=kind.__doc__)
    groups = {"options": parser}
    for field, hint in fields_of(kind):
        heading = field.metadata["group"]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        add(groups[heading], field, hint)
    given = [word.split("=")[0].replace("--no-", "--") for word in arguments if word.startswith("--")]
    for name in given:
        if given.count(name) > 1:
            raise UsageError(f"{name} is given more than once")
    values, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise UsageError(f"{unknown[0]!r} is no option of {command}{suggestion(unknown[0], kind)}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in vars(values).items()})


class Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions."""

    def __init__(self, **options):
        # What goes where, for what is missing.
        self.places = {}
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raises them."""
        name = message.removeprefix("the following arguments are required: ")
        if name in self.places:
            message = f"{name} is missing: {self.places[name]}"
        raise UsageError(message.removeprefix("argument "))


def fields_of(kind: type):
    """The fields of a dataclass, each with its type."""
    hints = typing.get_type_hints(kind)
    return [(field, hints[field.name]) for field in dataclasses.fields(kind)]


def flag(name: str) -> str:
    """The option of a field."""
    return f"--{name.replace('_', '-')}"


def suggestion(word: str, kind: type) -> str:
    """What may have been meant, or where the options are listed."""
    near = difflib.get_close_matches(word, [flag(field.name) for field in dataclasses.fields(kind)], 1)
    return f": did you mean {near[0]}?" if near else "; --help lists them"


def add(parser, field: dataclasses.Field, hint: Any):
    """Adds one field to a parser."""
    optional = type(None) in typing.get_args(hint)
    hint = typing.get_args(hint)[0] if optional else hint
    several = typing.get_origin(hint) is tuple
    hint = typing.get_args(hint)[0] if several else hint
    given = field.default is not dataclasses.MISSING
    usual = shown(field.metadata["usual"] if field.default is None else field.default)
    help = field.metadata["help"] + (f" (default: {usual})" if given and usual else "")
    settings = {"help": help.replace("%", "%%")} | ({"default": field.default} if given else {})
    if hint is bool:
        parser.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **settings)
        return
    # What is None unless it is given can be left out; only other defaults need a word for it.
    settings["type"] = functools.partial(convert, hint, optional and field.default is not None)
    choices = typing.get_args(hint)
    accepted = f"one or more of {', '.join(choices)}" if several else f"one of {', '.join(choices)}"
    metavar = KINDS[hint][0] if not choices else f"{{{','.join(choices)}}}"
    if several:
        settings["nargs"], metavar = "+", "NAME"
    if several and choices:
        settings["help"] += f" Takes {accepted}."
    settings["metavar"] = field.metadata["metavar"] or metavar
    if not given:
        parser.places[field.name.upper()] = f"give {accepted}"
        settings["metavar"] = field.name.upper()
    parser.add_argument(flag(field.name) if given else field.name, **settings)


def shown(default: Any) -> str:
    """A default in the help, as one would write it."""
    return " ".join(map(str, default)) if isinstance(default, tuple) else "" if default is None else str(default)


def convert(hint: Any, or_none: bool, text: str) -> Any:
    """A value from its text."""
    choices = typing.get_args(hint)
    if not choices:
        accepted = KINDS[hint][1]
    else:
        hint, accepted = {choice: choice for choice in choices}.__getitem__, f"one of {', '.join(choices)}"
    if or_none:
        accepted += ", or none"
        if text.lower() == "none":
            return None
    try:
        return hint(text)
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"takes {accepted}, not {text!r}") from None


def line(command: str, config: Any) -> str:
    """The command that gives a configuration, as one would type it.

    Example:
        >>> from experiments.commands import ReportConfig
        >>> line("report", ReportConfig(preset="cpu", out=Path("my runs")))
        "python -m experiments report --preset cpu --out 'my runs'"
    """
    words = []
    for field, _ in fields_of(type(config)):
        value = getattr(config, field.name)
        if value == field.default or (value is not None and value == field.metadata["usual"]):
            continue
        texts = [str(v).lower() if v is None else str(v) for v in (value if isinstance(value, tuple) else (value,))]
        if isinstance(value, bool):
            words.append(flag(field.name) if value else flag(f"no_{field.name}"))
        else:
            words += texts if field.default is dataclasses.MISSING else [flag(field.name), *texts]
    return f"{PROGRAM} {command}" + "".join(f" {shlex.quote(word)}" for word in words)
