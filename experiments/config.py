"""What a training run is: one frozen dataclass, which the command line offers and the metrics file keeps.

Two commands share it. `train` takes it as it is; `race` holds its fields fixed (`problems.py`) and varies the
optimizer and its learning rate. A number that is not in here cannot change a result.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.errors import UsageError
from experiments.options import ABOVE_0, AT_LEAST_0, FRACTION, Options, Rule, option, up_to

if TYPE_CHECKING:
    from curvax.schedules import BatchSchedule

METHODS = (
    "sgd",
    "adamw",
    "lars",
    "lamb",
    "muon",
    "muon_lars",
    "soap",
    "sophia",
    "mclr",
    "percent_delta",
    "cblr",
    "cblr_squares",
)
# Those that want the curvature of the loss, and those with a decay of second moments.
CURVED, ADAPTIVE = frozenset({"cblr", "sophia"}), frozenset({"adamw", "lamb", "muon", "muon_lars", "soap"})
# How and where a run is carried out: to change this changes its results by rounding at most.
CONDUCT = frozenset(
    ("data_dir", "devices", "parallel", "coordinator", "num_processes", "process_id", "checkpoint_seconds", "out")
)
# More of these are a slip of the finger, and lists of them would fill the memory.
MOST_EPOCHS, MOST_DEVICES, MOST_PIXELS = 100_000, 64, 4096
DATASET = re.compile(r"[A-Za-z0-9_]+(/[A-Za-z0-9_.-]*[A-Za-z0-9_-])?(:\d+\.\d+\.\d+)?")

images, network, method, plan, special, where = (
    functools.partial(option, group=heading)
    for heading in (
        *("images", "network", "method", "batches and learning rate"),
        *("what is left out, what is recorded", "devices, processes and folders"),
    )
)
SEEDS = Rule("at least 0 and below 2^32", lambda x: 0 <= x < 2**32)
ALEXNET = Rule("is for --model alexnet", lambda config: config.model == "alexnet")
WITH_CURVATURE = Rule("is for --optimizer cblr or sophia", lambda config: config.optimizer in CURVED)
RENEWING = Rule(
    "is for --optimizer cblr, cblr_squares, sophia or soap",
    lambda config: config.optimizer in {*CURVED, "soap", "cblr_squares"},
)
WITH_MOMENTS = Rule(f"is for {', '.join(sorted(ADAPTIVE))}", lambda config: config.optimizer in ADAPTIVE)
DISCARDING = Rule("is for a --discard above 0", lambda config: config.discard > 0)
ONE_PHASE = Rule("is for runs without --phases", lambda config: not config.phases)


@dataclasses.dataclass(frozen=True)
class TrainConfig(Options):
    """Train one network on one data set with one optimizer. The same command goes on where it was stopped."""

    dataset: str = images(
        "digits",
        "digits (scikit-learn's, no download), generated (random patterns, no download), or any image classification"
        " data set of TensorFlow Datasets, such as cifar10, cifar100, mnist or svhn_cropped.",
    )
    data_dir: Path | None = images(None, "Folder of TFDS's data sets; else TFDS_DATA_DIR, or ~/tensorflow_datasets.")
    image_size: int = images(32, "Side in pixels to which every image is resized.", up_to(MOST_PIXELS))
    augment: bool = images(True, "Pad by an eighth of the side, crop and flip at random; digits are never flipped.")
    holdout: float = images(0.0, "Test on this fraction of the training images, not on the test images.", FRACTION)
    train_images: int | None = images(None, "Train on this many images, the first ones; else on all.", ABOVE_0)
    test_images: int | None = images(None, "Test on this many images, the first ones; else on all.", ABOVE_0)

    model: Literal["alexnet", "resnet18"] = network("alexnet", "The network.")
    width: float = network(1.0, "Fraction of the published channels and features.", up_to(100))
    hidden: int | None = network(None, "Features of the dense layers; else 4096 times the width.", ABOVE_0, ALEXNET)
    dropout: float | None = network(None, "Share dropped before two dense layers.", FRACTION, ALEXNET, usual=0.5)
    init: Literal["he", "pytorch"] = network(
        "he", "he: kernels from N(0, 2 / fan in), biases 0. pytorch: both uniform within 1 / sqrt(fan in)."
    )
    sharpness: float = network(
        1.0,
        "Trains on the cross-entropy of this number times the logits. Above 1 the loss is sharper: near the start its"
        " gradient grows with it, its curvature with its square. The reported test loss is the plain cross-entropy.",
        ABOVE_0,
    )

    optimizer: Literal[METHODS] = method("mclr", "The method.")
    momentum: float = method(0.9, "Decay of the momentum, or of Adam's first moment.", FRACTION)
    nesterov: bool = method(False, "Nesterov's momentum, where a method has the choice.")
    b2: float | None = method(None, "Decay of second moments.", FRACTION, WITH_MOMENTS, usual=0.999)
    weight_decay: float = method(0.0005, "Multiple of the parameters added to their update.", AT_LEAST_0)
    damping: float | None = method(
        None,
        "Of cblr: added to the curvature, times a layer's mean. Of sophia: gamma, which multiplies the curvature.",
        AT_LEAST_0,
        WITH_CURVATURE,
        usual=0.3,
    )
    curvature_every: int | None = method(
        None,
        "Steps from one estimate of the curvature, or one turn of the basis, to the next.",
        ABOVE_0,
        RENEWING,
        usual=10,
    )
    curvature_batch_size: int | None = method(
        None, "Images for an estimate; else a micro-batch.", ABOVE_0, WITH_CURVATURE
    )

    learning_rate: float | None = plan(
        None, "Peak; else the best of the trials of `race` (docs/race).", ABOVE_0, ONE_PHASE
    )
    batch_size: int | None = plan(None, "Images per step; the rest is dropped.", ABOVE_0, ONE_PHASE, usual=1024)
    epochs: int | None = plan(None, "Passes over the training images.", up_to(MOST_EPOCHS), ONE_PHASE, usual=10)
    phases: tuple[str, ...] = plan(
        (),
        "As 1:512:0.005 79:8192:0.05, in place of --epochs, --batch-size and --learning-rate.",
        metavar="EPOCHS:BATCH:RATE",
        repeats=True,
    )
    schedule: Literal["cosine", "constant"] = plan("cosine", "How the learning rate goes on after the warm-up.")
    warmup_epochs: float = plan(1.0, "Epochs in which the learning rate rises from 0.", AT_LEAST_0)
    micro_batch_size: int | None = plan(
        None,
        "Images whose gradient is computed at once, for batches beyond memory. The step is that of the whole batch, but"
        " for dropout, which draws anew, and batch norm, which normalises over each micro-batch.",
        ABOVE_0,
    )

    discard: float = special(0.0, "Fraction of a batch left out of its gradient, the mean over the rest.", FRACTION)
    discard_by: Literal["loss", "chance"] | None = special(
        None, "Which are left out: those with the smallest loss, or any.", None, DISCARDING, usual="loss"
    )
    discard_epochs: int | None = special(None, "In the first so many epochs only; else in all.", ABOVE_0, DISCARDING)
    probes: bool = special(False, "Record every array's mean gradient, parameter stride and loss stride in every step.")

    devices: int = where(1, "Of each process, to divide batches over; a CPU simulates them.", up_to(MOST_DEVICES))
    parallel: Literal["jit", "pmap"] = where(
        "jit", "How a gradient is divided: jit on a mesh, or pmap; to rounding alike."
    )
    coordinator: str | None = where(
        None,
        "HOST:PORT of the first of several processes, for all of them; or auto, if they are to find each other as"
        " jax.distributed does. Under SLURM, Open MPI and on TPU pods they do so without being told.",
    )
    num_processes: int | None = where(None, "Number of processes, with --coordinator HOST:PORT.", ABOVE_0)
    process_id: int | None = where(None, "Which of them this is, from 0, with --coordinator HOST:PORT.", AT_LEAST_0)
    seed: int = where(0, "Determines initial parameters, order, augmentation, dropout and probes.", SEEDS)
    checkpoint_seconds: float | None = where(
        60.0, "Seconds between checkpoints; one is at the end, too. 0: after every step. none: not at all.", AT_LEAST_0
    )
    out: Path = where(Path("runs"), "Folder for the run's own, which is named after what determines its results.")

    def __post_init__(self):
        super().__post_init__()
        if not DATASET.fullmatch(self.dataset):
            raise UsageError(
                f"--dataset takes digits, generated, or a name that TFDS lists, such as cifar10, not {self.dataset!r}"
            )
        if self.model == "alexnet" and self.image_size < 16:
            raise UsageError(f"--image-size must be at least 16 for alexnet, not {self.image_size}")
        if self.discard and self.optimizer in CURVED:
            raise UsageError(f"--discard does not reach the curvature of {self.optimizer}: choose another --optimizer")
        if self.num_epochs > MOST_EPOCHS:
            raise UsageError(f"--phases take at most {MOST_EPOCHS} epochs in all")
        for batch_size in self.batch_sizes:
            self._check_batch(batch_size)
        self._check_processes()

    @functools.cached_property
    def _phases(self) -> list[tuple[int, int, float | None]]:
        """Epochs, batch size and, if it has its own, learning rate of each."""
        phases = [] if self.phases else [(self.epochs, self.batch_size, None)]
        for text in self.phases:
            try:
                epochs, batch_size, rate = text.split(":")
                phases.append((int(epochs), int(batch_size), float(rate)))
                valid = all(0 < number < math.inf for number in phases[-1])
            except ValueError:
                valid = False
            if not valid:
                raise UsageError(f"--phases takes EPOCHS:BATCH:RATE, numbers above 0 such as 1:512:0.005, not {text!r}")
        return phases

    def _check_batch(self, batch_size: int):
        micro = self.micro_size(batch_size)
        if batch_size % micro:
            raise UsageError(f"--micro-batch-size must divide the batch size {batch_size}, and {micro} does not")
        for name, size in (("micro-batch-size", micro), ("curvature-batch-size", self.curvature_size(batch_size))):
            if size % self.devices:
                raise UsageError(f"--devices {self.devices} must divide the --{name}, here {size} images")

    def _check_processes(self):
        names, said = ("coordinator", "num_processes", "process_id"), "--coordinator, --num-processes, --process-id"
        given = [getattr(self, name) is not None for name in names]
        if self.coordinator == "auto":
            if any(given[1:]):
                raise UsageError("--coordinator auto finds --num-processes and --process-id itself: leave them out")
        elif any(given):
            if not all(given):
                raise UsageError(f"{said} belong together: give all three, or --coordinator auto under a launcher")
            address = re.fullmatch(r"(\[[^]]+\]|[^:\s]+):(\d{1,5})", self.coordinator)
            if not address or not 0 < int(address[2]) < 2**16:
                raise UsageError(f"--coordinator takes HOST:PORT, as 127.0.0.1:7000, or auto, not {self.coordinator!r}")
            if self.process_id >= self.num_processes:
                raise UsageError(
                    f"--process-id must be below --num-processes {self.num_processes}, and is {self.process_id}"
                )

    def micro_size(self, batch_size: int) -> int:
        """Images whose gradient is computed at once."""
        return min(self.micro_batch_size or batch_size, batch_size)

    def curvature_size(self, batch_size: int) -> int:
        """Images of each batch from which the curvature is estimated."""
        return min(self.curvature_batch_size or self.micro_size(batch_size), batch_size)

    def discards(self, epoch: int) -> bool:
        """Whether images are left out in an epoch, counted from 0."""
        return self.discard > 0 and (self.discard_epochs is None or epoch < self.discard_epochs)

    @property
    def batch_sizes(self) -> list[int]:
        """All that occur, in order of size."""
        return sorted({batch_size for _, batch_size, _ in self._phases})

    @property
    def num_epochs(self) -> int:
        """Passes over the training images."""
        return sum(epochs for epochs, _, _ in self._phases)

    def plan(self, learning_rate: float) -> "BatchSchedule":
        """What is trained when; `learning_rate` is the peak where the phases do not say their own."""
        from curvax.schedules import BatchSchedule, Phase

        phases = tuple(Phase(epochs, size, rate or learning_rate) for epochs, size, rate in self._phases)
        return BatchSchedule(phases, self.warmup_epochs, self.schedule)

    @property
    def name(self) -> str:
        """Names what determines the results: two configurations have one name if and only if theirs are the same."""
        digest = hashlib.sha256(json.dumps(self.changed, sort_keys=True).encode()).hexdigest()[:10]
        return f"{re.sub('[/:]', '-', self.dataset)}-{self.model}-{self.optimizer}-{digest}"

    @property
    def changed(self) -> dict[str, Any]:
        """What is not as usual of what determines the results: new options leave the names of old runs as they are."""
        usual = TrainConfig().as_dict()
        return {name: x for name, x in self.as_dict().items() if name not in CONDUCT and x != usual[name]}

    def describe(self, init: str | None = None) -> str:
        """What matters to a plot, in words; `init` where it stands for more than one."""
        images = f"the first {self.train_images:,}" if self.train_images else "all"
        dropout = f" dropout {self.dropout:g}," if self.model == "alexnet" else ""
        return (
            f"{self.model} at width {self.width:g}, {init or self.init} initialisation, {images} training images of"
            f" {self.dataset} at {self.image_size} pixels,{dropout}"
            f" {'crops and flips' if self.augment else 'no augmentation'}, momentum {self.momentum:g}, weight decay"
            f" {self.weight_decay:g}, {self.schedule} learning rate"
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values, in order."""
        as_json = {type(Path()): str, tuple: list}
        return {name: as_json.get(type(v), lambda v: v)(v) for name, v in dataclasses.asdict(self).items()}


def load_config(fields: Mapping[str, Any]) -> TrainConfig:
    """A configuration from its JSON fields: the inverse of `TrainConfig.as_dict`."""
    fields = dict(fields, out=Path(fields["out"]), phases=tuple(fields["phases"]))
    fields["data_dir"] = Path(fields["data_dir"]) if fields["data_dir"] else None
    return TrainConfig(**fields)
