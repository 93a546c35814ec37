"""Whether a network is piecewise linear in each array of its parameters, so that no entry has curvature of its own."""

from typing import Any

import jax
import jax.numpy as jnp

from curvax.exact.dataflow import analyse
from curvax.exact.trace import trace
from curvax.objective import Objective


def piecewise_linear(objective: Objective, params: Any) -> bool:
    """Whether every array is proved to enter the outputs piecewise linearly while all the others stay."""
    outputs = jax.tree.leaves(jax.eval_shape(objective.predict, params, objective.data))
    if len(outputs) != 1 or not jnp.issubdtype(outputs[0].dtype, jnp.floating):
        return False
    flow = analyse(trace(objective, params))
    return not flow.curved.get(flow.program.outputs, 0)
