"""One step on many devices, written once and run in either of JAX's two ways.

Under `jit` on a mesh a function sees the whole batch: `share` only says that the images are to be split, and the
compiler sums over the devices where the function sums over images. Under `pmap` it sees the share of one device:
`share` cuts that out, and `total` sums by hand. What goes in and what comes out is the same on all devices in both, and
so is a checkpoint.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.errors import UsageError

AXIS = "data"


class Jit:
    """Runs functions under `jit`, on a mesh of the devices of all processes."""

    # The name that `axis_name` of curvax and of batch norm want; None where a function sees the whole batch.
    axis_name: str | None = None

    def __init__(self, devices: Sequence[jax.Device]):
        self.devices = devices
        mesh = jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)
        self.everywhere, self.split = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))

    def place(self, tree: Any) -> Any:
        """Puts arrays, the same in every process, on every device."""
        return jax.tree.map(self._place, tree)

    def _place(self, x):
        # Unlike `jax.device_put`, this compares nothing between processes.
        return on_data(lambda data: jax.make_array_from_process_local_data(self.everywhere, np.asarray(data)), x)

    @property
    def shares(self) -> int:
        """Into how many a function that is compiled here sees a batch divided."""
        return 1

    def compile_same(self, function: Callable, static: Sequence[str] = (), donate: bool = False) -> Callable:
        """A compiled function that does the same on all devices, without `share` and `total`.

        It is of arrays that are the same on all devices, to such arrays. Static keywords are compiled in; the first
        argument may be donated.
        """
        donated = (0,) if donate else ()
        return jax.jit(function, static_argnames=static, donate_argnums=donated, out_shardings=self.everywhere)

    def compile(self, function: Callable, static: Sequence[str] = (), donate: bool = False) -> Callable:
        """A compiled function that may use `share` and `total`, else as `compile_same`."""
        return self.compile_same(function, static, donate)

    def share(self, batch: jax.Array) -> jax.Array:
        """The entries along the first axis that belong to this device."""
        return jax.lax.with_sharding_constraint(batch, self.split)

    def whole(self, shares: jax.Array) -> jax.Array:
        """What `share` divides, put together again."""
        return shares

    def total(self, tree: Any) -> Any:
        """Sums over the batch, from sums over shares."""
        return tree


class Pmap(Jit):
    """Runs functions under `pmap`."""

    axis_name = AXIS

    @property
    def shares(self) -> int:
        """One for each device."""
        return len(self.devices)

    def compile(self, function: Callable, static: Sequence[str] = (), donate: bool = False) -> Callable:
        """As `Jit.compile`."""
        here = sum(device.process_index == jax.process_index() for device in self.devices)

        @functools.cache
        def compiled(**options):
            # `pmap` wants one argument that differs between devices, and cannot leave names of arguments to the caller.
            return jax.pmap(
                lambda _, first, rest: function(first, *rest, **options),
                axis_name=AXIS,
                in_axes=(0, None, None),
                out_axes=None,
                devices=self.devices,
                donate_argnums=(1,) if donate else (),
            )

        def call(first, *rest, **options):
            results = compiled(**options)(np.zeros(here), first, rest)
            return results if jax.process_count() == 1 else jax.tree.map(self._join, results)

        return call

    def _join(self, x):
        # To each process `pmap` returns arrays of its own devices alone.
        def join(data):
            shards = [shard.data for shard in data.addressable_shards]
            return jax.make_array_from_single_device_arrays(data.shape, self.everywhere, shards)

        return on_data(join, x)

    def share(self, batch: jax.Array) -> jax.Array:
        """The entries along the first axis that belong to this device."""
        size = len(batch) // self.shares
        return jax.lax.dynamic_slice_in_dim(batch, jax.lax.axis_index(AXIS) * size, size)

    def whole(self, shares: jax.Array) -> jax.Array:
        """What `share` divides, put together again."""
        return jax.lax.all_gather(shares, AXIS, tiled=True)

    def total(self, tree: Any) -> Any:
        """Sums over the batch, from sums over shares."""
        return jax.lax.psum(tree, AXIS)


WAYS = {"jit": Jit, "pmap": Pmap}


def on_data(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Applies a function to an array, and to the numbers in an array of keys."""
    if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return function(x)
    return jax.random.wrap_key_data(function(jax.random.key_data(x)), impl=jax.random.key_impl(x))


def devices_of_run(number: int) -> list[jax.Device]:
    """The first so many devices of each process, one after the other."""
    if number > jax.local_device_count():
        raise UsageError(f"--devices {number}: there are {jax.local_device_count()}")
    return [device for i in range(jax.process_count()) for device in jax.local_devices(process_index=i)[:number]]
