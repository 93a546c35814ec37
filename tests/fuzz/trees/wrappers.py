"""A transformation inside those of optax and curvax that wrap another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from tests.fuzz.trees.examples import needs_curvature
from tests.fuzz.trees.run import Broken, Ran, check_form, check_same, leaves, said


class Unsuited(Exception):
    """The wrapper is not for this example."""


def wrapped(ran: Ran) -> None:
    """The wrapper does with the transformation what it does with any."""
    make, compare = _WRAPPERS[ran.example.detail]
    loss = {"obj_fn": _loss} if ran.example.detail == "with_hessian_diag" else {}
    try:
        tx = make(ran, ran.tx)
        updates, before, after = ran.step(tx, ran.g, **loss)
    except Unsuited:
        return
    except Exception as error:
        if _refuses_any(ran, make):
            return
        raise Broken(said(error)) from error
    check_form(updates, ran.g, before, after)
    compare(ran, updates)
    # optax accumulates the real parts of complex gradients alone.
    if ran.example.detail == "MultiSteps" and not any(map(np.iscomplexobj, leaves(ran.g))):
        # Two mini-steps with one gradient are a step with it.
        _close(ran, tx.update(ran.g, after, ran.w, **ran.extra)[0])


def _refuses_any(ran: Ran, make) -> bool:
    """Whether the wrapper fails on this tree whatever it wraps."""
    try:
        ran.step(make(ran, optax.sgd(0.5, 0.9)), ran.g)
    except Exception:
        return True
    return False


def _loss(params):
    return sum(jnp.sum(jnp.abs(x).astype(jnp.float32) ** 2) for x in jax.tree.leaves(params))


def _partition(ran: Ran, tx):
    del ran
    label = lambda params: jax.tree.map(lambda x: "ours" if jnp.ndim(x) > 0 else "not", params)
    return optax.partition({"ours": tx, "not": optax.set_to_zero()}, label)


def _masked(ran: Ran, tx):
    del ran
    return optax.masked(tx, lambda params: jax.tree.map(lambda x: jnp.ndim(x) > 0, params))


def _injected(ran: Ran, tx):
    del tx
    # optax casts numbers to the dtype of the first leaf, and the rest is promoted to that.
    if len({leaf.dtype for leaf in ran.example.leaves}) > 1:
        raise Unsuited
    if ran.example.name.startswith("scale_by_") and "=" not in ran.example.arguments.replace("layers=", ""):
        raise Unsuited
    make = optax.inject_hyperparams(getattr(curvax, ran.example.name))
    return eval(f"make({ran.example.arguments})", {"make": make})


def _flattened(ran: Ran, tx):
    if len({leaf.dtype for leaf in ran.example.leaves}) > 1 or needs_curvature(ran.example.name):
        raise Unsuited
    return optax.flatten(tx)


def _equal(ran: Ran, updates) -> None:
    check_same(ran.updates, updates, 0.0, "wrapped")


def _close(ran: Ran, updates) -> None:
    check_same(ran.updates, updates, 8 * float(jnp.finfo(jnp.bfloat16).eps), "wrapped")


def _negated(ran: Ran, updates) -> None:
    check_same(jax.tree.map(jnp.negative, ran.updates), updates, 0.0, "wrapped")


def _scalars_pass(ran: Ran, updates) -> None:
    for g, u in zip(leaves(ran.g), leaves(updates), strict=True):
        if g.ndim == 0 and g != u:
            raise Broken(f"the masked gradient {g} became {u}")


def _scalars_stop(ran: Ran, updates) -> None:
    del ran
    for u in leaves(updates):
        if u.ndim == 0 and u != 0:
            raise Broken(f"an update that was set to zero is {u}")


def _nothing_yet(ran: Ran, updates) -> None:
    del ran
    for u in leaves(updates):
        if (u != 0).any():
            raise Broken(f"the first of two mini-steps has the update {u.tolist()}")


def _anything(ran: Ran, updates) -> None:
    del ran, updates


_WRAPPERS = {
    "chain": (lambda ran, tx: optax.chain(tx, optax.scale(-1.0)), _negated),
    "named_chain": (lambda ran, tx: optax.named_chain(("a", tx), ("b", optax.scale(-1.0))), _negated),
    "masked": (_masked, _scalars_pass),
    "partition": (_partition, _scalars_stop),
    "inject_hyperparams": (_injected, _close),
    "MultiSteps": (lambda ran, tx: optax.MultiSteps(tx, 2), _nothing_yet),
    "skip_not_finite": (
        lambda ran, tx: optax.MultiSteps(tx, 1, should_skip_update_fn=optax.skip_not_finite),
        _anything,
    ),
    # What is inside is compiled, and rounds as compiled code does.
    "apply_if_finite": (lambda ran, tx: optax.apply_if_finite(tx, 3), _close),
    "flatten": (_flattened, _anything),
    "with_probes": (lambda ran, tx: curvax.with_probes(tx), _equal),
    "with_hessian_diag": (lambda ran, tx: curvax.with_hessian_diag(tx, "basis"), _anything),
}
