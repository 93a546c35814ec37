"""The training loop: what must not change its results, and what must."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data
from experiments.config import TrainConfig, load_config
from experiments.errors import Diverged, UsageError
from experiments.step import Stepper
from experiments.train import train

TINY = TrainConfig(
    dataset="generated",
    image_size=16,
    width=0.1,
    dropout=0.0,
    optimizer="lars",
    learning_rate=0.01,
    batch_size=64,
    epochs=4,
)
# All that a run can depend on: dropout, augmentation, curvature kept from step to step.
RICH = dataclasses.replace(TINY, optimizer="cblr", dropout=0.5, curvature_every=3, epochs=2)


@functools.cache
def dataset():
    return data.load(TINY)


def change(**changes):
    return dataclasses.replace(TINY, **changes)


def phased(*phases):
    """The changes by which phases take the place of what else says when to train."""
    return {"phases": phases, "epochs": None, "batch_size": None, "learning_rate": None}


@functools.cache
def stepper(config):
    """Shared between tests: nearly all their time is compilation."""
    return Stepper(config, dataset())


@functools.cache
def run(config, seed=0):
    """The records of a run."""
    return list(train(stepper(config), seed, config.learning_rate))


def column(records, name, kind="step"):
    return np.array([record[name] for record in records if record["kind"] == kind])


def untimed(record):
    return {name: value for name, value in record.items() if name not in ("seconds", "images_per_second", "compiled")}


@pytest.mark.once
def test_the_loss_falls_and_the_test_images_are_learnt():
    records = run(TINY)
    assert column(records, "test_accuracy", "epoch")[-1] > 0.3
    assert column(records, "loss", "epoch")[-1] < 0.6 * column(records, "loss", "epoch")[0]


@pytest.mark.once
def test_one_seed_gives_the_same_numbers_and_another_gives_others():
    again = list(train(stepper(TINY), 0, TINY.learning_rate))
    np.testing.assert_array_equal(column(again, "loss"), column(run(TINY), "loss"))
    assert not np.any(column(run(TINY, seed=1), "loss") == column(run(TINY), "loss"))


@pytest.mark.once
@pytest.mark.parametrize("way", ["jit", "pmap"])
def test_one_device_and_eight_agree(way):
    """With curvature, in coordinates: eigenvectors without a gradient, of which a kernel has many, are any."""
    config = dataclasses.replace(RICH, optimizer="sophia")
    one, eight = run(config), run(dataclasses.replace(config, devices=8, parallel=way))
    np.testing.assert_allclose(column(eight, "loss"), column(one, "loss"), rtol=1e-3)
    np.testing.assert_allclose(column(eight, "test_loss", "epoch"), column(one, "test_loss", "epoch"), rtol=1e-3)


@pytest.mark.once
def test_batch_norm_over_eight_devices_is_over_the_whole_batch():
    config = change(model="resnet18", dropout=None, width=0.03, image_size=8, batch_size=256)
    images = data.load(config)
    found = []
    for way in (config, *(dataclasses.replace(config, devices=8, parallel=way) for way in ("jit", "pmap"))):
        judge = Stepper(way, images)
        state = judge.init(0)
        found.append(judge.gradient(state, judge.train, judge.shuffle(state, 0), np.int32(0), 256))
    one, *eight = (jax.tree.leaves(jax.device_get(sums)) for sums in found)
    for sums in eight:
        for leaf, expected in zip(sums, one, strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=1e-3, atol=1e-4 * np.max(np.abs(expected)))


@pytest.mark.once
def test_micro_batches_add_up_to_the_batch():
    whole, micro = run(TINY), run(change(micro_batch_size=16))
    # In the first steps: training is chaotic, and rounding grows from step to step.
    np.testing.assert_allclose(column(micro, "loss")[:8], column(whole, "loss")[:8], rtol=1e-4)
    np.testing.assert_allclose(column(micro, "accuracy")[:8], column(whole, "accuracy")[:8])


@pytest.mark.once
def test_a_run_goes_on_from_its_state_to_the_same_bits():
    whole, kept = run(RICH), {}

    def keep(state, step, last):
        kept[step] = jax.tree.map(jnp.copy, state)

    list(train(stepper(RICH), 0, 0.01, save=keep))
    # Within an epoch; after its last step and before it is judged; after it is judged; before the last epoch is judged.
    for step, judged in ((3, 0), (8, 0), (8, 1), (16, 1)):
        state, past = jax.tree.map(jnp.copy, kept[step]), whole[: step + judged]
        rest = list(train(stepper(RICH), 0, 0.01, state, past))
        assert [untimed(record) for record in rest] == [untimed(record) for record in whole[step + judged :]]


@pytest.mark.once
def test_one_compilation_per_batch_size_and_none_for_rates_or_seeds():
    changing = stepper(change(**phased("1:128:0.01", "1:64:0.02", "1:128:0.03")))
    flags = [list(column(train(changing, seed, rate), "compiled")) for seed, rate in ((0, 0.1), (1, 0.2))]
    # Four steps of 128, eight of 64, four of 128.
    assert flags == [[True, *[False] * 3, True, *[False] * 11], [False] * 16]
    sizes = {name: program._cache_size() for name, program in vars(changing.programs).items()}
    assert (sizes["update"], sizes["gradient"], sizes["shuffle"], sizes["evaluate"]) == (2, 2, 1, 1)


@pytest.mark.once
def test_sharpness_multiplies_the_logits():
    plain, sharp = (stepper(change(sharpness=sharpness)) for sharpness in (1.0, 4.0))
    state = plain.init(0)
    batch = plain.batch(state, plain.train, plain.shuffle(state, 0), 0, 0, 8)
    logits, sharper = (s.logits(state, state.params, batch, 0, 8)[0] for s in (plain, sharp))
    np.testing.assert_allclose(sharper, 4 * logits, rtol=1e-5)


def test_an_epoch_trains_on_every_image_of_its_full_batches_once():
    still = stepper(change(augment=False, batch_size=192))
    state = still.init(0)
    order = still.shuffle(state, 0)
    labels = [still.batch(state, still.train, order, 192 * b, 0, 192)["labels"] for b in range(2)]
    np.testing.assert_array_equal(np.concatenate(labels), dataset().train.labels[np.asarray(order)[:384]])
    images = still.batch(state, still.train, order, 0, 64, 128)["images"]
    mean, std = data.channel_statistics(dataset().train.images)
    expected = (dataset().train.images[np.asarray(order)[64:192]] - mean) / std
    np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-5)


def test_evaluation_counts_every_test_image_once():
    # 100 images do not divide by 8 devices: four are seen twice and may count only once.
    part = dataset()._replace(test=data.Split(dataset().test.images[:100], dataset().test.labels[:100]))
    results = [judge.evaluate(judge.init(0)) for judge in (Stepper(change(devices=n), part) for n in (1, 8))]
    np.testing.assert_allclose(*results, rtol=1e-5)


def test_divergence_is_said_in_one_line():
    with pytest.raises(Diverged, match=r"the loss is nan at step .*: try a smaller --learning-rate"):
        list(train(stepper(TINY), 0, 1e20))


def test_too_few_devices_are_refused():
    with pytest.raises(UsageError, match=f"--devices 64: there are {jax.device_count()}"):
        Stepper(change(devices=64), dataset())


@pytest.mark.once
def test_the_images_left_out_are_those_of_the_whole_batch():
    """In one micro-batch or four, the gradient is that of the images with the largest losses."""
    config = change(discard=0.3, batch_size=128, epochs=1)
    whole = run(config)
    parts = run(dataclasses.replace(config, micro_batch_size=32))
    np.testing.assert_allclose(column(parts, "loss"), column(whole, "loss"), rtol=1e-4)
    split = run(dataclasses.replace(config, micro_batch_size=32, devices=8, parallel="pmap"))
    np.testing.assert_allclose(column(split, "loss"), column(whole, "loss"), rtol=1e-4)

    judge = stepper(config)
    state = judge.init(0)
    order = judge.shuffle(state, 0)
    losses = np.asarray(judge.programs.losses(state, judge.train, order, 0, 0, size=128))
    weights = np.asarray(judge.programs.weights(state, losses))
    np.testing.assert_array_equal(np.flatnonzero(weights), np.sort(np.argsort(losses)[38:]))


@pytest.mark.once
def test_images_are_left_out_in_the_first_epochs_only():
    some = run(change(discard=0.3, discard_epochs=1, discard_by="chance", batch_size=128, epochs=2))
    all_ = run(change(discard=0.3, discard_by="chance", batch_size=128, epochs=2))
    np.testing.assert_array_equal(column(some, "loss")[:5], column(all_, "loss")[:5])
    assert not np.any(column(some, "loss")[5:] == column(all_, "loss")[5:])


@pytest.mark.once
def test_probes_change_nothing_and_see_the_step():
    plain, probed = run(change(epochs=1, optimizer="sgd")), run(change(epochs=1, optimizer="sgd", probes=True))
    np.testing.assert_allclose(column(probed, "loss"), column(plain, "loss"), rtol=1e-5)
    rates = column(probed, "learning_rate")
    for layer in ("linears/0/kernel", "convs/0/bias"):
        stride, gradient = (column(probed, f"{name}/{layer}") for name in ("parameter_stride", "mean_abs_gradient"))
        # Without its history, of which the first step has none, momentum adds nothing; decay adds next to nothing.
        np.testing.assert_allclose(stride[0], rates[0] * gradient[0], rtol=1e-2)


def test_configurations_survive_json():
    config = change(**phased("1:512:0.005", "2:256:0.05"), micro_batch_size=64, devices=2)
    assert load_config(config.as_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be above 0, not 0"),
        ({"dropout": 1.0}, "--dropout must be at least 0 and below 1, not 1.0"),
        ({"learning_rate": -1.0}, "--learning-rate must be above 0, not -1.0"),
        ({"learning_rate": float("nan")}, "--learning-rate must be above 0, not nan"),
        ({"micro_batch_size": 48}, "--micro-batch-size must divide the batch size 64, and 48 does not"),
        ({"devices": 3}, "--devices 3 must divide the --micro-batch-size, here 64 images"),
        (
            {"devices": 8, "optimizer": "cblr", "curvature_batch_size": 12},
            "--devices 8 must divide the --curvature-batch-size, here 12 images",
        ),
        (phased("1:512"), "--phases takes EPOCHS:BATCH:RATE"),
        (phased("1:512:0"), "--phases takes EPOCHS:BATCH:RATE"),
    ],
)
def test_impossible_configurations_say_what_is_accepted(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        change(**changes)
    assert "\n" not in str(error.value)
