"""Losses `(outputs, data) -> (B,)` with a softmax in them."""

from tests.fuzz.programs.build import Build
from tests.fuzz.programs.pieces.outputs import flat, logits, nll, tokens


def cross_entropy(b: Build):
    classes = logits(b)
    b.loss = [f"return {nll(b, 'z', b.integers(classes))}"]


def soft_labels(b: Build):
    classes = logits(b)
    labels = f"jax.nn.softmax({b.normal(classes)})"
    if b.maybe():
        labels = f"optax.smooth_labels({labels}, 0.1)"
    b.loss = [f"return optax.softmax_cross_entropy(z, {labels})"]


def unnormalised_labels(b: Build):
    classes = logits(b)
    b.loss = [f"return optax.softmax_cross_entropy(z, {b.normal(classes)})"]


def temperature(b: Build):
    classes = logits(b)
    b.loss = [f"return {nll(b, '(z / {})'.format(b.pick('2.0', '0.5', b.datum('2.0'))), b.integers(classes))}"]


def learned_temperature(b: Build):
    classes = logits(b)
    b.emit(f"h = h * jnp.exp({b.param()})")
    b.loss = [f"return {nll(b, 'z', b.integers(classes))}"]


def weighted(b: Build):
    """Weights of either sign, as those of REINFORCE are, or a mask."""
    classes = logits(b)
    weight = b.pick(b.normal(), f"jnp.abs({b.normal()})", b.bools(), b.bools())
    b.loss = [f"return {weight} * {nll(b, 'z', b.integers(classes))}"]


def where_masked(b: Build):
    classes = logits(b)
    b.loss = [f"return jnp.where({b.bools()}, {nll(b, 'z', b.integers(classes))}, 0.0)"]


def padded_labels(b: Build):
    """The label -1 means nothing."""
    classes = logits(b)
    labels = b.integers(classes + 1)
    b.loss = [f"y = {labels} - 1", f"return jnp.where(y >= 0, {nll(b, 'z', 'jnp.maximum(y, 0)')}, 0.0)"]


def class_weights(b: Build):
    classes = logits(b)
    b.traits.add("data without examples")
    weights, y = b.datum(f"jnp.abs(normal({b.number()}, {classes}))"), b.integers(classes)
    b.loss = [f"return {weights}[{y}] * {nll(b, 'z', y)}"]


def reinforce(b: Build):
    classes = logits(b)
    action = b.integers(classes)
    b.loss = [
        f"log_p = jnp.take_along_axis(jax.nn.log_softmax(z), {action}[:, None], 1)[:, 0]",
        f"return -{b.normal()} * log_p",
    ]


def clipped_policy(b: Build):
    classes = logits(b)
    action = b.integers(classes)
    b.loss = [
        f"ratio = jnp.exp(jnp.take_along_axis(jax.nn.log_softmax(z), {action}[:, None], 1)[:, 0] + 1.0)",
        f"a = {b.normal()}",
        "return -jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a)",
    ]


def token_mean(b: Build):
    length, classes = tokens(b)
    b.loss = [f"return {nll(b, 'z', b.integers(classes, length))}.{b.pick('mean', 'sum')}(-1)"]


def token_losses(b: Build):
    """One loss for each token; `Objective` takes the mean."""
    length, classes = tokens(b)
    b.loss = [f"return {nll(b, 'z', b.integers(classes, length))}"]


def masked_tokens(b: Build):
    length, classes = tokens(b)
    mask = b.bools(length)
    total = b.pick(f"jnp.maximum({mask}.sum(-1), 1)", str(length))
    b.loss = [f"return ({nll(b, 'z', b.integers(classes, length))} * {mask}).sum(-1) / {total}"]


def tokens_over_batch(b: Build):
    """The mean over all tokens of the batch that count: the data of other examples enter each loss."""
    length, classes = tokens(b)
    b.traits.add("data coupled")
    mask = b.bools(length)
    b.loss = [
        f"m = {mask}",
        f"return len(m) * ({nll(b, 'z', b.integers(classes, length))} * m).sum(-1) / (1 + m.sum())",
    ]


def flat_tokens(b: Build):
    length, classes = tokens(b)
    labels = b.integers(classes, length)
    b.loss = [
        f"z, y = z.reshape(-1, {classes}), {labels}.ravel()",
        f"return {nll(b, 'z', 'y')}.reshape(-1, {length}).mean(-1)",
    ]


def two_heads(b: Build):
    """A dictionary or a tuple of outputs, of two losses added up."""
    flat(b)
    n = b.shape[1]
    one, other = b.param(n, 2), b.param(n, b.pick(1, 2))
    trunk = b.pick("h", "jax.nn.relu(h)", "jnp.tanh(h)")
    b.emit(f"h = {trunk}")
    first, second = b.pick(('z["a"]', 'z["b"]'), ("z[0]", "z[1]"))
    b.result = "{" + f'"a": h @ {one}, "b": h @ {other}' + "}" if "a" in first else f"(h @ {one}, h @ {other})"
    b.traits.add("tree of outputs")
    second_loss = b.pick(
        f"jnp.sum(({second} - {b.normal(1)}) ** 2, -1)", f"jax.nn.logsumexp({second}, -1)", f"jnp.sum({second}, -1)"
    )
    b.loss = [f"return {nll(b, first, b.integers(2))} + {b.pick('0.5 * ', '')}{second_loss}"]


def heads_in_one_array(b: Build):
    """Some classes for one task, the rest for another."""
    classes = logits(b, 4)
    one, other = nll(b, "z[:, :2]", b.integers(2)), nll(b, "z[:, 2:]", b.integers(classes - 2))
    b.loss = [f"return {one} + {b.pick('0.3 * ', '')}{other}"]


def heads_that_overlap(b: Build):
    classes = logits(b, 3)
    b.loss = [f"return {nll(b, 'z', b.integers(classes))} + {nll(b, 'z[:, 1:]', b.integers(classes - 1))}"]


def squared_and_classes(b: Build):
    classes = logits(b, 3)
    b.loss = [f"return {nll(b, 'z[:, :2]', b.integers(2))} + jnp.sum((z[:, 2:] - {b.normal(classes - 2)}) ** 2, -1)"]


def squared_for_some(b: Build):
    """A cross-entropy for some labels, its square or another loss for the others."""
    classes = logits(b)
    y = b.integers(classes)
    b.loss = [
        f"c = {nll(b, 'z', y)}",
        f"return jnp.where({y} == 0, c, {b.pick('c**2', 'jnp.sum(z**2, -1)', '2 * c')})",
    ]


def focal(b: Build):
    classes = logits(b)
    b.loss = [f"c = {nll(b, 'z', b.integers(classes))}", "return (1 - jnp.exp(-c)) ** 2 * c"]


def z_loss(b: Build):
    classes = logits(b)
    b.loss = [f"return {nll(b, 'z', b.integers(classes))} + {b.pick(0.1, 0.001)} * jax.nn.logsumexp(z, -1) ** 2"]


def soft_capped(b: Build):
    classes = logits(b)
    b.loss = ["z = 2.0 * jnp.tanh(z / 2.0)", f"return {nll(b, 'z', b.integers(classes))}"]


def logsumexp(b: Build):
    logits(b)
    b.loss = [
        b.pick(
            "return jax.nn.logsumexp(z, -1)",
            "return -jax.nn.logsumexp(-z, -1)",
            "return jax.nn.logsumexp(z, -1) + jnp.sum(z, -1)",
            "return jnp.log1p(jnp.exp(jax.nn.logsumexp(z, -1)))",
        )
    ]


def entropies(b: Build):
    classes = logits(b)
    b.loss = b.pick(
        ["p = jax.nn.softmax(z)", "return -jnp.sum(p * jnp.log(p), -1)"],
        [
            "p = jax.nn.softmax(z)",
            f"return {nll(b, 'z', b.integers(classes))} - 0.1 * jnp.sum(p * jax.nn.log_softmax(z), -1)",
        ],
        [
            "q = jax.nn.log_softmax(z)",
            f"t = jax.nn.log_softmax({b.normal(classes)})",
            "return jnp.sum(jnp.exp(t) * (t - q), -1)",
        ],
        [
            "q = jax.nn.log_softmax(z)",
            f"t = jax.nn.log_softmax({b.normal(classes)})",
            "return jnp.sum(jnp.exp(q) * (q - t), -1)",
        ],
        ["p = jax.nn.softmax(z)", f"return jnp.sum((p - jax.nn.one_hot({b.integers(classes)}, {classes})) ** 2, -1)"],
        [f"return -jnp.take_along_axis(jax.nn.softmax(z), {b.integers(classes)}[:, None], 1)[:, 0]"],
    )


def function_of_cross_entropy(b: Build):
    classes = logits(b)
    b.loss = [
        f"c = {nll(b, 'z', b.integers(classes))}",
        b.pick(
            "return c**2",
            "return jnp.sqrt(1 + c)",
            "return jnp.minimum(c, 1.0)",
            "return jnp.maximum(c - 0.5, 0.0)",
            "return jnp.exp(-c)",
        ),
    ]


def gathers_with_fill(b: Build):
    classes = logits(b)
    y = b.integers(classes + 2)
    b.loss = [
        f"t = jnp.take_along_axis(z, {y}[:, None], 1, mode='fill', fill_value=0.0)[:, 0]",
        b.pick("return (jax.nn.logsumexp(z, -1) - t) ** 2", "return jax.nn.logsumexp(z, -1) - t"),
    ]


def loss_in_a_loop(b: Build):
    length, classes = tokens(b)
    y = b.integers(classes, length)
    b.loss = [
        "def add(total, step):",
        "    z, y = step",
        f"    return total + {nll(b, 'z', 'y')}, None",
        f"return lax.scan(add, jnp.zeros(len(z), z.dtype), (z.swapaxes(0, 1), {y}.T))[0]",
    ]


def mapped_loss(b: Build):
    classes = logits(b)
    y = b.integers(classes)
    b.loss = [
        b.pick(
            f"return jax.vmap(lambda z, y: {nll(b, 'z', 'y')})(z, {y})",
            f"return jax.vmap(lambda z, t: jnp.sum((z - t) ** 2))(z, {b.normal(classes)})",
        )
    ]
