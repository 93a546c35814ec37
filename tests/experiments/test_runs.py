"""A run that is stopped, whenever and however, ends as if it had not been."""

import dataclasses
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_train import RICH, TINY, untimed

from experiments import records, runs
from experiments.checkpoints import Checkpoints, flat
from experiments.config import load_config
from experiments.errors import RunError
from experiments.train import Diverged

# A checkpoint that fails leaves threads of Orbax's behind, which then find nobody to tell.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = Path(__file__).parents[2]
# Every step is a checkpoint, two epochs of four steps.
QUICK = dataclasses.replace(TINY, width=0.05, batch_size=128, epochs=2, dropout=0.5, checkpoint_seconds=0.0)


class Stopped(Exception):
    pass


def stop_after(step):
    def show(record):
        if record["step"] == step:
            raise Stopped

    return show


def stopped(folder, config=QUICK, step=6):
    """A folder in which a run stopped with checkpoints of the two steps before this one."""
    with pytest.raises(Stopped):
        runs.run(config, folder, stop_after(step))
    return folder


def untimed_all(rows):
    return [untimed(row) for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    runs.run(QUICK, folder)
    return folder


def state_of(folder, config, step):
    stepper = runs.stepper_of(config)
    return Checkpoints(folder / "checkpoints").restore(step, stepper.init(config.seed))


def assert_same_run(folder, other, config, step):
    """Equal records, none lost or repeated, and equal last states: parameters, optimizer, key, to the last bit."""
    rows, others = (records.read(path / runs.METRICS)[1:] for path in (folder, other))
    assert untimed_all(rows) == untimed_all(others)
    leaves, expected = (flat(state_of(path, config, step)) for path in (folder, other))
    for name, leaf in leaves.items():
        leaf, wanted = (jax.random.key_data(x) if name == ".key" else x for x in (leaf, expected[name]))
        np.testing.assert_array_equal(leaf, wanted, err_msg=name)


def wait_for_lines(path, number, process):
    while not (path.exists() and path.read_bytes().count(b"\n") >= number):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


RUN = """
import json, pathlib, sys
from experiments import config, runs
for folder in sys.argv[2:]:
    runs.run(config.load_config(json.loads(sys.argv[1])), pathlib.Path(folder))
"""


def test_a_run_killed_twice_ends_with_the_same_bits(tmp_path):
    config = dataclasses.replace(RICH, width=0.03, batch_size=128, checkpoint_seconds=0.0)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def start(*folders):
        arguments = [sys.executable, "-c", RUN, records.line(config.as_dict()), *map(str, folders)]
        return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    # One line for the configuration: the kills come in the first epoch, and at the end of it or in the second.
    for lines in (3, 6):
        process = start(killed)
        wait_for_lines(killed / runs.METRICS, lines, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(killed, whole)
    said = process.communicate()[0].decode()
    assert process.returncode == 0, said
    assert said.count("going on after step") == 1
    assert_same_run(killed, whole, config, step=8)


def newest(folder, step=5):
    return folder / "checkpoints" / str(step)


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(folder):
    path = largest_file(newest(folder))
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(folder):
    path = largest_file(newest(folder))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_a_file(folder):
    largest_file(newest(folder)).unlink()


def stop_before_the_digests(folder):
    newest(folder).with_suffix(".json").unlink()


def lose_half_of_the_digests(folder):
    path = newest(folder).with_suffix(".json")
    path.write_text(path.read_text()[:100])


@pytest.mark.parametrize(
    ("damage", "report"),
    [
        (truncate, "damaged (in "),
        (flip_a_bit, "damaged (in "),
        (lose_a_file, "damaged (in "),
        (stop_before_the_digests, "half written"),
        (lose_half_of_the_digests, "unreadable"),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(damage, report, tmp_path, whole, capsys):
    damage(stopped(tmp_path))
    shown = []
    runs.run(QUICK, tmp_path, shown.append)
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"{Path('checkpoints') / '5'} is" in said and report in said and "going on after step 4" in said
    assert shown[0]["step"] == 5 or (shown[0]["kind"], shown[0]["step"]) == ("epoch", 4)
    assert_same_run(tmp_path, whole, QUICK, step=8)


def test_without_any_whole_checkpoint_a_run_begins_again(tmp_path, whole, capsys):
    stopped(tmp_path)
    for path in (tmp_path / "checkpoints").glob("*/_METADATA"):
        path.write_text("")
    shown = []
    runs.run(QUICK, tmp_path, shown.append)
    assert shown[0]["step"] == 1 and capsys.readouterr().out.count("damaged") == 2
    assert_same_run(tmp_path, whole, QUICK, step=8)


@pytest.mark.parametrize("tail", [b'{"kind": "step", "st', b"\x00\x00\x00\n", b"3\n"])
def test_a_broken_line_of_metrics_is_dropped(tail, tmp_path, whole):
    with (stopped(tmp_path) / runs.METRICS).open("ab") as file:
        file.write(tail)
    runs.run(QUICK, tmp_path)
    assert_same_run(tmp_path, whole, QUICK, step=8)


def test_metrics_that_were_lost_are_made_again(tmp_path, whole):
    path = stopped(tmp_path) / runs.METRICS
    # The configuration, steps 1 to 4: the checkpoint of step 5 knows more than the file, that of step 4 does not.
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))
    runs.run(QUICK, tmp_path)
    assert_same_run(tmp_path, whole, QUICK, step=8)


def test_a_run_that_is_done_is_read(tmp_path, whole):
    shown = []
    again = runs.run(QUICK, whole, shown.append)
    assert shown == [] and again == records.read(whole / runs.METRICS)[1:]
    assert [row["step"] for row in again] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["7", "7.json", "8", "8.json"]


def test_a_run_goes_on_on_another_mesh_and_back(tmp_path, whole):
    four = dataclasses.replace(QUICK, devices=4)
    assert four.name == QUICK.name
    stopped(tmp_path, QUICK, 3)
    # A state is the same on every mesh, to the last bit.
    leaves = [jax.tree.leaves(state_of(tmp_path, config, 2)) for config in (QUICK, four)]
    for one, spread in zip(*leaves, strict=True):
        assert len(one.sharding.device_set) == 1 and len(spread.sharding.device_set) == 4
        data = [
            jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (one, spread)
        ]
        np.testing.assert_array_equal(*data)
    stopped(tmp_path, four, 6)
    losses = [[row["loss"] for row in rows] for rows in (runs.run(QUICK, tmp_path), runs.run(QUICK, whole))]
    # To rounding: the sum over a batch is made of four parts, in two of the steps.
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_without_checkpoints_a_run_begins_again(tmp_path):
    config = dataclasses.replace(QUICK, checkpoint_seconds=None)
    rows = runs.run(config, stopped(tmp_path, config))
    assert not (tmp_path / "checkpoints").exists()
    assert untimed_all(rows) == untimed_all(records.read(tmp_path / runs.METRICS)[1:])


def test_divergence_is_remembered(tmp_path):
    config, shown = dataclasses.replace(QUICK, learning_rate=1e20), []
    for _ in range(2):
        with pytest.raises(Diverged, match=r"the loss is nan at step \d+: try a smaller --learning-rate"):
            runs.run(config, tmp_path, shown.append)
    assert len(shown) == len(records.read(tmp_path / runs.METRICS)[1:])


def test_a_full_disk_stops_a_run_which_then_goes_on(tmp_path, whole):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file above 4 KiB: the metrics fit for now, the parameters do not.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(RunError, match=r"cannot write a checkpoint to .*the same command then goes on"):
            runs.run(QUICK, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    runs.run(QUICK, tmp_path)
    assert_same_run(tmp_path, whole, QUICK, step=8)


def test_a_disk_without_room_for_checkpoints_is_said_before_the_work(tmp_path, monkeypatch):
    state = runs.stepper_of(QUICK).init(0)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    shown = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    with pytest.raises(RunError, match=r"checkpoints need .* MB, .* or do without by --checkpoint-seconds None"):
        runs.run(QUICK, tmp_path, shown.append)
    assert not shown
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * size))
    assert len(runs.run(QUICK, tmp_path)) == 10


def test_metrics_that_do_not_fit_stop_a_run(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(RunError, match="No space left on device"), records.Writer(tmp_path / "full") as writer:
        writer.write({"kind": "step"})


def test_folders_are_of_one_run_and_one_process(tmp_path, whole):
    other = dataclasses.replace(QUICK, seed=1)
    with pytest.raises(RunError, match=f"holds the run {QUICK.name}, not {other.name}: give another --out"):
        runs.run(other, whole)
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(RunError, match="another run is writing"):
        runs.run(QUICK, tmp_path)
    os.close(lock)


def test_a_checkpoint_of_another_network_is_refused(whole):
    wide = runs.stepper_of(dataclasses.replace(QUICK, width=0.06))
    with pytest.raises(RunError, match=r"of another network or optimizer: .*convs.* is float32"):
        Checkpoints(whole / "checkpoints").restore(8, wide.init(0))


def test_names_tell_results_apart_and_nothing_else():
    same = dataclasses.replace(QUICK, devices=2, out=Path("x"), data_dir=Path("y"), checkpoint_seconds=5.0)
    assert same.name == QUICK.name == load_config(QUICK.as_dict()).name
    others = [
        dataclasses.replace(QUICK, **change) for change in ({"seed": 1}, {"width": 0.06}, {"phases": ("1:64:1",)})
    ]
    assert len({config.name for config in (QUICK, *others)}) == 4


def test_seeds_and_rates_share_what_is_compiled():
    assert runs.stepper_of(QUICK) is runs.stepper_of(dataclasses.replace(QUICK, seed=3, learning_rate=0.5))
