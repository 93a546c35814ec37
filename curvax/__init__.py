"""Learning rates from the curvature of the loss.

    update = -gamma * radius(layer) * gradient

Every method here is one choice of *radius* (`radii`), one way of grouping parameters into *layers* (`layers`) and, for
the second-order ones, one source of *curvature* (`curvature`). The three are independent;
`transforms` brings them together, and `optimizers` gives the usual combinations their names. After Gao & Zhong, "Study
on the Large Batch Size Training of Neural Networks Based on the Second Order Gradient".
"""

from curvax.curvature.estimate import Estimate
from curvax.curvature.hessian import explain, hessian_diag, hvp, value_grad_and_hessian_diag
from curvax.curvature.hutchinson import Hutchinson
from curvax.curvature.methods import Auto, Basis, Exact, GaussNewton, SquaredGradients
from curvax.curvature.refresh import HessianDiagState, with_hessian_diag
from curvax.curvature.xdiag import XDiag
from curvax.eigenbasis import EigenbasisState, in_eigenbasis, with_eigenbasis
from curvax.large_batch import discard_random_losses, discard_small_losses
from curvax.metrics import metrics
from curvax.noise_scale import (
    NoiseScale,
    NoiseScaleState,
    noise_scale_from_batches,
    noise_scale_over_devices,
    with_noise_scale,
)
from curvax.objective import Objective
from curvax.optimizers import cblr, lamb, lars, mclr, percent_delta
from curvax.order_statistics import median, quantile
from curvax.orthogonal import orthogonalize
from curvax.probes import ProbeState, held_out_stride, with_probes
from curvax.reports.report import Report, report
from curvax.scans import find_stacks
from curvax.schedules import BatchSchedule, Phase, growing_batches, legw, seesaw, small_batch_start
from curvax.stacks import Stacked
from curvax.transforms import (
    discard_small_gradients,
    scale_by_approximate_radius,
    scale_by_curvature_radius,
    scale_by_lars,
    scale_by_median_curvature,
    scale_by_percent_delta,
)

__version__ = "0.2.0"

__all__ = [
    "Auto",
    "Basis",
    "BatchSchedule",
    "EigenbasisState",
    "Estimate",
    "Exact",
    "GaussNewton",
    "HessianDiagState",
    "Hutchinson",
    "NoiseScale",
    "NoiseScaleState",
    "Objective",
    "Phase",
    "ProbeState",
    "Report",
    "SquaredGradients",
    "Stacked",
    "XDiag",
    "cblr",
    "discard_random_losses",
    "discard_small_gradients",
    "discard_small_losses",
    "explain",
    "find_stacks",
    "growing_batches",
    "held_out_stride",
    "hessian_diag",
    "hvp",
    "in_eigenbasis",
    "lamb",
    "lars",
    "legw",
    "mclr",
    "median",
    "metrics",
    "noise_scale_from_batches",
    "noise_scale_over_devices",
    "orthogonalize",
    "percent_delta",
    "quantile",
    "report",
    "scale_by_approximate_radius",
    "scale_by_curvature_radius",
    "scale_by_lars",
    "scale_by_median_curvature",
    "scale_by_percent_delta",
    "seesaw",
    "small_batch_start",
    "value_grad_and_hessian_diag",
    "with_eigenbasis",
    "with_hessian_diag",
    "with_noise_scale",
    "with_probes",
]
