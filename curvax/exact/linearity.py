"""Whether a network is piecewise linear in each array of its parameters, so that no entry has curvature of its own."""

from typing import Any

from curvax.exact.dataflow import analyse
from curvax.exact.trace import trace
from curvax.objective import Objective


def piecewise_linear(objective: Objective, params: Any) -> bool:
    """Whether every array is proved to enter the outputs piecewise linearly while all the others stay.

    Formula:
        Then `d^2 outputs / d params_i^2 = 0`, and the Hessian of the mean loss has the diagonal of its Gauss-Newton
        matrix, also where the loss couples the examples.

    Args:
        objective: an `Objective`; its penalty is not looked at.
        params: a pytree of floating-point arrays.

    Returns:
        True if it is proved, else False.

    Raises:
        ValueError: if the loss does not return one value per example.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from curvax import Objective
        >>> from curvax.exact import piecewise_linear
        >>> square = lambda outputs, x: outputs**2
        >>> relu = Objective(lambda w, x: jax.nn.relu(x @ w), square, jnp.ones((4, 2)))
        >>> tanh = Objective(lambda w, x: jnp.tanh(x @ w), square, jnp.ones((4, 2)))
        >>> piecewise_linear(relu, jnp.ones(2)), piecewise_linear(tanh, jnp.ones(2))
        (True, False)
    """
    flow = analyse(trace(objective, params))
    return flow.program.nonlinear_backward is None and not any(flow.curved.get(var, 0) for var in flow.program.outputs)
