"""Losses that look like others: nearly a softmax, nearly functions of single outputs, nearly independent examples."""

from tests.fuzz.programs.build import Build
from tests.fuzz.programs.pieces.outputs import flat, logits, nll, tokens


def nearly_logsumexp(b: Build):
    n = logits(b)
    shift, weights = b.normal(n), b.normal(n)
    b.loss = b.pick(
        ["return jnp.log(1 + jnp.sum(jnp.exp(z), -1))"],
        [f"return jnp.log(jnp.sum(jnp.exp(z) * jnp.abs({weights}), -1))"],
        [f"return jax.nn.logsumexp(z, -1, b=jnp.abs({weights}))"],
        ["return 0.5 * jnp.log(jnp.sum(jnp.exp(2 * z), -1))"],
        ["return jnp.log(jnp.mean(jnp.exp(z), -1))"],
        ["return jnp.log(jnp.sum(jnp.exp(z), -1)) ** 2"],
        ["m = z.mean(-1, keepdims=True)", "return jnp.log(jnp.sum(jnp.exp(z - m), -1)) + m[:, 0]"],
        ["m = lax.stop_gradient(z.max(-1))", "return jnp.log(jnp.sum(jnp.exp(z - m[:, None]), -1)) + 2 * m"],
        ["m = lax.stop_gradient(z)", "return jnp.log(jnp.sum(jnp.exp(z - m), -1))"],
        [f"return jax.nn.logsumexp(z + {shift}, -1)"],
        [f"return jax.nn.logsumexp(z * {shift}, -1)"],
        ["return jax.nn.logsumexp(jnp.concatenate([z, jnp.zeros_like(z[:, :1])], -1), -1)"],
        ["return jax.nn.logsumexp(jnp.concatenate([z, z[:, :1]], -1), -1)"],
        [f"return jax.nn.logsumexp(z[:, jnp.array({[b.rng.randrange(n) for _ in range(3)]})], -1)"],
        [f"return jax.nn.logsumexp(jnp.where({b.bools(n)}, z, -1e9), -1)"],
        [f"return jax.nn.logsumexp(z, -1, where={b.bools(n)} | (jnp.arange({n}) == 0))"],
        ["return jnp.logaddexp.reduce(z, axis=-1)"],
        ["return jnp.logaddexp(z[:, 0], z[:, 1])"],
        ["return lax.cumlogsumexp(z, 1)[:, -1]"],
        ["return lax.cumlogsumexp(z, 1).sum(-1)"],
        ["return jax.nn.logsumexp(jnp.tanh(z), -1) + jax.nn.logsumexp(z, -1)"],
        ["return jax.nn.logsumexp(jax.nn.log_softmax(z) + z, -1)"],
        ["return jax.nn.logsumexp(jax.nn.relu(z), -1)"],
        ["return jax.nn.logsumexp(z @ (jnp.eye(z.shape[1]) + 0.3), -1)"],
        ["return jax.nn.logsumexp(jnp.cumsum(z, -1), -1)"],
        ["return jnp.sqrt(jnp.sum(jnp.exp(z), -1))"],
        ["return jnp.log(jnp.sum(jax.nn.softplus(z), -1))"],
        ["return jnp.log(jnp.prod(1 + jnp.exp(z), -1))"],
    )


def weighted_by_itself(b: Build):
    """What multiplies a cross-entropy depends on the outputs: counted, stopped or compared."""
    n = logits(b)
    last = b.pick(
        "return c * lax.stop_gradient(c)",
        "return c * lax.stop_gradient(jnp.exp(-c)) ** 2",
        "return c * (z[:, 0] > 0)",
        "return c * jnp.sum(z, -1)",
        "return c * jnp.sign(z[:, 0])",
        "return jnp.where(c > 1.0, c, 0.5 * c)",
        "return jnp.where(z[:, 0] > z[:, 1], c, -c)",
        "return c * jax.nn.logsumexp(z, -1)",
        "return c / lax.stop_gradient(1 + c)",
        "return c * (jnp.argmax(z, -1) == 0)",
        "return c * jnp.round(z[:, 0])",
        "return c - lax.stop_gradient(c)",
        "return lax.select(c > lax.stop_gradient(c.mean()), c, 2 * c)",
        "return c + 0 * c**2",
    )
    if "c.mean()" in last:
        b.traits.add("coupled")
    b.loss = [f"c = {nll(b, 'z', b.integers(n))}", last]


def nearly_separate(b: Build):
    n = flat(b)
    y = b.normal(n)
    b.loss = b.pick(
        ["return jnp.sum(z * z[:, ::-1], -1)"],
        ["return jnp.sum(z**2 * lax.stop_gradient(z[:, ::-1]), -1)"],
        ["return jnp.sum(z**2 * (z[:, :1] > 0), -1)"],
        [f"return jnp.sum(jnp.maximum(z, z[:, :1] + {y}) ** 2, -1)"],
        [f"return jnp.sum(jnp.where(z > {y}, z**2, jnp.exp(z)), -1)"],
        [f"return jnp.sum((z[:, ::-1] - {y}) ** 2, -1)"],
        ["return jnp.sum(jnp.concatenate([z, 2 * z], -1) ** 2, -1)"],
        ["return jnp.sum(jnp.pad(z, ((0, 0), (1, 1))) ** 3, -1)"],
        ["return jnp.sum(jnp.diff(z, axis=-1, prepend=0) ** 2, -1)"],
        ["return jnp.sum((z - z.mean(-1, keepdims=True)) ** 2, -1)"],
        ["return jnp.sum((z - lax.stop_gradient(z.mean(-1, keepdims=True))) ** 2, -1)"],
        [f"return jnp.sum(jnp.sin(z) * {y}, -1) + jnp.sum(jnp.sort(z**2, -1) * {y}, -1)"],
        ["return jnp.sum(jnp.cumsum(z**2, -1), -1)"],
        ["return jnp.sum(jnp.cumsum(z, -1) ** 2, -1)"],
        ["return jnp.mean(z.reshape(len(z), -1, 1) ** 2 * jnp.arange(1.0, 3.0), (1, 2))"],
        [f"return jnp.sum(jnp.abs(z * {y}) ** 1.5, -1)"],
        ["return jnp.sum(jnp.real(jnp.exp(1j * z)), -1)"],
        ["return jnp.sum(jnp.abs(z + 1j * z[:, ::-1]) ** 2, -1)"],
        ["return jnp.sum(jnp.abs(jnp.fft.fft(z + 0.5)) ** 2, -1)"],
        ["return jnp.sum(lax.map(lambda c: c**3, z.T), 0)"],
        ["return jnp.max(z**2, -1)"],
        ["return jnp.sum(z, -1) * jnp.max(z, -1)"],
        [f"return lax.dot_general(z**2, {y}, (((1,), (1,)), ((0,), (0,))))"],
    )


def nearly_independent(b: Build):
    """Examples that meet, or seem to."""
    n = flat(b)
    lines, coupled = b.pick(
        (["return jnp.sum(z**2, -1)[::-1]"], False),
        (["return jnp.sum(jnp.roll(z, 1, 0) ** 2, -1)"], False),
        (["return jnp.sum(z**2, -1) * jnp.sum(lax.stop_gradient(z), -1)[::-1]"], True),
        (["return jnp.sum((z - z[:1]) ** 2, -1)"], True),
        (["return jnp.sum(jnp.cumsum(z, 0) ** 2, -1)"], True),
        (["return jnp.sort(jnp.sum(z**2, -1))"], False),
        (["return jnp.sum(jnp.sort(z, 0) ** 2, -1)"], True),
        (["return jnp.sum((z - lax.stop_gradient(z.mean(0))) ** 2, -1)"], True),
        (["return jnp.sum(z**2, -1) * (z.sum() > 0)"], True),
        (["return jnp.sum((z / jnp.linalg.norm(z + 1)) ** 2, -1)"], True),
        (["return jnp.full(len(z), jnp.mean(z**2))"], True),
        (["return jnp.sum(z, -1) * z.mean()"], True),
        (["return jnp.sum(z**2, -1) / (1 + jnp.max(z))"], True),
        (["return jnp.einsum('bi,ci->b', z, z)"], True),
        (["return jnp.sum((z - z[jnp.arange(len(z)) // 2 * 2]) ** 2, -1)"], True),
        ([f"return jnp.sum((z - {b.normal(n)}[::-1]) ** 2, -1)"], False),
        ([f"y = {b.normal(n)}", "return jnp.sum((z - y.mean(0)) ** 2, -1)"], False),
        (["return jnp.sum(jnp.concatenate([z[1:], z[:1]]) * z, -1)"], True),
        (["return jnp.sum(jax.nn.softmax(z, 0), -1)"], True),
        (["return jnp.sum(z.reshape(-1).reshape(z.shape[1], -1) ** 2, 0)"], True),
        (["return jax.ops.segment_sum((z**2).ravel(), jnp.arange(z.size) // z.shape[1], len(z))"], False),
    )
    b.traits |= {"coupled"} if coupled else {"unproved", "data coupled"}
    b.loss = lines


def square_of_transposed(b: Build):
    """As many examples as outputs, so that a transposed matrix has the same shape."""
    n = flat(b)
    b.need(n == b.batch)
    b.traits.add("coupled")
    b.loss = [
        b.pick("return jnp.sum(z.T**2, -1)", "return jnp.sum((z @ z) ** 2, -1)", "return jnp.sum((z - z.T) ** 2, -1)")
    ]


def over_two_axes(b: Build):
    length, classes = tokens(b)
    b.loss = b.pick(
        ["return jax.nn.logsumexp(z, (1, 2))"],
        ["return jax.nn.logsumexp(z, 1).sum(-1)"],
        ["return jax.nn.logsumexp(jax.nn.logsumexp(z, 1), 1)"],
        ["return jax.nn.logsumexp(z.sum(1), -1)"],
        ["return jax.nn.logsumexp(z, -1).max(1)"],
        ["return jnp.prod(jax.nn.logsumexp(z, -1), 1)"],
        [f"y = {b.integers(classes)}", f"return {nll(b, 'z.mean(1)', 'y')}"],
        [f"y = {b.integers(classes)}", f"return {nll(b, 'z[:, -1]', 'y')}"],
        [f"y = {b.integers(classes, length)}", f"return jnp.max({nll(b, 'z', 'y')}, 1)"],
        [f"y = {b.integers(classes)}", "return -jnp.log(jax.nn.softmax(z).mean(1))[jnp.arange(len(z)), y]"],
        [f"y = {b.integers(length)}", f"return {nll(b, 'z.swapaxes(1, 2)[:, 0]', 'y')}"],
    )


def inside_transformations(b: Build):
    """A softmax that the trace has to look for."""
    n = logits(b)
    y = b.integers(n)
    one = nll(b, "z", "y")
    b.loss = b.pick(
        [f"return jax.jit(lambda z, y: {one})(z, {y})"],
        [f"return jax.checkpoint(lambda z, y: {one})(z, {y})"],
        [f"return lax.map(lambda a: (lambda z, y: {one})(*a), (z, {y}))"],
        [f"return lax.scan(lambda _, a: (None, (lambda z, y: {one})(*a)), None, (z, {y}))[1]"],
        [f"return lax.cond(True, lambda z, y: {one}, lambda z, y: jnp.sum(z**2, -1), z, {y})"],
        [f"y = {y}", f"return lax.cond(y[0] > 0, lambda z: {one}, lambda z: jnp.sum(z**2, -1), z)"],
        [f"y = {y}", f"return jax.vmap(lambda z, y: jax.vmap(lambda z: {one})(z[None])[0])(z, y)"],
        [f"y = {y}", f"return jnp.stack([{one}, jnp.sum(z, -1)]).sum(0)"],
        [f"y = {y}", "return jax.jvp(lambda z: jax.nn.logsumexp(z, -1), (z,), (jnp.ones_like(z),))[1]"],
        [f"y = {y}", f"return jax.grad(lambda t: jnp.sum({one} * t))(jnp.ones(len(z)))"],
    )
    if "y[0]" in " ".join(b.loss):
        b.traits.add("data coupled")
