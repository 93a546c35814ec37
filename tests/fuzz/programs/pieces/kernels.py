"""Pieces whose parameters are matrices: dense layers in their many forms, and what is made of weights."""

from tests.fuzz.programs.build import Build


def dense(b: Build):
    width = b.pick(1, 2, 3, 4)
    kernel = b.param(b.shape[-1], width)
    bias = f" + {b.param(width)}" if b.maybe() else ""
    b.emit(f"h = h @ {kernel}{bias}")
    b.became(*b.shape[:-1], width)


def dense_general(b: Build):
    """All axes of an example into one or two new ones."""
    new = b.pick((2,), (3,), (2, 2), (1, 3))
    kernel = b.param(*b.shape[1:], *new, scale=0.5)
    inner, outer = "ijkl"[: b.rank - 1], "xy"[: len(new)]
    b.need(b.rank <= 5)
    b.emit(f'h = jnp.einsum("b{inner},{inner}{outer}->b{outer}", h, {kernel})')
    b.became(b.batch, *new)


def einsum_reordered(b: Build):
    """The result has its axes in another order than usual, the examples last in between."""
    b.need(b.rank == 3)
    width = b.pick(2, 3)
    kernel = b.param(b.shape[2], width)
    if b.maybe():
        b.emit(f'h = jnp.einsum("bti,io->obt", h, {kernel})', "h = jnp.moveaxis(jnp.tanh(h), 0, -1)")
    else:
        b.emit(f'h = jnp.einsum("oi,bti->tob", {kernel}.T, h).transpose(2, 0, 1)')
    b.became(*b.shape[:2], width)


def mixes_tokens(b: Build):
    """A kernel along an axis that is not the last."""
    b.need(b.rank >= 3)
    width = b.pick(1, 2, 3)
    kernel = b.param(b.shape[1], width)
    b.emit(f'h = jnp.einsum("bt...,ts->bs...", h, {kernel})')
    b.became(b.batch, width, *b.shape[2:])


def per_head(b: Build):
    """A batched product: every row of heads has a kernel of its own."""
    b.need(b.rank == 3)
    width = b.pick(1, 2)
    kernel = b.param(b.shape[1], b.shape[2], width)
    b.emit(f"h = lax.dot_general(h, {kernel}, (((2,), (1,)), ((1,), (0,)))).swapaxes(0, 1)")
    b.became(*b.shape[:2], width)


def scalar_gain(b: Build):
    b.emit(f"h = {b.pick('h * {}', 'h * jnp.exp({})', 'h / (1 + {} ** 2)', '{} - h').format(b.param())}")


def bias_everywhere(b: Build):
    """A bias for every number of an example, as learned positions are."""
    b.emit(f"h = h + {b.param(*b.shape[1:], scale=0.5)}")


def lora(b: Build):
    rank = b.pick(1, 2)
    first, second = b.param(b.shape[-1], rank), b.param(rank, b.shape[-1])
    b.emit(b.pick("h = h + h @ ({} @ {})", "h = h + h @ {} @ {}").format(first, second))


def weight_of_weights(b: Build):
    """The kernel is a curved function of the parameter."""
    width = b.pick(2, 3)
    kernel = b.param(b.shape[-1], width)
    change = b.pick(
        "jnp.exp(w)",
        "w / jnp.linalg.norm(w)",
        "w / jnp.sqrt(jnp.sum(w**2, 0, keepdims=True) + 1e-6)",
        "w - w.mean(0)",
        "jax.nn.softmax(w, 0)",
        "jnp.tril(w)",
        "w * jnp.abs(w)",
        "jnp.where(w > 0, w, 0.1 * w)",
        "jnp.cumsum(w, 0)",
        "jnp.sort(w, 0)",
        "w[::-1] * 2",
        "jnp.pad(w, 1)[1:-1, 1:-1]",
        "jnp.concatenate([w[:, :1], w[:, 1:]], 1)",
        "jnp.roll(w, 1, 0)",
        "lax.stop_gradient(w) * w",
    )
    b.emit(f"w = {kernel}", f"h = h @ ({change})")
    b.became(*b.shape[:-1], width)


def symmetric_kernel(b: Build):
    n = b.shape[-1]
    kernel = b.param(n, n)
    b.emit(
        b.pick(
            "h = h @ ({0} + {0}.T)", "h = h @ {0} @ {0}.T", "h = jnp.einsum('...i,ij,...j->...i', h, {0}, h)"
        ).format(kernel)
    )


def packed_kernel(b: Build):
    """A vector of parameters scattered into a matrix."""
    n = b.shape[-1]
    packed = b.param(n * (n + 1) // 2, scale=0.5)
    how = b.pick("set", "add")
    b.emit(f"w = jnp.zeros(({n}, {n})).at[jnp.tril_indices({n})].{how}({packed})", "h = h @ w")


def sliced_kernels(b: Build):
    """Two kernels cut from one array."""
    n = b.shape[-1]
    stacked = b.param(2, n, n, scale=0.5)
    b.emit(b.pick("h = jnp.tanh(h @ {0}[0]) @ {0}[1]", "h = jax.nn.relu(h @ {0}[0]) + h @ {0}[1]").format(stacked))


def used_twice(b: Build):
    n = b.shape[-1]
    kernel = b.param(n, n)
    b.emit(f"h = {b.pick('jnp.tanh', 'jax.nn.relu', '')}(h @ {kernel}) @ {kernel}{b.pick('', '.T')}")


def residual(b: Build):
    n = b.shape[-1]
    kernel = b.param(n, n)
    b.emit(f"h = h + {b.pick('jax.nn.relu', 'jax.nn.gelu', 'jnp.sin')}(h @ {kernel})")


def gated(b: Build):
    n, width = b.shape[-1], b.pick(1, 2, 3)
    one, other = b.param(n, width), b.param(n, width)
    b.emit(f"h = {b.pick('jax.nn.sigmoid', 'jax.nn.relu', 'jax.nn.silu', '')}(h @ {one}) * (h @ {other})")
    b.became(*b.shape[:-1], width)


def prelu(b: Build):
    b.emit(f"h = jnp.where(h > 0, h, {b.param(b.shape[-1], scale=0.3)} * h)")


def maxout(b: Build):
    n, width = b.shape[-1], b.pick(1, 2)
    kernel = b.param(n, width, 2, scale=0.7)
    b.emit(f'h = jnp.max(jnp.einsum("...i,ijk->...jk", h, {kernel}), -1)')
    b.became(*b.shape[:-1], width)


def bilinear_pooling(b: Build):
    n = b.shape[-1]
    kernel = b.param(n, n, scale=0.5)
    b.emit(f'h = jnp.einsum("...i,ij,...j->...", h, {kernel}, h)[..., None]')
    b.became(*b.shape[:-1], 1)


def solves(b: Build):
    """A system of equations that the parameters make."""
    b.need(b.rank == 2, 2 <= b.shape[1] <= 4)
    n = b.shape[1]
    kernel = b.param(n, n, scale=0.3)
    b.emit(f"h = jnp.linalg.solve(2 * jnp.eye({n}) + {kernel} @ {kernel}.T, h.T).T")


def complex_kernel(b: Build):
    """A complex matrix made of two real ones."""
    n, width = b.shape[-1], b.pick(1, 2)
    real, imaginary = b.param(n, width), b.param(n, width)
    b.emit(f"c = h @ ({real} + 1j * {imaginary})")
    b.emit(
        b.pick(
            "h = jnp.abs(c)",
            "h = c.real",
            "h = c.real * c.imag",
            "h = jnp.abs(c) ** 2",
            "h = (c * c).imag",
            "h = jnp.exp(0.3 * c).real",
            "h = jnp.concatenate([c.real, c.imag], -1)",
        )
    )
    b.became(*b.shape[:-1], 2 * width if "concatenate" in b.lines[-1] else width)


def size_of_examples(b: Build):
    """A width that equals the number of examples, so that axes cannot be told apart by size."""
    b.need(b.batch <= 4)
    kernel = b.param(b.shape[-1], b.batch)
    b.emit(f"h = h @ {kernel}")
    b.became(*b.shape[:-1], b.batch)


def flattened_tokens(b: Build):
    """Examples and tokens share an axis for a while."""
    b.need(b.rank == 3)
    kernel = b.param(b.shape[2], b.shape[2])
    b.emit(
        f"t = h.reshape(-1, {b.shape[2]}) @ {kernel}",
        f"h = {b.pick('t', 'jax.nn.relu(t)', 'jnp.sin(t)')}.reshape(len(h), {b.shape[1]}, {b.shape[2]})",
    )


def mixture_of_experts(b: Build):
    n = b.shape[-1]
    gate, experts = b.param(n, 2), b.param(2, n, 2, scale=0.7)
    top = b.pick(
        "jax.nn.softmax(h @ {0})", "jax.nn.one_hot(jnp.argmax(h @ {0}, -1), 2) * jax.nn.softmax(h @ {0})"
    ).format(gate)
    b.emit(f'h = jnp.einsum("...e,...i,eio->...o", {top}, h, {experts})')
    b.became(*b.shape[:-1], 2)


def zero_kernel(b: Build):
    """A last layer of zeros: ties at initialisation."""
    width = b.pick(2, 3)
    b.emit(f"h = h @ {b.param(b.shape[-1], width, text=f'jnp.zeros(({b.shape[-1]}, {width}))')}")
    b.became(*b.shape[:-1], width)


def unlikely(b: Build):
    """A bias that makes one class of probability 1e-6 or so."""
    width = b.pick(2, 3, 4)
    b.traits.add("unlikely")
    last = b.pick(-14.0, -30.0)
    kernel, bias = b.param(b.shape[-1], width), b.param(width, text=f"jnp.zeros({width}).at[-1].set({last})")
    b.emit(f"h = h @ {kernel} + {bias}")
    b.became(*b.shape[:-1], width)


def many_outputs(b: Build):
    """More outputs than columns are usually taken for; what follows cannot have kernels of that size."""
    b.need(b.rank == 2, b.batch <= 3)
    width = b.pick(50, 300, 1100)
    wide = b.datum(f"normal({b.number()}, {b.batch}, {width})")
    b.emit(f"h = {b.pick('', 'jnp.tanh')}(h @ {b.param(b.shape[1], 1)}) * {wide}")
    b.became(b.batch, width, most=width)


def masked_kernel(b: Build):
    """Some weights are pruned, dropped at random, clipped, rounded, or scaled by data."""
    n, width = b.shape[-1], b.pick(2, 3)
    kernel = b.param(n, width)
    key = b.datum(f"jax.random.key({b.number()})")
    scale = b.datum(f"normal({b.number()})")
    b.traits.add("data without examples")
    b.emit(
        f"w = {kernel}",
        b.pick(
            f"h = h @ jnp.where(jnp.arange({width}) % 2 == 0, w, 0.0)",
            f"h = h @ (w * (jax.random.uniform({key}, w.shape, jnp.float32) < 0.7))",
            "h = h @ jnp.clip(w, -0.5, 0.5)",
            "h = h @ (w + lax.stop_gradient(jnp.round(2 * w) / 2 - w))",
            f"h = h @ (w * {scale})",
            "h = h @ (w / lax.stop_gradient(jnp.linalg.norm(w)))",
            "h = h @ lax.stop_gradient(w) + h @ w",
            "h = h @ w + lax.stop_gradient(h @ w) * (h @ w)",
            "h = h @ jnp.concatenate([w[:1], 2 * w[1:]], 0)",
            "h = h @ w.at[0].set(0.5)",
            "h = h @ w.at[0].multiply(w[0])",
            "h = h @ jnp.flip(w, 0) + h @ w",
            "h = h @ (w.ravel().reshape(w.shape[::-1]).T)",
            "h = h @ jnp.broadcast_to(w[:1], w.shape)",
            "h = h @ jnp.repeat(w[:, :1], w.shape[1], 1)",
        ),
    )
    b.became(*b.shape[:-1], width)


def joined_kernels(b: Build):
    """A kernel made of two arrays, or an array cut into pieces that overlap."""
    n, width = b.shape[-1], 2
    one, other = b.param(n, width), b.param(n, width)
    b.emit(
        b.pick(
            f"h = h @ jnp.concatenate([{one}, {other}], 1)",
            f"h = h @ jnp.stack([{one}[:, 0], {other}[:, 1]], 1) @ jnp.ones((2, 4))",
            f"w = jnp.stack([{one}, {other}])",
            f"h = jnp.concatenate([h @ {one}, h @ ({one} + {other})], -1)",
            f"h = jnp.concatenate([h @ {one}[:, :1], h @ {one}, h @ {other}[:, 1:]], -1)",
        )
    )
    if "w =" in b.lines[-1]:
        b.emit("h = jnp.concatenate([jnp.tanh(h @ w[0]), h @ w[1]], -1)")
    b.became(*b.shape[:-1], 4)


def scaled_examples(b: Build):
    """The parameter meets data before it meets the network."""
    n = b.shape[-1]
    gain = b.param(n, scale=0.5)
    rows = b.normal(n)
    shape = ", ".join(["len(h)", *["1"] * (b.rank - 2), str(n)])
    b.emit(
        b.pick(
            f"h = h * ({gain} * {rows}).reshape({shape})",
            f"h = h + ({gain} + {rows}).reshape({shape})",
            f"h = h * jnp.sin({gain} * {rows}).reshape({shape})",
        )
    )
