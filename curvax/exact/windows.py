"""What slides over an image, as a sum over the offsets of its window.

At one offset, a convolution is a matrix applied to some of the pixels, and a pooling a choice of some of them. Which
pixels meet which outputs there is arithmetic: strides, padding and dilations are all in it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn


class Line(NamedTuple):
    """One dimension of a sliding window."""

    pixels: int
    outputs: int
    size: int
    stride: int
    padding: tuple[int, int]
    base_dilation: int
    window_dilation: int

    def meeting(self, offset: int) -> tuple[range, range]:
        """The pixels that an offset sees, and the outputs it sees them for."""
        output = np.arange(self.outputs)
        place = output * self.stride + offset * self.window_dilation - self.padding[0]
        pixel = place // self.base_dilation
        meets = (place % self.base_dilation == 0) & (pixel >= 0) & (pixel < self.pixels)
        return _progression(pixel[meets]), _progression(output[meets])


Meeting = tuple[tuple[range, ...], tuple[range, ...]]


def offsets(lines: Sequence[Line]) -> Iterator[tuple[tuple[int, ...], Meeting]]:
    """Every offset of a window, with the pixels and the outputs that meet there, dimension by dimension."""
    for offset in np.ndindex(*(line.size for line in lines)):
        meetings = [line.meeting(place) for line, place in zip(lines, offset, strict=True)]
        yield offset, (tuple(seen for seen, _ in meetings), tuple(reached for _, reached in meetings))


def convolution_lines(eqn: JaxprEqn) -> list[Line]:
    """The spatial dimensions of a `conv_general_dilated`."""
    spec = eqn.params["dimension_numbers"]
    pixels, outputs, sizes = (
        [atom.aval.shape[d] for d in dims[2:]]
        for atom, dims in (
            (eqn.invars[0], spec.lhs_spec),
            (eqn.outvars[0], spec.out_spec),
            (eqn.invars[1], spec.rhs_spec),
        )
    )
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    return list(map(Line, pixels, outputs, sizes, *(eqn.params[name] for name in names)))


def pooling_lines(eqn: JaxprEqn) -> list[Line]:
    """All dimensions of a `reduce_window_*`."""
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    return list(map(Line, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape, *(eqn.params[name] for name in names)))


def pick(array: jax.Array, places: Sequence[range]) -> jax.Array:
    """The entries of `array` at `places`."""
    return array[tuple(slice(place.start, place.stop, place.step) for place in places)]


def put(array: jax.Array, places: Sequence[range], shape: Sequence[int]) -> jax.Array:
    """Zeros of some shape with `array` at `places`: the transpose of `pick`."""
    if not array.size:
        return jnp.zeros(shape, array.dtype)
    last = [place[-1] for place in places]
    config = [(p.start, n - 1 - end, p.step - 1) for p, n, end in zip(places, shape, last, strict=True)]
    return jax.lax.pad(array, jnp.zeros((), array.dtype), config)


def _progression(places: np.ndarray) -> range:
    if len(places) < 2:
        return range(places[0], places[0] + 1) if len(places) else range(0)
    return range(int(places[0]), int(places[-1]) + 1, int(places[1] - places[0]))
