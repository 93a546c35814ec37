"""The devices of a run, those of all its processes: where its arrays are, and functions of a batch divided among them.

Under `jit` a function sees the whole batch: where its images are to be split is a hint, and the compiler sums over the
devices where the function sums over images. Under `pmap` it sees the share of one device, and sums by hand. What goes
in and what comes out is the same on all devices in both, and so is a checkpoint.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.errors import UsageError

AXIS = "data"


class Devices:
    """The first so many devices of each process, one after the other."""

    def __init__(self, number: int):
        if number > jax.local_device_count():
            raise UsageError(f"--devices {number}: there are {jax.local_device_count()}")
        self.all = [d for i in range(jax.process_count()) for d in jax.local_devices(process_index=i)[:number]]
        self._number = number
        mesh = jax.make_mesh((len(self.all),), (AXIS,), (AxisType.Auto,), devices=self.all)
        self._everywhere, self._split = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))

    def place(self, tree: Any) -> Any:
        """Puts arrays, the same in every process, on every device."""
        # Unlike `jax.device_put`, this compares nothing between processes.
        put = lambda x: jax.make_array_from_process_local_data(self._everywhere, np.asarray(x))
        return jax.tree.map(put, tree)

    def jit(self, function: Callable, **options: Any) -> Callable:
        """`jax.jit`, to arrays that are the same on all devices."""
        return jax.jit(function, out_shardings=self._everywhere, **options)

    def split(self, batch: jax.Array) -> jax.Array:
        """Within a function of `jit`: says that a batch is to be divided."""
        return jax.lax.with_sharding_constraint(batch, self._split)

    def pmap(self, function: Callable) -> Callable:
        """A function of the share of each device, of arrays that are the same on all; the first one is donated.

        Its keywords are compiled in.
        """

        @functools.cache
        def compiled(**options):
            # `pmap` wants one argument that differs between devices, and cannot leave names of arguments to the caller.
            own = lambda _, first, rest: function(first, *rest, **options)
            settings = {"in_axes": (0, None, None), "out_axes": None, "devices": self.all, "donate_argnums": (1,)}
            return jax.pmap(own, axis_name=AXIS, **settings)

        def call(first, *rest, **options):
            return jax.tree.map(self._join, compiled(**options)(np.zeros(self._number), first, rest))

        return call

    def _join(self, x):
        # To each process `pmap` returns arrays of its own devices alone.
        shards = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, self._everywhere, shards)


def own_share(batch: jax.Array) -> jax.Array:
    """Within a function of `pmap`: the entries along the first axis that belong to this device."""
    size = len(batch) // jax.lax.axis_size(AXIS)
    return jax.lax.dynamic_slice_in_dim(batch, jax.lax.axis_index(AXIS) * size, size)
