"""The command `bench`: what it counts, and that its lines reach the terminal and the disk. No figure is timed here."""

import json
import math

import pytest

from experiments import __main__
from experiments.bench import collectives, command, optimizers
from experiments.bench.command import cells
from experiments.bench.measure import Row


@pytest.mark.once
@pytest.mark.parametrize("devices", [8, 64])
def test_an_update_moves_counts_and_no_parameters(devices):
    width, depth = 256, 2
    found = {traffic.rule: traffic for traffic in collectives.measure(devices, width, depth)}
    assert set(found) == set(collectives.RULES)
    for traffic in found.values():
        assert 0 < traffic.count and traffic.bytes <= depth * 64 * 1024
        assert traffic.largest < 4 * width


def test_bytes_of_collectives_are_read_from_a_program():
    program = "\n".join(
        [
            "%body (p: f32[8]) -> f32[8] {",
            "  %a = (u32[8,2]{1,0}, pred[3]) all-gather-start(%p), dimensions={0}",
            "}",
            "ENTRY %main (p: f32[8]) -> f32[8] {",
            "  %b = bf16[5]{0} all-reduce(%p), to_apply=%add",
            "  %c = f32[100]{0} add(%p, %p)",
            "}",
        ]
    )
    assert collectives.collectives(program) == [(67, True), (10, False)]


@pytest.mark.once
@pytest.mark.parametrize(
    "part",
    [optimizers.medians, optimizers.small_layers, pytest.param(optimizers.train_step, marks=pytest.mark.once)],
)
def test_every_part_of_the_table_yields_its_figures(part):
    said = []
    rows = list(part(said.append, repeats=1, quick=True))
    assert said and rows
    for row in rows:
        assert math.isfinite(row.reached) and row.detail and row.bars
    assert all(row.reached == 0 for row in rows if "differ" in row.what)


def test_a_line_meets_its_bars_one_after_the_other():
    assert [Row("", x, (60, 20), "").verdict() for x in (70, 60, 20)] == ["missed", "first met", "met"]
    assert [Row("", x, (20, 50), "", at_least=True).verdict() for x in (10, 20, 50)] == ["missed", "first met", "met"]
    assert cells(Row("speed", 123.4, (20, 50), "", at_least=True))[1:3] == ["123", "≥ 20, 50"]


def test_the_command_prints_and_keeps_every_line(capfd, tmp_path, monkeypatch):
    def rows(say, repeats, quick):
        say("two numbers")
        yield Row("first ratio", 1.04, (1.05,), f"{repeats} repeats")
        yield Row("second ratio", 2.5, (1.5,), f"quick is {quick}")

    monkeypatch.setitem(command.TABLES, "optimizers", rows)
    assert __main__.main(["bench", "optimizers", "--repeats", "3", "--out", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    for word in ("first ratio", "1.04", "≤ 1.05", "met", "3 repeats", "second ratio", "missed", "cores", "jax"):
        assert word in out
    [path] = tmp_path.glob("*-bench-optimizers/table.jsonl")
    config, *lines = map(json.loads, path.read_text().splitlines())
    assert config["repeats"] == 3 and config["cores"] > 0
    assert [(line["reached"], line["verdict"]) for line in lines] == [(1.04, "met"), (2.5, "missed")]
