"""A hundred calls that cannot be carried out: one line each, the right exit code, and nothing left behind."""

import contextlib
import dataclasses
import json
import os
import pty
import shlex
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from experiments import __main__, images_tfds, options, processes
from experiments.commands import COMMANDS
from experiments.config import TrainConfig
from experiments.options import flag

ROOT = Path(__file__).parents[2]
TINY = "--dataset generated --image-size 16 --width 0.05 --batch-size 128 --learning-rate 0.1"
LONG = "x" * 300

# What is typed after `python -m experiments`, and some of what is answered.
REFUSED = f"""
sprint | 'sprint' is no command: give one of race, train, bench, figure, report
--seeds 3 | is no command
Train | is no command
train --optimizer adamax | --optimizer: invalid choice: 'adamax'
train --optimizer | --optimizer: expected one argument
train --learning-rte 1 | did you mean --learning-rate?
train digits | 'digits' is no option of train
train --xyz | --help lists them
train --batch 64 | did you mean --batch-size?
train --batch-size many | --batch-size: invalid int value: 'many'
train --batch-size 1.5 | invalid int value: '1.5'
train --batch-size 0 | --batch-size must be above 0, not 0
train --batch-size -5 | above 0
train --batch-size 2000 | --batch-size 2000 exceeds the 1437 training images of digits
train --batch-size {10**40} | exceeds the 1437 training images
train --phases 1:2000:0.1 | --phases: batch size 2000 exceeds
train --width inf | --width must be above 0
train --width nan | --width must be above 0
train --width 1e9 | at most 100
train --width 0 | above 0
train --width wide | invalid float value: 'wide'
train --image-size 1 | at least 16 for alexnet
train --image-size 7 | at least 16
train --image-size 15 | at least 16
train --image-size 0 | above 0
train --image-size 999999999 | at most 4096
train --image-size 4096 | images need
train --model resnet18 --image-size -1 | above 0
train --model vgg | --model: invalid choice: 'vgg'
train --model resnet18 --hidden 64 | --hidden is for --model alexnet: leave it out
train --model resnet18 --dropout 0.5 | --dropout is for --model alexnet
train --hidden 0 | above 0
train --dropout 1 | at least 0 and below 1
train --dropout nan | at least 0 and below 1
train --momentum 1.0 | below 1
train --momentum -0.1 | at least 0
train --weight-decay -1 | at least 0
train --weight-decay inf | at least 0
train --sharpness 0 | above 0
train --sharpness inf | above 0
train --learning-rate 0 | above 0
train --learning-rate -1 | above 0
train --learning-rate -1e-3 | --learning-rate
train --learning-rate inf | above 0
train --learning-rate nan | above 0
train --damping 0.1 | --damping is for --optimizer cblr
train --curvature-every 3 | is for --optimizer cblr
train --curvature-batch-size 3 | is for --optimizer cblr
train --optimizer cblr --damping -1 | at least 0
train --optimizer cblr --curvature-every 0 | above 0
train --optimizer cblr --discard 0.3 | choose another --optimizer
train --optimizer lamb --epochs 0 | above 0
train --epochs 100001 | at most 100000
train --epochs 1e3 | invalid int value
train --epochs 3 --epochs 5 | --epochs is given more than once
train --augment --no-augment | --augment is given more than once
train --phases | --phases: expected at least one argument
train --phases 1:512 | takes EPOCHS:BATCH:RATE
train --phases 1:512:0 | takes EPOCHS:BATCH:RATE
train --phases 1:512:inf | takes EPOCHS:BATCH:RATE
train --phases 0:512:1 | takes EPOCHS:BATCH:RATE
train --phases a:b:c | takes EPOCHS:BATCH:RATE
train --phases 9999999999:512:0.1 | at most 100000 epochs
train --phases 1:512:0.1 --epochs 3 | --epochs is for runs without --phases: leave it out
train --phases 1:512:0.1 --batch-size 64 | --batch-size is for runs without --phases
train --phases 1:512:0.1 --learning-rate 1 | --learning-rate is for runs without --phases
train --warmup-epochs inf | at least 0
train --warmup-epochs -1 | at least 0
train --micro-batch-size 48 | must divide the batch size 1024, and 48 does not
train --micro-batch-size 0 | above 0
train --devices 0 | above 0
train --devices 999999 | at most 64
train --devices 3 | --devices 3 must divide the --micro-batch-size, here 1024 images
train --devices 512 | at most 64
train --discard 1 | below 1
train --discard nan | at least 0 and below 1
train --discard-by loss | --discard-by is for a --discard above 0
train --discard-epochs 3 | is for a --discard above 0
train --discard 0.1 --discard-by size | invalid choice: 'size'
train --holdout 1 | below 1
train --holdout 1e-9 | leaves none to test or to train on
train --train-images 0 | above 0
train --train-images 5000 | --train-images 5000: digits has 1437
train --test-images 5000 | --test-images 5000: digits has 360
train --seed -1 | at least 0 and below 2^32
train --seed {2**64} | below 2^32
train --seed {2**32} | below 2^32
train --checkpoint-seconds -1 | at least 0
train --checkpoint-seconds inf | at least 0
train --checkpoint-seconds often | invalid float_or_none value: 'often'
train --parallel shards | invalid choice: 'shards'
train --coordinator nonsense | belong together
train --coordinator auto --num-processes 2 | finds --num-processes and --process-id itself
train --coordinator nonsense --num-processes 2 --process-id 0 | takes HOST:PORT
train --coordinator a:99999 --num-processes 2 --process-id 0 | takes HOST:PORT
train --coordinator a.invalid:80 --num-processes 2 --process-id 0 | nobody knows the host a.invalid
train --coordinator localhost:80 --num-processes 2 --process-id 2 | must be below --num-processes 2
train --coordinator localhost:80 --num-processes 0 --process-id 0 | above 0
train --num-processes 2 | belong together
train --dataset ../../x | --dataset takes digits, generated
train --dataset /etc | --dataset takes
train --dataset a/../b | --dataset takes
train --dataset .. | --dataset takes
train --dataset '' | --dataset takes
train --dataset cifar11 | digits, generated, or a name that TFDS lists
train --dataset coco | --dataset coco
train --dataset huggingface:foo | --dataset
train --dataset cifar10:1.0.0 | --dataset cifar10:1.0.0 cannot be used
train --dataset cifar10/foo | --dataset cifar10/foo cannot be used
train --dataset lsun | needs the features image and label
train --dataset cifar10 --data-dir /nowhere | --data-dir /nowhere is not a folder
train --dataset cifar10 --data-dir file | --data-dir file is not a folder
race | required: {{digits,alexnet,resnet18}}
race mnist | invalid choice: 'mnist'
race digits --methods | --methods: expected at least one argument
race digits --methods sgd adam | invalid choice: 'adam'
race digits --methods sgd sgd | --methods: sgd is given more than once
race digits --seeds 0 | --seeds must be above 0
race digits --seeds {10**30} | at most 1000
race digits --epochs 0 | --epochs must be above 0
race digits --batch-size 2000 | --batch-size 2000 exceeds the 1437 training images of digits
race alexnet --dataset ../x | --dataset takes
race digits --results other | digits-512.jsonl is not of a race with these settings
race digits --like digits-512 --methods lamb | lamb was not tuned there
bench | the following arguments are required: {{optimizers,curvature,losses
bench speed | invalid choice: 'speed'
bench optimizers --repeats 0 | --repeats must be above 0
bench optimizers --dataset digits | --dataset is for estimators
bench estimators --dataset ../x | --dataset takes
figure | the following arguments are required: FIGURE
figure --preset cpu | required: FIGURE
figure 17 | invalid choice: '17'
figure 3 3 | 3 is given more than once
figure all 3 | all holds every other number
figure 3 --preset large | invalid choice: 'large'
figure 3 --dry-run --results x | leave one of them out
figure 3 --preset cpu --data-dir nowhere | --data-dir nowhere is not a folder
report --preset | --preset: expected one argument
report | python -m experiments figure all
report --preset cpu --out there | figure all --preset cpu --out there
report --results /nowhere | figure all --results /nowhere
report --results 'my [old] :smile: folder' | figure all --results 'my [old] :smile: folder'
""".strip().splitlines()

# Accepted, and then impossible: exit code 1.
FAILED = f"""
train {TINY} --out file/runs | cannot write to file/runs
train {TINY} --out file | cannot write to file
train {TINY} --out {LONG} | cannot write to
train {TINY} --out link | cannot write to link
train --dataset cifar10 --learning-rate 0.1 --data-dir empty | is not prepared in
train --dataset cifar10 --learning-rate 0.1 --data-dir damaged | --dataset cifar10 cannot be read
figure 15 --out file | cannot write to file
figure 15 --results file | cannot write to file
figure 15 --results file/x | give another --results
report --results odd --preset cpu | python -m experiments figure 3 --preset cpu --results odd
report --results odder | is damaged
report --results oddest | cannot read
race digits --like nothing | cannot read
""".strip().splitlines()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with what can be in the way."""
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "README.md").write_text("# no JSON")
    (tmp_path / "link").symlink_to("nowhere/at/all")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/digits-512.jsonl").write_text('{"kind": "settings"}\n')
    for name in ("empty", "odd", "odder", "oddest", "oddest/figure-03.jsonl", "damaged/cifar10/3.0.2"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "odd" / "figure-03.jsonl").write_text(json.dumps({"number": 3, "settings": ""}) + "\n")
    (tmp_path / "odder" / "figure-03.jsonl").write_text("{")
    for name in ("dataset_info.json", "features.json"):
        (tmp_path / "damaged/cifar10/3.0.2" / name).write_text("{")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images_tfds, "reachable", lambda builder: False)
    monkeypatch.setattr(processes, "PATIENCE_SECONDS", 0)
    return tmp_path


def everything(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def call(words):
    try:
        return __main__.main(words)
    except SystemExit as exit:
        return exit.code or 0


@contextlib.contextmanager
def terminal(columns=80):
    """Standard output and errors on a pseudo-terminal; yields a list that then holds what was shown there."""
    keyboard, screen = pty.openpty()
    termios.tcsetwinsize(screen, (24, columns))
    shown, kept = [], [os.dup(number) for number in (1, 2)]

    def read():
        with contextlib.suppress(OSError):
            while part := os.read(keyboard, 1 << 16):
                shown.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    streams = sys.stdout, sys.stderr
    os.dup2(screen, 1), os.dup2(screen, 2)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
    try:
        yield shown
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        sys.stdout, sys.stderr = streams
        for number, other in enumerate(kept, 1):
            os.dup2(other, number)
            os.close(other)
        os.close(screen)
        reader.join()
        os.close(keyboard)
        shown[:] = [b"".join(shown).decode().replace("\r\n", "\n")]


def cases(lines, code):
    for line in lines:
        words, _, answer = line.partition(" | ")
        yield pytest.param(words, code, answer, id=words[:60])


@pytest.mark.parametrize(("line", "code", "answer"), [*cases(REFUSED, 2), *cases(FAILED, 1)])
def test_what_cannot_be_is_one_line_on_a_terminal_and_in_a_pipe(line, code, answer, place, capfd):
    before = everything(place)
    assert call(shlex.split(line)) == code
    out, said = capfd.readouterr()
    assert said.startswith("error: ") and said.count("\n") == 1 and answer in said
    assert "Traceback" not in out
    with terminal() as shown:
        assert call(shlex.split(line)) == code
    # A progress bar may have come and gone before it.
    assert shown[0].endswith(said) and "\x1b" not in shown[0].splitlines()[-1] and "Traceback" not in shown[0]
    assert everything(place) == before


def test_there_are_a_hundred():
    assert len(REFUSED) + len(FAILED) >= 100


@pytest.mark.parametrize("line", ["sprint", "train --width inf", "--help"])
def test_a_process_of_its_own_says_the_same(line, tmp_path):
    command = [sys.executable, "-m", "experiments", *line.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    piped = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    with terminal() as shown:
        code = subprocess.run(command, cwd=tmp_path, env=environment, stdout=1, stderr=2).returncode
    assert code == piped.returncode == (0 if line == "--help" else 2)
    if code:
        assert shown[0] == piped.stderr and piped.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "code"), [("--help >/dev/full", 1), ("sprint 2>/dev/full", 2), ("sprint 2>&-", 2), ("--help >&-", 0)]
)
def test_an_output_that_takes_nothing_changes_no_code_and_leaves_no_traceback(line, code, tmp_path):
    command = f"exec {sys.executable} -m experiments {line}"
    for unbuffered in ("", "1"):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr


def test_a_locale_without_letters_is_no_reason_to_fail(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "experiments", "train", "--dataset", "é"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(b"error: --dataset takes")


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_the_screen_and_names_every_option(name, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with terminal(columns) as shown:
        assert call([*name.split(), "--help"]) == 0
    assert max(map(len, shown[0].splitlines())) <= columns
    names = [flag(field) for field in dataclasses.fields(COMMANDS[name][0])] if name else []
    assert all(word in shown[0] for word in names or COMMANDS)


def test_the_options_of_train_are_in_groups(capfd):
    assert call(["train", "--help"]) == 0
    text = capfd.readouterr().out
    groups = {field.metadata["group"] for field in dataclasses.fields(TrainConfig)}
    assert 5 <= len(groups) <= 8 and all(f"\n{group}:\n" in text for group in groups)


def test_help_and_refusals_import_nothing_that_takes_time():
    code = (
        "import sys; from experiments import __main__; __main__.main(['train', '--width', '0']);"
        "assert not {'jax', 'numpy', 'curvax', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("name", COMMANDS)
def test_a_configuration_is_the_command_that_gives_it(name):
    kind = COMMANDS[name][0]
    first = {"race": ["alexnet"], "bench": ["estimators"], "figure": ["3", "16"]}.get(name, [])
    changed = {
        "race": ["--methods", "sgd", "--seeds", "3", "--out", "my [red] runs"],
        "train": [
            "--no-augment",
            "--checkpoint-seconds",
            "none",
            "--phases",
            "1:512:0.5",
            "2:64:1",
            "--optimizer",
            "cblr",
        ],
        "bench": ["--quick", "--dataset", "cifar10"],
        "figure": ["--preset", "cpu"],
        "report": ["--results", "a'b"],
    }[name]
    for words in (first, [*first, *changed]):
        config = options.parse(kind, name, words)
        typed = shlex.split(options.line(name, config))
        assert typed[:4] == ["python", "-m", "experiments", name]
        assert options.parse(kind, name, typed[4:]) == config
