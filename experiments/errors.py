"""The two ways in which a command ends without its result: each one line on the terminal and an exit code."""


class UsageError(Exception):
    """A wish that cannot be met as stated; the line says what is accepted. Exit code 2."""


class RunError(Exception):
    """A run that had to stop; the line says why, and what to try. Exit code 1."""
