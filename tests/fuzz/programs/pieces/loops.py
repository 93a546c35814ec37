"""Pieces with loops and branches inside."""

from tests.fuzz.programs.build import Build


def recurrence(b: Build):
    b.need(b.rank == 3)
    _, length, n = b.shape
    width = b.pick(1, 2)
    inputs, states = b.param(n, width), b.param(width, width)
    cell = b.pick("jnp.tanh(x @ {0} + s @ {1})", "jax.nn.relu(x @ {0} + s @ {1})", "0.5 * s + x @ {0} @ {1}").format(
        inputs, states
    )
    options = b.pick("", ", unroll=True", ", unroll=2", ", reverse=True")
    results, after, shape = b.pick(
        ("s, _", "s", (b.batch, width)),
        ("_, ys", "ys.mean(0)", (b.batch, width)),
        ("_, ys", "ys.swapaxes(0, 1)", (b.batch, length, width)),
        ("s, ys", "s + ys[0]", (b.batch, width)),
    )
    emitted = b.pick("(s, s)", "(s, 2 * s)", "(s, (s, jnp.sin(s))[0])")
    b.emit(
        "def cell(s, x):",
        f"    s = {cell}",
        f"    return {emitted}",
        f"{results} = lax.scan(cell, jnp.zeros((len(h), {width}), h.dtype), h.swapaxes(0, 1){options})",
        f"h = {after}",
    )
    b.became(*shape)


def gru(b: Build):
    b.need(b.rank == 3)
    _, _, n = b.shape
    width = b.pick(1, 2)
    kernel, states = b.param(n, 2 * width), b.param(width, 2 * width)
    b.emit(
        "def cell(s, x):",
        f"    a, z = jnp.split(x @ {kernel} + s @ {states}, 2, -1)",
        "    z = jax.nn.sigmoid(z)",
        "    return z * s + (1 - z) * jnp.tanh(a), None",
        f"h = lax.scan(cell, jnp.zeros((len(h), {width}), h.dtype), h.swapaxes(0, 1))[0]",
    )
    b.became(b.batch, width)


def scanned_layers(b: Build):
    """Stacked kernels, one for each trip of a loop."""
    n, depth = b.shape[-1], b.pick(1, 2, 3)
    stacked = b.param(depth, n, n, scale=0.6)
    step = b.pick("jax.nn.relu(h @ w)", "h + jnp.tanh(h @ w)", "h @ w", "h + jax.nn.relu(h @ w)")
    if b.maybe(0.3):
        step = f"jax.checkpoint(lambda h, w: {step})(h, w)"
    unroll = b.pick("", ", unroll=True")
    b.emit(f"h = lax.scan(lambda h, w: ({step}, None), h, {stacked}{unroll})[0]")


def scans_examples(b: Build):
    """A loop over the examples themselves, one at a time."""
    b.need(b.rank == 2)
    n, width = b.shape[1], b.pick(1, 2)
    kernel = b.param(n, width)
    b.emit(
        b.pick(
            f"h = lax.map(lambda row: jnp.tanh(row @ {kernel}), h)",
            f"h = lax.map(lambda row: jax.nn.relu(row @ {kernel}), h, batch_size=2)",
            f"h = lax.scan(lambda _, row: (None, row @ {kernel}), None, h)[1]",
        )
    )
    b.became(b.batch, width)


def counted_loop(b: Build):
    n = b.shape[-1]
    kernel = b.param(n, n, scale=0.5)
    body = b.pick("jnp.tanh(h @ {0})", "h + 0.5 * jax.nn.relu(h @ {0})", "h @ {0}").format(kernel)
    b.emit(f"h = lax.fori_loop(0, {b.pick(1, 2, 3)}, lambda i, h: {body}, h)")


def loop_of_data(b: Build):
    """A `while` whose trips depend on data, beside the path of derivatives."""
    count = b.datum(f"jnp.asarray({b.pick(1, 2, 3)})")
    b.traits.add("data without examples")
    b.emit(
        f"n = lax.while_loop(lambda s: s[0] < {count}, lambda s: (s[0] + 1, s[1] * 1.5), (0, 1.0))[1]",
        "h = h * n",
    )


def forward_loop(b: Build):
    """A `while` over values that carry no gradient."""
    b.emit(
        "t = lax.while_loop(lambda t: jnp.max(jnp.abs(t)) > 0.5, lambda t: 0.5 * t, lax.stop_gradient(h))", "h = h + t"
    )
    b.traits.add("coupled")


def branch_of_data(b: Build):
    flag = b.datum(f"jnp.asarray({b.pick(-1.0, 1.0)})")
    b.traits.add("data without examples")
    one, other = b.pick(("jnp.tanh(h)", "h"), ("jax.nn.relu(h)", "2 * h"), ("h", "h**2"))
    b.emit(
        b.pick(
            f"h = lax.cond({flag} > 0, lambda h: {one}, lambda h: {other}, h)",
            f"h = lax.switch(({flag} > 0).astype(int), [lambda h: {one}, lambda h: {other}], h)",
        )
    )


def branch_of_parameters(b: Build):
    """The branch depends on the parameters, through all examples."""
    b.traits.add("coupled")
    b.emit("h = lax.cond(jnp.sum(h) > 0, lambda h: jnp.tanh(h), lambda h: 0.5 * h, h)")


def branch_per_example(b: Build):
    n = b.shape[-1]
    kernel = b.param(n, n)
    flags = b.bools()
    b.emit(f"h = jax.vmap(lambda row, f: lax.cond(f, lambda r: jnp.tanh(r @ {kernel}), lambda r: r, row))(h, {flags})")


def fixed_point(b: Build):
    """Newton's iteration, written out by `fori_loop`."""
    b.emit("h = lax.fori_loop(0, 3, lambda i, y: y - (y**3 + y - h) / (3 * y**2 + 1), jnp.zeros_like(h))")


def linear_recurrence(b: Build):
    """An associative scan with a parameter for its decay."""
    b.need(b.rank == 3)
    decay = b.param(b.shape[2], scale=0.5)
    b.emit(
        f"a = jnp.broadcast_to(jax.nn.sigmoid({decay}), h.shape)",
        "h = lax.associative_scan(lambda l, r: (l[0] * r[0], l[1] * r[0] + r[1]), (a, h), axis=1)[1]",
    )
