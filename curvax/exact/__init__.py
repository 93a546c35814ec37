"""Exact Hessian diagonals at the price of a few gradients, wherever the traced computation proves that they are exact.

    trace -> dataflow -> routes -> factor -> backprop

`trace` flattens the objective into primitive operations; `dataflow` finds, from the tables in `primitives`, how each
variable depends on the parameters and on the examples; `routes` draws from that a proof for each parameter array;
`factor` writes the Hessian beyond a cut as columns; `backprop` sweeps them back to the layers and contracts them there.
Whatever is not proved goes to `units`, one unit vector at a time: slower, never wrong.
"""

from curvax.exact.diagonals import BUDGET, exact_diag, explain, explain_ggn, ggn_diag
from curvax.exact.estimate import ggn_mc_diag
from curvax.exact.explanation import Explanation, Row, explain_products
from curvax.exact.independence import couples_examples
from curvax.exact.linearity import piecewise_linear

__all__ = [
    "BUDGET",
    "Explanation",
    "Row",
    "couples_examples",
    "exact_diag",
    "explain",
    "explain_ggn",
    "explain_products",
    "ggn_diag",
    "ggn_mc_diag",
    "piecewise_linear",
]
