"""What slides over an image, as a sum over the offsets of its window: convolutions and poolings.

At one offset, a convolution is a matrix applied to some of the pixels, and a pooling a choice of some of them. Which
pixels meet which outputs there is arithmetic: strides, padding and dilations are all in it.

On a CPU a convolution inside a loop runs at a fraction of its speed outside, while matrix products lose nothing: for
many columns it is sent back offset by offset, each a matrix product over the pixels that the offset meets (measured on
a 4x4 image, 384 to 256 channels: 21 against 91 GMAC/s). A max pooling finds its winners once, for all columns.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from curvax.exact.primitives.layers import Layer, Window, examples_first
from curvax.exact.primitives.record import Form, LayerRule, Primitive, Pull, along, records


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


# Convolutions.


def _images(eqn, slot, dim):
    numbers = eqn.params["dimension_numbers"]
    images = slot == 0 and dim == numbers.out_spec[0] and eqn.params["batch_group_count"] == 1
    return numbers.lhs_spec[0] if images else None


_convolution_axis = along(_images)


def _fits(eqn, slot, axis, num_examples) -> bool:
    own, images = (_convolution_axis(eqn, i, 0, axis, num_examples) for i in (slot, 0))
    return slot == 1 and eqn.params["batch_group_count"] == 1 and own is None and images is not None


def _convolution(eqn, slot, axis, num_examples) -> Layer:
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    kernel_sizes = [eqn.invars[1].aval.shape[d] for d in numbers.rhs_spec[2:]]

    def layout(array, spec, batch_axis):
        channels = examples_first(array, batch_axis, num_examples, spec[2:], spec[1:2])
        return channels.reshape(*channels.shape[:2], groups, -1)

    def unfold(matrix):
        matrix = matrix.reshape(*kernel_sizes, *matrix.shape[1:])
        matrix = jnp.moveaxis(matrix, (-3, -1, -2), (0, 1, 2))
        matrix = matrix.reshape(-1, *matrix.shape[2:])
        return matrix.transpose(np.argsort(numbers.rhs_spec))

    image_axis = _convolution_axis(eqn, 0, 0, axis, num_examples)
    operand = lambda values: layout(values[0], numbers.lhs_spec, image_axis)
    windows = _kernel_windows(eqn, axis.outer * axis.inner)
    return Layer(operand, windows, lambda cotangent: layout(cotangent, numbers.out_spec, axis), unfold)


def _kernel_windows(eqn, copies) -> list[Window]:
    """For each offset of the kernel, the pixels and the outputs that it connects."""
    lines = convolution_lines(eqn)

    def flat(places, sizes):
        # The examples' axis may hold further positions, before the spatial ones.
        grid = np.ix_(np.arange(copies), *places)
        return np.ravel_multi_index(np.broadcast_arrays(*grid), (copies, *sizes)).ravel()

    sizes = [line.pixels for line in lines], [line.outputs for line in lines]
    return [tuple(map(flat, meeting, sizes)) for _, meeting in offsets(lines)]


def _pull_convolution(eqn, values) -> Pull | None:
    if eqn.params["batch_group_count"] != 1 or eqn.params["feature_group_count"] != 1:
        return None
    images, kernel = values
    spec = eqn.params["dimension_numbers"]
    lines = convolution_lines(eqn)
    channels_last = lambda numbers: (numbers[0], *numbers[2:], numbers[1])
    kernel = kernel.transpose(*spec.rhs_spec[2:], spec.rhs_spec[0], spec.rhs_spec[1])
    shape = [images.shape[d] for d in spec.lhs_spec]
    batch, inputs, pixels = shape[0], shape[1], shape[2:]

    def pull(cotangent):
        # The result may be wider than what is convolved.
        cotangent = cotangent.transpose(channels_last(spec.out_spec)).astype(images.dtype)
        total = jnp.zeros((batch, *pixels, inputs), cotangent.dtype)
        for offset, (seen, reached) in offsets(lines):
            part = pick(cotangent, [range(batch), *reached]) @ kernel[offset]
            total += put(part, [range(batch), *seen, range(inputs)], total.shape)
        return total.transpose(_inverse(channels_last(spec.lhs_spec)))

    return pull


def _inverse(permutation):
    return [permutation.index(d) for d in range(len(permutation))]


# Poolings.


def _window(eqn, slot, dim):
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    alone = all(eqn.params[name][dim] == 1 for name in names) and tuple(eqn.params["padding"][dim]) == (0, 0)
    return dim if alone else None


def _pull_max_pooling(eqn, values) -> Pull:
    (images,) = values
    out = eqn.outvars[0].aval
    meetings = [meeting for _, meeting in offsets(pooling_lines(eqn))]
    lowest = jnp.full(out.shape, -jnp.inf, out.dtype)
    best, winner = lowest, jnp.full(out.shape, -1)
    for index, (seen, reached) in enumerate(meetings):
        value = jnp.where(_reached(reached, out.shape), put(pick(images, seen), reached, out.shape), lowest)
        # The first of equals wins, as in JAX.
        winner = jnp.where(value > best, index, winner)
        best = jnp.maximum(value, best)

    def pull(cotangent):
        total = jnp.zeros(images.shape, cotangent.dtype)
        for index, (seen, reached) in enumerate(meetings):
            won = jnp.where(winner == index, cotangent, jnp.zeros_like(cotangent))
            total += put(pick(won, reached), seen, images.shape)
        return total

    return pull


def _reached(places, shape) -> jax.Array:
    return put(jnp.ones([len(place) for place in places], bool), places, shape)


RECORDS = [
    Primitive(
        "conv_general_dilated",
        Form.BILINEAR,
        axis=_convolution_axis,
        layer=LayerRule(_fits, _convolution),
        pullback=_pull_convolution,
    ),
    *records(Form.LINEAR, "reduce_window_sum", axis=along(_window)),
    *records(Form.PIECEWISE, "reduce_window_max", axis=along(_window), pullback=_pull_max_pooling),
    *records(Form.PIECEWISE, "reduce_window_min", axis=along(_window)),
]
