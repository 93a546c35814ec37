"""Any image classification data set that TensorFlow Datasets knows, read without TensorFlow.

TFDS reads files in the ArrayRecord format without TensorFlow, so they are prepared, and looked for, in that format.
While preparing them it would call TensorFlow for one thing, to encode images given as arrays; Pillow does that here.
Decoded images are NumPy arrays of any size, which Pillow brings to the network's.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from experiments.console import say
from experiments.errors import RunError, UsageError

CHUNK = 1000
CURE = "prepare it again with `tfds build NAME --file_format=array_record`, or give another --data-dir"


class Source(NamedTuple):
    """A prepared data set: its training and its test split, its number of classes, and where it is."""

    splits: tuple[Any, Any]
    num_classes: int
    folder: Any


def decode(split: Any, size: int, folder: object, advance: Callable[[int], Any]) -> tuple[np.ndarray, np.ndarray]:
    """All images of a split, `(N, size, size, 3)`, uint8, and labels `(N,)`, int32; `advance(n)` after each `n`."""
    images, labels = np.empty((len(split), size, size, 3), np.uint8), np.empty(len(split), np.int32)
    with reading(folder):
        for start in range(0, len(split), CHUNK):
            records = split.__getitems__(list(range(start, min(start + CHUNK, len(split)))))
            for i, record in enumerate(records, start):
                images[i], labels[i] = resize(record["image"], size), record["label"]
            advance(len(records))
    return images, labels


def open_source(name: str, data_dir: Path | None) -> Source:
    """Finds a data set, or downloads and prepares it.

    Raises:
        UsageError: if TFDS has no such data set, or it is not one of labelled images.
        RunError: if it cannot be read, or is not prepared and cannot be downloaded.
    """
    builder = find_builder(name, data_dir)
    features = builder.info.features
    if not {"image", "label"} <= set(features or ()) or not hasattr(features["label"], "num_classes"):
        raise UsageError(f"--dataset {name} is not image classification: it needs the features image and label")
    if not builder.is_prepared():
        prepare(builder)
    with reading(builder.data_dir):
        source = builder.as_data_source()
    test = next((split for split in ("test", "validation") if split in source), None)
    if "train" not in source or test is None:
        raise UsageError(f"--dataset {name} needs a split train and a split test or validation; it has {list(source)}")
    return Source((source["train"], source[test]), features["label"].num_classes, builder.data_dir)


def find_builder(name: str, data_dir: Path | None):
    """The TFDS builder of a data set."""
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.ERROR)
    if data_dir is not None and not data_dir.is_dir():
        raise UsageError(f"--data-dir {data_dir} is not a folder")
    # Of a package that it misses it speaks in a banner, before it raises.
    quiet = io.StringIO()
    with reading(f"--dataset {name}"), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        try:
            return tfds.builder(name, data_dir=data_dir, file_format="array_record")
        except tfds.core.registered.DatasetNotFoundError as error:
            raise UsageError(
                f"--dataset {name} is not known: digits, generated, or a name that TFDS lists, such as cifar10"
            ) from error
        except (ValueError, AssertionError, ImportError) as error:
            raise UsageError(f"--dataset {name} cannot be used ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """The first line of what an error, or its cause, says."""
    error = error.__cause__ or error
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def reading(what: object) -> Iterator[None]:
    """Says what cannot be read, and what to do, whatever goes wrong."""
    try:
        yield
    except UsageError:
        raise
    except NotImplementedError as error:
        raise RunError(f"{what} was not prepared as array_record: {CURE}") from error
    # ArrayRecord, Pillow, protocol buffers, the file system and the files of a data set raise what they like.
    except Exception as error:
        raise RunError(f"{what} cannot be read ({reason(error)}): {CURE}") from error


def prepare(builder):
    """Downloads a data set and writes it to the builder's folder."""
    cure = "connect to the network once, or give --data-dir (or TFDS_DATA_DIR) a folder in which it is prepared"
    where = f"{builder.name} is not prepared in {builder.data_dir}"
    if not reachable(builder):
        raise RunError(f"{where} and its download cannot be reached: {cure}; --dataset digits needs none")
    say(f"{where}: downloading")
    # TFDS encodes arrays by TensorFlow, but accepts Pillow's images.
    feature = builder.info.features["image"]
    encode = feature.encode_example
    pillow = lambda image: Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    feature.encode_example = lambda image: encode(pillow(image) if isinstance(image, np.ndarray) else image)
    try:
        builder.download_and_prepare()
    # What a download can raise is open-ended: sockets, HTTP, checksums, archives, a full disk.
    except Exception as error:
        raise RunError(f"{where} and could not be prepared ({reason(error)}): {cure}") from error


def reachable(builder) -> bool:
    """Whether any host of the data set's files answers; TFDS itself would retry for minutes before it says no."""
    import requests

    urls = [*builder.url_infos, "https://storage.googleapis.com"]
    for host in {"/".join(url.split("/")[:3]) for url in urls}:
        with contextlib.suppress(requests.RequestException):
            requests.head(host, timeout=10)
            return True
    return False


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """An image `(h, w, 1, 3 or 4)`, uint8, as `(size, size, 3)`; transparency is dropped."""
    image = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image[..., :3]
    return (
        image
        if image.shape[:2] == (size, size)
        else np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
    )
