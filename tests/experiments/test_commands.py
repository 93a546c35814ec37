"""The command line, and what it leaves behind."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from experiments import __main__, problems, records, runs, train, tune
from experiments.config import TrainConfig, load_config
from experiments.errors import Diverged
from experiments.problems import GRID_POINTS, PROBLEMS, RACERS

ROOT = Path(__file__).parents[2]
TINY = ["--dataset", "generated", "--image-size", "16", "--width", "0.05", "--batch-size", "128", "--epochs", "2"]


def command(capfd, *arguments):
    """Exit code, output and errors of `python -m experiments ...`, run in this process."""
    try:
        code = __main__.main(arguments)
    except SystemExit as exit:
        code = exit.code or 0
    return (code, *capfd.readouterr())


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


@pytest.fixture
def tiny_problem(monkeypatch):
    config = TrainConfig(dataset="generated", image_size=16, width=0.05, batch_size=128, epochs=2, dropout=0.0)
    problem = dataclasses.replace(PROBLEMS["digits"], config=config, tune_seeds=1, race_seeds=2, target=0.3)
    monkeypatch.setitem(PROBLEMS, "digits", problem)
    return problem


@pytest.mark.slow
def test_tune_then_race_from_nothing(capfd, tmp_path, tiny_problem, monkeypatch):
    file = tmp_path / "tuned.json"
    monkeypatch.setattr(problems, "TUNED_FILE", file)
    code, _, err = command(capfd, "race", "--out", str(tmp_path))
    assert code == 2 and f"python -m experiments tune --out {tmp_path}" in err
    assert not list(tmp_path.iterdir())

    code, _, _ = command(capfd, "tune", "--methods", "lars", "--out", str(tmp_path))
    assert code == 0
    tuned = json.loads(file.read_text())["digits"]
    trials, best = (tuned["methods"]["lars"][name] for name in ("trials", "best"))
    assert [trial["learning_rate"] for trial in trials] == tiny_problem.grid("lars")
    accuracies = {trial["learning_rate"]: trial["accuracy"] for trial in trials}
    assert accuracies[best] == max(accuracies.values())
    assert tuned["settings"]["holdout"] == tiny_problem.holdout

    tuned["methods"]["sgd"] = {"best": 0.02, "trials": []}
    file.write_text(json.dumps({"digits": tuned}))
    code, out, _ = command(capfd, "race", "--methods", "sgd", "lars", "--out", str(tmp_path))
    assert code == 0
    assert "steps to 30%" in out and "ratio to sgd" in out
    [folder] = tmp_path.glob("*-race-digits")
    assert (folder / "race.png").read_bytes().startswith(b"\x89PNG")
    first, *rest = records.read(folder / "race.jsonl")
    assert first["learning_rates"] == {"sgd": 0.02, "lars": best}
    assert first["problem"] == "digits"
    steps = [record for record in rest if record["kind"] == "step"]
    assert len(steps) == 2 * 2 * 2 * 4
    outcomes = [record for record in rest if record["kind"] == "outcome"]
    assert [(o["method"], o["seed"]) for o in outcomes] == [("sgd", 0), ("sgd", 1), ("lars", 0), ("lars", 1)]


def test_tune_goes_on_where_it_stopped(capfd, tmp_path, tiny_problem, monkeypatch):
    file, trained = tmp_path / "tuned.json", []
    fixed = tiny_problem.change(holdout=tiny_problem.holdout)
    results = tune.Results(file, "digits", tune.settings(fixed), again=False)
    for rate in tiny_problem.grid("sgd"):
        if rate != tiny_problem.grid("sgd")[2]:
            results.add("sgd", {"learning_rate": rate, "accuracy": 0.001, "loss": 9.0})

    def run(config, folder, show):
        trained.append(config.learning_rate)
        step = {"kind": "step", "seconds": 1.0, "compiled": False}
        return [step, {"kind": "epoch", "step": 4, "loss": 0.5, "test_loss": 0.6, "test_accuracy": 0.7}]

    monkeypatch.setattr(runs, "run", run)
    code, out, _ = command(capfd, "tune", "--methods", "sgd", "--file", str(file))
    assert code == 0 and "[70.0]" in out
    assert trained == [tiny_problem.grid("sgd")[2]]
    assert json.loads(file.read_text())["digits"]["methods"]["sgd"]["best"] == trained[0]

    monkeypatch.setitem(PROBLEMS, "digits", dataclasses.replace(tiny_problem, tune_seeds=2))
    command(capfd, "tune", "--methods", "sgd", "--file", str(file))
    assert len(trained) == 1 + 2 * GRID_POINTS, "trials made under other settings do not count"


def test_grids_are_of_equal_size_and_the_committed_rates_are_the_best_of_them():
    for problem in PROBLEMS.values():
        assert all(len(problem.grid(method)) == GRID_POINTS for method in problem.lowest)
    tuned = json.loads((ROOT / "experiments" / "tuned.json").read_text())
    for name, entry in tuned.items():
        for method, result in entry["methods"].items():
            rates = [trial["learning_rate"] for trial in result["trials"]]
            assert rates == PROBLEMS[name].grid(method)
            assert result["best"] == tune.best(result["trials"])["learning_rate"]
    assert set(tuned["digits"]["methods"]) >= set(RACERS)


def test_outcomes_are_read_off_the_records():
    steps = [{"kind": "step", "seconds": s, "compiled": s > 1} for s in (5.0, 0.1, 2.0, 0.1)]
    epochs = [
        {"kind": "epoch", "step": 2, "loss": 2.0, "test_loss": 2.1, "test_accuracy": 0.4},
        {"kind": "epoch", "step": 4, "loss": 1.0, "test_loss": 1.1, "test_accuracy": 0.6},
    ]
    outcome = train.outcome(TrainConfig(), steps + epochs, target=0.5)
    assert (outcome.steps_to_target, outcome.loss, outcome.test_accuracy) == (4, 1.0, 0.6)
    np.testing.assert_allclose([outcome.step_seconds, outcome.compile_seconds], [0.1, 6.8])
    outcome = train.outcome(TrainConfig(), steps + epochs + steps, target=0.7)
    assert outcome.steps_to_target is None and outcome.loss == float("inf") and outcome.test_accuracy == 0


def test_a_rate_is_borrowed_from_the_nearest_problem(monkeypatch):
    rates = {"digits": 0.1, "cifar10": 0.2}
    monkeypatch.setattr(problems, "tuned_learning_rate", lambda problem, method: rates.get(problem))
    assert problems.default_learning_rate(TrainConfig(dataset="digits")) == (0.1, "digits")
    assert problems.default_learning_rate(TrainConfig(dataset="svhn_cropped")) == (0.2, "cifar10")


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
