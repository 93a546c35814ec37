"""Makes the pictures of the gallery: `python docs/gallery/plots.py`, in a clone with its experiments installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import curvax
from experiments.plots import COLORS, LOOKS, name_axes, plt

HERE = Path(__file__).parent
SIZES = (64, 64, 64, 32, 10)


def digits():
    images, labels = load_digits(return_X_y=True)
    return {"x": jnp.asarray(images / 16, jnp.float32), "y": jnp.asarray(labels)}


def initial(seed=0):
    """Kernels as He has them, and biases of zero."""
    keys = jax.random.split(jax.random.key(seed), len(SIZES) - 1)
    layer = lambda key, m, n: {"kernel": jax.random.normal(key, (m, n)) * np.sqrt(2 / m), "bias": jnp.zeros(n)}
    return {f"dense_{i}": layer(key, *SIZES[i : i + 2]) for i, key in enumerate(keys)}


def predict(params, data):
    *hidden, last = params.values()
    x = data["x"] - 0.5
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def loss(logits, data):
    return optax.softmax_cross_entropy_with_integer_labels(logits, data["y"])


def estimates(data):
    """Estimated diagonals against the exact one, entry by entry."""
    params = initial()
    objective = curvax.Objective(predict, loss, {name: x[:128] for name, x in data.items()})
    exact = _flat(curvax.hessian_diag(objective, params, "exact"))
    methods = {
        "Hutchinson, 4 products": curvax.Hutchinson(num_samples=4),
        "XDiag, 8 products": curvax.XDiag(num_samples=4),
        "Gauss-Newton, 4 random columns": curvax.GaussNewton(num_samples=4),
    }
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.9), sharex=True, sharey=True, layout="constrained")
    for panel, (name, method), color in zip(panels, methods.items(), COLORS, strict=False):
        found = _flat(curvax.hessian_diag(objective, params, method, key=0))
        error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        kept = (exact > 1e-7) & (found > 1e-7)
        panel.loglog(exact[kept], found[kept], ".", markersize=1.5, alpha=0.4, color=color, rasterized=True)
        panel.loglog([1e-6, 1], [1e-6, 1], color="black", linewidth=0.8)
        below = np.mean(found[exact > 1e-7] <= 0)
        panel.set(title=f"{name}\nrelative error {error:.2f}, {below:.0%} not above zero", xlabel="exact")
        panel.set(xlim=(1e-6, 1), ylim=(1e-6, 1))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("estimated")
    return figure


def radii(data):
    """The radius of each kernel by LARS and by MCLR while `mclr` trains, over the geometric mean of all kernels.

    By themselves all radii grow without bound as the loss of the training images, and with it the gradient, vanishes.
    """
    params = initial()
    optimizer = curvax.mclr(optax.cosine_decay_schedule(0.008, 120))

    @jax.jit
    def step(params, state):
        grads = jax.grad(curvax.Objective(predict, loss, data))(params)
        kernels = [(params[name]["kernel"], grads[name]["kernel"]) for name in params]
        lars = jnp.stack([jnp.linalg.norm(w) / jnp.linalg.norm(g) for w, g in kernels])
        mclr = jnp.stack([curvax.median(w) / curvax.median(g) for w, g in kernels])
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, jnp.stack([lars, mclr])

    found, state = [], optimizer.init(params)
    for _ in range(120):
        params, state, row = step(params, state)
        found.append(row)
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.9), sharey=True, layout="constrained")
    for panel, rows, title in zip(panels, np.array(found).transpose(1, 2, 0), ("LARS", "MCLR"), strict=True):
        rows = rows / np.exp(np.mean(np.log(rows), axis=0))
        for name, row, style in zip(params, rows, LOOKS, strict=False):
            panel.semilogy(row, label=name, **style, markevery=20)
        name_axes(panel, "optimizer steps", "radius over the mean of all", title)
    return figure


def ramp(data):
    """The batch doubles where the noise scale, averaged over steps, is beyond it."""
    rng = np.random.default_rng(0)
    params, batch, seen, found, state, optimizer = initial(), 16, 0, [], None, None

    @jax.jit
    def gradient(params, data):
        return jax.grad(curvax.Objective(predict, loss, data))(params)

    while seen < 20_000:
        if state is None:
            optimizer = curvax.with_noise_scale(curvax.mclr(0.004), batch // 4, accumulate=4)
            state, update = optimizer.init(params), jax.jit(optimizer.update)
            begun = seen
        for _ in range(4):
            chosen = rng.choice(len(data["y"]), batch // 4, replace=False)
            grads = gradient(params, {name: x[chosen] for name, x in data.items()})
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        seen += batch
        scale = curvax.metrics(state)["noise_scale"]
        found.append((seen, batch, scale))
        # An average over a few steps is not worth much: at least thirty at each size.
        if seen - begun >= 30 * batch and scale > batch and batch < 512:
            batch, state = 2 * batch, None
    seen, batches, scales = map(np.array, zip(*found, strict=True))
    figure, panel = plt.subplots(figsize=(7, 3.9), layout="constrained")
    known = np.isfinite(scales) & (scales > 0)
    panel.semilogy(seen[known], scales[known], color=COLORS[1], linewidth=0.8, label="noise scale")
    panel.step(seen, batches, where="post", color=COLORS[0], linewidth=2, label="batch size")
    name_axes(panel, "examples seen", "examples")
    return figure


def report(data):
    """The plot of a report: the radius of each layer, by curvature and by parameters over gradients."""
    objective = curvax.Objective(predict, loss, {name: x[:256] for name, x in data.items()})
    return curvax.report(objective, initial()).plot()


def _flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


if __name__ == "__main__":
    data = digits()
    for make in (estimates, radii, ramp, report):
        make(data).savefig(HERE / f"{make.__name__}.png", dpi=110)
        print(make.__name__, flush=True)
