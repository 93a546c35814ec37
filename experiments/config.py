"""What a training run is: one frozen dataclass, which the command line offers and the metrics file keeps.

Three commands share it. `train` takes it as it is; `race` and `tune` hold its fields fixed (`problems.py`) and vary the
optimizer and its learning rate. A number that is not in here cannot change a result.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from curvax.schedules import BatchSchedule, Phase
from experiments.methods import CURVED, METHODS

# How and where a run is carried out: to change this changes its results by rounding at most.
CONDUCT = frozenset(
    ("data_dir", "devices", "parallel", "coordinator", "num_processes", "process_id", "checkpoint_seconds", "out")
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train one network on one data set with one optimizer."""

    dataset: str = "digits"
    """digits (scikit-learn's, no download), generated (random patterns, no download), or any image classification
    data set of TensorFlow Datasets, such as cifar10, cifar100, mnist or svhn_cropped."""
    data_dir: Path | None = None
    """Folder in which TFDS keeps, or has prepared, its data sets; else TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    image_size: int = 32
    """Side in pixels to which every image is resized."""
    augment: bool = True
    """Pad by 4 pixels, crop at random, flip left to right at random; digits are never flipped."""
    holdout: float = 0.0
    """Fraction of the training images to test on, in place of the test images: what `tune` judges by."""
    train_images: int | None = None
    """Train on this many of the training images, the first ones; on all if not given."""
    test_images: int | None = None
    """Test on this many of the test images, the first ones; on all if not given."""

    model: Literal["alexnet", "resnet18"] = "alexnet"
    """The network."""
    width: float = 1.0
    """Fraction of the published number of channels (and, in AlexNet, of features in the fully connected layers)."""
    hidden: int | None = None
    """AlexNet: features of the two fully connected layers; 4096 times the width if not given."""
    dropout: float = 0.5
    """AlexNet: share of the features dropped before each of the two fully connected layers. ResNet18 has none."""
    init: Literal["he", "pytorch"] = "he"
    """he: kernels from N(0, 2 / fan in), biases 0. pytorch: both uniform within 1 / sqrt(fan in), as torch.nn does."""
    sharpness: float = 1.0
    """Trains on the cross-entropy of this number times the logits. Above 1 the loss is sharper: near the start its
    gradient grows with it, its curvature with its square. The reported test loss is the plain cross-entropy."""

    optimizer: Literal[tuple(METHODS)] = "mclr"
    """The method."""
    learning_rate: float | None = None
    """Peak learning rate; the one `tune` found (experiments/tuned.json) if not given."""
    momentum: float = 0.9
    """Decay of the heavy-ball momentum (of Adam's first moment, for lamb)."""
    weight_decay: float = 0.0005
    """Multiple of the parameters added to their update."""
    damping: float = 0.1
    """cblr: added to the curvature, in multiples of its mean over each layer."""
    curvature_every: int = 10
    """cblr: steps from one curvature estimate to the next."""
    curvature_batch_size: int | None = None
    """cblr: images, the first of each batch, from which the curvature is estimated; a micro-batch if not given."""

    batch_size: int = 1024
    """Images per optimizer step. The incomplete last batch of an epoch is dropped."""
    micro_batch_size: int | None = None
    """Images whose gradient is computed at once, for batches beyond memory. The step is that of the whole batch, but
    for dropout, which draws anew, and batch norm, which normalises over each micro-batch."""
    epochs: int = 10
    """Passes over the training images."""
    phases: tuple[str, ...] = ()
    """EPOCHS:BATCH:RATE ..., such as 1:512:0.005 79:8192:0.05, in place of the epochs, batch size and learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up."""
    warmup_epochs: float = 1.0
    """Epochs in which the learning rate rises from 0."""

    discard: float = 0.0
    """Fraction of each batch that is left out of its gradient; at a size of 0.3 the mean is over the other 70 %."""
    discard_by: Literal["loss", "chance"] = "loss"
    """Which images to leave out: those with the smallest loss, or any."""
    discard_epochs: int | None = None
    """Leave images out in the first so many epochs; in all if not given."""
    probes: bool = False
    """Also record the mean absolute gradient, parameter stride and loss stride of every array in every step."""

    devices: int = 1
    """Devices of each process over which each batch is split; on a CPU they are simulated."""
    parallel: Literal["jit", "pmap"] = "jit"
    """jit on a mesh, or pmap: the same step, with the same results but for rounding and for the curvature of cblr,
    which pmap estimates from other random numbers."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes, for all of them; or auto, if they are to find each other as
    jax.distributed does. Under SLURM, Open MPI and on TPU pods they do so without being told."""
    num_processes: int | None = None
    """Number of processes, with --coordinator HOST:PORT."""
    process_id: int | None = None
    """Which of them this is, counted from 0, with --coordinator HOST:PORT."""
    seed: int = 0
    """Determines the initial parameters, the order of the images, augmentation, dropout and probes."""
    checkpoint_seconds: float | None = 60.0
    """Seconds from one checkpoint to the next; there is one at the end, too. The same command goes on from the last.
    With 0 every step has one, with None there is none at all."""
    out: Path = Path("runs")
    """Folder for the run's own, which is named after what determines its results."""

    def __post_init__(self):
        for name in ("image_size", "width", "sharpness", "curvature_every", "batch_size", "epochs", "devices"):
            _require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in (
            *("hidden", "learning_rate", "curvature_batch_size", "micro_batch_size"),
            *("train_images", "test_images", "discard_epochs"),
        ):
            value = getattr(self, name)
            _require(value is None or 0 < value < math.inf, name, "above 0", value)
        for name in ("dropout", "momentum", "holdout", "discard"):
            _require(0 <= getattr(self, name) < 1, name, "at least 0 and below 1", getattr(self, name))
        for name in ("weight_decay", "damping", "warmup_epochs", "seed", "checkpoint_seconds"):
            value = getattr(self, name)
            _require(value is None or value >= 0, name, "at least 0", value)
        for batch_size in {phase.batch_size for phase in self.plan(1.0).phases}:
            self._check_batch(batch_size)
        if self.discard and self.optimizer in CURVED:
            raise ValueError(f"--discard does not reach the curvature of {self.optimizer}: choose another --optimizer")

    def _check_batch(self, batch_size: int):
        micro = self.micro_size(batch_size)
        if batch_size % micro:
            raise ValueError(f"--micro-batch-size must divide the batch size {batch_size}, and {micro} does not")
        for name, size in (("micro-batch-size", micro), ("curvature-batch-size", self.curvature_size(batch_size))):
            if size % self.devices:
                raise ValueError(f"--devices {self.devices} must divide the --{name}, here {size} images")

    def micro_size(self, batch_size: int) -> int:
        """Images whose gradient is computed at once."""
        return min(self.micro_batch_size or batch_size, batch_size)

    def curvature_size(self, batch_size: int) -> int:
        """Images of each batch from which the curvature is estimated."""
        return min(self.curvature_batch_size or self.micro_size(batch_size), batch_size)

    def discards(self, epoch: int) -> bool:
        """Whether images are left out in an epoch, counted from 0."""
        return self.discard > 0 and (self.discard_epochs is None or epoch < self.discard_epochs)

    def plan(self, learning_rate: float) -> BatchSchedule:
        """What is trained when; `learning_rate` is the peak where the phases do not say their own."""
        phases = tuple(map(parse_phase, self.phases)) or (Phase(self.epochs, self.batch_size, learning_rate),)
        return BatchSchedule(phases, self.warmup_epochs, self.schedule)

    @property
    def name(self) -> str:
        """Names what determines the results: two configurations have one name if and only if theirs are the same.

        Example:
            >>> TrainConfig(width=0.5).name == TrainConfig(width=0.5, out=Path("elsewhere")).name
            True
        """
        # Without the defaults, so that a new option leaves the names of old runs as they are.
        usual = TrainConfig().as_dict()
        fields = {k: v for k, v in self.as_dict().items() if k not in CONDUCT and v != usual[k]}
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.dataset}-{self.model}-{self.optimizer}-{digest}"

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values, in order."""
        as_json = {type(Path()): str, tuple: list}
        return {name: as_json.get(type(v), lambda v: v)(v) for name, v in dataclasses.asdict(self).items()}


def parse_phase(text: str) -> Phase:
    """A phase from `EPOCHS:BATCH:RATE`.

    Example:
        >>> parse_phase("1:512:0.005")
        Phase(epochs=1, batch_size=512, learning_rate=0.005)
    """
    try:
        epochs, batch_size, learning_rate = text.split(":")
        return Phase(int(epochs), int(batch_size), float(learning_rate))
    except ValueError:
        message = f"--phases takes EPOCHS:BATCH:RATE, numbers above 0 such as 1:512:0.005, not {text!r}"
        raise ValueError(message) from None


def load_config(fields: Mapping[str, Any]) -> TrainConfig:
    """A configuration from its JSON fields: the inverse of `TrainConfig.as_dict`.

    Example:
        >>> load_config(TrainConfig(width=0.5).as_dict()) == TrainConfig(width=0.5)
        True
    """
    fields = dict(fields, out=Path(fields["out"]), phases=tuple(fields["phases"]))
    fields["data_dir"] = Path(fields["data_dir"]) if fields["data_dir"] else None
    return TrainConfig(**fields)


def _require(condition: bool, name: str, accepted: str, value: Any):
    if not condition:
        raise ValueError(f"--{name.replace('_', '-')} must be {accepted}, not {value}")
