"""The command line: `python -m experiments [race | train | bench | figure | report] [options]`.

The arguments are read, and refused, before anything is imported that takes time.
"""

import contextlib
import importlib
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from experiments import options, processes
from experiments.commands import COMMANDS
from experiments.errors import RunError, Stopped, UsageError


def main(arguments: Sequence[str]) -> int:
    """Runs one command.

    Returns:
        0 if it did what it says, 1 if it could not, 2 if it was asked for something it does not accept, 128 and the
        number of a signal if that stopped it.
    """
    # LAPACK's threads would wait for those of XLA on the same cores: a QR takes many times as long as with one.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        config, place = parse(list(arguments) or ["race", "digits"])
        module, function = place.split(":")
        with processes.one_run(config):
            getattr(importlib.import_module(module), function)(config)
    except UsageError as error:
        return fail(error, 2)
    except RunError as error:
        return fail(error, 1)
    except MemoryError as error:
        return fail(f"out of memory ({error}): make the network, the images or the batch smaller", 1)
    except BrokenPipeError:
        # Whoever read what is shown has gone.
        return 128 + signal.SIGPIPE
    except OSError as error:
        # What this program writes says so itself; what is left is the output, on a full disk.
        return fail(f"{error.filename or 'what is shown'} cannot be written or read ({error.strerror or error})", 1)
    except Stopped as stopped:
        return fail(stopped, stopped.code)
    except KeyboardInterrupt:
        return fail("stopped by SIGINT: the same command begins again", 130)
    return 0


def parse(arguments: Sequence[str]) -> tuple[Any, str]:
    """The configuration that the arguments ask for, and where the code is that carries it out.

    Raises:
        UsageError: if they are not accepted.
        SystemExit: after printing the help.
    """
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(overview())
        raise SystemExit(0)
    if name not in COMMANDS:
        raise UsageError(f"{name!r} is no command: give one of {', '.join(COMMANDS)}, or nothing, for race digits")
    kind, place = COMMANDS[name]
    return options.parse(kind, name, rest), place


def overview() -> str:
    """The help that names the commands."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    lines = [f"usage: {options.PROGRAM} [command] [options]", ""]
    lines += [
        *textwrap.wrap("Experiments with curvature-based learning rates. Without a command: race digits.", width),
        "",
    ]
    for name, (kind, _) in COMMANDS.items():
        purpose = kind.__doc__.split("\n")[0]
        lines += textwrap.wrap(purpose, width, initial_indent=f"  {name:<8}", subsequent_indent=" " * 10)
    return "\n".join(
        [*lines, "", *textwrap.wrap(f"{options.PROGRAM} COMMAND --help lists the options of a command.", width)]
    )


def fail(message: object, code: int) -> int:
    """Prints one line and returns the exit code."""
    # What an argument or another library says may hold anything.
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", str(message))
    with contextlib.suppress(OSError):
        print(f"error: {line}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    processes.leave(lambda: main(sys.argv[1:]))
