"""Pieces under transformations of JAX, with rules of the user's own, and with complex numbers."""

from tests.fuzz.programs.build import Build


def fourier(b: Build):
    n = b.shape[-1]
    line, width = b.pick(
        ("h = jnp.fft.fft(h, axis=-1).real", n),
        ("h = jnp.abs(jnp.fft.rfft(h + 0.1, axis=-1)) ** 2", n // 2 + 1),
        (f"h = jnp.fft.irfft(jnp.fft.rfft(h, axis=-1) * 1.5, n={n}, axis=-1)", n),
        (f"h = jnp.fft.ifft(jnp.fft.fft(h, axis=-1) * jnp.exp(1j * jnp.arange({n})), axis=-1).real", n),
        ("h = jnp.abs(jnp.fft.fft(h + 1j * h[..., ::-1] + 0.5, axis=-1))", n),
    )
    b.emit(line)
    b.became(*b.shape[:-1], width)


def fourier_kernel(b: Build):
    """A convolution in frequency space."""
    n = b.shape[-1]
    kernel = b.param(n)
    b.emit(f"h = jnp.fft.irfft(jnp.fft.rfft(h, axis=-1) * jnp.fft.rfft({kernel}), n={n}, axis=-1)")


def complex_values(b: Build):
    b.emit(
        b.pick(
            "h = jnp.abs(h + 0.5j)",
            "h = jnp.abs(h * (1 + 2j))",
            "h = (h * (0.5 + 1j)).imag",
            "h = jnp.angle(1 + 1j * h)",
            "h = jnp.real(jnp.exp(1j * h))",
            "h = jnp.real(jnp.conj(h + 1j) * (h * 1j))",
            "h = jnp.real((h + 1j * h[..., ::-1]) ** 2)",
            "h = jnp.where(h > 0, h + 0.5j, 1j * h).imag + h",
            "h = jnp.real(lax.complex(h, 2 * h) * 1j)",
        )
    )


def custom_forward_rule(b: Build):
    name = b.name("f")
    rule = b.pick(
        ("jnp.sin(x)", "jnp.cos(x) * t"),
        ("jnp.maximum(x, 0)", "(x > 0) * t"),
        ("x**2 / 2", "x * t"),
        ("jnp.round(2 * x) / 2", "t"),
        ("jnp.abs(x)", "jnp.sign(x) * t"),
    )
    b.helpers += [
        "@jax.custom_jvp",
        f"def {name}(x):",
        f"    return {rule[0]}",
        f"{name}.defjvp(lambda primals, tangents: (lambda x, t: ({name}(x), {rule[1]}))(*primals, *tangents))",
        "",
    ]
    b.emit(f"h = {name}(h)")


def custom_backward_rule(b: Build):
    """A rule that need not agree with itself: what counts is how JAX differentiates its backward pass."""
    forward, backward = b.pick(
        ("jnp.sin(x)", "jnp.cos(x) * t"),
        ("jnp.maximum(x, 0)", "(x > 0) * t"),
        ("x", "jnp.clip(t, -0.1, 0.1)"),
        ("jnp.round(2 * x) / 2", "t"),
        ("x", "-0.5 * t"),
    )
    b.traits.add("custom_vjp")
    b.emit(f"h = {_rule(b, 'x', forward, forward, f'({backward},)')}(h)")


def opaque_rule(b: Build):
    """A forward pass that calls the function itself, as is usual: JAX cannot push derivatives forward through it."""
    forward, backward = b.pick(("jnp.sin(x)", "jnp.cos(x) * t"), ("jnp.maximum(x, 0)", "(x > 0) * t"))
    b.traits |= {"custom_vjp", "opaque"}
    b.emit(f"h = {_rule(b, 'x', forward, 'f(x)', f'({backward},)')}(h)")


def custom_gradient_of_dense(b: Build):
    """A dense layer with a backward rule of its own, which is right."""
    n, width = b.shape[-1], b.pick(1, 2)
    b.need(b.rank == 2)
    b.traits.add("custom_vjp")
    rule = _rule(b, "x, w", "x @ w", "x @ w", "(t @ x[1].T, x[0].T @ t)")
    b.emit(f"h = {rule}(h, {b.param(n, width)})")
    b.became(b.batch, width)


def _rule(b: Build, arguments: str, value: str, forward: str, backward: str) -> str:
    name = b.name("f")
    saved = f"({arguments})" if "," in arguments else arguments
    b.helpers += [
        "@jax.custom_vjp",
        f"def {name}({arguments}):",
        f"    return {value}",
        f"{name}.defvjp(lambda {arguments}: ({forward.replace('f(', name + '(')}, {saved}), lambda x, t: {backward})",
        "",
    ]
    return name


def rematerialised(b: Build):
    n, width = b.shape[-1], b.pick(1, 2, 3)
    kernel = b.param(n, width)
    body = b.pick("jax.nn.relu(h @ w)", "jnp.tanh(h @ w)", "h @ w")
    policy = b.pick("", ", policy=jax.checkpoint_policies.dots_saveable")
    b.emit(f"h = jax.checkpoint(lambda h, w: {body}{policy})(h, {kernel})")
    b.became(*b.shape[:-1], width)


def compiled_inside(b: Build):
    n, width = b.shape[-1], b.pick(1, 2, 3)
    kernel = b.param(n, width)
    b.emit(
        f"h = jax.jit(lambda h, w: {b.pick('jax.nn.relu(h @ w)', 'h @ w', 'jax.jit(jnp.tanh)(h @ w)')})(h, {kernel})"
    )
    b.became(*b.shape[:-1], width)


def mapped_over_examples(b: Build):
    n, width = b.shape[-1], b.pick(1, 2, 3)
    kernel, bias = b.param(n, width), b.param(width)
    body = b.pick("row @ {0} + {1}", "jax.nn.relu(row @ {0} + {1})", "jnp.tanh(row @ {0}) * {1}").format(kernel, bias)
    b.emit(f"h = jax.vmap(lambda row: {body})(h)")
    b.became(*b.shape[:-1], width)


def mapped_over_kernels(b: Build):
    """An ensemble: the kernels are mapped, the examples are not."""
    n, members = b.shape[-1], b.pick(1, 2)
    stacked = b.param(members, n, 2, scale=0.6)
    body = b.pick("h @ w", "jax.nn.relu(h @ w)", "jnp.tanh(h @ w)")
    after = b.pick("mean(0)", "max(0)", "prod(0)")
    b.emit(f"h = jax.vmap(lambda w: {body})({stacked}).{after}")
    b.became(*b.shape[:-1], 2)


def derivative_inside(b: Build):
    """The network differentiates itself, as networks for differential equations do."""
    b.need(b.rank == 2)
    n = b.shape[1]
    kernel = b.param(n, n)
    b.emit(
        b.pick(
            f"h = jax.vmap(jax.grad(lambda row: jnp.sum(jnp.tanh(row @ {kernel}))))(h)",
            f"h = jax.jvp(lambda x: jnp.sin(x @ {kernel}), (h,), (jnp.ones_like(h),))[1]",
            f"h = jax.vjp(lambda x: jax.nn.relu(x @ {kernel}), h)[1](jnp.ones_like(h))[0]",
        )
    )


def picks_rows_of_kernels(b: Build):
    """Each example has the kernel that its data names."""
    b.need(b.rank == 2)
    n, width, count = b.shape[1], b.pick(1, 2), b.pick(2, 3)
    kernels = b.param(count, n, width, scale=0.6)
    index = b.integers(count)
    b.emit(
        b.pick(
            f'h = jnp.einsum("bi,bio->bo", h, {kernels}[{index}])',
            f"h = jax.vmap(lambda row, i: row @ {kernels}[i])(h, {index})",
        )
    )
    b.became(b.batch, width)
