"""Outside of `jit` a refresh is compiled once, and again where, and only where, the loss is another computation."""

import dataclasses
import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import curvax
from curvax.curvature import eager

BATCHES = [problems.classification(seed, examples=8, features=3, classes=2) for seed in range(3)]
PARAMS = problems.mlp_params(sizes=(3, 4, 2))


def new_lambda(batch):
    return lambda params: jnp.mean(problems.cross_entropy(problems.mlp(params, batch), batch))


def new_objective(batch):
    return curvax.Objective(lambda p, d: problems.mlp(p, d), lambda z, d: problems.cross_entropy(z, d), batch)


@dataclasses.dataclass(frozen=True)
class Counting:
    """Unit vectors, and how often they were asked for: once for each compilation."""

    name: str
    asked: list = dataclasses.field(default_factory=list, compare=False)

    @property
    def calls(self):
        return len(self.asked)

    def estimate(self, objective, params, key):
        self.asked.append(None)
        return curvax.Basis().estimate(objective, params)


def curvature_of_steps(method, objectives, params=PARAMS):
    inner = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), lambda u, s, p=None, *, hessian_diag=None, **_: (hessian_diag, s)
    )
    seen, state = [], curvax.with_hessian_diag(inner, method).init(params)
    for objective in objectives:
        # Made anew, as `optax.inject_hyperparams` does.
        tx = curvax.with_hessian_diag(inner, method)
        diag, state = tx.update(params, state, params, obj_fn=objective)
        seen.append(diag)
    return seen


@pytest.mark.slow_but_for("new_objective")
@pytest.mark.parametrize("make", [new_lambda, new_objective])
def test_a_loss_made_anew_on_another_batch_is_not_compiled_again(make):
    method = Counting(make.__name__)
    seen = curvature_of_steps(method, map(make, BATCHES))
    assert method.calls == 1
    for diag, batch in zip(seen, BATCHES, strict=True):
        expected = problems.dense_hessian_diag(new_lambda(batch), PARAMS)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), diag, expected)


def test_a_function_that_stays_is_seen_to_read_another_variable():
    factor = 1.0
    arrays = {"a": jnp.array([1.0, 2.0])}

    def loss(w):
        return factor * jnp.sum(arrays["a"] * w**2)

    method, w = Counting("a function that stays"), jnp.ones(2)
    step = lambda: curvature_of_steps(method, [loss], w)[0].tolist()
    assert step() == [2.0, 4.0]
    arrays["a"] = jnp.array([5.0, 7.0])
    assert step() == [10.0, 14.0] and method.calls == 1
    factor = 3.0
    assert step() == [30.0, 42.0] and method.calls == 2


def test_the_functions_of_an_objective_are_seen_to_read_another_array():
    arrays = {"scale": jnp.array(1.0)}
    objective = curvax.Objective(lambda w, x: x @ w, lambda z, x: arrays["scale"] * z**2, jnp.eye(2))
    method, w = Counting("a function that stays"), jnp.ones(2)
    step = lambda: curvature_of_steps(method, [objective], w)[0].tolist()
    assert step() == [1.0, 1.0]
    arrays["scale"] = jnp.array(4.0)
    assert step() == [4.0, 4.0]


@pytest.mark.parametrize("kind", [jax.custom_jvp, jax.custom_vjp])
def test_rules_of_differentiation_tell_losses_apart(kind):
    """The same values, by functions whose derivatives are said to be different ones."""

    def loss(slope):
        @kind
        def function(w):
            return jnp.sum(w**2)

        if kind is jax.custom_jvp:
            function.defjvp(lambda w, t: (function(*w), jnp.sum(slope * w[0] * t[0])))
        else:
            function.defvjp(lambda w: (jnp.sum(w**2), w), lambda w, c: (c * slope * w,))
        return function

    w, slope = jnp.ones(2), jnp.array([3.0, 8.0])
    seen = curvature_of_steps("basis", [loss(2.0), loss(5.0), loss(slope), loss(2 * slope)], w)
    np.testing.assert_allclose(np.stack(seen), [[2, 2], [5, 5], [3, 8], [6, 16]])


def test_methods_selections_and_shapes_have_programs_of_their_own():
    loss = lambda p: jnp.sum(p["a"]) ** 2 + jnp.sum(p["b"] ** 4)
    for size in (2, 3):
        params = {"a": jnp.ones(size), "b": jnp.ones(2)}
        for where in (None, {"a": True, "b": False}):
            tx = curvax.with_hessian_diag(optax.identity(), "basis", where=where)
            _, state = tx.update(params, tx.init(params), params, obj_fn=loss)
            np.testing.assert_allclose(state.hessian_diag["a"], 2 * np.ones(size))
            assert where is not None or state.hessian_diag["b"].tolist() == [12.0, 12.0]


def test_a_method_that_may_change_is_asked_in_every_step():
    class Constant:
        value = 1.0

        def estimate(self, objective, params, key):
            return curvax.Estimate(objective(params), params, jax.tree.map(lambda x: x * 0 + self.value, params))

    method, w, seen = Constant(), jnp.ones(2), []
    for method.value in (1.0, 5.0):
        seen += [diag.tolist() for diag in curvature_of_steps(method, [lambda w: jnp.sum(w**2)], w)]
    assert seen == [[1.0, 1.0], [5.0, 5.0]]


@pytest.mark.slow
def test_programs_and_what_they_hold_are_few():
    """Losses of different constants, each a program of its own."""

    def steps(number):
        for i in range(number):
            array = jnp.full(2, float(i))
            loss = lambda w, i=i, array=array: float(i) * jnp.sum(jax.nn.relu(array * w))
            curvature_of_steps("basis", [loss], jnp.ones(2))
            yield weakref.ref(loss), weakref.ref(array)

    found = list(steps(eager.CAPACITY + 5))
    gc.collect()
    assert len(eager._programs) <= eager.CAPACITY
    assert all(reference() is None for pair in found[:5] for reference in pair)


def test_what_can_be_differentiated_only_once_is_computed_all_the_same():
    @jax.custom_vjp
    def once(x):
        return jnp.sin(x)

    def backward(x, cotangent):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return (jax.pure_callback(lambda x, c: np.cos(x) * c, shape, x, cotangent),)

    once.defvjp(lambda x: (jnp.sin(x), x), backward)

    class Squares:
        def estimate(self, objective, params, key):
            value, grad = jax.value_and_grad(objective)(params)
            return curvax.Estimate(value, grad, grad**2)

    seen = curvature_of_steps(Squares(), [lambda w: jnp.sum(once(w))], jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(seen[0], np.cos([0.1, 0.2]) ** 2, rtol=1e-5)


def test_a_diagonal_is_compiled_once_and_is_another_program_than_a_refresh():
    method = Counting("a diagonal")
    for batch in BATCHES:
        found = curvax.hessian_diag(new_objective(batch), PARAMS, method)
        expected = problems.dense_hessian_diag(new_lambda(batch), PARAMS)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, expected)
    assert method.calls == 1
    curvature_of_steps(method, [new_objective(BATCHES[0])])
    assert method.calls == 2


@pytest.mark.parametrize("seen", [lambda x: {"first": x[0]}, lambda x: {"name": "batch", "first": x[0]}])
def test_other_output_of_an_eager_call_may_be_anything(seen):
    """Of an Objective and of a plain function; what is no array cannot come out of a program."""
    x, w = jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.ones(2)
    objective = curvax.Objective(lambda w, x: (x @ w, seen(x)), lambda z, x: z**2, x, has_aux=True)
    plain = lambda w: objective(w)
    for loss in (objective, plain):
        diag, aux = curvax.hessian_diag(loss, w, "basis", has_aux=loss is plain)
        assert diag.tolist() == [10.0, 4.0]
        assert aux.keys() == seen(x).keys() and aux["first"].tolist() == [1.0, 2.0]


def test_a_method_of_the_callers_own_may_look_at_numbers():
    @dataclasses.dataclass(frozen=True)
    class OnTheHost:
        """Differences of gradients, by NumPy."""

        step: float

        def estimate(self, objective, params, key):
            points = np.asarray(params) + self.step * np.eye(len(params), dtype=np.float32)
            slopes = np.stack([np.asarray(jax.grad(objective)(point)) for point in points])
            diag = np.diag(slopes - np.asarray(jax.grad(objective)(params))) / self.step
            return curvax.Estimate(float(objective(params)), jax.grad(objective)(params), diag)

    loss = lambda w: jnp.sum(jnp.array([1.0, 3.0]) * w**2)
    found = curvax.value_grad_and_hessian_diag(loss, jnp.ones(2), OnTheHost(0.5))
    assert found.value == 4.0 and found.diag.tolist() == [2.0, 6.0]


def test_functions_that_close_over_what_is_being_traced():
    """Their arrays are known outside of them only, at another time."""

    @jax.jit
    def diagonals(x, shift):
        objective = curvax.Objective(lambda w, x: x @ w, lambda z, x: shift * z**2, jnp.eye(2))
        return [curvax.hessian_diag(loss, jnp.ones(2), "basis") for loss in (objective, lambda w: x @ w**2)]

    for x in (jnp.array([1.0, 2.0]), jnp.array([5.0, 7.0])):
        found = diagonals(x, x[1])
        np.testing.assert_allclose(found[0], jnp.full(2, x[1]), rtol=1e-6)
        np.testing.assert_allclose(found[1], 2 * x, rtol=1e-6)
