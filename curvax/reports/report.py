"""The curvature of a network at a glance: the first call."""

import contextlib
import dataclasses
import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.checks import check_number
from curvax.curvature.hessian import explain
from curvax.curvature.methods import Auto, Exact
from curvax.curvature.micro_batches import num_examples
from curvax.curvature.scalar import scalar_objective
from curvax.curvature.short_forms import as_method, needs_key
from curvax.keys import Key, as_key
from curvax.layers import Layer, Layers, checked, group, path_name
from curvax.objective import Objective
from curvax.reports import advice, measure, plot, table
from curvax.scans import scanned_axes, stacked_at
from curvax.stacks import sizes, without

#: Passes and products up to which curvature is computed exactly: an estimate in four draws takes eight.
CHEAP = 32
#: Seconds after which a stage says that it is running.
PATIENCE = 2.0


@dataclasses.dataclass(frozen=True)
class Report:
    """What `curvax.report` found; printed, a table and what stands out in it.

    Attributes:
      layers: a dict of numbers for each layer, see `to_dict`.
      findings: sentences on what stands out, and what to do.
      loss: its value on the batch.
      params: how many there are.
      num_examples: of the batch; 0 where the objective does not show them.
      critical_batch_size: the noise scale of the whole gradient, in examples; infinite where all of it is noise, `None`
        where it is not known, for `noise_reason`.
      method: how the curvature was computed.
      unreached: the paths of arrays that no derivative reaches.
      hidden_stacks: the paths of arrays that hold many layers, as the trace shows, and their shapes alone do not.
      cost: a line.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> found = curvax.report(lambda p: jnp.sum(p["kernel"] ** 2), {"kernel": jnp.ones((2, 2))})
      >>> found.to_dict()["layers"][0]["curvature"], found.noise_reason
      (2.0, 'the objective is a plain function, in which no examples can be told apart')
    """

    layers: list[dict[str, Any]]
    loss: float
    params: int
    num_examples: int
    critical_batch_size: float | None
    noise_reason: str
    method: str
    unreached: tuple[str, ...]
    hidden_stacks: tuple[str, ...]
    cost: str

    @property
    def findings(self) -> list[str]:
        """What stands out."""
        return list(advice.findings(self))

    def __str__(self) -> str:
        return table.text(self)

    def _repr_html_(self) -> str:
        return table.markup(self)

    def plot(self) -> Any:
        """The radius of each layer, as Figure 2 of the paper has it; a matplotlib figure.

        Raises:
          ImportError: without matplotlib.
        """
        return plot.radii(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers and text, as JSON takes them but for infinities and NaN.

        Returns:
          `{"layers": [...], "findings": [...], ...}`; `pandas.DataFrame(report.to_dict()["layers"])` is a table.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        lists = {name: list(value) for name, value in fields.items() if isinstance(value, tuple)}
        return {**fields, **lists, "findings": self.findings}


def report(
    objective: Any,
    params: Any,
    *,
    method: Any = None,
    num_samples: int = 4,
    layers: Layers = "kernel",
    key: Key = 0,
    has_aux: bool = False,
) -> Report:
    """Measure the curvature of each layer of a network, and what the rules would make of it.

    Formula:
      For each layer: norms and medians of w and g; the mean of the Hessian's diagonal h; radii by eq. 23 (LARS), eq.
      20-22 (MCLR) and eq. 24 (PercentDelta) of Gao & Zhong: `R_k = norm2(u_k) / norm2(g_k)` with u the step of the
      optimizer at the rate 1 without momentum, over `R_all = sqrt(sum_k R_k^2 norm2(g_k)^2 / sum_k norm2(g_k)^2)`
      (`cblr` turns the step of a layer, and goes as far as LARS); quantiles of the radius `1 / (|h| + 0.1 mean|h|)` of
      the parameters that have a gradient; and the noise scale `tr(Sigma) / |G|^2` of McCandlish et al. 2018, from
      gradients of eight parts of the batch.

    Args:
      objective: an `Objective`, or any function `params -> scalar`, of which no noise can be told.
      params: a tree of real arrays.
      method: how curvature is computed, as in `hessian_diag`; `None` for the exact diagonal where `explain` says that
        it costs 32 passes at most, and else `num_samples` draws of the estimate that the objective allows.
      num_samples: draws of an estimate; two at least for a standard error.
      layers: `"array"`, `"module"`, `"kernel"` or rules from path regex to layer name, see `layers.group`. A layer is
        measured on its kernels, but for the noise; what follows none, on itself. Each layer of a stack has a row of its
        own; for `"kernel"` and an `Objective` stacks are also found by `find_stacks`.
      key: a seed or a `jax.random.key`, of the draws.
      has_aux: whether the objective returns other output too.

    Returns:
      A `Report`: print it, or `plot()` it, or take `to_dict()`.

    Raises:
      ValueError: as `hessian_diag`; if there are no parameters.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> def predict(params, x):
      ...   return jnp.tanh(x @ params["hidden"]) @ params["head"]
      >>> objective = curvax.Objective(predict, lambda z, x: jnp.sum(z**2, 1) + x[:, 0], jnp.eye(8, 4))
      >>> found = curvax.report(objective, {"hidden": jnp.ones((4, 3)) / 9, "head": jnp.ones((3, 2)) / 9})
      >>> [row["layer"] for row in found.layers], found.params, found.method
      (['head', 'hidden'], 18, 'Exact()')
    """
    start, clock = time.perf_counter(), _Clock()
    check_number("num_samples", num_samples, "[1, inf)", whole=True)
    if not sum(jnp.size(x) for x in jax.tree.leaves(params)):
        raise ValueError("there are no parameters to report on; pass the tree of arrays that you train.")
    scalar, params = scalar_objective(objective, params, None, has_aux)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    layers, hidden = _with_scans(scalar, params, layers)
    groups = [layer for layer in group(leaves, layers) if any(leaves[i][1].size for i in layer.scaled)]
    parts = measure.Parts.of(groups)
    with clock.stage("plan"):
        method, passes, products = _method(scalar, params, method)
    keys = list(jax.random.split(as_key(key), int(num_samples))) if needs_key(method) else []
    loss, grad, noise = measure.gradient(scalar, params, parts, clock.stage)
    with clock.stage("norms and medians"):
        dark = measure.unreached(scalar, params, grad)
        first = measure.first_order(parts, layers, params, grad)
        dead = measure.dead_units(parts, grad)
    # Large, and computed anew with the curvature.
    del grad
    second, errors = measure.curvature(scalar, params, parts, layers, method, keys, clock.stage)
    whole = None if isinstance(noise, str) else measure.Noise(*(np.sum(x) for x in noise))
    rows = _rows(groups, leaves, first | second, dead, errors, noise)
    gradients = 1 + max(len(keys), 1)
    times = f"{len(keys)} x " if keys else ""
    counts = [(passes, "backward passes"), (products, "Hessian-vector products")]
    curvature = " and ".join(f"{times}{number} {what}" for number, what in counts if number)
    if passes is None:
        curvature = f"{times}the curvature by a method of your own"
    return Report(
        layers=rows,
        loss=float(loss),
        params=sum(x.size for _, x in leaves),
        num_examples=num_examples(scalar, params) if isinstance(scalar, Objective) else 0,
        critical_batch_size=None if whole is None else float(whole.critical_batch_size),
        noise_reason=noise if isinstance(noise, str) else "",
        method=repr(method) + (f", {len(keys)} draws" if keys else ""),
        unreached=tuple(path_name(leaves[i][0]) for i in dark),
        hidden_stacks=hidden,
        cost=f"Cost: {time.perf_counter() - start:.1f} s with compilation; {gradients} gradients, {curvature}.",
    )


def _with_scans(objective: Any, params: Any, layers: Layers) -> tuple[Layers, tuple[str, ...]]:
    """The grouping with the stacks that the trace shows, and the paths of those that shapes do not show."""
    if checked(layers).axes is not None or not isinstance(objective, Objective):
        return layers, ()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    seen = {i: axes for x in group(leaves, layers) for i, axes in zip(x.scaled, x.axes, strict=True)}
    read = dict(enumerate(scanned_axes(objective, params)))
    names = {i: path_name(path) for i, (path, _) in enumerate(leaves)}
    hidden = [i for i, axes in read.items() if axes and axes != seen[i]]
    if not hidden:
        return layers, ()
    axes = [read[i] or seen[i] for i in read]
    return stacked_at(list(names.values()), axes, "kernel"), tuple(names[i] for i in hidden)


def _method(objective: Any, params: Any, method: Any) -> tuple[Any, int | None, int | None]:
    """The method, and the passes and products that it takes, where that is known."""
    if method is None:
        said = explain(objective, params, Exact())
        if (said.passes or 0) + (said.products or 0) <= CHEAP:
            return Exact(), said.passes, said.products
        method = Auto().choose(objective, params)
    method = as_method(method, {})
    said = explain(objective, params, method)
    return method, said.passes, said.products


def _rows(
    groups: Sequence[Layer],
    leaves: Any,
    found: measure.Statistics,
    dead: Sequence[int],
    errors: measure.Statistics,
    noise: measure.Noise | str,
) -> list[dict[str, Any]]:
    radii = {name: found[f"radius_{name}"] for name in measure.FIRST_ORDER}
    squares = found["gradient_norm"] ** 2
    whole = {name: np.sqrt(_over(np.nansum(r**2 * squares), np.nansum(squares))) for name, r in radii.items()}
    scales = None if isinstance(noise, str) else noise.critical_batch_size
    rows: list[dict[str, Any]] = []
    for name, layer, shapes in _single_layers(groups, leaves):
        i = len(rows)
        units = sum(shapes[j][-1] for j in layer.measured or layer.scaled if len(shapes[j]) > 1)
        numbers = {column: float(values[i]) for column, values in found.items()}
        rows.append(
            {
                "layer": name,
                "params": sum(map(math.prod, shapes.values())),
                "is_kernel": bool(layer.measured),
                "units": units,
                "dead": dead[i] / units if units else 0.0,
                "curvature_error": float(errors["curvature"][i]),
                "critical_batch_size": None if scales is None else float(scales[i]),
                **numbers,
                **{f"rate_{name}": _over(radii[name][i], whole[name]) for name in radii},
            }
        )
    return rows


def _single_layers(groups: Sequence[Layer], leaves: Any) -> Iterator[tuple[str, Layer, dict[int, tuple[int, ...]]]]:
    """The layers by name, each of a stack apart, with the shapes of their arrays."""
    for layer in groups:
        shapes = {i: without(leaves[i][1].shape, axes) for i, axes in zip(layer.scaled, layer.axes, strict=True)}
        name = layer.name or _name_of(layer, leaves)
        counts = sizes(leaves[layer.scaled[0]][1].shape, layer.axes[0])
        for place in np.ndindex(counts):
            yield name + (f"[{', '.join(map(str, place))}]" if place else ""), layer, shapes


def _name_of(layer: Layer, leaves: Any) -> str:
    """Of a layer at the top of the tree, which has no path: that of its array, if it is one."""
    return path_name(leaves[layer.scaled[0]][0]) if len(layer.scaled) == 1 else ""


def _over(a: float, b: float) -> float:
    return float(a / b) if b > 0 else float("nan")


class _Clock:
    """Says which stage is running, once it has taken longer than anybody likes to wait without a word."""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        timer = threading.Timer(PATIENCE, lambda: print(f"curvax.report: {name} ...", file=sys.stderr, flush=True))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
