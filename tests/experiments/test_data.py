"""Where images come from, and what is done to them on the device."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from experiments import data, images_tfds
from experiments.config import TrainConfig
from experiments.errors import RunError, UsageError

augment = jax.jit(data.augment, static_argnames="flips")
TFDS_DATA_DIR = os.environ.get("TFDS_DATA_DIR")


def test_digits_are_all_there_once():
    dataset = data.load(TrainConfig(dataset="digits", batch_size=512))
    assert dataset.train.images.shape == (1437, 32, 32, 3)
    assert dataset.test.images.shape == (360, 32, 32, 3)
    assert dataset.train.images.dtype == np.uint8
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(load_digits().target))
    # Bilinear enlargement by an even factor keeps the mean of an image, but for its outermost half pixels.
    images = np.concatenate([dataset.train.images, dataset.test.images])
    assert np.mean(images) == pytest.approx(load_digits().data.mean() * 255 / 16, rel=0.02)
    assert not dataset.flips


def test_holdout_takes_training_images_and_no_test_image():
    whole = data.load(TrainConfig(dataset="generated", image_size=16, batch_size=64))
    held = data.load(TrainConfig(dataset="generated", image_size=16, batch_size=64, holdout=0.25))
    assert (len(held.train), len(held.test)) == (384, 128)
    np.testing.assert_array_equal(np.concatenate([held.train.images, held.test.images]), whole.train.images)


def test_a_batch_beyond_the_images_is_refused():
    with pytest.raises(UsageError, match=r"--batch-size 1438 exceeds the 1437 training images of digits"):
        data.load(TrainConfig(dataset="digits", batch_size=1438))


def test_shuffle_is_a_permutation_that_depends_on_its_key():
    first, second = (np.asarray(data.shuffle(jax.random.key(k), 100)) for k in (0, 1))
    np.testing.assert_array_equal(np.sort(first), np.arange(100))
    assert not np.array_equal(first, second)


def test_augmentation_crops_and_mirrors():
    images = jax.random.uniform(jax.random.key(0), (64, 16, 16, 3), minval=0.5)
    positions = jnp.arange(64)
    augmented = np.asarray(augment(jax.random.key(1), positions, images, flips=True))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    found, mirrored, offsets = 0, 0, set()
    for before, after in zip(padded, augmented, strict=True):
        for row in range(5):
            for column in range(5):
                crop = before[row : row + 16, column : column + 16]
                for flip in (False, True):
                    if np.array_equal(crop[:, ::-1] if flip else crop, after):
                        found, mirrored = found + 1, mirrored + flip
                        offsets.add((row, column))
    assert found == 64
    assert 16 < mirrored < 48
    assert {row for row, _ in offsets} == {column for _, column in offsets} == set(range(5))


def test_augmentation_of_an_image_depends_on_its_position_alone():
    images = jax.random.uniform(jax.random.key(0), (64, 16, 16, 3))
    whole = augment(jax.random.key(1), jnp.arange(64), images, flips=True)
    half = augment(jax.random.key(1), jnp.arange(32, 64), images[32:], flips=True)
    np.testing.assert_array_equal(whole[32:], half)


def test_channel_statistics_are_numpys():
    images = np.random.default_rng(0).integers(0, 256, (50, 7, 7, 3), np.uint8)
    mean, std = data.channel_statistics(images)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, images.std((0, 1, 2)), rtol=1e-5)
    normal = np.asarray(data.normalise(jnp.asarray(images), mean, std))
    np.testing.assert_allclose(normal.mean((0, 1, 2)), 0, atol=1e-5)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(images_tfds, "reachable", lambda builder: builder.name != "cifar10")


def write_dataset(folder: Path, shape, splits, label=True):
    """A data set of random images, prepared as after a download; returns what was written."""
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Image(shape=shape)}
    if label:
        features["label"] = tfds.features.ClassLabel(num_classes=4)
    rng = np.random.default_rng(0)
    written = {}

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {name: self._generate_examples(name, size) for name, size in splits.items()}

        def _generate_examples(self, name, size):
            for i in range(size):
                side = (shape[0] or 10 + i, shape[1] or 12, shape[2])
                image = rng.integers(0, 256, side, np.uint8)
                written[name, i] = image
                yield i, {"image": image, "label": i % 4} if label else {"image": image}

    Tiny.name = "tiny"
    images_tfds.prepare(Tiny(data_dir=folder, file_format="array_record"))
    return written


def test_a_tfds_folder_is_read_and_resized(tmp_path):
    written = write_dataset(tmp_path, (None, None, 1), {"train": 12, "validation": 5})
    config = TrainConfig(dataset="tiny", data_dir=tmp_path, image_size=16, batch_size=4)
    dataset = data.load(config)
    assert dataset.train.images.shape == (12, 16, 16, 3)
    assert dataset.test.images.shape == (5, 16, 16, 3)
    assert dataset.num_classes == 4
    assert sorted(dataset.train.labels) == sorted(i % 4 for i in range(12))
    means = sorted(image.mean() for (split, _), image in written.items() if split == "train")
    np.testing.assert_allclose(sorted(dataset.train.images.mean((1, 2, 3))), means, rtol=0.1)


def test_images_of_the_right_size_are_kept_bit_for_bit(tmp_path):
    written = write_dataset(tmp_path, (16, 16, 3), {"train": 6, "test": 3})
    config = TrainConfig(dataset="tiny", data_dir=tmp_path, image_size=16, batch_size=4)
    images = {image.tobytes() for image in data.load(config).test.images}
    assert images == {image.tobytes() for (split, _), image in written.items() if split == "test"}


@pytest.mark.parametrize(
    ("splits", "label", "message"),
    [
        ({"train": 4, "test": 2}, False, "needs the features image and label"),
        ({"train": 4}, True, "needs a split train and a split test or validation"),
    ],
)
def test_what_is_no_image_classification_is_refused(tmp_path, splits, label, message):
    write_dataset(tmp_path, (8, 8, 3), splits, label)
    with pytest.raises(UsageError, match=message):
        data.load(TrainConfig(dataset="tiny", data_dir=tmp_path, batch_size=4))


def test_unknown_names_and_folders_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--dataset no_such_images is not known"):
        data.load(TrainConfig(dataset="no_such_images"))
    with pytest.raises(UsageError, match="is not a folder"):
        data.load(TrainConfig(dataset="cifar10", data_dir=tmp_path / "absent"))


def test_a_download_that_cannot_be_had_is_one_line_with_the_cure(tmp_path):
    with pytest.raises(RunError, match=r"is not prepared in .*--data-dir \(or TFDS_DATA_DIR\)") as error:
        data.load(TrainConfig(dataset="cifar10", data_dir=tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not TFDS_DATA_DIR, reason="CIFAR-10 IS NOT TESTED: set TFDS_DATA_DIR to where TFDS has prepared it")
def test_cifar10():
    dataset = data.load(TrainConfig(dataset="cifar10", data_dir=Path(TFDS_DATA_DIR)))
    assert dataset.train.images.shape == (50000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(dataset.train.labels), np.full(10, 5000))
    np.testing.assert_array_equal(np.bincount(dataset.test.labels), np.full(10, 1000))
    # The published channel means of the training images.
    np.testing.assert_allclose(
        data.channel_statistics(dataset.train.images)[0] / 255, [0.4914, 0.4822, 0.4465], atol=2e-3
    )


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "tiny-test.array_record-00000-of-00001"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]\n"])
def test_damaged_files_of_a_prepared_data_set_are_one_line(name, content, tmp_path):
    write_dataset(tmp_path, (16, 16, 3), {"train": 6, "test": 3})
    [path] = tmp_path.rglob(name)
    path.write_bytes(content)
    with pytest.raises((RunError, UsageError), match="tiny") as error:
        data.load(TrainConfig(dataset="tiny", data_dir=tmp_path, image_size=16, batch_size=4))
    assert "\n" not in str(error.value) and "--d" in str(error.value)


def test_images_beyond_the_memory_are_refused():
    with pytest.raises(UsageError, match=r"--image-size 4096: 1000000 images need .* GB, and this machine has"):
        data.check_memory(1_000_000, 4096)
    data.check_memory(60_000, 32)
