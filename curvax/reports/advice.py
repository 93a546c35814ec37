"""What stands out in a report, and what to do about it, in words.

Each threshold is a named constant with its reason; below it nothing is said.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from curvax.reports.report import Report

#: Between layers whose radii differ by less, one learning rate costs a factor of ten in speed at most each way.
SPREAD = 100.0
#: McCandlish et al. 2018: at the noise scale a step is worth half of a full gradient's, at a quarter of it a fifth.
LARGE_BATCH, SMALL_BATCH = 2.0, 0.25
#: A ReLU network at its initial parameters has few dead units; from a quarter on its width is not used.
DEAD = 0.25
#: Beside more negative curvature than this the mean radius of a layer says little of a minimum.
NEGATIVE = 0.4
#: The relative standard error from which a number is no more than its order of magnitude.
UNCERTAIN = 0.5


def findings(report: "Report") -> Iterator[str]:
    """The sentences, the gravest first."""
    named = [{**row, "layer": row["layer"] or "(all)"} for row in report.layers]
    report = dataclasses.replace(report, layers=named)
    yield from _broken(report)
    yield from _unreached(report)
    yield from _stacks(report)
    yield from _spread(report)
    yield from _batch(report)
    yield from _dead(report)
    yield from _zeros(report)
    yield from _negative(report)
    yield from _uncertain(report)


def _broken(report: "Report") -> Iterator[str]:
    for layer in report.layers:
        if layer["non_finite_gradient"]:
            yield (
                f"{_percent(layer['non_finite_gradient'])} of the gradient of {layer['layer']} are not finite: no rule"
                " can set a rate. Look for a logarithm or a root of zero, or for an overflow in half precision."
            )
        elif layer["non_finite"]:
            yield (
                f"{_percent(layer['non_finite'])} of the curvature of {layer['layer']} are not finite, while its"
                " gradient is: the root of zero, mostly. Add a small number inside the root."
            )


def _unreached(report: "Report") -> Iterator[str]:
    if report.unreached:
        yield (
            f"No derivative reaches {_list(report.unreached)}: these arrays never train. Freeze them,"
            " by optax.set_to_zero, or look for a stop_gradient or an output that is not used."
        )


def _stacks(report: "Report") -> Iterator[str]:
    if report.hidden_stacks:
        yield (
            f"{_list(report.hidden_stacks)}: a scan runs over their layers, which shapes alone do not show. Tell the"
            " optimizer: layers=curvax.find_stacks(objective, params)."
        )


def _spread(report: "Report") -> Iterator[str]:
    # Without parameters or without a gradient a radius is 1, and says nothing.
    measured = [x for x in report.layers if x["is_kernel"] and x["weight_norm"] > 0 and x["gradient_norm"] > 0]
    radii = {row["layer"]: row["radius_lars"] for row in measured if 0 < row["radius_lars"] < np.inf}
    if len(radii) < 2:
        return
    high, low = max(radii, key=radii.__getitem__), min(radii, key=radii.__getitem__)
    if (ratio := radii[high] / radii[low]) > SPREAD:
        yield (
            f"The radius of {high} is {ratio:,.0f} times that of {low}: one learning rate for both is too large for the"
            " one or too small for the other. Use a rule with one for each layer: curvax.cblr, mclr or percent_delta."
        )


def _batch(report: "Report") -> Iterator[str]:
    batch, scale = report.num_examples, report.critical_batch_size
    if scale is None:
        yield f"The gradient's noise is not known: {report.noise_reason}."
        return
    if any(layer["non_finite_gradient"] for layer in report.layers):
        return  # That is said above.
    if not any(layer["gradient_norm"] for layer in report.layers):
        yield "The gradient is zero: these are parameters of a stationary point, or the loss does not depend on them."
    elif not np.isfinite(scale):
        yield f"Of the gradient of these {batch:,} examples all is noise, as far as can be told: take more of them."
    elif batch > LARGE_BATCH * scale:
        yield (
            f"A batch of {batch:,} is {batch / scale:.1f} times the noise scale ({scale:,.0f} examples): smaller"
            " batches would make nearly as good steps."
        )
    elif batch < SMALL_BATCH * scale:
        yield (
            f"A batch of {batch:,} is 1/{scale / batch:.0f} of the noise scale ({scale:,.0f} examples): with twice"
            " the batch, and a larger learning rate, nearly half as many steps would do."
        )


def _dead(report: "Report") -> Iterator[str]:
    for row in report.layers:
        if row["dead"] > DEAD and row["layer"] not in report.unreached:
            yield (
                f"{_percent(row['dead'])} of the {row['units']:,} columns of {row['layer']} have no gradient on these"
                " examples: units that are dead, or inputs that are always zero. A smaller learning rate, or a smaller"
                " scale of the initial weights, keeps units alive."
            )


def _zeros(report: "Report") -> Iterator[str]:
    zeros = [row["layer"] for row in report.layers if row["is_kernel"] and row["weight_norm"] == 0]
    if zeros:
        yield f"{_list(zeros)}: all zeros, with no radius of their own. They follow the other kernels (docs/rates.md)."


def _negative(report: "Report") -> Iterator[str]:
    for row in report.layers:
        if row["is_kernel"] and row["negative"] > NEGATIVE and row["curvature_error"] == 0:
            yield (
                f"{_percent(row['negative'])} of the curvature of {row['layer']} is negative: this is a saddle, or far"
                " from a minimum; warm the learning rate up."
            )


def _uncertain(report: "Report") -> Iterator[str]:
    rough = [row["layer"] for row in report.layers if row["curvature_error"] > UNCERTAIN * abs(row["curvature"])]
    if rough:
        yield f"The curvature of {_list(rough)} is known to its order of magnitude only: raise num_samples."


def _percent(share: float) -> str:
    text = f"{100 * share:.0f} %"
    return "over 99 %" if text == "100 %" and share < 1 else text


def _list(names: Sequence[str]) -> str:
    shown = list(names)[:3]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shown) + more
