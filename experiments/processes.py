"""Several processes that are one run: each has its devices and its copy of the images, the first alone writes.

All of them run the same program on the same configuration, so that they meet in every collective operation. What only
one of them can know (what is on the disk, what time it is) the first finds out and tells the others. When one ends
before the run does, the others cannot go on, and must not wait for it: they end too, and the checkpoints remain.
"""

import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.console import console
from experiments.errors import RunError, UsageError

Json = TypeVar("Json")

# The signs of a launcher that `jax.distributed.initialize` can ask for everything, and of more than one process.
LAUNCHERS = {
    "SLURM_STEP_NODELIST": lambda: int(os.environ.get("SLURM_NTASKS", 1)) > 1,
    "OMPI_COMM_WORLD_SIZE": lambda: int(os.environ["OMPI_COMM_WORLD_SIZE"]) > 1,
    "TPU_WORKER_HOSTNAMES": lambda: "," in os.environ["TPU_WORKER_HOSTNAMES"],
    "MEGASCALE_COORDINATOR_ADDRESS": lambda: True,
}
# A process that has said nothing for so long is dead. They speak from a thread of their own, even while they compile.
HEARTBEAT_SECONDS = 30
# What JAX and Orbax raise where another process no longer answers: Gloo's closed connections, NCCL's and the
# coordinator's unavailable peers, barriers that nobody else reaches.
LOST = (jax.errors.JaxRuntimeError, TimeoutError)
AGAIN = "start all processes again with the same command, and the run goes on from its last checkpoint"


def join(config):
    """Joins the processes of a run, if there are several; has to come before anything else of JAX.

    Args:
        config: an `experiments.config.TrainConfig`.

    Raises:
        UsageError: if only some of the options are given that belong together.
        RunError: if the others are not met.
    """
    given = {name: getattr(config, name) for name in ("coordinator", "num_processes", "process_id")}
    found = any(name in os.environ and several() for name, several in LAUNCHERS.items())
    if config.coordinator == "auto" or (found and set(given.values()) == {None}):
        given = dict.fromkeys(given)
    elif set(given.values()) == {None}:
        return
    elif None in given.values():
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"{names} belong together: give all three, or --coordinator auto under a launcher")
    # Without it, processes on CPUs compute side by side and cannot add.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # A CPU would begin the next function before the last has ended, and what one process sums meet what another does.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    _watch()
    try:
        jax.distributed.initialize(*given.values(), heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"the processes did not meet ({str(error).splitlines()[0]}): start all of them, within five minutes, with"
            " the same --coordinator and --num-processes, and each with its own --process-id from 0"
        ) from error
    console.print(f"process {jax.process_index()} of {jax.process_count()}; if one ends, {AGAIN}", soft_wrap=True)


def _watch():
    """Sees to it that the end of this process is explained, even where JAX or the system aborts it."""
    global _watcher
    # Its input ends with this process; a line comes before that only if the process ends by itself.
    script = 'read -r line || echo "error: a process of the run has ended before it was done: $0" >&2'
    _watcher = subprocess.Popen(["sh", "-c", script, AGAIN], stdin=subprocess.PIPE, start_new_session=True)


_watcher: subprocess.Popen | None = None


def is_first() -> bool:
    """Whether this process writes for all."""
    return jax.process_index() == 0


def from_first(make: Callable[[], Json]) -> Json:
    """What the first process makes, a JSON value, in all of them; or the error that it raises."""
    if jax.process_count() == 1:
        return make()
    said = _attempt(make) if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
    said = np.frombuffer(said.ljust(size, b"\0"), np.uint8)
    value, error = json.loads(bytes(multihost_utils.broadcast_one_to_all(said)))
    if error is not None:
        raise RunError(error)
    return value


def _attempt(make: Callable) -> bytes:
    try:
        return json.dumps([make(), None]).encode()
    except RunError as error:
        return json.dumps([None, str(error)]).encode()


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Turns the failure of another process into a `RunError`."""
    try:
        yield
    except LOST as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).splitlines()[0]
        raise RunError(f"another process of the run has ended, or cannot be reached ({reason}): {AGAIN}") from error


def leave(main: Callable[[], int]):
    """Ends this process with the code that `main` returns; at once if it failed and there are others."""
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    if _watcher is None:
        sys.exit(code)
    _watcher.communicate(b"done\n")
    sys.stdout.flush()
    sys.stderr.flush()
    # An orderly end waits for the other processes, which wait for this one.
    os._exit(code) if code else sys.exit(code)
