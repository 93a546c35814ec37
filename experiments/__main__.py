"""The command line: `python -m experiments [race | tune | train | bench | figure | report] [options]`."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence

import jax
import tyro

from experiments import processes
from experiments.bench.command import BenchConfig, bench
from experiments.config import TrainConfig
from experiments.errors import RunError, UsageError
from experiments.figures.command import FigureConfig, make_figures
from experiments.figures.report import ReportConfig, report
from experiments.race import RaceConfig, race
from experiments.single import run_single
from experiments.tune import TuneConfig, tune

COMMANDS = {
    "race": (RaceConfig, race),
    "tune": (TuneConfig, tune),
    "train": (TrainConfig, run_single),
    "bench": (BenchConfig, bench),
    "figure": (FigureConfig, make_figures),
    "report": (ReportConfig, report),
}
DESCRIPTION = "Experiments with curvature-based learning rates. Without a command: race."


def main(arguments: Sequence[str]) -> int:
    """Runs one command.

    Returns:
        0 if it did what it says, 1 if it could not, 2 if it was asked for something it does not accept.
    """
    try:
        config = parse(list(arguments) or ["race"])
        start_devices(getattr(config, "devices", 1))
        if isinstance(config, TrainConfig):
            processes.join(config)
        command = next(run for kind, run in COMMANDS.values() if kind is type(config))
        with processes.ending_together():
            command(config)
    except UsageError as error:
        return fail(error, 2)
    except RunError as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    return 0


def parse(arguments: Sequence[str]):
    """The configuration that the arguments ask for.

    Raises:
        UsageError: if they are not accepted.
        SystemExit: after printing the help.
    """
    kinds = {name: kind for name, (kind, _) in COMMANDS.items()}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                kinds, prog="python -m experiments", description=DESCRIPTION, args=arguments
            )
    except SystemExit as exit:
        if exit.code:
            raise UsageError(one_line(said.getvalue())) from None
        raise


def one_line(box: str) -> str:
    """What tyro says in a framed box, without frame, line breaks and the pointer to the help.

    Example:
        >>> one_line("╭─ Oh ─╮\\n│ too  │\\n│ few  │\\n│ ──── │\\n│ For full helptext, see x │\\n╰──────╯")
        'too few'
    """
    rows = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    parts = [[]]
    for row in rows:
        if row.strip("─"):
            parts[-1].append(row)
        else:
            parts.append([])
    texts = [re.sub(r"^Error parsing \w+Config: ", "", " ".join(part)) for part in parts]
    texts = [text.replace("Argument helptext: ", "; it takes ") for text in texts if "full helptext" not in text]
    return " ".join(texts).replace(" ; ", "; ") or " ".join(box.split())


def start_devices(number: int):
    """Makes a CPU count as several devices; without effect on accelerators, or once JAX has started."""
    with contextlib.suppress(RuntimeError):
        if number > 1:
            jax.config.update("jax_num_cpu_devices", number)


def fail(message: object, code: int) -> int:
    """Prints one line and returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    processes.leave(lambda: main(sys.argv[1:]))
