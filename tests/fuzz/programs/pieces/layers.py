"""Pieces with parameters that are more than a product: embeddings, attention, convolutions, norms."""

from tests.fuzz.programs.build import Build, read_param


def scale_and_shift(b: Build):
    scale, shift = (
        b.param(b.shape[-1], text=f"1 + normal({b.number()}, {b.shape[-1]}, scale=0.3)"),
        b.param(b.shape[-1]),
    )
    b.emit(f"h = h * {scale} + {shift}")


def embedding(b: Build):
    """Rows looked up by data, in one of the modes of indexing, some of them out of bounds or negative.

    Not out of bounds without a mode: there JAX's forward derivatives take the last row, its backward ones none.
    """
    rows, width = b.pick(2, 3, 4), b.shape[-1]
    table = b.param(rows, width, scale=0.7)
    high = b.pick(rows, rows, rows + 2)
    index = b.integers(high, *b.shape[1:-1])
    if b.maybe(0.2):
        index = f"({index} - 1)"
    how = b.pick(
        "{0}[{1}]",
        "jnp.take({0}, {1}, axis=0)",
        'jnp.take({0}, {1}, axis=0, mode="clip")',
        'jnp.take({0}, {1}, axis=0, mode="wrap")',
        'jnp.take({0}, {1}, axis=0, mode="fill", fill_value=0.0)',
        '{0}.at[{1}].get(mode="fill", fill_value=1.0)',
        "jax.nn.one_hot({1}, " + str(rows) + ") @ {0}",
    )
    if how == "{0}[{1}]":
        index = f"({index} % {rows})"
    b.emit(f"h = h + {how.format(table, index)}")


def tied_embedding(b: Build):
    """The same table looks tokens up and scores them."""
    width = b.pick(2, 3)
    rows = b.pick(3, 4)
    table = b.param(rows, width, scale=0.7)
    index = b.integers(rows)
    b.emit(f"e = {table}[{index}]", f"h = ({b.pick('e', 'jnp.tanh(e)', 'jax.nn.relu(e)')}) @ {table}.T")
    b.became(b.batch, rows)


def tied_to_earlier(b: Build):
    """An earlier matrix again, if its shape fits."""
    fits = [i for i, (_, shape) in enumerate(b.params) if len(shape) == 2 and shape[0] == b.shape[-1]]
    b.need(bool(fits))
    index = b.pick(*fits)
    b.emit(f"h = h @ {read_param(b.spec.style, index)}")
    b.became(*b.shape[:-1], b.params[index][1][1])


def attention(b: Build):
    b.need(b.rank == 3, b.shape[1] > 1)
    n, inner = b.shape[2], b.pick(1, 2)
    q, k = b.param(n, inner, scale=0.7), b.param(n, inner, scale=0.7)
    bias = f" + {b.param(inner)}" if b.maybe() else ""
    mask = " + jnp.where(jnp.tril(jnp.ones(({0}, {0}))) > 0, 0.0, -1e9)".format(b.shape[1]) if b.maybe() else ""
    b.emit(
        f'a = jnp.einsum("bqe,bke->bqk", h @ {q}, h @ {k}{bias}){mask}',
        f"h = jax.nn.softmax(a, -1) @ h{b.pick('', ' + h')}",
    )


def convolution_2d(b: Build):
    b.need(b.rank == 4)
    _, height, width, channels = b.shape
    kh, kw = b.rng.randint(1, min(2, height)), b.rng.randint(1, min(2, width))
    groups = b.pick(*[g for g in (1, 1, 2, 3, channels) if channels % g == 0])
    out = groups * b.pick(1, 1, 2)
    strides = (b.pick(1, 1, 2), b.pick(1, 2))
    padding = b.pick('"SAME"', '"VALID"', "((1, 0), (0, 1))", "((0, 1), (1, 1))")
    dilation = b.pick((1, 1), (1, 1), (2, 1))
    spread = (1, 1) if padding.startswith('"') else b.pick((1, 1), (1, 2))
    kernel = b.param(kh, kw, channels // groups, out, scale=0.7)
    call = (
        f"lax.conv_general_dilated(h, {kernel}, {strides}, {padding}, lhs_dilation={spread}, rhs_dilation={dilation},"
        f' dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count={groups})'
    )
    bias = f" + {b.param(out)}" if b.maybe() else ""
    b.emit(f"h = {call}{bias}")
    b.became(b.batch, *_conv_sizes((height, width), (kh, kw), strides, padding, spread, dilation, b), out)


def _conv_sizes(sizes, kernel, strides, padding, spread, dilation, b):
    shape = []
    for axis, (n, k, s, e, r) in enumerate(zip(sizes, kernel, strides, spread, dilation, strict=True)):
        n, k = (n - 1) * e + 1, (k - 1) * r + 1
        if padding == '"SAME"':
            out = -(-n // s)
        else:
            low, high = (0, 0) if padding == '"VALID"' else eval(padding)[axis]
            out = (n + low + high - k) // s + 1
        b.need(out >= 1)
        shape.append(out)
    return shape


def convolution_1d(b: Build):
    b.need(b.rank == 3)
    _, length, channels = b.shape
    k, out, stride = b.rng.randint(1, min(3, length)), b.pick(1, 2), b.pick(1, 2)
    padding = b.pick("SAME", "VALID")
    layout = b.pick('("NWC", "WIO", "NWC")', '("NWC", "OWI", "NWC")', '("NWC", "WIO", "NCW")')
    shape = (out, k, channels) if "OWI" in layout else (k, channels, out)
    kernel = b.param(*shape, scale=0.7)
    b.emit(f'h = lax.conv_general_dilated(h, {kernel}, ({stride},), "{padding}", dimension_numbers={layout})')
    length = -(-length // stride) if padding == "SAME" else (length - k) // stride + 1
    b.became(b.batch, *((out, length) if "NCW" in layout else (length, out)))


def examples_as_channels(b: Build):
    """A convolution over features whose examples are not the first axis."""
    b.need(b.rank == 3)
    kernel = b.param(2, b.shape[2], 2, scale=0.7)
    layout = '("WNC", "WIO", "NWC")'
    b.emit(f'h = lax.conv_general_dilated(h.swapaxes(0, 1), {kernel}, (1,), "SAME", dimension_numbers={layout})')
    b.became(*b.shape[:2], 2)


def layer_norm(b: Build):
    axes = b.pick("-1", str(tuple(range(1, b.rank))))
    b.emit(f"h = (h - h.mean({axes}, keepdims=True)) * lax.rsqrt(h.var({axes}, keepdims=True) + 1e-2)")
    if b.maybe():
        scale_and_shift(b)


def rms_norm(b: Build):
    scale = (
        f" * {b.param(b.shape[-1], text=f'1 + normal({b.number()}, {b.shape[-1]}, scale=0.3)')}" if b.maybe() else ""
    )
    b.emit(f"h = h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-2){scale}")


def batch_norm_in_training(b: Build):
    b.traits.add("coupled")
    axes = str(tuple(range(b.rank - 1)))
    b.emit(f"h = (h - h.mean({axes})) / jnp.sqrt(h.var({axes}) + 1e-1)")
    if b.maybe():
        scale_and_shift(b)


def batch_norm_in_evaluation(b: Build):
    n = b.shape[-1]
    mean, var = b.datum(f"normal({b.number()}, {n})"), b.datum(f"jnp.exp(normal({b.number()}, {n}))")
    b.traits.add("data without examples")
    b.emit(f"h = (h - {mean}) * lax.rsqrt({var} + 1e-3)")
    if b.maybe():
        scale_and_shift(b)


def group_norm(b: Build):
    b.need(b.shape[-1] % 2 == 0, b.features > 2)
    b.emit(
        f"g = h.reshape(len(h), -1, 2, {b.shape[-1] // 2})",
        "g = (g - g.mean((1, 3), keepdims=True)) / jnp.sqrt(g.var((1, 3), keepdims=True) + 1e-1)",
        f"h = g.reshape(len(h), {', '.join(map(str, b.shape[1:]))})",
    )
