"""Small training programs of the kinds that people write: a network, its own optimizer, and data that need no download.

Each is written as its public model is, with that model's shapes, initial values and way of taking the loss:

- `mnist`: Flax's MNIST example with batch norm and dropout, on digits; its own optimizer is momentum SGD;
- `vae`: Flax's variational autoencoder, whose loss is summed over the pixels, and whose biases are zero; Adam;
- `resnet`: residual blocks with batch norm, the last norm of each starting at zero as in Flax's ImageNet; momentum SGD;
- `gpt`, `gpt_tied`: a decoder written by hand, embeddings and last norm beside each other, tokens by Zipf's law; AdamW.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from curvax import Objective

BATCH = 64
TOKENS, CONTEXT, WIDTH, HEADS, BLOCKS = 512, 32, 32, 4, 2


class Program(NamedTuple):
    """A training program.

    Attributes:
      init: `init(key) -> params`.
      predict: `predict(params, data) -> outputs`, in training mode: dropout and latent draws come from `data["key"]`.
      loss: `loss(outputs, data) -> (B,)`.
      batches: `batches(seed, steps) -> data`, one per step.
      own: the optimizer that comes with the public program.
    """

    init: Callable[[jax.Array], Any]
    predict: Callable[[Any, Any], Any]
    loss: Callable[[Any, Any], jax.Array]
    batches: Callable[[int, int], Any]
    own: optax.GradientTransformation

    def objective(self, data: Any) -> Objective:
        return Objective(self.predict, self.loss, data)


def lecun(key, *shape):
    return jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))


def dense_params(key, *shape):
    return {"kernel": lecun(key, *shape), "bias": jnp.zeros(shape[-1])}


def norm_params(features, scale=1.0):
    return {"scale": jnp.full(features, scale), "bias": jnp.zeros(features)}


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def conv(p, x, stride=1):
    y = jax.lax.conv_general_dilated(
        x, p["kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + p["bias"] if "bias" in p else y


def normalize(p, x, axes):
    centered = x - x.mean(axes, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.square(centered).mean(axes, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def batch_norm(p, x):
    return normalize(p, x, tuple(range(x.ndim - 1)))


def layer_norm(p, x):
    return normalize(p, x, -1)


def pool(x):
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "SAME") / 4


def dropout(key, x, rate):
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def cross_entropy(logits, data):
    return optax.softmax_cross_entropy_with_integer_labels(logits, data["y"])


def digit_batches(seed, steps):
    digits = load_digits()
    rng = np.random.default_rng(seed)
    for step in range(steps):
        chosen = rng.choice(len(digits.target), BATCH, replace=False)
        x = (digits.images[chosen] / 16).astype(np.float32)[..., None]
        yield {
            "x": x,
            "y": digits.target[chosen].astype(np.int32),
            "key": jax.random.fold_in(jax.random.key(seed), step),
        }


def mnist_init(key):
    keys = jax.random.split(key, 4)
    return {
        "conv1": dense_params(keys[0], 3, 3, 1, 16),
        "batch_norm1": norm_params(16),
        "conv2": dense_params(keys[1], 3, 3, 16, 32),
        "batch_norm2": norm_params(32),
        "linear1": dense_params(keys[2], 128, 64),
        "linear2": dense_params(keys[3], 64, 10),
    }


def mnist_predict(p, data):
    first, second = jax.random.split(data["key"])
    x = pool(jax.nn.relu(dropout(first, batch_norm(p["batch_norm1"], conv(p["conv1"], data["x"])), 0.025)))
    x = pool(jax.nn.relu(batch_norm(p["batch_norm2"], conv(p["conv2"], x))))
    x = jax.nn.relu(dropout(second, dense(p["linear1"], x.reshape(len(x), -1)), 0.025))
    return dense(p["linear2"], x)


def vae_init(key):
    keys = jax.random.split(key, 5)
    shapes = {"fc1": (64, 128), "mean": (128, 8), "logvar": (128, 8), "fc2": (8, 128), "fc3": (128, 64)}
    return {name: dense_params(k, *shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def vae_predict(p, data):
    hidden = jax.nn.relu(dense(p["fc1"], data["x"].reshape(len(data["x"]), -1)))
    mean, logvar = dense(p["mean"], hidden), dense(p["logvar"], hidden)
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(data["key"], mean.shape)
    return jnp.concatenate([dense(p["fc3"], jax.nn.relu(dense(p["fc2"], z))), mean, logvar], axis=-1)


def vae_loss(outputs, data):
    logits, mean, logvar = jnp.split(outputs, [64, 72], axis=-1)
    pixels = optax.sigmoid_binary_cross_entropy(logits, data["x"].reshape(len(logits), -1)).sum(-1)
    return pixels - 0.5 * (1 + logvar - jnp.square(mean) - jnp.exp(logvar)).sum(-1)


def resnet_init(key):
    keys = iter(jax.random.split(key, 12))
    params = {"stem": {"kernel": lecun(next(keys), 3, 3, 1, 16)}, "stem_norm": norm_params(16)}
    for i, (features_in, features) in enumerate([(16, 16), (16, 32)]):
        block = {
            "conv1": {"kernel": lecun(next(keys), 3, 3, features_in, features)},
            "norm1": norm_params(features),
            "conv2": {"kernel": lecun(next(keys), 3, 3, features, features)},
            "norm2": norm_params(features, 0.0),
        }
        if features_in != features:
            block |= {"projection": {"kernel": lecun(next(keys), 1, 1, features_in, features)}}
            block |= {"projection_norm": norm_params(features)}
        params[f"block{i}"] = block
    return params | {"head": dense_params(next(keys), 32, 10)}


def resnet_predict(p, data):
    x = jax.nn.relu(batch_norm(p["stem_norm"], conv(p["stem"], data["x"])))
    for i in range(2):
        block = p[f"block{i}"]
        stride = 2 if "projection" in block else 1
        y = jax.nn.relu(batch_norm(block["norm1"], conv(block["conv1"], x, stride)))
        y = batch_norm(block["norm2"], conv(block["conv2"], y))
        if "projection" in block:
            x = batch_norm(block["projection_norm"], conv(block["projection"], x, stride))
        x = jax.nn.relu(x + y)
    return dense(p["head"], x.mean((1, 2)))


def token_batches(seed, steps, batch=16):
    """Words by Zipf's law: each is followed by a word of its own half of the time, else by a fresh draw."""
    rng = np.random.default_rng(seed)
    law = 1 / np.arange(1, TOKENS + 1)
    follower = np.random.default_rng(0).permutation(TOKENS)
    for _ in range(steps):
        text = rng.choice(TOKENS, (batch, CONTEXT + 1), p=law / law.sum())
        follows = rng.random(text.shape) < 0.5
        for t in range(1, CONTEXT + 1):
            text[:, t] = np.where(follows[:, t], follower[text[:, t - 1]], text[:, t])
        yield {"x": text[:, :-1].astype(np.int32), "y": text[:, 1:].astype(np.int32)}


def gpt_init(key, tied):
    keys = iter(jax.random.split(key, 3 + 4 * BLOCKS))
    normal = lambda *shape, scale=0.02: scale * jax.random.normal(next(keys), shape)
    linear = lambda *shape: {"w": normal(*shape), "b": jnp.zeros(shape[-1])}
    params = {
        "wte": normal(TOKENS, WIDTH),
        "wpe": normal(CONTEXT, WIDTH),
        "lnf": jnp.ones(WIDTH),
    }
    params["blocks"] = [
        {
            "ln1": jnp.ones(WIDTH),
            "qkv": linear(WIDTH, 3 * WIDTH),
            "out": linear(WIDTH, WIDTH),
            "ln2": jnp.ones(WIDTH),
            "up": linear(WIDTH, 4 * WIDTH),
            "down": linear(4 * WIDTH, WIDTH),
        }
        for _ in range(BLOCKS)
    ]
    return params if tied else params | {"head": normal(WIDTH, TOKENS)}


def gpt_predict(p, data):
    def norm(scale, x):
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale

    def affine(layer, x):
        return x @ layer["w"] + layer["b"]

    def attention(block, x):
        q, k, v = jnp.split(affine(block["qkv"], x).reshape(*x.shape[:2], HEADS, -1), 3, axis=-1)
        scores = jnp.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(WIDTH // HEADS)
        scores = jnp.where(np.tri(CONTEXT, dtype=bool), scores, -1e9)
        return affine(block["out"], jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(scores), v).reshape(x.shape))

    x = p["wte"][data["x"]] + p["wpe"]
    for block in p["blocks"]:
        x = x + attention(block, norm(block["ln1"], x))
        x = x + affine(block["down"], jax.nn.gelu(affine(block["up"], norm(block["ln2"], x))))
    return norm(p["lnf"], x) @ (p["head"] if "head" in p else p["wte"].T)


def gpt_loss(logits, data):
    return cross_entropy(logits, data).mean(-1)


PROGRAMS = {
    "mnist": Program(mnist_init, mnist_predict, cross_entropy, digit_batches, optax.sgd(0.1, 0.9)),
    "vae": Program(vae_init, vae_predict, vae_loss, digit_batches, optax.adam(1e-3)),
    "resnet": Program(resnet_init, resnet_predict, cross_entropy, digit_batches, optax.sgd(0.1, 0.9)),
    "gpt": Program(lambda key: gpt_init(key, False), gpt_predict, gpt_loss, token_batches, optax.adamw(1e-3)),
    "gpt_tied": Program(lambda key: gpt_init(key, True), gpt_predict, gpt_loss, token_batches, optax.adamw(1e-3)),
}
