"""Several processes that are one run: each has its devices and its copy of the images, the first alone writes.

All of them run the same program on the same configuration, so that they meet in every collective operation. What only
one of them can know (what is on the disk, what time it is) the first finds out and tells the others. When one ends
before the run does, the others cannot go on, and must not wait for it: they end too, and the checkpoints remain.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from experiments.console import say
from experiments.errors import RunError, UsageError
from experiments.signals import deadly, handle, listener

Json = TypeVar("Json")

# The signs of a launcher that `jax.distributed.initialize` can ask for everything, and of more than one process.
LAUNCHERS = {
    "SLURM_STEP_NODELIST": lambda: os.environ.get("SLURM_NTASKS", "1") != "1",
    "OMPI_COMM_WORLD_SIZE": lambda: os.environ["OMPI_COMM_WORLD_SIZE"] != "1",
    "TPU_WORKER_HOSTNAMES": lambda: "," in os.environ["TPU_WORKER_HOSTNAMES"],
    "MEGASCALE_COORDINATOR_ADDRESS": lambda: True,
}
# A process that has said nothing for so long is dead. They speak from a thread of their own, even while they compile.
HEARTBEAT_SECONDS = 30
PATIENCE_SECONDS = 60
# What XLA begins its errors with: of Gloo's closed connections, NCCL's and the coordinator's unavailable peers, and of
# barriers that nobody else reaches.
STATUS = re.compile(
    "(ABORTED|CANCELLED|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): "
)
AGAIN = "start all processes again with the same command, and the run goes on from its last checkpoint"

_watcher: subprocess.Popen | None = None
_stops_together = False


@contextlib.contextmanager
def one_run(config: Any) -> Iterator[None]:
    """Joins the processes of a run, if there are several; turns the failure of another one into a `RunError`.

    Args:
        config: of a command; a `TrainConfig` may ask for more processes, or be started by a launcher.

    Raises:
        RunError: if the others are not met, or no longer there.
    """
    if hasattr(config, "coordinator"):
        join(config)
    try:
        yield
    except (RuntimeError, TimeoutError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if several() and (STATUS.match(reason) or isinstance(error, TimeoutError)):
            raise RunError(f"another process of the run has ended, or cannot be reached ({reason}): {AGAIN}") from error
        if reason.startswith("RESOURCE_EXHAUSTED"):
            raise MemoryError(reason) from error
        raise


def join(config: Any):
    """Joins the processes of a run, if there are several; has to come before anything else of JAX."""
    global _watcher
    found = any(name in os.environ and more() for name, more in LAUNCHERS.items())
    if config.coordinator is None and not found:
        return
    given = {}
    if config.coordinator not in (None, "auto"):
        check_address(config)
        given = {"coordinator_address": config.coordinator}
        given |= {"num_processes": config.num_processes, "process_id": config.process_id}
    import jax

    # Without it, processes on CPUs compute side by side and cannot add.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # A CPU would begin the next function before the last has ended, and what one process sums meet what another does.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # It would take SIGTERM for itself, and do nothing.
    jax.config.update("jax_enable_preemption_service", False)
    start_devices(config.devices)
    hush()
    _watcher = watcher()
    try:
        with deadly():
            jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"the processes did not meet ({str(error).splitlines()[0]}): start all of them, within five minutes, with"
            " the same --coordinator and --num-processes, and each with its own --process-id from 0"
        ) from error
    say(f"process {jax.process_index()} of {jax.process_count()}; if one ends, {AGAIN}")


def start_devices(number: int):
    """Makes a CPU count as several devices; without effect on accelerators, or once JAX has started."""
    import jax

    if number > max(1, jax.config.jax_num_cpu_devices):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", number)


def check_address(config: Any):
    """Tries what JAX cannot survive if it fails.

    Raises:
        UsageError: if the host of the coordinator has no address.
        RunError: if its port is taken, in the process that would listen there.
    """
    host, port = config.coordinator.rsplit(":", 1)
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            socket.getaddrinfo(host.strip("[]"), None)
            break
        except (OSError, UnicodeError) as error:
            # Where Kubernetes starts all at once, a host may have an address a little later.
            if time.monotonic() > end:
                raise UsageError(f"--coordinator {config.coordinator}: nobody knows the host {host}") from error
            time.sleep(1)
    if config.process_id == 0:
        try:
            # As JAX does: all addresses of this machine, and ports that a process has just left.
            socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True).close()
        except OSError as error:
            raise RunError(f"port {port}: {os.strerror(error.errno)}; give another --coordinator") from error


def hush():
    """Keeps Gloo, which writes below `sys.stdout`, off the terminal."""
    sys.stdout.flush()
    own, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)
    sys.stdout = open(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)


def watcher() -> subprocess.Popen:
    """What sees to it that the end of this process is explained, even where JAX or the system aborts it."""
    # Its input ends with this process; a line comes before that only if the process ends by itself.
    script = 'read -r line || echo "error: a process of the run has ended before it was done: $0" >&2'
    return subprocess.Popen(["sh", "-c", script, AGAIN], stdin=subprocess.PIPE, start_new_session=True)


def several() -> bool:
    """Whether this process is one of many."""
    if _watcher is None:
        return False
    import jax

    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes for all."""
    import jax

    return not several() or jax.process_index() == 0


def from_first(make: Callable[[], Json]) -> Json:
    """What the first process makes, a JSON value, in all of them; or the error that it raises."""
    if not several():
        return make()
    import numpy as np

    said = [None, None]
    if is_first():
        try:
            said[0] = make()
        except (RunError, UsageError) as error:
            said[1] = str(error)
    text = json.dumps(said).encode()
    size = int(arrays_from_first(np.int32(len(text))))
    value, error = json.loads(bytes(arrays_from_first(np.frombuffer(text.ljust(size)[:size], np.uint8))))
    if error is not None:
        raise RunError(error)
    return value


def arrays_from_first(tree: Any) -> Any:
    """The arrays of the first process, in all of them; the others give some of the same shapes."""
    if not several():
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(tree)


def agree(signal: int, due: bool) -> tuple[int, bool]:
    """The highest signal that any process has caught, and whether the first says that it is time."""
    if not several():
        return signal, due
    import numpy as np
    from jax.experimental import multihost_utils

    global _stops_together
    told = multihost_utils.process_allgather(np.array([signal, due], np.int32))
    _stops_together = bool(told[:, 0].any())
    return int(told[:, 0].max()), bool(told[0, 1])


def leave(main: Callable[[], int]):
    """Runs a program and ends this process with the code that it returns; at once if it failed and there are others."""
    # Read when JAX is imported: what its C++ says of failures, this says in a line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name in ("stdout", "stderr"):
        # A locale without ± or é is no reason to fail, nor is a closed output.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")
    handle(listener)
    try:
        code = main()
    except SystemExit as end:  # After the help.
        code = end.code or 0
    except Exception:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            # It would fail once more at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            gone = isinstance(error, BrokenPipeError)  # With whoever read it.
            code = code or int(stream is sys.stdout and not gone)
    if _watcher is None:
        sys.exit(code)
    _watcher.communicate(b"done\n")
    sys.stderr.flush()
    # An orderly end waits for the other processes, which may wait for this one.
    os._exit(code) if code and not _stops_together else sys.exit(code)
