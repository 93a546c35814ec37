"""Ctrl-C, and the SIGTERM of SLURM, Kubernetes and `kill`: training ends after a step, all else at once."""

import contextlib
import signal
from collections.abc import Callable, Iterator

from experiments.errors import Stopped

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def handle(handler: Callable | signal.Handlers):
    """Lets signals do this; what is ignored, as Ctrl-C is by a background process, stays ignored."""
    for number in NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


class Listener:
    """Turns signals into `Stopped`, or notes the first where a step is not to be torn apart."""

    def __init__(self):
        self._waits, self._caught = False, 0

    def __call__(self, number, frame):
        before, self._caught = self._caught, number
        if before or not self._waits:
            raise Stopped(number)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, the first signal only shows in `caught`; a second one ends the program at once, as elsewhere."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def caught(self) -> int:
        """The signal that came, or 0; maybe before, since what it raises is lost in a callback of the collector."""
        return self._caught


listener = Listener()


@contextlib.contextmanager
def deadly() -> Iterator[None]:
    """Within, signals do what the system does, also to code that does not come back to Python for minutes."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    handle(signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
