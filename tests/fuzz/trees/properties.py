"""All that an example is held to."""

import jax

from tests.fuzz.trees.compiled import compiled
from tests.fuzz.trees.examples import Example
from tests.fuzz.trees.run import check_form, run
from tests.fuzz.trees.values import scale, values, zero
from tests.fuzz.trees.wrappers import wrapped

_PROPERTIES = {"values": values, "zero": zero, "scale": scale, "wrapped": wrapped, "compiled": compiled}


def check(example: Example) -> None:
    """Raises `Broken` if something does not hold."""
    with jax.enable_x64(example.wide):
        ran = run(example)
        if ran is not None:
            check_form(ran.updates, ran.g, ran.before, ran.after)
            _PROPERTIES[example.mode](ran)
