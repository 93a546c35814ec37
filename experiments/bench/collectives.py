"""What an update moves between devices, read from the compiled program: nothing is allocated, and nothing runs.

A program for many devices needs a process in which there are so many. `python -m experiments.bench.collectives DEVICES
WIDTH DEPTH` is that process: it prints one JSON object per rule.
"""

import functools
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax

RULES = {name: getattr(curvax, name) for name in ("lars", "percent_delta", "mclr", "lamb")}
# The radius alone: the eigenbasis and the polar factor are products of whole matrices.
RULES["cblr"] = functools.partial(curvax.cblr, eigenbasis=False, orthogonal=False)
# What the search for a median of float32 may take at most, see `curvax.selection`; other loops there are none.
MAX_PASSES = 26
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")
COLLECTIVE = re.compile(rf"= (.*?) (?:{'|'.join(COLLECTIVES)})(?:-start)?\(")


class Traffic(NamedTuple):
    """The collectives of one update: how many (those in loops once), and the bytes of their results on one device.

    Of the largest, and of all, those in loops counted as often as they may run at most.
    """

    rule: str
    count: int
    largest: int
    bytes: int


def measure(devices: int, width: int, depth: int) -> Iterator[Traffic]:
    """Traffic of every rule in a process of its own with so many simulated devices, for dense layers of this width."""
    arguments = [sys.executable, "-m", "experiments.bench.collectives", *map(str, (devices, width, depth))]
    root = Path(__file__).parents[2]
    with subprocess.Popen(arguments, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            yield Traffic(**json.loads(line))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)


def compiled_update(rule: str, mesh: jax.sharding.Mesh, width: int, depth: int) -> str:
    """The text of the program that updates dense layers, whose kernels are split by rows and by columns in turn."""
    place = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    kernels = [place((width, width), (P("x", None), P(None, "x"))[i % 2]) for i in range(depth)]
    params = [{"kernel": kernel, "bias": place((width,), P("x"))} for kernel in kernels]
    tx = optax.with_extra_args_support(RULES[rule](0.1, weight_decay=1e-4))
    state = optax.tree.map_params(
        tx,
        lambda x, like: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding),
        jax.eval_shape(tx.init, params),
        params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P())),
    )
    update = lambda g, state, w, h: tx.update(g, state, w, hessian_diag=h)
    outputs = jax.tree.map(lambda x: x.sharding, (params, state))
    return jax.jit(update, out_shardings=outputs).lower(params, state, params, params).compile().as_text()


def collectives(program: str) -> list[tuple[int, bool]]:
    """Bytes of each collective's result, and whether it is part of a loop."""
    results = []
    # A computation begins at the margin; what a loop runs is named its body or condition, or is called by these.
    for block in re.split(r"\n(?=\S)", program):
        results += [(result_bytes(shape), not block.startswith("ENTRY")) for shape in COLLECTIVE.findall(block)]
    return results


def result_bytes(shape: str) -> int:
    """The size of an HLO type, which may be a tuple."""
    parts = re.findall(r"[a-z]+(\d*)\[([\d,]*)\]", shape)
    # Only `pred` has no number: a byte each.
    return sum(math.prod(int(n) for n in dims.split(",") if n) * int(bits or 8) // 8 for bits, dims in parts)


def main(devices: int, width: int, depth: int):
    """Prints every rule's traffic."""
    jax.config.update("jax_num_cpu_devices", devices)
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu"))
    for rule in RULES:
        found = collectives(compiled_update(rule, mesh, width, depth))
        total = sum(size * (MAX_PASSES if in_loop else 1) for size, in_loop in found)
        largest = max((size for size, _ in found), default=0)
        print(json.dumps(Traffic(rule, len(found), largest, total)._asdict()), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
