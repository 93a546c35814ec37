"""What an exact diagonal will cost, parameter by parameter, before anything is computed."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax.exact.dataflow import Flow
from curvax.exact.routes import Route
from curvax.exact.trace import leaf_paths

CURES = (
    "raise `budget`, restrict the diagonal to other parameters, write the layer so that a cheaper route can be proved"
    ' (the reason above says what stood in the way), or use an estimate: method="hutchinson", or of a curvax.Objective'
    ' "ggn" or "ggn_mc"'
)


class Row(NamedTuple):
    """One parameter: its route, why, and what it adds to the cost.

    Attributes:
        path: the parameter.
        shape: its shape.
        route: "gauss-newton", "tail", "unit vectors", or "zero" where no derivative reaches the loss.
        reason: what was proved, or what stood in the way.
        passes: backward passes; `None` where that is not known. Parameters that share columns share their cost: it
            stands with the first of them.
        products: Hessian-vector products, or `None`.
    """

    path: str
    shape: tuple[int, ...]
    route: str
    reason: str
    passes: int | None
    products: int | None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The routes of all parameters; printed, a table.

    Attributes:
        rows: one for each parameter, and one for each array whose penalty needs unit vectors.
        method: which method was chosen, where the caller left the choice.
    """

    rows: tuple[Row, ...]
    method: str = ""

    @property
    def passes(self) -> int | None:
        """Backward passes in all; `None` where that is not known."""
        return _total([row.passes for row in self.rows])

    @property
    def products(self) -> int | None:
        """Hessian-vector products in all; `None` where that is not known."""
        return _total([row.products for row in self.rows])

    def check(self, budget: int | None) -> None:
        """Raises a ValueError that names the dearest parameter if the cost is above `budget`."""
        cost = self.passes + self.products
        if budget is None or cost <= budget:
            return
        row = max(self.rows, key=lambda row: row.passes + row.products)
        raise ValueError(
            f"the exact diagonal needs {self.passes} backward passes and {self.products} Hessian-vector products, above"
            f" the budget of {budget}. The dearest parameter is {row.path!r} {row.shape}: {row.passes} passes and"
            f" {row.products} products by the route {row.route!r} ({row.reason}). Cures: {CURES}."
        )

    def __str__(self) -> str:
        table = [("parameter", "shape", "route", "passes", "HVPs", "why")]
        said = lambda cost: "?" if cost is None else str(cost)
        table += [(r.path, str(r.shape), r.route, said(r.passes), said(r.products), r.reason) for r in self.rows]
        table += [("total", "", "", said(self.passes), said(self.products), "")]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        return "\n".join([self.method, *lines] if self.method else lines)


def _total(costs: Sequence[int | None]) -> int | None:
    return None if None in costs else sum(costs)


def explain_unknown(params: Any, method: str) -> Explanation:
    """The table of a method that says nothing of itself."""
    said = (method, "a method of your own: its cost is not known", None, None)
    paths, shapes = leaf_paths(params), map(jnp.shape, jax.tree.leaves(params))
    return Explanation(tuple(Row(path, shape, *said) for path, shape in zip(paths, shapes, strict=True)))


def explain_products(params: Any, counts: Sequence[int], route: str, reason: str) -> Explanation:
    """The table of a method that treats all parameters alike.

    Args:
        params: a pytree of arrays or of their shapes.
        counts: Hessian-vector products for each parameter; of those that all share, the first has to pay.
        route: what the products are.
        reason: why.

    Returns:
        The explanation.
    """
    rows = []
    for path, x, count in itertools.zip_longest(leaf_paths(params), jax.tree.leaves(params), counts, fillvalue=0):
        rows.append(Row(path, jnp.shape(x), route, reason, 0, count))
    return Explanation(tuple(rows))


def explain_routes(flow: Flow, routes: Sequence[Route], penalised: Sequence[int]) -> Explanation:
    """The table for a traced objective; `penalised` are the arrays whose penalty needs unit vectors."""
    rows, paid = [], set()
    for route in routes:
        shape = flow.program.params[route.bit].aval.shape
        fresh = [place for place in route.origins if place not in paid]
        paid.update(fresh)
        rows.append(Row(route.path, shape, route.name, route.reason, *route.cost(flow, fresh)))
    for bit in penalised:
        aval, path = flow.program.params[bit].aval, f"penalty of {flow.program.paths[bit]}"
        rows.append(Row(path, aval.shape, "unit vectors", "the penalty mixes its entries", 0, aval.size))
    return Explanation(tuple(rows))
