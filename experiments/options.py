"""A dataclass as the options of a command, by the standard library's parser: help in groups, errors in one line."""

import argparse
import dataclasses
import difflib
import math
import shlex
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.errors import UsageError

PROGRAM = "python -m experiments"
METAVARS = {int: "N", float: "X", str: "NAME", Path: "PATH"}


class Rule(NamedTuple):
    """What an option takes, or where it applies: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


ABOVE_0 = Rule("above 0", lambda x: 0 < x < math.inf)
AT_LEAST_0 = Rule("at least 0, and a number", lambda x: 0 <= x < math.inf)
FRACTION = Rule("at least 0 and below 1", lambda x: 0 <= x < 1)


def up_to(most: float) -> Rule:
    """Positive numbers up to this one."""
    return Rule(f"above 0 and at most {most}", lambda x: 0 < x <= most)


def option(
    default: Any, help: str, bounds: Rule | None = None, where: Rule | None = None, group: str = "options", **about: Any
) -> Any:
    """A field of a dataclass that `parse` offers as an option.

    Args:
        default: if it is not given; without one the field takes a place, not a name.
        help: one sentence or a few.
        bounds: of the numbers that are accepted.
        where: with which other options it applies.
        group: heading in the help.
        about: `usual`, what is taken for None where it applies; `metavar`, what stands for the value in the help;
            whether one of several values `repeats`.
    """
    about = {"usual": None, "metavar": None, "repeats": False, **about}
    about |= {"help": help, "bounds": bounds, "where": where, "group": group}
    return dataclasses.field(default=default, metadata=about)


class Options:
    """The configuration of a command, which is checked, and filled in with what is usual, when it is made."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, about, name = getattr(self, field.name), field.metadata, flag(field)
            applies = about["where"] is None or about["where"].holds(self)
            if value is None:
                if applies and about["usual"] is not None:
                    object.__setattr__(self, field.name, about["usual"])
            elif not applies:
                raise UsageError(f"{name} {about['where'].words}: leave it out")
            elif about["bounds"] and not about["bounds"].holds(value):
                raise UsageError(f"{name} must be {about['bounds'].words}, not {value}")
            elif isinstance(value, tuple) and not about["repeats"]:
                for one in (one for one in value if value.count(one) > 1):
                    raise UsageError(f"{name}: {one} is given more than once")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions."""

    def error(self, message: str) -> typing.NoReturn:
        """Raises them."""
        raise UsageError(message.removeprefix("argument "))


def parse(kind: type, command: str, arguments: Sequence[str]) -> Any:
    """A dataclass from the arguments of a command.

    Raises:
        UsageError: if they are not accepted, by the parser or by the dataclass.
        SystemExit: after printing the help.
    """
    fields = dataclasses.fields(kind)
    places = [flag(field) for field in fields if is_place(field)]
    usage = " ".join([PROGRAM, command, *places, "[options]"])
    parser = Parser(usage=usage, description=kind.__doc__, allow_abbrev=False)
    groups, hints = {"options": parser}, typing.get_type_hints(kind)
    for field in fields:
        heading = field.metadata["group"]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        add(groups[heading], field, hints[field.name])
    given = [word.split("=")[0].replace("--no-", "--") for word in arguments if word.startswith("--")]
    for name in given:
        if given.count(name) > 1:
            raise UsageError(f"{name} is given more than once")
    values, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(map(flag, fields)), 1)
        hint = f": did you mean {near[0]}?" if near else "; --help lists them"
        raise UsageError(f"{unknown[0]!r} is no option of {command}{hint}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in vars(values).items()})


def is_place(field: dataclasses.Field) -> bool:
    """Whether a field takes a place on the command line, not a name."""
    return field.default is dataclasses.MISSING


def flag(field: dataclasses.Field) -> str:
    """What a field is called on the command line."""
    return field.name.upper() if is_place(field) else f"--{field.name.replace('_', '-')}"


def add(parser: Any, field: dataclasses.Field, hint: Any):
    """Adds one field to a parser."""
    about, default = field.metadata, field.default
    optional = type(None) in typing.get_args(hint)
    hint = typing.get_args(hint)[0] if optional else hint
    several = typing.get_origin(hint) is tuple
    hint = typing.get_args(hint)[0] if several else hint
    choices = typing.get_args(hint)
    help, usual = about["help"], about["usual"] if default is None else default
    help += f" It {about['where'].words}." if about["where"] else ""
    listed = several or len(choices) > 6
    help += f" {'One or more' if several else 'One'} of {', '.join(choices)}." if choices and listed else ""
    help += "" if usual in (None, ()) or is_place(field) else f" (default: {' '.join(words(usual))})"
    settings = {"help": help.replace("%", "%%")} | ({} if is_place(field) else {"default": default})
    if hint is bool:
        parser.add_argument(flag(field), action=argparse.BooleanOptionalAction, **settings)
        return
    settings["type"] = str if choices else hint
    if optional and hint is float and default is not None:
        # What is None unless it is given can be left out; only other defaults need a word for it.
        settings["type"] = float_or_none
    one = f"{{{','.join(choices)}}}" if choices else METAVARS[hint]
    settings["metavar"] = about["metavar"] or ("NAME" if listed else one)
    settings |= {"nargs": "+"} if several else {}
    name = field.name if is_place(field) else flag(field)
    parser.add_argument(name, choices=choices or None, **settings)


def float_or_none(text: str) -> float | None:
    """A number, or None, from its text."""
    return None if text.lower() == "none" else float(text)


def words(value: Any) -> list[str]:
    """A value as it is typed."""
    return [str(v).lower() if v is None else str(v) for v in (value if isinstance(value, tuple) else (value,))]


def line(command: str, config: Any) -> str:
    """The command that gives a configuration, as one would type it."""
    typed = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default or (value is not None and value == field.metadata["usual"]):
            continue
        if isinstance(value, bool):
            typed.append(flag(field) if value else flag(field).replace("--", "--no-", 1))
        else:
            typed += words(value) if is_place(field) else [flag(field), *words(value)]
    return f"{PROGRAM} {command}" + "".join(f" {shlex.quote(word)}" for word in typed)
