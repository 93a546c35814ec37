"""The ways in which a command ends without its result: each one line on the terminal, and an exit code."""

import signal


class UsageError(ValueError):
    """A wish that cannot be met as stated; the line says what is accepted. Exit code 2."""


class RunError(Exception):
    """A run that had to stop; the line says why, and what to try. Exit code 1."""


class Diverged(RunError):
    """The loss is no longer a number."""


class Stopped(KeyboardInterrupt):
    """A signal asked for the end; the line says how to go on. Exit code 128 and the signal's number.

    As with Ctrl-C, whoever handles every `Exception` does not handle this.
    """

    def __init__(self, number: int, rest: str = "the same command begins again"):
        super().__init__(f"stopped by {signal.Signals(number).name}: {rest}")
        self.code = 128 + number
