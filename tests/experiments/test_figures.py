"""Figures: statistics against closed forms, claims on numbers made to hold or to fail, and one run from nothing."""

import dataclasses
import json
import re

import numpy as np
import pytest

from experiments import __main__, plots, runs
from experiments.config import METHODS
from experiments.console import TrainingBars
from experiments.figures import (
    base,
    batch_gradient,
    batch_sweep,
    command,
    discard_ratio,
    median_rate,
    report,
    small_start,
    statistics,
)
from experiments.figures.base import Place, count
from experiments.figures.dry_run import grouped
from experiments.figures.statistics import FAILED, HELD, UNDECIDED, Estimate

SMOKE = Place("smoke")


def verdicts(claims):
    return [claim.verdict for claim in claims]


def test_the_slope_of_a_power_law_and_its_interval():
    x = np.array([32, 128, 512, 2048.0])
    exact = statistics.slope(x, 3 * x**-0.5)
    np.testing.assert_allclose([exact.value, exact.low, exact.high], -0.5, rtol=1e-9)
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        estimate = statistics.slope(x, 3 * x**-0.5 * np.exp(0.3 * rng.normal(size=4)))
        inside += estimate.low < -0.5 < estimate.high
    # 95 % of 400, with a standard error of 1.1 %.
    assert abs(inside / 400 - 0.95) < 0.045


def test_the_interval_of_a_mean_covers_it():
    rng = np.random.default_rng(0)
    estimates = [statistics.mean(rng.normal(2, 1, size=4)) for _ in range(400)]
    assert abs(np.mean([e.low < 2 < e.high for e in estimates]) - 0.95) < 0.045


def test_one_seed_or_equal_seeds_decide_nothing():
    for values in ([0.3], [0.3, 0.3]):
        assert statistics.mean(values).above(0) == UNDECIDED


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 0.2, HELD), (-0.2, -0.1, FAILED), (-0.1, 0.1, UNDECIDED), (-0.1, 0, FAILED)]
)
def test_verdicts(low, high, verdict):
    assert Estimate((low + high) / 2, low, high).above(0) == verdict
    assert Estimate(-(low + high) / 2, -high, -low).below(0) == verdict


def gradient_rows(mu, sigma):
    sizes = batch_gradient.SIZES["cpu"]
    return [{"seed": 0, "batch_size": n, "mean_abs_gradient": batch_gradient.law(n, mu, sigma)} for n in sizes]


def test_figure_3_recovers_mean_and_deviation_and_judges_by_them():
    rows = gradient_rows(1e-6, 5e-5)
    np.testing.assert_allclose(batch_gradient.fit(*batch_gradient.by_size(rows)), (1e-6, 5e-5), rtol=1e-4)
    assert verdicts(command.FIGURES[3].judge(rows)) == [HELD, FAILED, HELD]
    assert verdicts(command.FIGURES[3].judge(gradient_rows(1e-9, 5e-5))) == [HELD, HELD, HELD]


def test_the_law_of_figure_3_by_monte_carlo():
    mu, sigma, n = 0.1, 1.7, 64
    draws = np.random.default_rng(0).normal(0, np.sqrt(mu**2 + sigma**2 / n), 1_000_000)
    np.testing.assert_allclose(np.mean(np.abs(draws)), batch_gradient.law(n, mu, sigma), rtol=0.005)


def sweep_rows(exponent):
    rng = np.random.default_rng(0)
    for batch in batch_sweep.SIZES["cpu"]:
        for seed in range(3):
            for epoch in (1, 2):
                stride = batch**exponent * np.exp(0.02 * rng.normal())
                strides = {"mean_parameter_stride": 0.05 * stride, "mean_loss_stride": 0.05 * stride**2}
                row = {"batch_size": batch, "seed": seed, "epoch": epoch, "learning_rate": 0.05, "steps": 1}
                for init in ("pytorch", "he"):
                    yield {"init": init, **row, **strides}


@pytest.mark.parametrize(
    ("exponent", "expected"), [(-0.5, [HELD, HELD]), (-0.2, [HELD, FAILED]), (0.3, [FAILED, FAILED])]
)
def test_figures_4_5_and_7_judge_the_exponent(exponent, expected):
    sweep = list(sweep_rows(exponent))
    for number in (4, 7):
        assert verdicts(command.FIGURES[number].judge(sweep)) == 2 * expected
    assert verdicts(command.FIGURES[5].judge(sweep)) == expected[:1] * 3


def test_fluctuation_is_the_deviation_of_noise_and_none_of_a_line():
    assert statistics.fluctuation(np.linspace(2, 1, 30)) < 1e-12
    noise = np.random.default_rng(0).normal(0, 0.3, 20_000)
    np.testing.assert_allclose(statistics.fluctuation(np.linspace(2, 1, 20_000) + noise), 0.3, rtol=0.03)


def test_a_class_explains_all_of_a_choice_of_classes_and_nothing_of_a_random_one():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 20_000)
    assert discard_ratio.explained(labels > 2, labels) == pytest.approx(1)
    # By chance the expected share is (10 - 1) / 20000.
    assert discard_ratio.explained(rng.random(20_000) > 0.3, labels) < 0.002


def test_the_arms_of_figures_11_to_14_take_the_paper_s_steps():
    place = Place("paper")
    steps = {}
    for arm in small_start.ARMS:
        config = small_start.config(place, arm, 0)
        steps[arm] = [epoch.steps for epoch in config.plan(config.learning_rate).epochs(50_000)]
    assert steps[small_start.START][:3] == [97, 6, 6]
    assert steps[small_start.BASELINE] == steps[small_start.WARMUP] == [6] * 200
    # Whole epochs of 6 steps cannot match 97 better.
    assert abs(sum(steps[small_start.MATCHED]) - sum(steps[small_start.START])) <= 3


def test_shared_runs_are_the_same_run():
    grids = {number: figure.grid(Place("cpu")) for number, figure in command.FIGURES.items()}
    by_figure = {number: {config.name for config in grid.values()} for number, grid in grids.items()}
    assert by_figure[5] == by_figure[8] < by_figure[1]
    assert by_figure[5] < by_figure[4] == by_figure[7]
    assert by_figure[11] == by_figure[12] < by_figure[13] == by_figure[14]
    assert by_figure[10] & by_figure[11], "the baseline of the larger batch"


def test_full_scale_batches_are_the_paper_s_and_split_where_they_must_be():
    grids = [figure.grid(Place("paper")) for figure in command.FIGURES.values()]
    groups = grouped([dataclasses.replace(c, train_images=50_000) for grid in grids for c in grid.values()])
    assert {32, 49152, 2000, 8000, 512, 8192, 1024} <= {batch for steps in groups.values() for batch in steps}
    assert all(micro <= 1024 and size % micro == 0 for (_, micro, _), steps in groups.items() for size in steps)
    # 200 epochs of 24 steps, and 5 seeds, at one learning rate for all and at one that grows with the batch.
    [alexnet] = [
        s for (config, *_), s in groups.items() if 2048 in s and (config.model, config.momentum) == ("alexnet", 0)
    ]
    assert alexnet[2048] == 200 * 24 * 5 + 24 * 5


@pytest.mark.parametrize("peak", [0.00005, 0.018, 0.3])
def test_the_rate_of_the_race_has_worse_ones_on_both_sides(peak):
    """Accuracies that fall off on both sides of a peak, within the grid, below and above it."""
    accuracy = lambda config: 1 / (1 + abs(np.log(config.learning_rate / peak)))
    trained = lambda config: [{"kind": "epoch", "test_accuracy": accuracy(config)}]
    trials = median_rate.tuned(Place("cpu"), trained, "mclr", 1024)
    rates = list(trials)
    assert rates == sorted(rates) and set(median_rate.GRIDS["mclr"]) <= set(rates)
    best = max(trials, key=trials.get)
    assert rates[0] < best < rates[-1] and abs(np.log(best / peak)) < np.log(3)


def test_the_search_for_a_rate_ends():
    trained = lambda config: [{"kind": "epoch", "test_accuracy": config.learning_rate}]
    trials = median_rate.tuned(Place("cpu"), trained, "mclr", 1024)
    assert len(trials) == len(median_rate.GRIDS["mclr"]) + median_rate.EXTENSIONS["cpu"]


def run(capfd, *arguments):
    code = __main__.main(arguments)
    return (code, *capfd.readouterr())


@pytest.mark.once
def test_figures_and_report_from_nothing(capfd, tmp_path, monkeypatch):
    monkeypatch.setitem(batch_sweep.EPOCHS, "smoke", 1)
    monkeypatch.setitem(batch_sweep.SIZES, "smoke", (256, 512))
    out = ["--out", str(tmp_path)]
    code, printed, _ = run(capfd, "figure", "4", "15", *out)
    folder = tmp_path / "figures-smoke"
    assert code == 0 and "Figure 4." in printed and str(folder) in printed
    assert {path.name for path in folder.iterdir()} == {
        f"figure-{n}.{kind}" for n in ("04", "15") for kind in ("png", "jsonl")
    }
    about, *rows = map(json.loads, (folder / "figure-04.jsonl").read_text().splitlines())
    assert about["command"] == "python -m experiments figure 4"
    assert sorted({row["batch_size"] for row in rows}) == [256, 512]

    # What one figure ran, another only reads.
    monkeypatch.setattr(runs, "go_on", lambda *rest: pytest.fail("ran again"))
    assert run(capfd, "figure", "7", *out)[0] == 0

    code, printed, _ = run(capfd, "report", *out)
    assert code == 0 and "report.html" in printed
    page = (folder / "report.md").read_text()
    assert [n for n in (4, 7, 15) if f"## Figure {n}." in page] == [4, 7, 15]
    html = (folder / "report.html").read_text()
    assert html.count("<table>") == 4 and '<img src="figure-04.png"' in html
    assert html.index("<img") < html.index("All claims") and '<meta name="viewport"' in html
    links = re.findall(r'<a href="#([^"]+)">', html)
    assert links and all(f'id="{link}"' in html for link in links)
    assert all(color in html for verdict, color in report.COLORS.items() if f">{verdict}<" in html)


@pytest.mark.once
def test_a_run_that_diverged_counts_as_one(tmp_path):
    place = Place("smoke", out=tmp_path)
    wild = median_rate.config(place, "sgd", 128, 1e9, 0)
    records = runs.Runner(TrainingBars())(dataclasses.replace(wild, epochs=1, warmup_epochs=0.0), "wild")
    assert base.last_epoch(records)["test_accuracy"] == 0.0


def test_a_method_looks_the_same_wherever_it_is_drawn():
    looks = [plots.look(label, place) for place, label in enumerate(["sgd", "mclr (0.006)", "mclr", "lars"])]
    assert looks[1] == looks[2] and len({look["color"] for look in looks}) == 3
    assert set(plots.METHODS) == set(METHODS)
    for some in (plots.METHODS, plots.ESTIMATORS):
        assert len({tuple(look.items()) for look in some.values()}) == len(some)


def test_ticks_of_batch_sizes_leave_room():
    figure, panel = plots.plt.subplots()
    sizes = [2**k for k in range(5, 17)]
    panel.plot(sizes, sizes)
    plots.batch_axis(panel, sizes)
    shown = [label.get_text() for label in panel.get_xticklabels()]
    assert shown == ["32", "128", "512", "2048", "8192", "32768"] and not len(panel.get_xticks(minor=True))
    plots.plt.close(figure)


def test_one_seed_is_not_seeds():
    assert [count(n, "seed") for n in (0, 1, 2)] == ["0 seeds", "1 seed", "2 seeds"]
