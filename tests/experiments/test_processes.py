"""Several processes on this machine are one run: its numbers, its folder, its end."""

import dataclasses
import os
import re
import shlex
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_runs import ROOT, kept, wait_for_lines
from test_train import TINY

from experiments import options, processes, records, runs
from experiments.errors import RunError

# Dropout, two epochs of four steps, and little to compile: on a small machine all processes compile on the same cores.
CONFIG = dataclasses.replace(
    TINY, width=0.03, batch_size=128, epochs=2, dropout=0.5, augment=False, checkpoint_seconds=0.0
)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(number, config, cache):
    """Starts `python -m experiments train` in so many processes, which share four devices."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    config = dataclasses.replace(
        config, devices=4 // number, coordinator=f"127.0.0.1:{free_port()}", num_processes=number, process_id=0
    )
    # What runs in the background ignores Ctrl-C, these tests may, and it would be inherited.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return [
            subprocess.Popen(
                [sys.executable, *shlex.split(options.line("train", dataclasses.replace(config, process_id=i)))[1:]],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in range(number)
        ]
    finally:
        signal.signal(signal.SIGINT, before)


def ends(running):
    """Exit codes and output; the time limit is there to tell a hang from an end."""
    said = [process.communicate(timeout=600)[0] for process in running]
    return [process.returncode for process in running], said


@pytest.mark.once
def test_two_processes_of_which_one_dies_and_two_that_go_on_equal_one(tmp_path):
    """The first two under `pmap`, the others under `jit`: a run is the same in several processes and in either way."""
    config = dataclasses.replace(CONFIG, out=tmp_path)
    folder = runs.folder_of(config)
    two = start(2, dataclasses.replace(config, parallel="pmap"), tmp_path / "cache")
    wait_for_lines(folder / runs.METRICS, 4, two[0])
    two[1].send_signal(signal.SIGKILL)
    codes, said = ends(two)
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    assert processes.AGAIN in said[0].splitlines()[-1] and "free some space" not in said[0], said[0]
    assert "[Gloo]" not in "".join(said)

    codes, said = ends(start(2, config, tmp_path / "cache"))
    assert codes == [0, 0], said
    assert "going on after step" in said[0] and f"records: {folder}" in said[0].replace("\n", "")
    assert not any("records:" in text or "epoch" in text for text in said[1:])

    found = records.read(folder / runs.METRICS)[1:]
    one = runs.run(dataclasses.replace(config, devices=4), tmp_path / "one")
    assert [(row["kind"], row["step"]) for row in found] == [(row["kind"], row["step"]) for row in one]
    for name in ("loss", "accuracy", "learning_rate"):
        # The mesh is the same; only the order in which four numbers are added is not.
        np.testing.assert_allclose([row[name] for row in found], [row[name] for row in one], rtol=1e-4)
    losses = [[row["test_loss"] for row in rows if row["kind"] == "epoch"] for rows in (found, one)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.once
def test_a_cpu_counts_as_several_devices_in_a_process_of_its_own(tmp_path):
    command = options.line("train", dataclasses.replace(CONFIG, devices=2, epochs=1, out=tmp_path))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def joined(monkeypatch):
    """The arguments with which processes would be joined, where nothing but `join` could set them."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(tuple(given.values())[:-1]))
    monkeypatch.setattr(jax.config, "update", lambda *arguments: None)
    for name in ("watcher", "hush"):
        monkeypatch.setattr(processes, name, lambda: None)
    for name in processes.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    ("environment", "options", "expected"),
    [
        ({}, {}, []),
        ({}, {"coordinator": "localhost:{port}", "num_processes": 2, "process_id": 1}, [("localhost:{port}", 2, 1)]),
        ({}, {"coordinator": "auto"}, [()]),
        ({"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4"}, {}, [()]),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, {}, []),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, [()]),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, {}, []),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}, [()]),
        (
            {"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4"},
            {"coordinator": "localhost:{port}", "num_processes": 2, "process_id": 0},
            [("localhost:{port}", 2, 0)],
        ),
    ],
)
def test_processes_meet_as_their_launcher_or_the_options_say(environment, options, expected, joined, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    port = free_port()
    put = lambda x: x.format(port=port) if isinstance(x, str) else x
    processes.join(dataclasses.replace(CONFIG, **{name: put(value) for name, value in options.items()}))
    assert joined == [tuple(map(put, arguments)) for arguments in expected]


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::"])
def test_a_port_in_use_is_one_line_and_no_crash(address, joined):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as other:
        port = other.getsockname()[1]
        config = dataclasses.replace(CONFIG, coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=0)
        with pytest.raises(RunError, match=f"port {port}: Address already in use; give another --coordinator"):
            processes.join(config)
        assert not joined
        # Only the first process listens there.
        processes.join(dataclasses.replace(config, process_id=1))
    assert joined == [(f"127.0.0.1:{port}", 2, 1)]


@pytest.mark.once
@pytest.mark.parametrize(("number", "who"), [(signal.SIGTERM, (1,)), (signal.SIGINT, (0, 1))])
def test_a_signal_to_any_process_stops_all_of_them_with_the_step_saved(number, who, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=500, checkpoint_seconds=1e6, out=tmp_path)
    folder = runs.folder_of(config)
    two = start(2, config, tmp_path / "cache")
    wait_for_lines(folder / runs.METRICS, 4, two[0])
    for i in who:
        two[i].send_signal(number)
    codes, said = ends(two)
    assert codes == [128 + number, 128 + number], said
    steps = {
        re.search(rf"error: stopped by {number.name}: step (\d+) of 2000 is saved; start all", text)[1] for text in said
    }
    [step] = steps
    assert kept(folder) == [f"step-{step}.npz"]
    assert records.read(folder / runs.METRICS)[-1]["step"] == int(step)
    assert not any("Gloo" in text or "Traceback" in text for text in said)


def test_processes_that_do_not_meet_are_told_how(joined, monkeypatch):
    def fail(**options):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.\nMore.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(RunError, match=r"did not meet \(DEADLINE_EXCEEDED: Barrier timed out.\): start all of them"):
        processes.join(dataclasses.replace(CONFIG, coordinator="auto"))
