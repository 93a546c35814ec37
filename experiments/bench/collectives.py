"""What an update moves between devices, read from the compiled program: nothing is allocated, and nothing runs.

A program for many devices needs a process in which there are so many. `python -m experiments.bench.collectives DEVICES
WIDTH DEPTH` is that process: it prints one JSON object per rule.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax

ROOT = Path(__file__).parents[2]
RULES = {
    "lars": lambda: curvax.lars(0.1, weight_decay=1e-4),
    "percent_delta": lambda: curvax.percent_delta(0.1, weight_decay=1e-4),
    "mclr": lambda: curvax.mclr(0.1, weight_decay=1e-4),
    "lamb": lambda: curvax.lamb(0.1, weight_decay=1e-4),
    "cblr": lambda: curvax.cblr(0.1, weight_decay=1e-4),
}
# What the search for a median of float32 may take at most, see `curvax.selection`; other loops there are none.
MAX_PASSES = 26
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")
COLLECTIVE = re.compile(rf"= (.*?) (?:{'|'.join(COLLECTIVES)})(?:-start)?\(")


class Traffic(NamedTuple):
    """The collectives of one update of so many layers: how many (those in loops once), and the bytes of their results.

    On one device, of the largest, and of all, those in loops counted as often as they may run at most.
    """

    rule: str
    layers: int
    parameters: int
    count: int
    largest: int
    bytes: int


def measure(devices: int, width: int, depth: int) -> Iterator[Traffic]:
    """Traffic of every rule in a process of its own with so many simulated devices, for dense layers of this width."""
    arguments = [sys.executable, "-m", "experiments.bench.collectives", *map(str, (devices, width, depth))]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            yield Traffic(**json.loads(line))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)


def traffic(rule: str, mesh: jax.sharding.Mesh, width: int, depth: int) -> Traffic:
    """Compiles an update of sharded parameters and looks at its collectives."""
    program = compiled_update(RULES[rule](), shapes(mesh, width, depth), mesh)
    results = collectives(program)
    sizes = [size for size, _ in results]
    total = sum(size * (MAX_PASSES if in_loop else 1) for size, in_loop in results)
    return Traffic(rule, depth, depth * width * (width + 1), len(sizes), max(sizes, default=0), total)


def shapes(mesh: jax.sharding.Mesh, width: int, depth: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Dense layers, whose kernels are split by rows and by columns in turn."""

    def one(spec, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    specs = [P("x", None), P(None, "x")]
    return [{"kernel": one(specs[i % 2], width, width), "bias": one(P("x"), width)} for i in range(depth)]


def compiled_update(tx: optax.GradientTransformationExtraArgs, params: Any, mesh: jax.sharding.Mesh) -> str:
    """The text of the program that updates such parameters, and leaves everything where it is."""
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    state = optax.tree.map_params(
        tx,
        lambda x, like: place(x, like.sharding),
        jax.eval_shape(tx.init, params),
        params,
        transform_non_params=lambda x: place(x, NamedSharding(mesh, P())),
    )
    update = lambda g, state, w, h: optax.with_extra_args_support(tx).update(g, state, w, hessian_diag=h)
    outputs = jax.tree.map(lambda x: x.sharding, (params, state))
    return jax.jit(update, out_shardings=outputs).lower(params, state, params, params).compile().as_text()


def collectives(program: str) -> list[tuple[int, bool]]:
    """Bytes of each collective's result, and whether it is part of a loop."""
    results = []
    # A computation begins at the margin; what a loop runs is named its body or condition, or is called by these.
    for block in re.split(r"\n(?=\S)", program):
        in_loop = not block.startswith("ENTRY")
        results += [(result_bytes(result), in_loop) for result in COLLECTIVE.findall(block)]
    return results


def result_bytes(shape: str) -> int:
    """The size of an HLO type, which may be a tuple.

    Example:
        >>> result_bytes("(f32[8,4]{1,0}, pred[])")
        129
    """
    parts = re.findall(r"[a-z]+(\d*)\[([\d,]*)\]", shape)
    # Only `pred` has no number: a byte each.
    return sum(math.prod(int(n) for n in dims.split(",") if n) * int(bits or 8) // 8 for bits, dims in parts)


def main(devices: int, width: int, depth: int) -> None:
    """Prints every rule's traffic."""
    jax.config.update("jax_num_cpu_devices", devices)
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu"))
    for rule in RULES:
        print(json.dumps(traffic(rule, mesh, width, depth)._asdict()), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
