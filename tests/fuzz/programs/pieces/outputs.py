"""What losses ask of a network: outputs of the form that they can judge."""

from tests.fuzz.programs.build import FEATURES, Build


def logits(b: Build, least: int = 2) -> int:
    """Makes `h` a matrix of examples and classes; the number of classes."""
    if b.rank > 2:
        b.emit("h = h.reshape(len(h), -1)")
        b.became(b.batch, b.features)
    many = b.shape[1] > FEATURES
    if not many and (b.shape[1] < least or b.shape[1] > 5 or b.maybe(0.3)):
        classes = max(least, b.pick(2, 3, 3, 4, b.batch if b.batch <= 4 else 2))
        b.emit(f"h = h @ {b.param(b.shape[1], classes)}")
        b.became(b.batch, classes)
    return b.shape[1]


def flat(b: Build) -> int:
    if b.rank > 2:
        b.emit("h = h.reshape(len(h), -1)")
        b.became(b.batch, b.features)
    return b.shape[1]


def tokens(b: Build) -> tuple[int, int]:
    """Makes `h` `(B, T, C)`."""
    if b.rank == 2:
        b.emit("h = jnp.stack([h, 0.5 * h], 1)")
        b.became(b.batch, 2, b.shape[1])
    elif b.rank > 3:
        b.emit(f"h = h.reshape(len(h), -1, {b.shape[-1]})")
        b.became(b.batch, b.features // b.shape[-1], b.shape[-1])
    if b.shape[2] < 2 or b.maybe(0.3):
        classes = b.pick(2, 3, b.shape[1] if b.shape[1] in (2, 3) else 2)
        b.emit(f"h = h @ {b.param(b.shape[2], classes)}")
        b.became(*b.shape[:2], classes)
    return b.shape[1], b.shape[2]


def nll(b: Build, z: str, y: str) -> str:
    """The negative log-likelihood of integer labels in the last axis, in one of the ways in which people write it."""
    return b.pick(
        f"optax.softmax_cross_entropy_with_integer_labels({z}, {y})",
        f"optax.softmax_cross_entropy({z}, jax.nn.one_hot({y}, {z}.shape[-1]))",
        f"-jnp.take_along_axis(jax.nn.log_softmax({z}), {y}[..., None], -1)[..., 0]",
        f"-jnp.sum(jax.nn.one_hot({y}, {z}.shape[-1]) * jax.nn.log_softmax({z}), -1)",
        f"(jax.nn.logsumexp({z}, -1) - jnp.take_along_axis({z}, {y}[..., None], -1)[..., 0])",
        f"-jnp.log(jnp.take_along_axis(jax.nn.softmax({z}), {y}[..., None], -1)[..., 0])",
        f"(jnp.log(jnp.sum(jnp.exp({z}), -1)) - jnp.sum({z} * jax.nn.one_hot({y}, {z}.shape[-1]), -1))",
    )
