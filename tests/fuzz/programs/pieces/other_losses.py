"""Losses `(outputs, data) -> (B,)` of outputs that are no logits, or of whole batches."""

from tests.fuzz.programs.build import Build
from tests.fuzz.programs.pieces.outputs import flat, logits, nll


def squared(b: Build):
    n = flat(b)
    b.loss = [
        b.pick(
            "return jnp.sum((z - {0}) ** 2, -1)",
            "return jnp.mean(optax.squared_error(z, {0}), -1)",
            "return optax.l2_loss(z, {0}).sum(-1)",
        ).format(b.normal(n))
    ]


def squared_of_any_rank(b: Build):
    target = b.normal(*b.shape[1:])
    b.loss = [f"return jnp.mean((z - {target}) ** 2, {tuple(range(1, b.rank))})"]


def squared_of_one(b: Build):
    """Outputs that are a vector `(B,)`."""
    flat(b)
    b.emit(f"h = (h @ {b.param(b.shape[1], 1)})[:, 0]" if b.maybe() else "h = h.sum(-1)")
    b.loss = [f"return (z - {b.normal()}) ** 2"]


def masked_squared(b: Build):
    n = flat(b)
    b.loss = [
        b.pick(
            f"return jnp.where({b.bools()}, jnp.sum((z - {b.normal(n)}) ** 2, -1), 0.0)",
            f"return jnp.sum({b.bools(n)} * (z - {b.normal(n)}) ** 2, -1)",
        )
    ]


def elementwise(b: Build):
    """Losses whose Hessian is diagonal."""
    n = flat(b)
    y, t = b.bools(n), b.normal(n)
    one = b.pick(
        f"optax.sigmoid_binary_cross_entropy(z, {y})",
        f"jax.nn.softplus(z) - z * {y}",
        f"jnp.exp(z) - z * {b.integers(4, n)}",
        f"optax.huber_loss(z, {t}, delta=0.5)",
        f"optax.log_cosh(z, {t})",
        f"jnp.log1p((z - {t}) ** 2)",
        f"optax.losses.sigmoid_focal_loss(z, {y}.astype(z.dtype), alpha=0.25, gamma=2.0)",
        f"jnp.abs(z - {t})",
        f"jnp.where(z > {t}, 0.9, 0.1) * jnp.abs(z - {t})",
        f"(z - {t}) ** 4",
        f"{t} * jnp.sin(z)",
        f"{b.normal(n)} * (z - {t}) ** 2",
    )
    b.loss = [f"return jnp.{b.pick('sum', 'mean')}({one}, -1)"]


def padded_binary(b: Build):
    n = flat(b)
    y = b.integers(3, n)
    b.loss = [f"y = {y}", "e = jax.nn.softplus(z) - z * (y == 1)", "return jnp.sum(jnp.where(y == 2, 0.0, e), -1)"]


def poisson(b: Build):
    n = flat(b)
    b.loss = [f"return jnp.sum(jnp.exp(z) - {b.integers(4, n)} * z, -1)"]


def hinge(b: Build):
    classes = logits(b)
    b.loss = b.pick(
        [f"y = 2 * {b.bools(classes)} - 1", "return jnp.sum(jnp.maximum(0, 1 - y * z), -1)"],
        [f"y = 2 * {b.bools(classes)} - 1", "return jnp.sum(jnp.maximum(0, 1 - y * z) ** 2, -1)"],
        [
            f"y = {b.integers(classes)}[:, None]",
            "return jnp.max(z + (jnp.arange(z.shape[1])[None] != y) - jnp.take_along_axis(z, y, 1), -1)",
        ],
        [
            f"y = {b.integers(classes)}[:, None]",
            "return jnp.sum(jnp.maximum(0, 0.5 + z - jnp.take_along_axis(z, y, 1)) ** 2, -1)",
        ],
    )


def cosine(b: Build):
    n = logits(b)
    b.loss = [f"return optax.cosine_distance(z + 0.3, {b.normal(n)}, epsilon=1e-3)"]


def gaussian(b: Build):
    """A learned mean and a learned scale."""
    n = logits(b)
    b.need(n % 2 == 0)
    b.loss = [
        "m, s = jnp.split(z, 2, -1)",
        f"return jnp.sum(0.5 * ((m - {b.normal(n // 2)}) * jnp.exp(-s)) ** 2 + s, -1)",
    ]


def mixture(b: Build):
    n = logits(b)
    b.need(n % 2 == 0)
    b.loss = [
        "a, m = jnp.split(z, 2, -1)",
        f"return -jax.nn.logsumexp(jax.nn.log_softmax(a) - 0.5 * (m - {b.normal(1)}) ** 2, -1)",
    ]


def ordered(b: Build):
    n = logits(b)
    b.loss = b.pick(
        [f"return jnp.sum((jnp.sort(z, -1) - jnp.sort({b.normal(n)}, -1)) ** 2, -1)"],
        [f"return jnp.min((z - {b.normal(n)}) ** 2, -1)"],
        [
            "gap = z[:, :, None] - z[:, None, :]",
            f"y = {b.normal(n)}",
            "return jnp.sum((y[:, :, None] > y[:, None, :]) * jax.nn.softplus(-gap), (1, 2))",
        ],
        ["return lax.top_k(z**2, 2)[0].sum(-1)"],
        [f"return jnp.sum(jnp.cumsum(z, -1) * {b.normal(n)}, -1) ** 2"],
    )


def any_function(b: Build):
    n = flat(b)
    b.loss = [
        b.pick(
            "return jnp.sum(jnp.sin(z), -1) ** 2",
            "return jnp.prod(1 + z**2, -1)",
            "return jnp.linalg.norm(z + 0.5, axis=-1)",
            f"return jnp.sum(z * {b.normal(n)}, -1)",
            "return jnp.sum(z, -1) ** 3",
            f"return jnp.tanh(jnp.sum(z * {b.normal(n)}, -1))",
        )
    ]


def contrastive(b: Build):
    b.traits.add("coupled")
    n = logits(b)
    b.loss = [
        f"t = {b.normal(n)}",
        b.pick("s = z @ t.T", "s = z @ z.T", "s = (z / jnp.sqrt(jnp.sum(z**2, -1, keepdims=True) + 0.1)) @ t.T"),
        "return " + nll(b, "s", "jnp.arange(len(z))"),
    ]


def batch_statistics(b: Build):
    b.traits.add("coupled")
    n = flat(b)
    b.loss = [
        b.pick(
            f"return jnp.sum((z - z.mean(0) - {b.normal(n)}) ** 2, -1)",
            "return jnp.sum((z - z.max(0)) ** 2, -1)",
            f"return optax.softmax_cross_entropy(z - z.mean(0), jax.nn.softmax({b.normal(n)}))",
            "return jnp.sum(z, -1) ** 2 / (1 + jnp.mean(z**2))",
        )
    ]


def softmax_over_batch(b: Build):
    b.traits.add("coupled")
    flat(b)
    b.loss = [
        "return -jax.nn.log_softmax(z.sum(-1))" if b.maybe() else "return -jnp.diagonal(jax.nn.log_softmax(z @ z.T, 0))"
    ]


def neighbours(b: Build):
    """Each example is compared with the next."""
    b.traits.add("coupled")
    flat(b)
    b.loss = ["return jnp.sum((z - jnp.roll(z, 1, 0)) ** 2, -1)"]


def loss_without_parameters(b: Build):
    """The outputs do not enter: all curvature is zero."""
    n = flat(b)
    b.loss = [
        b.pick(
            f"return jnp.sum({b.normal(n)} ** 2, -1)",
            "return jnp.sum(jnp.sign(z), -1)",
            f"return jnp.sum(z, -1) * {b.normal()}",
        )
    ]
