"""The price of the rules: a median beside a norm, an update beside optax's, and what is moved between devices."""

from collections.abc import Iterator

from experiments.bench import collectives, medians, updates
from experiments.bench.table import Row, Say

KIBIBYTES = 64


def rows(say: Say, repeats: int, quick: bool) -> Iterator[Row]:
    """The table."""
    for part in (medians.rows, updates.train_step, updates.small_layers, traffic):
        yield from part(say, repeats, quick)


def traffic(say: Say, repeats: int, quick: bool) -> Iterator[Row]:
    """What every rule moves between 8, 64 and 256 devices, for a hundred million sharded parameters; nothing is timed.

    For each rule, kibibytes per layer between as many devices as make it most, and the bytes of the largest collective;
    the bar of the latter is a layer's smallest array.
    """
    del repeats
    width, depth, meshes = (512, 2, (8,)) if quick else (2048, 24, (8, 64, 256))
    found = {}
    for devices in meshes:
        say(f"what moves between {devices} devices")
        for traffic in collectives.measure(devices, width, depth):
            found.setdefault(traffic.rule, {})[devices] = traffic
    for rule, by_devices in found.items():
        per_layer = {devices: t.bytes / 1024 / t.layers for devices, t in by_devices.items()}
        million = next(iter(by_devices.values())).parameters / 1e6
        detail = ", ".join(f"{kib:.3g} on {devices}" for devices, kib in per_layer.items())
        what = f"KiB per layer in collectives, {million:.0f} M parameters: {rule}"
        yield Row(what, max(per_layer.values()), (KIBIBYTES,), f"{detail} devices")
    largest = {rule: max(t.largest for t in by_devices.values()) for rule, by_devices in found.items()}
    rule = max(largest, key=largest.get)
    detail = f"{rule}; the smallest bias has {4 * width} bytes, a kernel {4 * width**2}"
    yield Row("bytes of the largest collective of any rule", largest[rule], (4 * width - 1,), detail)
