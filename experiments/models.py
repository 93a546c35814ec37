"""AlexNet and ResNet18 for small images, in Flax NNX.

A network here is a function of images, a key and a mode; what the training loop knows of Flax ends in this file:
`build` splits a module into its definition, parameters and state, `apply` puts them together again. Parameters and
state are plain nested dicts of arrays.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# Of a layer's number and its input.
Drop = Callable[[int, jax.Array], jax.Array]


class AlexNet(nnx.Module):
    """AlexNet as used on CIFAR-10: five convolutions, three poolings, three fully connected layers.

    At width 1, image size 32 and 10 classes it has 23,272,266 parameters; images have a side of at least 16 pixels.
    """

    def __init__(self, num_classes, *, width=1.0, image_size=32, hidden=None, init="he", rngs):
        channels = [scaled(c, width) for c in (64, 192, 384, 256, 256)]
        hidden = hidden or scaled(4096, width)
        # The stride and the three poolings leave a sixteenth of the side: 2 x 2 positions of a 32 x 32 image.
        flat = channels[-1] * ((image_size + 1) // 2 // 8) ** 2
        shapes = zip([3, *channels[:-1]], channels, (2, 1, 1, 1, 1), strict=True)
        self.convs = nnx.List([conv(i, o, 3, stride, True, init, rngs) for i, o, stride in shapes])
        sizes = [(flat, hidden), (hidden, hidden), (hidden, num_classes)]
        self.linears = nnx.List([linear(i, o, init, rngs) for i, o in sizes])

    def __call__(self, x: jax.Array, *, train: bool, drop: Drop) -> jax.Array:
        """Images `(B, size, size, 3)` to logits `(B, num_classes)`; in training, `drop` before the first two layers."""
        for i, layer in enumerate(self.convs):
            x = nnx.relu(layer(x))
            if i in (0, 1, 4):
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for i, layer in enumerate(self.linears):
            x = drop(i, x) if i < 2 and train else x
            x = layer(x) if i == 2 else nnx.relu(layer(x))
        return x


class BasicBlock(nnx.Module):
    """Two 3 x 3 convolutions with batch norm, added to their input, which is projected where the shape changes."""

    def __init__(self, inputs, outputs, stride, init, rngs):
        self.conv1, self.norm1 = conv(inputs, outputs, 3, stride, False, init, rngs), norm(outputs, rngs)
        self.conv2, self.norm2 = conv(outputs, outputs, 3, 1, False, init, rngs), norm(outputs, rngs)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.conv3, self.norm3 = conv(inputs, outputs, 1, stride, False, init, rngs), norm(outputs, rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Images `(B, h, w, inputs)` to `(B, h / stride, w / stride, outputs)`."""
        y = nnx.relu(self.norm1(self.conv1(x), use_running_average=not train))
        y = self.norm2(self.conv2(y), use_running_average=not train)
        return nnx.relu(y + (self.norm3(self.conv3(x), use_running_average=not train) if self.projects else x))


class ResNet18(nnx.Module):
    """ResNet18 as used on CIFAR-10: a 3 x 3 stem, eight basic blocks, the mean over positions, one linear layer.

    At width 1 and 10 classes it has 11,173,962 parameters.
    """

    def __init__(self, num_classes, *, width=1.0, init="he", rngs):
        channels = [scaled(c, width) for c in (64, 128, 256, 512)]
        self.stem, self.norm = conv(3, channels[0], 3, 1, False, init, rngs), norm(channels[0], rngs)
        blocks, inputs = [], channels[0]
        for stage, outputs in enumerate(channels):
            for stride in (2 if stage else 1, 1):
                blocks.append(BasicBlock(inputs, outputs, stride, init, rngs))
                inputs = outputs
        self.blocks = nnx.List(blocks)
        self.linear = linear(channels[-1], num_classes, init, rngs)

    def __call__(self, x: jax.Array, *, train: bool, drop: Drop) -> jax.Array:
        """Images `(B, size, size, 3)` to logits `(B, num_classes)`; nothing is dropped."""
        x = nnx.relu(self.norm(self.stem(x), use_running_average=not train))
        for block in self.blocks:
            x = block(x, train=train)
        return self.linear(jnp.mean(x, axis=(1, 2)))


def build(config, num_classes: int, key: jax.Array, axis_name: str | None = None) -> tuple[Any, Any, Any]:
    """The network of a configuration, from a key: its definition (static), parameters and statistics of batch norm.

    The definition is of a share of the batch where that is divided over an axis of devices of this name.
    """
    options = {"width": config.width, "init": config.init, "rngs": nnx.Rngs(key)}
    if config.model == "resnet18":
        model = ResNet18(num_classes, **options)
    else:
        model = AlexNet(num_classes, image_size=config.image_size, hidden=config.hidden, **options)
    model.set_attributes(nnx.BatchNorm, axis_name=axis_name, raise_if_not_found=False)
    definition, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return definition, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def apply(
    definition, params, stats, images: jax.Array, train: bool = False, drop: Drop = lambda layer, x: x
) -> tuple[jax.Array, Any]:
    """The logits of images `(B, size, size, 3)`, and the state after them; nothing is mutated.

    In training, batch norm takes the statistics of the batch, and `drop` drops features.
    """
    model = nnx.merge(definition, params, stats)
    logits = model(images, train=train, drop=drop)
    return logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def scaled(features: int, width: float) -> int:
    """A number of features at a fraction of the published width, at least 1."""
    return max(1, round(features * width))


def conv(inputs, outputs, size, stride, bias, init, rngs) -> nnx.Conv:
    """A square convolution that keeps the side of the image, divided by the stride."""
    options = initializers(init, inputs * size * size)
    options |= {"strides": stride, "padding": size // 2, "use_bias": bias, "conv_general_dilated": convolve}
    return nnx.Conv(inputs, outputs, (size, size), **options, rngs=rngs)


def convolve(x: jax.Array, kernel: jax.Array, strides, padding, **options) -> jax.Array:
    """`jax.lax.conv_general_dilated` of NHWC images; on a CPU, of tiny ones, their patches times one matrix.

    XLA's convolutions take two to four times as long there where the image is smaller than the kernel.
    """
    if jax.default_backend() != "cpu" or x.shape[1] >= kernel.shape[0]:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    (rows, columns), (down, right) = kernel.shape[:2], strides
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = (x.shape[1] - rows) // down + 1, (x.shape[2] - columns) // right + 1
    ends = [
        (i, i + down * (height - 1) + 1, j, j + right * (width - 1) + 1) for i in range(rows) for j in range(columns)
    ]
    patches = jnp.concatenate([x[:, a:b:down, c:d:right] for a, b, c, d in ends], -1)
    return patches @ kernel.reshape(-1, kernel.shape[-1])


def linear(inputs, outputs, init, rngs) -> nnx.Linear:
    """A fully connected layer."""
    return nnx.Linear(inputs, outputs, **initializers(init, inputs), rngs=rngs)


def norm(features, rngs) -> nnx.BatchNorm:
    """Batch norm whose averages forget as fast as PyTorch's: large batches make few steps."""
    return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, rngs=rngs)


def initializers(init: str, fan_in: int) -> dict[str, Any]:
    """Kernel and bias initializers of a layer that sums over `fan_in` inputs."""

    def drawn(draw):
        # By NumPy: to compile one draw for every shape takes longer than to train on the digits.
        generator = lambda key: np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return lambda key, shape, dtype, **_: jnp.asarray(draw(generator(key), shape), dtype)

    if init == "he":
        normal = drawn(lambda rng, shape: rng.normal(0, math.sqrt(2 / fan_in), shape))
        return {"kernel_init": normal, "bias_init": nnx.initializers.zeros_init()}
    uniform = drawn(lambda rng, shape: rng.uniform(-1, 1, shape) / math.sqrt(fan_in))
    return {"kernel_init": uniform, "bias_init": uniform}
