"""A run that is stopped, whenever and however, ends as if it had not been."""

import dataclasses
import fcntl
import json
import os
import re
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
from test_train import RICH, TINY, phased, untimed

from experiments import records, runs
from experiments.checkpoints import Checkpoints
from experiments.config import load_config
from experiments.errors import Diverged, RunError, Stopped, UsageError
from experiments.signals import handle, listener

ROOT = Path(__file__).parents[2]
# Every step is a checkpoint, two epochs of four steps.
QUICK = dataclasses.replace(TINY, width=0.05, batch_size=128, epochs=2, dropout=0.5, checkpoint_seconds=0.0)


class Torn(Exception):
    pass


def stop_after(step):
    def show(record):
        if record["step"] == step:
            raise Torn

    return show


def stopped(folder, config=QUICK, step=6):
    """A folder in which a run stopped with checkpoints of the two steps before this one."""
    with pytest.raises(Torn):
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


def arrays_of(folder, config, step):
    """Those of a checkpoint, by their names."""
    stepper = runs.stepper_of(config)
    held, arrays = Checkpoints(folder / "checkpoints").restore(step, stepper.arrays(stepper.init(config.seed)))
    assert held == step
    return arrays


def assert_same_run(folder, other, config, step):
    """Equal records, none lost or repeated, and equal last states: parameters, optimizer, key, to the last bit."""
    rows, others = (records.read(path / runs.METRICS)[1:] for path in (folder, other))
    assert untimed_all(rows) == untimed_all(others)
    arrays, expected = (arrays_of(path, config, step) for path in (folder, other))
    assert ".seed" in arrays and len(arrays) > 10
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


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


@pytest.mark.once
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
    [path] = (folder / "checkpoints").glob(f"step-{step}-*.npz")
    return path


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_an_array(path):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files[1:]}
    np.savez(path, **arrays)


def hold_something_else(path):
    path.write_text(json.dumps([1, {"arrays": 3}]))


def exchange(path):
    [other] = path.parent.glob("step-4-*.npz")
    shutil.copy(other, path)


def stop_while_writing(path):
    path.rename(path.with_name(path.name + ".draft"))


@pytest.mark.slow_but_for("truncate")
@pytest.mark.parametrize(
    "damage",
    [truncate, empty, flip_a_bit, lose_an_array, hold_something_else, exchange, stop_while_writing],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(damage, tmp_path, whole, capsys):
    damage(newest(stopped(tmp_path)))
    shown = []
    runs.run(QUICK, tmp_path, shown.append)
    said = capsys.readouterr().out
    report = "half written" if damage is stop_while_writing else "damaged"
    assert f"{tmp_path}/checkpoints/step-5" in said and report in said and "going on after step 4" in said
    assert shown[0]["step"] == 5 or (shown[0]["kind"], shown[0]["step"]) == ("epoch", 4)
    assert_same_run(tmp_path, whole, QUICK, step=8)
    assert kept(tmp_path) == ["step-7.npz", "step-8.npz"]


def kept(folder):
    """The names of its checkpoints, but for their digests."""
    return sorted(re.sub("-[0-9a-f]{64}", "", path.name) for path in (folder / "checkpoints").iterdir())


def test_no_flipped_bit_goes_unseen(tmp_path):
    arrays = {"a['w']": np.arange(5.0), ".b": np.array(3), "c/d": np.array([True, False])}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.folder.mkdir()
    checkpoints.save(arrays, 1)
    assert checkpoints.restore(1, arrays)[0] == 1
    content = newest(tmp_path, 1).read_bytes()
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= 0x10
        newest(tmp_path, 1).write_bytes(changed)
        assert checkpoints.restore(1, arrays) == (0, arrays)


def test_without_any_whole_checkpoint_a_run_begins_again(tmp_path, whole, capsys):
    stopped(tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_text("")
    shown = []
    runs.run(QUICK, tmp_path, shown.append)
    assert shown[0]["step"] == 1 and capsys.readouterr().out.count("is damaged") == 2
    assert_same_run(tmp_path, whole, QUICK, step=8)


def test_what_is_not_this_program_s_stays(tmp_path, whole):
    stopped(tmp_path)
    own = (
        "notes.txt",
        "step-3.npz.bak",
        "step-03.npz",
        "step-x.npz",
        "2024/data.npz",
        "step-2.npz/inner",
        "5",
        "5.json",
    )
    for name in own:
        path = tmp_path / "checkpoints" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (tmp_path / "metrics.txt").write_text("mine")
    runs.run(QUICK, tmp_path)
    assert all((tmp_path / "checkpoints" / name).read_text() == "mine" for name in own)
    assert (tmp_path / "metrics.txt").read_text() == "mine"
    assert_same_run(tmp_path, whole, QUICK, step=8)


@pytest.mark.parametrize("name", ["", "metrics.jsonl", "checkpoints", "checkpoints/NEWEST", "checkpoints/NEWEST.draft"])
def test_nothing_is_written_or_removed_behind_a_link(name, tmp_path):
    folder, foreign = stopped(tmp_path / "out" / "run"), tmp_path / "foreign"
    place = folder / name.replace("NEWEST", newest(folder).name)
    if place.exists():
        place.rename(foreign)
    else:
        foreign.write_text("mine")
    before = {path: path.read_bytes() for path in (foreign, *foreign.rglob("*")) if path.is_file()}
    place.symlink_to(foreign)
    with pytest.raises(RunError, match=re.escape(f"{place} is a link")):
        runs.run(QUICK, folder)
    assert before == {path: path.read_bytes() for path in (foreign, *foreign.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda folder: (folder / runs.METRICS).unlink(), shutil.move])
def test_a_folder_that_is_removed_during_a_run_ends_it(damage, tmp_path):
    folder = tmp_path / "run"

    def show(record):
        if record["step"] == 3:
            damage(folder, tmp_path / "elsewhere") if damage is shutil.move else damage(folder)

    with pytest.raises(
        RunError, match=r"metrics.jsonl was removed while it was written: the same command begins again"
    ):
        runs.run(QUICK, folder, show)
    # Nothing but what remained is there, and the same command then does it all.
    assert len(runs.run(QUICK, folder)) == 10


def test_the_first_signal_saves_the_step_and_the_second_ends_it(tmp_path, whole):
    def signal_at(step, times=1):
        def show(record):
            if (record["kind"], record["step"]) == ("step", step):
                [os.kill(os.getpid(), signal.SIGTERM) for _ in range(times)]

        return show

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    config = dataclasses.replace(QUICK, checkpoint_seconds=1e6)
    handle(listener)
    try:
        with pytest.raises(Stopped, match=r"SIGTERM: step 3 of 8 is saved; the same command goes on") as stop:
            runs.run(config, tmp_path, signal_at(3))
        assert stop.value.code == 128 + signal.SIGTERM and kept(tmp_path) == ["step-3.npz"]
        listener.__init__()
        with pytest.raises(Stopped, match="the same command begins again"):
            runs.run(config, tmp_path, signal_at(6, times=2))
        listener.__init__()
        without = dataclasses.replace(QUICK, checkpoint_seconds=None)
        with pytest.raises(Stopped, match=r"step 5 of 8 is not saved, for --checkpoint-seconds is none"):
            runs.run(without, tmp_path, signal_at(5))
    finally:
        listener.__init__()
        for number, handler in before.items():
            signal.signal(number, handler)
    runs.run(QUICK, tmp_path)
    assert_same_run(tmp_path, whole, QUICK, step=8)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({"new_option": 3}, r"is of another version of this program \(it knows the option new_option\)"),
        ({"format": 2}, r"is of another version of this program \(format 2, not 1\)"),
        ({"format": None}, "another version"),
        ({"width": "wide"}, "does not begin with the options of a run"),
        ({"phases": 7}, "does not begin with the options of a run"),
        ({"out": None}, "does not begin with the options of a run"),
        ({"width": -1}, "does not begin with the options of a run"),
    ],
)
def test_a_folder_of_another_version_is_refused_in_words(first, message, tmp_path, whole):
    held, *rest = records.read(whole / runs.METRICS)
    content = "".join(map(records.line, ({**held, **first}, *rest)))
    (tmp_path / runs.METRICS).write_text(content)
    with pytest.raises(RunError, match=message) as error:
        runs.run(QUICK, tmp_path)
    assert "\n" not in str(error.value) and (tmp_path / runs.METRICS).read_text() == content


@pytest.mark.parametrize("content", ["", "my notes\n", "[]\n", "{}", "\x00\n"])
def test_a_file_that_is_of_no_run_is_left_alone(content, tmp_path):
    (tmp_path / runs.METRICS).write_text(content)
    with pytest.raises(RunError, match="is not of a run: move it elsewhere, or give another --out"):
        runs.run(QUICK, tmp_path)
    assert (tmp_path / runs.METRICS).read_text() == content


def test_what_fails_before_its_first_record_leaves_no_folder(tmp_path):
    config = dataclasses.replace(QUICK, batch_size=600, out=tmp_path / "a" / "b")
    with pytest.raises(UsageError, match="exceeds the 512 training images"):
        runs.run(config, runs.folder_of(config))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tail", [b'{"kind": "step", "st', b"\x00\x00\x00\n", b"3\n", b"{}\n", b'{"kind": "epoch"}\n'])
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
    assert kept(whole) == ["step-7.npz", "step-8.npz"]


@pytest.mark.once
def test_a_run_goes_on_on_another_mesh_and_back(tmp_path, whole):
    four = dataclasses.replace(QUICK, devices=4)
    assert four.name == QUICK.name
    stopped(tmp_path, QUICK, 3)
    # A state is the same on every mesh, to the last bit.
    arrays, spread = arrays_of(tmp_path, QUICK, 2), runs.stepper_of(four)
    state = spread.place(arrays, spread.init(0))
    assert all(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(state))
    for name, array in spread.arrays(state).items():
        np.testing.assert_array_equal(array, arrays[name])
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
        with pytest.raises(RunError, match=r"cannot write to .*step-1-.*the same command then goes on"):
            runs.run(QUICK, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    runs.run(QUICK, tmp_path)
    assert_same_run(tmp_path, whole, QUICK, step=8)


def test_a_disk_without_room_for_checkpoints_is_said_before_the_work(tmp_path, monkeypatch):
    state = runs.stepper_of(QUICK).init(0)
    size = sum(array.nbytes for array in runs.stepper_of(QUICK).arrays(state).values())
    shown = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    with pytest.raises(RunError, match=r"checkpoints need .* MB, .* or do without by --checkpoint-seconds none"):
        runs.run(QUICK, tmp_path, shown.append)
    assert not shown
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * size))
    assert len(runs.run(QUICK, tmp_path)) == 10


def test_metrics_that_do_not_fit_stop_a_run():
    with pytest.raises(RunError, match="No space left on device"):
        records.append(Path("/dev/full"), {"kind": "step"})


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
        Checkpoints(whole / "checkpoints").restore(8, wide.arrays(wide.init(0)))


def test_names_tell_results_apart_and_nothing_else():
    same = dataclasses.replace(QUICK, devices=2, out=Path("x"), data_dir=Path("y"), checkpoint_seconds=5.0)
    assert same.name == QUICK.name == load_config(QUICK.as_dict()).name
    others = [dataclasses.replace(QUICK, **change) for change in ({"seed": 1}, {"width": 0.06}, phased("1:64:1"))]
    assert len({config.name for config in (QUICK, *others)}) == 4


def test_seeds_and_rates_share_what_is_compiled():
    assert runs.stepper_of(QUICK) is runs.stepper_of(dataclasses.replace(QUICK, seed=3, learning_rate=0.5))
