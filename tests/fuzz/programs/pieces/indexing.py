"""Pieces without parameters that pick, place, order and accumulate."""

from tests.fuzz.programs.build import Build


def gathers(b: Build):
    """Features picked by constant indices, in every mode of indexing."""
    n, k = b.shape[-1], b.rng.randint(1, 3)
    high = b.pick(n, n, n + 2)
    index = [b.rng.randrange(-1 if b.maybe(0.3) else 0, high) for _ in range(k)]
    mode = b.pick("clip", "wrap", "fill", "promise_in_bounds")
    if mode == "promise_in_bounds":
        index = [max(0, min(i, n - 1)) for i in index]
    fill = f", fill_value={b.pick(0.0, 1.0)}" if mode == "fill" else ""
    get, take = "h.at[..., jnp.array({0})].get(mode={1!r}{2})", "jnp.take(h, jnp.array({0}), axis=-1, mode={1!r}{2})"
    how = {"promise_in_bounds": get, "wrap": take}.get(mode, b.pick(get, take))
    b.emit("h = " + how.format(index, mode, fill))
    b.became(*b.shape[:-1], k)


def gathers_by_data(b: Build):
    """Features picked by each example's own indices."""
    b.need(b.rank == 2)
    n, k = b.shape[1], b.pick(1, 2, 3)
    index = b.integers(b.pick(n, n, n + 2), k)
    mode = b.pick("", "", ', mode="clip"', ', mode="fill", fill_value=0.0', ', mode="fill", fill_value=2.0')
    b.emit(
        b.pick(
            f"h = jnp.take_along_axis(h, {index}, 1{mode})",
            f"h = jax.vmap(lambda row, i: row.at[i].get(mode='clip'))(h, {index})",
            f"h = h[jnp.arange(len(h))[:, None], {index} % {n}]",
        )
    )
    b.became(b.batch, k)


def dynamic_slice(b: Build):
    n = b.shape[-1]
    size = b.rng.randint(1, n)
    starts = b.integers(n)
    zeros = ", ".join(["0"] * (b.rank - 2) + ["i"])
    sizes = (*b.shape[1:-1], size)
    b.emit(f"h = jax.vmap(lambda row, i: lax.dynamic_slice(row, ({zeros},), {sizes}))(h, {starts})")
    b.became(*b.shape[:-1], size)


def scatters(b: Build):
    """Features scattered to constant places, some of them twice or out of bounds."""
    n, size = b.shape[-1], b.pick(2, 3, 4)
    b.need(b.rank == 2)
    index = [b.rng.randrange(size if b.maybe(0.7) else size + 2) for _ in range(n)]
    how = b.pick("add", "add", "set", "max", "min")
    if how == "set":
        # Of values set at one place twice, which one stays is nobody's business.
        b.need(n <= size)
        index = b.rng.sample(range(size + 1), n)
    start = b.pick("jnp.zeros", "jnp.ones")
    mode = b.pick("", "", ", mode='drop'", ", mode='clip'")
    b.emit(f"h = {start}((len(h), {size}), h.dtype).at[:, jnp.array({index})].{how}(h{mode})")
    b.became(b.batch, size)


def scatters_by_data(b: Build):
    b.need(b.rank == 2)
    n, size = b.shape[1], b.pick(2, 3)
    index = b.integers(size + b.pick(0, 0, 1), n)
    b.emit(
        b.pick(
            f"h = jax.vmap(lambda row, i: jnp.zeros({size}, row.dtype).at[i].add(row))(h, {index})",
            f"h = jax.vmap(lambda row, i: jax.ops.segment_sum(row, i, {size}))(h, {index})",
            f"h = jnp.zeros((len(h), {size}), h.dtype).at[jnp.arange(len(h))[:, None], {index}].add(h)",
        )
    )
    b.became(b.batch, size)


def updates_slice(b: Build):
    b.emit(
        b.pick(
            "h = h.at[..., 0].set(2.0)",
            "h = h.at[..., -1].multiply(h[..., 0])",
            "h = lax.dynamic_update_slice_in_dim(h, 0.5 * h[..., :1], 0, h.ndim - 1)",
            "h = h.at[:, 0].add(h[:, -1])",
            "h = h.at[0].multiply(2.0)",
        )
    )


def cumulates(b: Build):
    axis = b.pick(*range(1, b.rank))
    b.emit(
        b.pick(
            "h = jnp.cumsum(h, {0})",
            "h = jnp.cumprod(h, {0})",
            "h = lax.cummax(h, {0})",
            "h = lax.cummin(h, {0}, reverse=True)",
            "h = lax.cumlogsumexp(h, {0})",
            "h = lax.cumsum(h, {0}, reverse=True)",
            "h = lax.associative_scan(jnp.add, h, axis={0})",
            "h = lax.associative_scan(jnp.multiply, h, axis={0})",
            "h = jnp.diff(h, axis={0}, prepend=0)",
        ).format(axis)
    )


def sorts(b: Build):
    n = b.shape[-1]
    k = b.rng.randint(1, n)
    line, width = b.pick(
        ("h = jnp.sort(h, -1)", n),
        ("h = -jnp.sort(-h, -1)", n),
        ("h = jnp.take_along_axis(h, jnp.argsort(h, -1), -1)", n),
        ("h = lax.sort((h, h**2), num_keys=1)[1]", n),
        (f"h = lax.top_k(h, {k})[0]", k),
        (f"h = jnp.take_along_axis(h, lax.top_k(jnp.abs(h), {k})[1], -1)", k),
        ("h = h * (jnp.argsort(jnp.argsort(h, -1), -1) > 0)", n),
        ("h = jnp.where(h >= jnp.max(h, -1, keepdims=True), h, 0.0)", n),
    )
    b.emit(line)
    b.became(*b.shape[:-1], width)
