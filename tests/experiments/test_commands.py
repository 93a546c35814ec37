"""The command line, and what it leaves behind."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from experiments import __main__, records, runs
from experiments.config import load_config
from experiments.errors import Diverged

ROOT = Path(__file__).parents[2]
TINY = ["--dataset", "generated", "--image-size", "16", "--width", "0.05", "--batch-size", "128", "--epochs", "2"]


def command(capfd, *arguments):
    """Exit code, output and errors of `python -m experiments ...`, run in this process."""
    try:
        code = __main__.main(arguments)
    except SystemExit as exit:
        code = exit.code or 0
    return (code, *capfd.readouterr())


@pytest.mark.once
def test_training_leaves_its_configuration_and_its_metrics(capfd, tmp_path):
    arguments = [
        "train",
        *TINY,
        "--optimizer",
        "lars",
        "--learning-rate",
        "0.02",
        "--out",
        str(tmp_path),
        "--no-augment",
    ]
    code, out, _ = command(capfd, *arguments)
    assert code == 0
    [path] = tmp_path.glob("*/metrics.jsonl")
    assert str(path) in out.replace("\n", "")
    first, *rest = records.read(path)
    assert (first.pop("kind"), first.pop("format")) == ("config", runs.FORMAT)
    assert load_config(first).optimizer == "lars"
    assert [record["kind"] for record in rest] == ["step"] * 4 + ["epoch"] + ["step"] * 4 + ["epoch"]
    assert [record["step"] for record in rest if record["kind"] == "step"] == list(range(1, 9))
    for record in rest:
        assert {"epoch", "loss", "accuracy", "learning_rate", "batch_size"} <= set(record)
    assert all({"test_accuracy", "images_per_second"} <= set(r) for r in rest if r["kind"] == "epoch")


def test_divergence_is_exit_code_1_and_one_line(capfd, tmp_path, monkeypatch):
    def diverge(stepper, seed, rate, *rest):
        raise Diverged(f"the loss is nan at step 3: try a smaller --learning-rate than {rate:g}")
        yield

    monkeypatch.setattr(runs, "train", diverge)
    code, out, err = command(
        capfd, "train", *TINY, "--optimizer", "sgd", "--learning-rate", "1e20", "--out", str(tmp_path)
    )
    assert code == 1
    assert err.startswith("error: the loss is nan at step ") and err.count("\n") == 1
    assert "Traceback" not in out + err


def test_an_unwritable_folder_is_exit_code_1_before_the_work(capfd, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = command(capfd, "train", *TINY, "--learning-rate", "0.1", "--out", str(tmp_path / "file" / "runs"))
    assert code == 1
    assert "cannot write to" in err and "--out" in err


def test_records_round_trip_and_numbers_that_are_none_become_null(tmp_path):
    rows = [{"kind": "config", "phases": ["1:2:3"], "x": None}, {"loss": 0.1 + 0.2, "step": 3, "name": "é"}]
    records.write(tmp_path / "a.jsonl", "")
    for row in [*rows, {"loss": float("nan"), "other": float("-inf")}]:
        records.append(tmp_path / "a.jsonl", row)
    assert records.read(tmp_path / "a.jsonl") == [*rows, {"loss": None, "other": None}]


def test_new_folders_never_coincide(tmp_path):
    folders = {records.new_folder(tmp_path, "run") for _ in range(5)}
    assert len(folders) == 5 and all(folder.is_dir() for folder in folders)


def test_importing_the_command_line_imports_no_tensorflow():
    code = "import sys, experiments.__main__, tensorflow_datasets; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        re.match("[a-z-]+", line)[0] for line in (*project["dependencies"], *extras["experiments"], *extras["bench"])
    }
    names = {"PIL": "pillow", "sklearn": "scikit-learn", "markdown_it": "markdown-it-py"}
    own = {*sys.stdlib_module_names, "experiments", "curvax"}
    for path in (ROOT / "experiments").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        imported += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        for name in {module.split(".")[0] for module in imported} - own:
            assert names.get(name, name).replace("_", "-") in declared, f"{path} imports {name}"
