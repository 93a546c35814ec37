"""Numbers of every library, and what is none."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.checks import check_number


@pytest.mark.parametrize(
    "value", [0, 0.5, Fraction(1, 3), np.float16(0.5), jnp.bfloat16(0.5), np.array(0.5), np.int64(0), jnp.array(0.9)]
)
def test_numbers_of_an_interval_pass(value):
    check_number("share", value, "[0, 1)")


@pytest.mark.parametrize(
    "value", [1, -0.1, float("nan"), np.float32(1), 1 - 1e-9, np.inf, jnp.array(jnp.nan), jnp.bfloat16(1), 10**400]
)
def test_numbers_outside_are_refused(value):
    with pytest.raises(ValueError, match=r"^share=.* is out of range; pass a number in \[0, 1\)\.$"):
        check_number("share", value, "[0, 1)")


@pytest.mark.parametrize(
    "value", [True, np.bool_(False), jnp.array(True), "0.5", None, [0.5], np.zeros(1), 0.5j, object]
)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match=r"share=.* is no number"):
        check_number("share", value, "[0, 1]")


@pytest.mark.parametrize("interval, inside", [("[1, 2]", True), ("(1, 2)", False), ("(1, 2]", False), ("[1, 2)", True)])
def test_brackets_say_which_ends_belong_to_it(interval, inside):
    if inside:
        check_number("share", 1, interval)
    else:
        with pytest.raises(ValueError, match="out of range"):
            check_number("share", 1, interval)


def test_whole_numbers():
    for value in (1, np.int64(4), np.uint8(2), jnp.array(3)):
        check_number("every", value, "[1, inf)", whole=True)
    for value in (2.0, 2.5, np.float32(2), True, jnp.array(1.0)):
        with pytest.raises(ValueError, match=r"every=.* is no whole number; pass a whole number in \[1, inf\)"):
            check_number("every", value, "[1, inf)", whole=True)


def test_traced_scalars_pass_and_traced_vectors_do_not():
    jax.jit(lambda x: check_number("share", x, "[0, 1)"))(2.0)
    with pytest.raises(ValueError, match="is no number"):
        jax.jit(lambda x: check_number("share", x, "[0, 1)"))(jnp.ones(2))
