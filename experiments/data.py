"""Images that live on the device once, as bytes, and leave it never.

A data set is four arrays. Everything random about feeding them, the order of an epoch and the augmentation of an image,
is a pure function of a key and of the image's position, so it runs inside the compiled step and comes out the same
whatever the micro-batch or the number of devices.
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import images_tfds
from experiments.console import TrainingBars
from experiments.errors import UsageError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Split:
    """Images `(N, size, size, 3)`, uint8, and their labels `(N,)`, int32."""

    images: Any
    labels: Any

    def __len__(self) -> int:
        return len(self.labels)


class Dataset(NamedTuple):
    """Training and test images, and what has to be known to read them."""

    train: Split
    test: Split
    # Labels run from 0 to this, exclusive.
    num_classes: int
    # Whether a mirrored image is still of its class; a mirrored digit is not.
    flips: bool = True


def load(config) -> Dataset:
    """The data set of a `TrainConfig`, in host memory.

    Raises:
        UsageError: for a name that nobody knows, or more images than there are.
        RunError: if the images cannot be had.
    """
    if config.dataset in ("digits", "generated"):
        dataset = {"digits": digits, "generated": generated}[config.dataset](config.image_size)
    else:
        dataset = tfds(config.dataset, config.data_dir, config.image_size)
    if config.holdout:
        # The last images of the training split take the place of the test split.
        number = round(config.holdout * len(dataset.train))
        if not 0 < number < len(dataset.train):
            few = f"{config.holdout} of {len(dataset.train)} images"
            raise UsageError(f"--holdout {few} leaves none to test or to train on")
        dataset = cut(dataset.train, number, dataset.num_classes, dataset.flips)
    for name in ("train", "test"):
        split, number = getattr(dataset, name), getattr(config, f"{name}_images")
        if number is not None and number > len(split):
            raise UsageError(f"--{name}-images {number}: {config.dataset} has {len(split)}")
        dataset = dataset._replace(**{name: Split(split.images[:number], split.labels[:number])})
    largest = config.batch_sizes[-1]
    if largest > len(dataset.train):
        option = "--phases: batch size" if config.phases else "--batch-size"
        raise UsageError(f"{option} {largest} exceeds the {len(dataset.train)} training images of {config.dataset}")
    return dataset


def check_memory(number: int, size: int):
    """Raises a UsageError if so many images of this side would not fit into the memory of this machine, with copies."""
    needed, there = 4 * 3 * number * size**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UsageError(
            f"--image-size {size}: {number} images need {needed / 1e9:,.0f} GB, and this machine has {there / 1e9:,.0f}"
        )


def digits(size: int) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 and grey, scaled up: 1,437 to train on, 360 to test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    check_memory(len(labels), size)
    images = jnp.asarray(images, jnp.float32).reshape(-1, 8, 8, 1) * (255 / 16)
    images = jax.image.resize(images, (len(labels), size, size, 1), "bilinear")
    images = np.asarray(jnp.broadcast_to(jnp.round(images), (len(labels), size, size, 3)), np.uint8)
    # The digits are ordered by writer. Mixed once, for every seed alike, so that both splits know all writers.
    order = np.random.default_rng(0).permutation(len(labels))
    return cut(Split(images[order], labels[order].astype(np.int32)), 360, 10, flips=False)


def generated(size: int, num_train: int = 512, num_test: int = 128) -> Dataset:
    """Ten blurred random patterns, each seen through noise: a data set for checks that should take seconds."""
    check_memory(num_train + num_test, size)
    rng = np.random.default_rng(0)
    labels = np.arange(num_train + num_test, dtype=np.int32) % 10
    patterns = jax.image.resize(rng.normal(size=(10, 4, 4, 3)), (10, size, size, 3), "bilinear")
    images = 128 + 40 * np.asarray(patterns)[labels] + 40 * rng.normal(size=(len(labels), size, size, 3))
    return cut(Split(np.clip(images, 0, 255).astype(np.uint8), labels), num_test, 10)


# Decoding takes longer than many a run; runs on the same images share them.
@functools.lru_cache(maxsize=1)
def tfds(name: str, data_dir: Path | None, size: int) -> Dataset:
    """An image classification data set of TensorFlow Datasets, resized to the network's input."""
    splits, num_classes, folder = images_tfds.open_source(name, data_dir)
    total = sum(map(len, splits))
    check_memory(total, size)
    with TrainingBars() as bars:
        task = bars.begin(f"decoding {name}", total)
        advance = lambda number: bars.advance(task, number)
        train, test = (Split(*images_tfds.decode(split, size, folder, advance)) for split in splits)
    return Dataset(train, test, num_classes)


def cut(split: Split, num_test: int, num_classes: int, flips: bool = True) -> Dataset:
    """Cuts the last `num_test` images off to test on."""
    head, tail = (Split(split.images[part], split.labels[part]) for part in np.s_[:-num_test, -num_test:])
    return Dataset(head, tail, num_classes, flips)


def shuffle(key: jax.Array, num_images: int) -> jax.Array:
    """The order of one epoch: a permutation of the images, `(num_images,)`, int32."""
    return jax.random.permutation(key, jnp.arange(num_images, dtype=jnp.int32))


def augment(key: jax.Array, positions: jax.Array, images: jax.Array, flips: bool) -> jax.Array:
    """Crops each image out of itself padded by an eighth of its side, and mirrors every second one if it `flips`.

    Images are `(B, size, size, 3)`, of any dtype. What is random about one depends on its position in the batch alone,
    `(B,)`, and on the key of the step.
    """

    pad = images.shape[1] // 8

    def one(position, image):
        crop_key, flip_key = jax.random.split(jax.random.fold_in(key, position))
        row, column = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
        padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        image = jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)
        return jnp.where(flips & jax.random.bernoulli(flip_key), image[:, ::-1], image)

    return jax.vmap(one)(positions, images)


def normalise(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Bytes to floats with mean 0 and deviation 1 per channel over the training split."""
    return (images.astype(jnp.float32) - mean) / std


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel over a split, both `(3,)`, float32, in bytes."""
    # Counted, not averaged: exact, and without a float copy of the whole split.
    counts = np.stack([np.bincount(images[..., c].reshape(-1), minlength=256) for c in range(images.shape[-1])])
    levels = np.arange(256)
    mean = counts @ levels / counts.sum(1)
    variance = counts @ levels**2 / counts.sum(1) - mean**2
    return mean.astype(np.float32), np.sqrt(np.maximum(variance, 1)).astype(np.float32)
