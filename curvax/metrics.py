"""What curvax's transformations keep in their states, as numbers for a logger."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from curvax.curvature.refresh import HessianDiagState
from curvax.layers import names_of
from curvax.noise_scale import NoiseScaleState
from curvax.probes import ProbeState

KINDS = HessianDiagState | NoiseScaleState | ProbeState

_Numbers = Iterator[tuple[str, jax.typing.ArrayLike]]


def metrics(state: Any) -> dict[str, float]:
    """What an optimizer's state has measured, as a flat dict of floats.

    Formula:
      Of `with_probes` and its layers `probes/loss_stride/<layer>` and so on, `probes/radius_quantiles/<layer>/<i>` for
      the i-th quantile; of `with_noise_scale` the critical batch sizes `noise_scale` of all and `noise_scale/<layer>`;
      `<layer>[k]` is the k-th layer of a stack; of `with_hessian_diag`, which is in `cblr`,
      `curvature/mean_abs/<array>`, the mean of |h| over an array, `curvature/num_refreshes` and
      `curvature/num_skipped`. Where a state has several of a kind, those after the first are `probes_1`, `probes_2` and
      so on.

    Args:
      state: of any optimizer that has such transformations in it. Its arrays are copied to the host at once.

    Returns:
      The numbers; empty if there is nothing of the kind in the state.

    Example:
      >>> import jax.numpy as jnp, optax, curvax
      >>> tx = optax.chain(optax.clip(1.0), curvax.with_probes(optax.sgd(0.5), quantiles=(0.5,)))
      >>> w = {"w": jnp.array([3.0, -0.5])}
      >>> updates, state = tx.update(w, tx.init(w), w)
      >>> curvax.metrics(state)["probes/mean_abs_gradient/w"]
      0.75
      >>> import json
      >>> len(json.dumps(curvax.metrics(state))) > 100
      True
    """
    found: dict[str, jax.typing.ArrayLike] = {}
    seen: dict[str, int] = {}
    for part in _parts(state):
        kind, named = _READERS[type(part)]
        number = seen[kind] = seen.get(kind, -1) + 1
        prefix = f"{kind}_{number}" if number else kind
        found |= {f"{prefix}/{name}" if name else prefix: value for name, value in named(part)}
    return {name: float(value) for name, value in jax.device_get(found).items()}


def _parts(state: Any) -> Iterator[KINDS]:
    for part in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, KINDS)):
        if isinstance(part, KINDS):
            yield part
            yield from _parts(part.inner_state)


def _of_probes(state: ProbeState) -> _Numbers:
    for field in ("mean_abs_gradient", "parameter_stride", "loss_stride"):
        for layer, value in getattr(state, field).items():
            for name, own in _of_layers(layer, value, 0):
                yield f"{field}/{name}", own
    for layer, values in state.radius_quantiles.items():
        for name, own in _of_layers(layer, values, 1):
            for i in range(own.shape[0]):
                yield f"radius_quantiles/{name}/{i}", own[i]


def _of_layers(name: str, values: jax.Array, ndim: int) -> Iterator[tuple[str, jax.Array]]:
    """The values of each layer: of a stack they have one axis more."""
    if values.ndim == ndim:
        yield name, values
    else:
        yield from ((f"{name}[{k}]", values[k]) for k in range(values.shape[0]))


def _of_noise(state: NoiseScaleState) -> _Numbers:
    yield "", state.whole.critical_batch_size
    for layer, scale in state.layers.items():
        yield from _of_layers(layer, scale.critical_batch_size, 0)


def _of_curvature(state: HessianDiagState) -> _Numbers:
    yield "num_refreshes", state.num_refreshes
    yield "num_skipped", state.num_skipped
    leaves = jax.tree_util.tree_leaves_with_path(state.hessian_diag)
    for name, (_, h) in zip(names_of([path for path, _ in leaves]), leaves, strict=True):
        if h.size:
            yield f"mean_abs/{name}", jnp.mean(jnp.abs(h))


#: What a kind is called, and what reads it.
_READERS: dict[type, tuple[str, Callable[[Any], _Numbers]]] = {
    HessianDiagState: ("curvature", _of_curvature),
    NoiseScaleState: ("noise_scale", _of_noise),
    ProbeState: ("probes", _of_probes),
}
