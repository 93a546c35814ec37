"""Schedules against their formulas, written out by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from curvax.schedules import BatchSchedule, Phase, growing_batches, legw, seesaw, small_batch_start


def rates(schedule, num_examples):
    return np.concatenate([epoch.learning_rates for epoch in schedule.epochs(num_examples)])


def test_warmup_and_decay_over_phases():
    phases = (Phase(2, 10, 0.1), Phase(3, 20, 0.4))
    schedule = BatchSchedule(phases, 1.5, "cosine")
    epochs = list(schedule.epochs(45))
    assert [epoch.number for epoch in epochs] == [0, 1, 2, 3, 4]
    assert [epoch.steps for epoch in epochs] == [4, 4, 2, 2, 2]
    assert [epoch.first_step for epoch in epochs] == [0, 4, 8, 10, 12]
    start = np.array([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 4.5])
    end = np.array([0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 4.5, 5])
    peak = np.where(start < 2, 0.1, 0.4)
    decay = np.where(start < 1.5, 1, (1 + np.cos(np.pi * (start - 1.5) / 3.5)) / 2)
    np.testing.assert_allclose(rates(schedule, 45), peak * np.minimum(end / 1.5, 1) * decay, rtol=1e-12)
    np.testing.assert_allclose(rates(BatchSchedule(phases), 45), peak)


def test_the_learning_rate_of_a_traced_step_and_after_the_end():
    schedule = BatchSchedule((Phase(2, 10, 0.1), Phase(1, 20, 0.4)), 1.0, "cosine")
    expected = rates(schedule, 40)
    seen = jax.jit(jax.vmap(schedule.learning_rate(40)))(np.arange(20, dtype=np.int32))
    np.testing.assert_allclose(seen, np.append(expected, [expected[-1]] * 10), rtol=1e-6)


def test_steps_of_every_unit():
    """Two steps of 8, 40 examples in batches of 16, an epoch of 50 examples in batches of 20."""
    phases = (Phase(2, 8, 0.1, "steps"), Phase(40, 16, 0.2, "examples"), Phase(1, 20, 0.4))
    steps = list(BatchSchedule(phases, decay="cosine", warmup_steps=3).steps(50))
    sizes = np.array([8, 8, 16, 16, 20, 20])
    seen = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    assert [(s.number, s.batch_size, s.examples) for s in steps] == list(zip(range(6), sizes, seen, strict=True))
    peak = np.array([0.1, 0.1, 0.2, 0.2, 0.4, 0.4])
    decay = (1 + np.cos(np.pi * np.clip((seen - 32) / (88 - 32), 0, 1))) / 2
    expected = peak * np.minimum(np.arange(1, 7) / 3, 1) * decay
    np.testing.assert_allclose([s.learning_rate for s in steps], expected, rtol=1e-12)


def test_steps_of_epochs_are_those_of_the_epochs_and_go_on_from_any():
    schedule = BatchSchedule((Phase(2, 10, 0.1), Phase(3, 20, 0.4)), 1.5, "cosine")
    steps = list(schedule.steps(45))
    np.testing.assert_allclose([s.learning_rate for s in steps], rates(schedule, 45))
    assert [s.number for s in steps] == list(range(14)) and steps[9].examples == 8 * 10 + 20
    for first in (0, 5, 14, 20):
        assert list(schedule.steps(45, first)) == steps[first:]


DECAYS = {"linear": lambda share: 1 - share, "cosine": lambda share: (1 + np.cos(np.pi * share)) / 2}


@pytest.mark.parametrize("decay", DECAYS)
def test_seesaw_follows_the_decay_where_it_halves_the_rate(decay):
    """Rate over root of the batch is the decayed rate where a phase begins, and the phases fill the run."""
    phases = seesaw(2**20, 64, 0.1, decay=decay, max_batch_size=4096).phases
    starts = np.cumsum([0] + [phase.length for phase in phases])
    assert starts[-1] == 2**20 and [phase.batch_size for phase in phases] == [64 * 2**k for k in range(7)]
    noise = np.array([phase.learning_rate / np.sqrt(phase.batch_size / 64) for phase in phases])
    np.testing.assert_allclose(noise, 0.1 * DECAYS[decay](starts[:-1] / 2**20), rtol=1e-3)
    assert sum(s.batch_size for s in seesaw(1000, 64, 0.1).steps()) <= 1000


def test_the_first_epoch_of_the_paper():
    epochs = list(small_batch_start(200).epochs(50_000))
    assert [(e.batch_size, e.steps) for e in epochs] == [(512, 97)] + 199 * [(8192, 6)]
    np.testing.assert_array_equal(rates(small_batch_start(200), 50_000), [0.005] * 97 + [0.05] * 199 * 6)


@pytest.mark.parametrize("batch_factor, rate_factor", [(5, 1.0), (2, 0.75), (4, 1.0)])
def test_a_growing_batch_decays_the_rate_per_example(batch_factor, rate_factor):
    """Smith et al., section 3: the noise scale falls as under a decay of the rate, always."""
    schedule = growing_batches(
        11, 16, 0.1, every=2, batch_factor=batch_factor, rate_factor=rate_factor, max_batch_size=500
    )
    assert [phase.length for phase in schedule.phases] == [2, 2, 2, 2, 2, 1]
    assert max(phase.batch_size for phase in schedule.phases) <= 500
    noise = np.array([phase.learning_rate / phase.batch_size for phase in schedule.phases])
    np.testing.assert_allclose(noise, 0.1 / 16 * (rate_factor / batch_factor) ** np.arange(6))


def test_legw_keeps_the_steps_of_the_warmup_and_its_slope_by_the_root():
    base = {"base_batch_size": 32, "base_learning_rate": 0.1, "base_warmup_epochs": 0.25}
    small, large = (legw(8, size, **base) for size in (32, 128))
    warming = [np.sum(np.diff(rates(schedule, 3200)) > 0) for schedule in (small, large)]
    assert warming[0] == warming[1] == 24
    np.testing.assert_allclose(rates(large, 3200).max(), 2 * rates(small, 3200).max())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Phase(0, 1, 1.0), "length=0 is out of range"),
        (lambda: Phase(1, 1, float("nan")), "learning_rate=nan is out of range"),
        (lambda: BatchSchedule(()), "at least one Phase"),
        (lambda: BatchSchedule(Phase(1, 1, 1.0)), "at least one Phase"),
        (lambda: Phase(1, 1, 1.0, "images"), "'epochs', 'steps' or 'examples'"),
        (lambda: Phase(7, 8, 1.0, "examples"), "no batch of 8"),
        (lambda: BatchSchedule((Phase(1, 1, 1.0, "steps"),), 1.0), "warmup_epochs is in another unit.*warmup_steps"),
        (lambda: BatchSchedule((Phase(1, 1, 1.0),), warmup_steps=1), "warmup_steps is in another unit"),
        (lambda: list(BatchSchedule((Phase(1, 1, 1.0, "steps"),)).epochs(8)), "call steps in place of epochs"),
        (lambda: list(BatchSchedule((Phase(1, 1, 1.0),)).steps()), "pass num_examples"),
        (lambda: seesaw(100, 8, 0.1, decay="step"), "'linear' or 'cosine'"),
        (lambda: BatchSchedule((Phase(1, 1, 1.0), 3)), "at least one Phase"),
        (lambda: BatchSchedule((Phase(1, 1, 1.0),), decay="linear"), "'constant' or 'cosine'"),
        (lambda: BatchSchedule((Phase(1, 1, 1.0),), -1.0), "warmup_epochs=.*out of range"),
        (lambda: list(BatchSchedule((Phase(1, 64, 1.0),)).epochs(63)), "a batch of 64 exceeds the 63 examples"),
        (lambda: small_batch_start(1), r"epochs=1 is out of range; pass a whole number in \[2, inf\)"),
        (
            lambda: dataclasses.replace(
                legw(1, 2, base_batch_size=1, base_learning_rate=1, base_warmup_epochs=0), phases=()
            ),
            "Phase",
        ),
    ],
)
def test_impossible_schedules_say_what_to_pass(make, message):
    with pytest.raises(ValueError, match=message):
        make()


GOOD = {
    Phase: {"length": 2, "batch_size": 8, "learning_rate": 0.1},
    small_batch_start: {"epochs": 3, "batch_size": 8, "learning_rate": 0.1, "first_epochs": 1, "first_batch_size": 4}
    | {"first_learning_rate": 0.1},
    growing_batches: {"epochs": 3, "batch_size": 8, "learning_rate": 0.1, "every": 1, "batch_factor": 2}
    | {"rate_factor": 0.5, "max_batch_size": 16},
    legw: {"epochs": 3, "batch_size": 8, "base_batch_size": 4, "base_learning_rate": 0.1, "base_warmup_epochs": 1.0},
}
WHOLE = (
    "epochs",
    "length",
    "batch_size",
    "first_epochs",
    "first_batch_size",
    "every",
    "batch_factor",
    "base_batch_size",
)


@pytest.mark.parametrize("make", GOOD)
def test_every_argument_is_checked_where_it_is_given(make):
    good = GOOD[make]
    make(**good)
    for name in good:
        may_be_zero = name == "base_warmup_epochs"
        bad = [-1, float("nan"), float("inf"), "1", True, *([] if may_be_zero else [0, np.float32(0)])]
        bad += [0.5, 2.0] if name in (*WHOLE, "max_batch_size") else []
        for value in bad:
            with pytest.raises(ValueError, match=f"{name.removeprefix('first_')}=.*pass a"):
                make(**{**good, name: value})


def test_numbers_of_numpy_make_the_same_schedules():
    """Eight bits hold a batch, but not the number of examples that it divides."""
    small = growing_batches(np.int8(3), np.uint8(100), np.float32(0.5), every=np.int8(1), batch_factor=np.int8(4))
    assert small == growing_batches(3, 100, 0.5, every=1, batch_factor=4)
    assert [epoch.steps for epoch in small.epochs(np.int64(50_000))] == [500, 125, 31]
    with pytest.raises(ValueError, match=r"num_examples=0\.5"):
        list(small.epochs(0.5))
