"""Exact Hessian diagonals at the price of a few gradients, wherever the traced computation proves that they are exact.

    trace -> dataflow -> atoms -> routes -> columns -> backprop

`trace` flattens the objective into primitive operations; `dataflow` finds, from the records in `primitives`, how each
variable depends on the parameters and on the examples; `atoms` finds what the loss is curved by; `routes` draws from
that a proof for each parameter array; `columns` has the columns of the loss's Hessian, and `factor` those of what lies
beyond a cut; `backprop` sweeps them back to the layers and contracts them there. Whatever is not proved goes to
`units`, one unit vector at a time: slower, never wrong.
"""

from curvax.exact.dataflow import piecewise_linear
from curvax.exact.diagonals import BUDGET, exact_diag, explain, explain_ggn, ggn_diag
from curvax.exact.explanation import Explanation, Row, explain_products, explain_unknown

__all__ = [
    "BUDGET",
    "Explanation",
    "Row",
    "exact_diag",
    "explain",
    "explain_ggn",
    "explain_products",
    "explain_unknown",
    "ggn_diag",
    "piecewise_linear",
]
