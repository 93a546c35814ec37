"""The race: who is tuned how often, what is kept, and the one method that is written for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from experiments import __main__, problems, race, records
from experiments.config import METHODS, TrainConfig
from experiments.methods import make
from experiments.problems import PROBLEMS, RESULTS
from experiments.search import SEARCHES, Search, best, next_trial, octaves
from experiments.soap import scale_by_soap
from experiments.train import outcome


def searched(search, accuracy, budget=10):
    """The trials of a method whose accuracy is a function of its rate and its other value."""
    trials = []
    while point := next_trial(search, trials, budget):
        trials.append({"learning_rate": point[0], search.other: point[1], "accuracy": accuracy(*point), "loss": 1.0})
        assert len(trials) < 40
    return trials


@pytest.mark.parametrize("distance", [-2, 0, 2, 5])
@pytest.mark.parametrize("better", [0.0, 0.1])
def test_every_method_has_as_many_trials_and_the_best_is_at_no_edge(distance, better):
    search = Search(0.01, "momentum", (0.9, 0.95))
    peak = lambda rate, value: 0.8 + better * (value == 0.95) - 0.03 * abs(np.log2(rate / 0.01) - distance)
    trials = searched(search, peak)
    assert len(trials) == 10
    assert len({(t["learning_rate"], t["momentum"]) for t in trials}) == 10
    assert (best(trials)["learning_rate"], best(trials)["momentum"]) == (0.01 * 2**distance, 0.95 if better else 0.9)


def test_a_search_goes_on_at_an_edge_beyond_its_number_of_trials():
    trials = searched(Search(0.01, "b2", (0.9, 0.95)), lambda rate, value: rate / (1 + rate) if rate < 100 else 0.0)
    assert len(trials) > 10
    rates = [t["learning_rate"] for t in trials]
    assert min(rates) < best(trials)["learning_rate"] < max(rates)


def test_octaves_are_those_between_the_crossings_of_two_points_below_the_best():
    search = Search(1.0, "b2", (0.9, 0.95))
    at = lambda rate, accuracy, value=0.9: {"learning_rate": rate, "b2": value, "accuracy": accuracy, "loss": 1.0}
    # Down: 1 octave to 0.79, then a quarter of the next. Up: half of the first.
    trials = [at(1.0, 0.80), at(0.5, 0.79), at(0.25, 0.75), at(2.0, 0.76), at(4.0, 0.5), at(8.0, 0.7, value=0.95)]
    np.testing.assert_allclose(octaves(search, trials), 1.25 + 0.5)
    np.testing.assert_allclose(octaves(search, trials[:2]), 1.0)


def test_every_method_has_a_search_and_a_transformation():
    assert set(SEARCHES) == set(METHODS)
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    for method, search in SEARCHES.items():
        value = type(search.values[0])(search.values[0])
        config = TrainConfig(optimizer=method, **{search.other: value}, **search.also)
        state = make(config, 0.0, jax.random.key(0)).init(params)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating))


def test_committed_results_are_whole():
    for name, _, rates in problems.committed():
        problem, rows = PROBLEMS[name.split("-")[0]], records.read(RESULTS / f"{name}.jsonl")
        for method, rate in rates.items():
            trials = records.where(rows, kind="trial", method=method)
            assert next_trial(SEARCHES[method], trials, problem.trials) is None
            assert all(run["learning_rate"] == rate for run in records.where(rows, kind="run", method=method))
        if name == "digits-512":
            assert set(rates) >= set(problem.methods), "the first command of the README tunes nothing"


def test_a_rate_is_borrowed_from_the_nearest_results(monkeypatch):
    of = lambda dataset, rate: (dataset, {"dataset": dataset, "model": "alexnet"}, {"mclr": rate})
    monkeypatch.setattr(problems, "committed", lambda: iter([of("digits", 0.1), of("cifar10", 0.2)]))
    assert problems.default_learning_rate(TrainConfig(dataset="digits")) == (0.1, "digits")
    assert problems.default_learning_rate(TrainConfig(dataset="svhn_cropped")) == (0.2, "cifar10")


def test_outcomes_are_read_off_the_records():
    steps = [{"kind": "step", "seconds": s, "compiled": s > 1} for s in (5.0, 0.1, 2.0, 0.1)]
    epochs = [{"kind": "epoch", "step": 2 * n, "loss": 3.0 - n, "test_accuracy": (4 + n) / 10} for n in (1, 2)]
    row = outcome(steps + epochs)
    assert (row["curve"], row["loss"], row["test_accuracy"]) == ([[2, 0.5], [4, 0.6]], 1.0, 0.6)
    np.testing.assert_allclose([row["step_seconds"], row["compile_seconds"]], [0.1, 6.8])
    diverged = outcome(steps + epochs + steps)
    assert diverged["loss"] == float("inf") and diverged["test_accuracy"] == 0
    assert race.steps_to(row, 0.55) == 4 and race.steps_to(row, 0.7) is None


def test_intervals_are_students():
    values = np.random.default_rng(0).normal(60, 1, 5)
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert race.spread(values, ".3f") == f"{values.mean():.3f} ± {(high - low) / 2:.3f}"
    assert race.spread(values[:1], ".2f") == f"{values[0]:.2f}"


def soap_by_numpy(grads, b1, b2, eps, frequency):
    """The steps of one matrix, in float64."""
    first, *rest = grads
    factors = [first @ first.T, first.T @ first]
    u, v = (np.linalg.svd(f)[0] for f in factors)
    m, n, steps = np.zeros_like(first), np.zeros_like(first), [np.zeros_like(first)]
    for t, g in enumerate(rest, 1):
        m, n = b1 * m + (1 - b1) * g, b2 * n + (1 - b2) * (u.T @ g @ v) ** 2
        scaled = (u.T @ (m / (1 - b1**t)) @ v) / (np.sqrt(n / (1 - b2**t)) + eps)
        steps.append(u @ scaled @ v.T)
        factors = [b2 * f + (1 - b2) * new for f, new in zip(factors, (g @ g.T, g.T @ g), strict=True)]
        if t % frequency == 0:
            rows, columns = (np.argsort(-np.diag(q.T @ f @ q)) for f, q in zip(factors, (u, v), strict=True))
            n = n[rows][:, columns]
            u, v = (np.linalg.qr(f @ q[:, o])[0] for f, q, o in zip(factors, (u, v), (rows, columns), strict=True))
    return steps


@pytest.mark.parametrize("frequency", [1, 3])
def test_soap_is_adam_in_the_eigenbasis(frequency):
    rng = np.random.default_rng(1)
    # As many rows as columns: the basis of the rest would be anyone's choice.
    grads = rng.normal(size=(8, 2, 2, 4)) @ np.diag([3.0, 1.5, 0.8, 0.4])
    tx = scale_by_soap(0.9, 0.95, 1e-8, frequency)
    state, update = tx.init({"w": jnp.zeros((2, 2, 4))}), jax.jit(tx.update)
    for g, step in zip(grads, soap_by_numpy(grads.reshape(8, 4, 4), 0.9, 0.95, 1e-8, frequency), strict=True):
        updates, state = update({"w": jnp.asarray(g, jnp.float32)}, state)
        np.testing.assert_allclose(updates["w"].reshape(4, 4), step, atol=2e-3)


def test_soap_with_sides_too_wide_is_adam():
    rng = np.random.default_rng(2)
    grads, params = rng.normal(size=(4, 5, 3)).astype(np.float32), jnp.zeros((5, 3))
    soap, adam = scale_by_soap(0.9, 0.95, max_width=2), optax.scale_by_adam(0.9, 0.95)
    states = [soap.init(params), adam.init(params)]
    _, states[0] = soap.update(jnp.asarray(grads[0]), states[0])
    for g in grads[1:]:
        ours, states[0] = soap.update(jnp.asarray(g), states[0])
        theirs, states[1] = adam.update(jnp.asarray(g), states[1])
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.fixture
def tiny_problem(monkeypatch, tmp_path):
    config = TrainConfig(dataset="generated", image_size=16, width=0.05, batch_size=128, epochs=2, dropout=0.0)
    problem = dataclasses.replace(PROBLEMS["digits"], config=config, methods=("sgd", "lars"), tune_seeds=1, trials=4)
    monkeypatch.setitem(PROBLEMS, "digits", problem)
    monkeypatch.setattr(problems, "RESULTS", tmp_path / "shared")
    return problem


def test_a_race_goes_on_where_it_was_killed(capfd, tmp_path, tiny_problem, monkeypatch):
    """The runs themselves are made up: a method is the better the nearer its rate is to 0.05."""
    del tiny_problem
    trained, killed = [], 5

    def run(self, config, label):
        if len(trained) == killed:
            raise KeyboardInterrupt
        trained.append((config.optimizer, config.learning_rate, config.momentum, config.holdout, config.seed))
        accuracy = 0.9 - 0.1 * abs(np.log2(config.learning_rate / 0.05)) - 0.01 * config.seed
        step = {"kind": "step", "seconds": 0.5, "compiled": False}
        return [step, {"kind": "epoch", "step": 8, "loss": 1.5, "test_accuracy": accuracy}]

    monkeypatch.setattr(race.Runner, "__call__", run)
    monkeypatch.setattr(race, "first_step", lambda *_: type("Step", (), {"objective": lambda *_: 0, "params": 0})())
    monkeypatch.setattr(race.curvax, "report", lambda *_: "the report")
    words = ["race", "digits", "--out", str(tmp_path), "--seeds", "2"]
    assert __main__.main(words) == 130
    path = tmp_path / "race" / "digits-128.jsonl"
    before = path.read_text()
    assert before.count('"trial"') == killed

    killed = 100
    assert __main__.main(words) == 0
    assert path.read_text().startswith(before)
    assert len(set(trained)) == len(trained) == 2 * 4 + 2 * 2
    trials = [one for one in trained if one[3]]
    assert [sum(one[0] == method for one in trials) for method in ("sgd", "lars")] == [4, 4]
    assert {one[1] for one in trained if not one[3]} == {0.04}
    out, _ = capfd.readouterr()
    assert "the report" in out and "digits-128.png" in out
    page = path.with_suffix(".md").read_text()
    assert "python -m experiments race digits --seeds 2" in page and str(tmp_path) not in page
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    assert __main__.main(words) == 0
    assert len(trained) == 12, "nothing was left to do"
    # The results of others are enough to race without tuning.
    (tmp_path / "shared").mkdir()
    path.rename(tmp_path / "shared" / path.name)
    assert __main__.main(words) == 0
    assert len(trained) == 12 + 4 and not any(one[3] for one in trained[12:])
    assert __main__.main([*words, "--like", "digits-128", "--batch-size", "256"]) == 0
    assert len(trained) == 16 + 4 and {one[1] for one in trained[16:]} == {0.04}


@pytest.mark.once
def test_a_race_from_nothing(capfd, tmp_path, tiny_problem):
    del tiny_problem
    assert __main__.main(["race", "digits", "--methods", "lars", "--seeds", "1", "--time", "--out", str(tmp_path)]) == 0
    rows = records.read(tmp_path / "race" / "digits-128.jsonl")
    [run] = records.where(rows, kind="run")
    assert len(run["curve"]) == 2 and run["state"] == 1.0 and np.isfinite(run["loss"])
    assert race.step_seconds(rows, "lars") == records.column(rows, "step_seconds", kind="time")[0] > 0
    assert run["learning_rate"] == best(records.where(rows, kind="trial"))["learning_rate"]
    assert "lars" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("batch", "images", "settled"),
    [(None, 50_000, (8192, 25, 1024)), (1024, 45_000, (1024, 25, None)), (50_000, 45_000, (45_000, 60, 1000))],
)
def test_at_the_full_batch_there_are_steps_enough(batch, images, settled):
    config = PROBLEMS["alexnet"].settled(batch, None, images)
    assert (config.batch_size, config.epochs, config.micro_batch_size) == settled
    assert config.warmup_epochs == 0.1 * config.epochs
