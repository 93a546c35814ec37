"""Everyday training programs end no worse with curvax's rules, at their starting rates, than with their own."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from tests.programs import PROGRAMS

STEPS, LAST = 100, 10
TABLE = re.findall(
    r"^\| `(\w+)\(rate(.*?)\)` \| ([\d.]+) \|", (Path(__file__).parents[1] / "docs/rates.md").read_text("utf-8"), re.M
)


def rule(name, arguments, rate):
    return eval(f"curvax.{name}(rate{arguments})", {"curvax": curvax, "rate": optax.cosine_decay_schedule(rate, STEPS)})


RULES = {name: functools.partial(rule, name, arguments, float(rate)) for name, arguments, rate in TABLE}


@functools.cache
def losses(name, optimizer):
    """The loss of each step's batch before the step."""
    program = PROGRAMS[name]
    tx = optax.with_extra_args_support(program.own if optimizer == "own" else RULES[optimizer]())

    @jax.jit
    def step(params, state, data):
        objective = program.objective(data)
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(grads, state, params, obj_fn=objective)
        return optax.apply_updates(params, updates), state, value

    params, found = program.init(jax.random.key(0)), []
    state = tx.init(params)
    for data in program.batches(0, STEPS):
        params, state, value = step(params, state, data)
        found.append(value)
    return np.array(jnp.stack(found))


@pytest.fixture
def as_users_have_it():
    """JAX's own rules for promotion, which the rest of the tests do without."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_the_table_of_starting_rates_names_each_rule():
    assert set(RULES) == {"cblr", "mclr", "lars", "percent_delta"}


@pytest.mark.once
@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("optimizer", ["cblr", "mclr", "lars", "percent_delta"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_ends_no_worse_than_with_its_own_optimizer(name, optimizer):
    """Within what its batches differ by; and at no step is it far above where it began."""
    found, own = losses(name, optimizer), losses(name, "own")
    assert found.max() < 1.5 * own[0]
    difference = found[-LAST:] - own[-LAST:]
    assert difference.mean() < 2 * difference.std() / np.sqrt(LAST - 1)
