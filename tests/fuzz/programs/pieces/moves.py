"""Pieces without parameters: activations, pooling, shapes, masks and noise from the data."""

from tests.fuzz.programs.build import Build


def activation(b: Build):
    b.emit(
        b.pick(
            "h = jax.nn.relu(h)",
            "h = jax.nn.relu(h)",
            "h = jnp.maximum(h, 0)",
            "h = jnp.abs(h)",
            "h = jax.nn.leaky_relu(h, 0.2)",
            "h = jnp.clip(h, -0.7, 0.7)",
            "h = jax.nn.hard_tanh(h)",
            "h = jax.nn.relu6(3 * h)",
            "h = jnp.where(h > 0.1, 2 * h, h)",
            "h = jnp.sign(h) * h",
            "h = jnp.minimum(h, h[..., ::-1])",
        )
    )


def smooth_activation(b: Build):
    b.emit(
        b.pick(
            "h = jax.nn.gelu(h)",
            "h = jax.nn.gelu(h, approximate=False)",
            "h = jnp.tanh(h)",
            "h = jax.nn.silu(h)",
            "h = jax.nn.softplus(h)",
            "h = jax.nn.elu(h)",
            "h = jax.nn.sigmoid(h)",
            "h = jnp.sin(h)",
            "h = h**2",
            "h = h * h",
            "h = 0.1 * h**3",
            "h = h**-2 if False else jnp.exp(-(h**2))",
            "h = jnp.log1p(h**2)",
            "h = jnp.sqrt(1 + h**2)",
            "h = jnp.square(jax.nn.relu(h))",
            "h = jnp.arctan2(h, 1 + h**2)",
            "h = jnp.power(jnp.abs(h) + 0.5, 1.5)",
            "h = 1 / (2 + jnp.cos(h))",
            "h = jax.scipy.special.erf(h)",
            "h = jnp.logaddexp(h, -h)",
            "h = jax.nn.mish(h)",
            "h = jnp.hypot(h, 1.0 + 0 * h)",
        ).replace("h**-2 if False else ", "")
    )


def softmax_over_features(b: Build):
    b.emit(f"h = jax.nn.{b.pick('softmax', 'log_softmax')}(h, {b.pick(-1, b.rank - 1, 1)})")


def reduces(b: Build):
    """Features become one, and stay an axis."""
    axis = b.pick(*range(1, b.rank))
    call = b.pick(
        "jnp.mean",
        "jnp.sum",
        "jnp.max",
        "jnp.min",
        "jax.nn.logsumexp",
        "jnp.prod",
        "jnp.linalg.norm",
        "jnp.std",
        "jnp.median",
    )
    constant = f" + 0.1 * jnp.arange({b.shape[-1]})" if call in ("jnp.linalg.norm", "jnp.std") else ""
    b.emit(f"h = {call}(h{constant}, axis={axis}, keepdims=True)")
    shape = list(b.shape)
    b.need(shape[axis] > 1 or call != "jnp.std")
    shape[axis] = 1
    b.became(*shape)


def pools(b: Build):
    b.need(b.rank >= 3)
    spatial = b.rank - 2
    window = [b.rng.randint(1, min(2, n)) for n in b.shape[1:-1]]
    stride = [b.pick(1, 2) for _ in range(spatial)]
    padding = b.pick("SAME", "VALID")
    start, operation = b.pick(("-jnp.inf", "lax.max"), ("jnp.inf", "lax.min"), ("0.0", "lax.add"))
    full_window, full_stride = (1, *window, 1), (1, *stride, 1)
    b.emit(f'h = lax.reduce_window(h, {start}, {operation}, {full_window}, {full_stride}, "{padding}")')
    sizes = [
        -(-n // s) if padding == "SAME" else (n - w) // s + 1
        for n, w, s in zip(b.shape[1:-1], window, stride, strict=True)
    ]
    b.became(b.batch, *sizes, b.shape[-1])


def global_pool(b: Build):
    b.need(b.rank >= 3)
    b.emit(f"h = h.{b.pick('mean', 'max', 'sum')}({tuple(range(1, b.rank - 1))})")
    b.became(b.batch, b.shape[-1])


def flattens(b: Build):
    b.need(b.rank > 2)
    b.emit(b.pick("h = h.reshape(len(h), -1)", "h = jax.vmap(jnp.ravel)(h)"))
    b.became(b.batch, b.features)


def splits_axis(b: Build):
    n = b.shape[-1]
    b.need(b.rank <= 3, n in (4, 6, 8))
    b.emit(f"h = h.reshape(*h.shape[:-1], 2, {n // 2})")
    b.became(*b.shape[:-1], 2, n // 2)


def adds_axis(b: Build):
    b.need(b.rank <= 3)
    where = b.pick(1, b.rank)
    b.emit(f"h = jnp.expand_dims(h, {where})")
    b.became(*b.shape[:where], 1, *b.shape[where:])


def moves(b: Build):
    """Rearrangements that keep the shape."""
    b.emit(
        b.pick(
            "h = h[..., ::-1]",
            "h = jnp.roll(h, 1, -1)",
            "h = jnp.flip(h, 1)",
            "h = jnp.concatenate([h[:, 1:], h[:, :1]], 1)",
            "h = jnp.stack(list(h))",
            "h = h[::-1][::-1]",
            "h = jnp.swapaxes(jnp.tanh(jnp.swapaxes(h, 0, -1)), 0, -1)",
            "h = jnp.split(jnp.concatenate([h, 2 * h], 1), 2, 1)[1]",
            "h = jnp.pad(h, [(1, 1)] + [(0, 0)] * (h.ndim - 1))[1:-1]",
            "h = h.T.T",
            "h = jnp.broadcast_to(h[None], (2, *h.shape)).mean(0)",
            "h = jnp.repeat(h, 2, 0)[::2]",
            "h = jnp.tile(h, [2] + [1] * (h.ndim - 1))[: len(h)]",
        )
    )


def reverses_examples(b: Build):
    """Example b of the outputs comes from another example: still independent of the rest, and yet not of its own."""
    b.traits.add("coupled")
    b.emit(
        b.pick(
            "h = h[::-1]", "h = jnp.roll(h, 1, 0)", f"h = h[{b.datum(f'jnp.argsort(normal({b.number()}, {b.batch}))')}]"
        )
    )


def transposes(b: Build):
    b.need(b.rank == 3)
    b.emit("h = h.swapaxes(1, 2)")
    b.became(b.batch, b.shape[2], b.shape[1])


def widens(b: Build):
    n = b.shape[-1]
    b.need(b.features * 2 <= 16)
    b.emit(
        b.pick(
            "h = jnp.concatenate([h, -h], -1)",
            "h = jnp.concatenate([jax.nn.relu(h), jax.nn.relu(-h)], -1)",
            "h = jnp.repeat(h, 2, -1)",
            "h = jnp.concatenate([h, jnp.ones_like(h)], -1)",
            "h = jnp.concatenate([jnp.sin(h), jnp.cos(h)], -1)",
        )
    )
    b.became(*b.shape[:-1], 2 * n)


def masked(b: Build):
    """A mask, of zeros and ones or Booleans, from the data."""
    mask = b.bools(*b.shape[1:])
    b.emit(
        b.pick(
            f"h = jnp.where({mask}, h, 0.0)",
            f"h = h * {mask}",
            f"h = jnp.where({mask}, h, -h)",
            f"h = lax.select({mask}, h, 0.5 * h)",
        )
    )


def dropout(b: Build):
    key = b.datum(b.pick(f"jax.random.key({b.number()})", f"jax.random.PRNGKey({b.number()})"))
    b.traits.add("data without examples")
    b.emit(f"h = h * (jax.random.uniform({key}, h.shape, jnp.float32) < 0.7) / 0.7")


def noise_per_example(b: Build):
    """Each example has a key of its own."""
    keys = b.datum(f"jax.random.split(jax.random.key({b.number()}), {b.batch})")
    b.emit(
        f"m = jax.vmap(lambda k: jax.random.uniform(k, (), jnp.float32) < 0.8)({keys})",
        "h = h * m.reshape(-1, *[1] * (h.ndim - 1))",
    )


def scaled_by_data(b: Build):
    b.traits.add("data without examples")
    b.emit(
        b.pick("h = {0} * h", "h = h / (1 + {0} ** 2)").format(
            b.datum(b.pick("0.7", f"normal({b.number()})", "np.float32(1.5)"))
        )
    )


def adds_input(b: Build):
    b.emit(f"h = h + {b.normal(*b.shape[1:])}")


def multiplies_input(b: Build):
    b.emit(f"h = h * {b.normal(*b.shape[1:])}")


def stops_gradient(b: Build):
    b.emit(
        b.pick(
            "h = h * lax.stop_gradient(h)",
            "h = h + lax.stop_gradient(jnp.sin(h) - h)",
            "h = h / (1 + lax.stop_gradient(jnp.abs(h)))",
        )
    )


def ignores_examples(b: Build):
    """Some outputs do not depend on the parameters at all."""
    b.emit("h = h.at[..., :1].set(0.3)")


def casts(b: Build):
    b.traits.add("rounds")
    b.emit(b.pick("h = h.astype(jnp.float32).astype(h.dtype)", "h = lax.reduce_precision(h, 8, 23)"))
