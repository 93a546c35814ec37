import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import curvax
from curvax.exact.equations import equations
from curvax.matrices import matrices_of
from curvax.rotations import Rotation, Sides, rotated_objective


def orthogonal(seed, n):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def normal(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def steps(tx, w, gradients, **extra):
    state, found = tx.init(w), []
    update = jax.jit(lambda g, state, w: tx.update(g, state, w, **extra))
    for g in gradients:
        updates, state = update(g, state, w)
        found.append(updates)
    return found, state


def reference(gradients, decay=0.95, every=10):
    """The moments and eigenvectors of both sides after each gradient, in float64."""
    sides, found = [], []
    for number, g in enumerate(np.asarray(gradients, np.float64), 1):
        g = g / np.linalg.norm(g)
        share = (1 - decay) / (1 - decay**number)
        new = [g @ g.T, g.T @ g]
        sides = [a + share * (b - a) for a, b in zip(sides or new, new, strict=True)]
        if number == 1:
            vectors = [np.linalg.eigh(a)[1][:, ::-1] for a in sides]
        elif (number - 1) % every == 0:
            vectors = [np.linalg.qr(a @ u)[0] for a, u in zip(sides, vectors, strict=True)]
        found.append((sides, vectors))
    return found


def test_moments_and_vectors_are_those_of_the_reference():
    gradients = [normal(i, 4, 6) for i in range(5)]
    tx = curvax.with_eigenbasis(optax.identity(), decay=0.8, every=2)
    _, state = steps(tx, jnp.ones((4, 6)), gradients)
    moments, vectors = reference(gradients, 0.8, 2)[-1]
    for ours, theirs in zip(state.moments, moments, strict=True):
        np.testing.assert_allclose(ours[0], theirs, rtol=1e-4, atol=1e-6)
    # Columns have either sign; those of no eigenvalue, two of six, are any that complete the others.
    for ours, theirs, rank in zip(state.vectors, vectors, (4, 4), strict=True):
        np.testing.assert_allclose(np.abs(np.sum(ours[0] * theirs, axis=0))[:rank], 1, rtol=1e-3)
        np.testing.assert_allclose(ours[0].T @ ours[0], np.eye(len(theirs)), atol=1e-5)


def test_the_iteration_converges_to_the_eigenvectors():
    """Of a gradient that stays the same: the angle to its singular vectors vanishes."""
    u, v = orthogonal(0, 5), orthogonal(1, 5)
    first, then = normal(2, 5, 5), jnp.asarray(u * [5.0, 4, 3, 2, 1] @ v.T, jnp.float32)
    tx = curvax.with_eigenbasis(optax.identity(), decay=0.5, every=1)
    _, state = steps(tx, jnp.ones((5, 5)), [first] + [then] * 80)
    np.testing.assert_allclose(np.abs(state.vectors.rows[0].T @ u), np.eye(5), atol=1e-3)
    np.testing.assert_allclose(np.abs(state.vectors.columns[0].T @ v), np.eye(5), atol=1e-3)


@pytest.mark.slow_but_for("Squared")
@pytest.mark.parametrize("method", [curvax.Exact(), curvax.SquaredGradients()], ids=repr)
def test_cblr_does_not_depend_on_the_coordinates_of_a_layer(method):
    """Rotating the inputs and outputs of a kernel rotates its path; in coordinates it would not."""
    hessian = normal(0, 12, 12)
    hessian = hessian @ hessian.T / 12
    left, right = (jnp.asarray(orthogonal(i, n), jnp.float32) for i, n in enumerate((3, 4)))
    loss = lambda w: 0.5 * jnp.ravel(w - 1) @ hessian @ jnp.ravel(w - 1)
    rotated_loss = lambda q: loss(left.T @ q @ right)

    def path(loss, w, **options):
        tx = curvax.cblr(0.05, method=method, every=2, basis_every=2, **options)

        @jax.jit
        def step(w, state):
            updates, state = tx.update(jax.grad(loss)(w), state, w, obj_fn=loss)
            return optax.apply_updates(w, updates), state

        state = tx.init(w)
        for _ in range(6):
            w, state = step(w, state)
        return w

    start = normal(3, 3, 4)
    plain, rotated = path(loss, start), path(rotated_loss, left @ start @ right.T)
    np.testing.assert_allclose(left @ plain @ right.T, rotated, rtol=1e-3, atol=1e-3)
    plain, rotated = (path(f, w, eigenbasis=False) for f, w in ((loss, start), (rotated_loss, left @ start @ right.T)))
    assert np.max(np.abs(left @ plain @ right.T - rotated)) > 0.01


def rotation(params, seed=0):
    def side(i, n):
        return jnp.asarray(orthogonal(seed + i, n), jnp.float32)[None]

    treedef, shapes = jax.tree.structure(params), matrices_of(params)
    sides = [Sides(None, None) if m is None else Sides(side(0, m.dims[1]), side(1, m.dims[2])) for m in shapes]
    return treedef.unflatten(map(Rotation, sides, shapes))


def dense_gauss_newton(objective, params, basis):
    """Its diagonal in the basis, from the Jacobian and the Hessian of each example's loss."""
    inside, q = rotated_objective(objective, params, basis)
    flat, unravel = jax.flatten_util.ravel_pytree(q)
    outputs = inside.predict(q, inside.data)
    jacobian = jax.jacobian(lambda flat: inside.predict(unravel(flat), inside.data))(flat)
    sizes = jnp.arange(outputs.shape[0])
    curvature = jax.hessian(lambda out: jnp.sum(inside.loss(out, inside.data)))(outputs)[sizes, :, sizes, :]
    return unravel(jnp.einsum("bip,bij,bjp->p", jacobian, curvature, jacobian) / outputs.shape[0])


@pytest.mark.slow
def test_the_diagonal_in_a_basis_is_that_of_the_rotated_matrix():
    """The Gauss-Newton matrix of a ReLU network, exactly, and by samples within five standard errors."""
    data = problems.classification(examples=16, features=5)
    objective = curvax.Objective(problems.mlp, problems.cross_entropy, data)
    params = problems.mlp_params(sizes=(5, 6, 4))
    basis = rotation(params)
    wanted = jax.jit(lambda: dense_gauss_newton(objective, params, basis))()
    inside, q = rotated_objective(objective, params, basis)
    chex.assert_trees_all_close(curvax.hessian_diag(inside, q, "exact"), wanted, rtol=1e-4, atol=1e-6)
    method = curvax.GaussNewton(num_samples=400, squares="batch", chunk_size=100)
    diag, error = curvax.hessian_diag(inside, q, method, key=0, standard_error=True)
    off = jax.tree.map(lambda a, b, e: (a - b) / e, diag, wanted, error)
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(off)) < 5


@pytest.mark.slow
def test_a_refresh_is_in_the_basis_that_is_handed_on():
    """What `with_hessian_diag` stores inside is the diagonal of the rotated Hessian."""
    hessian = normal(0, 12, 12)
    hessian = hessian + hessian.T
    loss = lambda w: 0.5 * jnp.ravel(w) @ hessian @ jnp.ravel(w)
    w = normal(1, 3, 4)
    tx = curvax.with_eigenbasis(curvax.with_hessian_diag(optax.identity(), "basis"))
    _, state = tx.update(jax.grad(loss)(w), tx.init(w), w, obj_fn=loss)
    u, v = (np.asarray(x[0]) for x in state.vectors)
    turn = np.kron(u, v)
    wanted = np.diag(turn.T @ np.asarray(hessian) @ turn).reshape(3, 4)
    np.testing.assert_allclose(state.inner_state.hessian_diag, wanted, rtol=1e-4, atol=1e-5)


def test_a_step_of_cblr_is_the_formula():
    """The second one, whose gradient is full in the basis of the first, from NumPy's singular values."""
    rng = np.random.default_rng(0)
    w, first, second = rng.normal(size=(3, 5, 5))
    hessian = np.diag(rng.uniform(0.1, 10, 25))
    loss = lambda x: 0.5 * jnp.ravel(x) @ jnp.asarray(hessian, jnp.float32) @ jnp.ravel(x)
    u, _, vt = np.linalg.svd(first)
    turn = np.kron(u, vt.T)
    h = np.abs(np.diag(turn.T @ hessian @ turn)).reshape(5, 5)
    step = u @ (u.T @ second @ vt.T / (h + 0.3 * h.mean())) @ vt
    left, _, right = np.linalg.svd(step, full_matrices=False)
    tx, w = curvax.cblr(0.1, method="basis", momentum=0.0), jnp.asarray(w, jnp.float32)
    (_, updates), _ = steps(tx, w, [jnp.asarray(g, jnp.float32) for g in (first, second)], obj_fn=loss)
    assert np.linalg.norm(updates) == pytest.approx(0.1 * np.linalg.norm(w), rel=1e-4)
    inside = -left.T @ np.asarray(updates, np.float64) @ right.T
    scaled = inside / np.diag(inside).mean()
    np.testing.assert_allclose(scaled, np.diag(np.diag(scaled)), atol=0.01)
    assert np.all((np.diag(scaled) > 0.55) & (np.diag(scaled) < 1.45))


def test_everything_taken_entry_by_entry_can_be_taken_in_it():
    """`|w / g|` and the discarding of small gradients, of diagonal matrices in the basis."""
    u, v = orthogonal(0, 3), orthogonal(1, 3)
    turn = lambda d: jnp.asarray(u @ np.diag(d) @ v.T, jnp.float32)
    w, g = turn([4.0, 5.0, 6.0]), turn([3.0, -2.0, 1.0])
    (updates,), _ = steps(curvax.with_eigenbasis(curvax.in_eigenbasis(curvax.discard_small_gradients(0.85))), w, [g])
    np.testing.assert_allclose(updates, turn([3.0, -2.0, 0.0]), atol=1e-5)
    bounded = curvax.scale_by_approximate_radius(max_radius=100.0)
    (updates,), _ = steps(curvax.with_eigenbasis(curvax.in_eigenbasis(bounded)), w, [g])
    np.testing.assert_allclose(updates, turn([4.0, -5.0, 6.0]), atol=1e-4)


def test_a_kernel_without_a_gradient_at_first_has_its_eigenvectors_later():
    """As the layers below one that starts at zero: with the second change of the basis it is diagonal."""
    u, v = orthogonal(0, 4), orthogonal(1, 4)
    g = jnp.asarray(u * [4.0, 3, 2, 1] @ v.T, jnp.float32)
    stack = {"kernel": jnp.stack([g, g]), "bias": jnp.ones((2, 4))}
    late = {**stack, "kernel": stack["kernel"].at[0].set(0)}
    _, state = steps(curvax.with_eigenbasis(optax.identity(), every=2), stack, [late, stack, stack])
    for i in range(2):
        inside = state.vectors.rows["kernel"][i].T @ g @ state.vectors.columns["kernel"][i]
        np.testing.assert_allclose(np.abs(inside), np.diag([4.0, 3, 2, 1]), atol=1e-4)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_squared_gradients_of_any_size_are_averaged(scale):
    """`sqrt(mean g^2)`, where neither the squares nor their mean need be floats."""
    gradients = [normal(i, 5) for i in range(3)]
    tx = curvax.with_hessian_diag(optax.identity(), "squares", decay=0.5)
    _, state = steps(tx, jnp.zeros(5), [g * scale for g in gradients])
    weights = np.array([0.25, 0.5, 1.0])[:, None]
    expected = np.sqrt(np.sum(weights * np.square(np.asarray(gradients, np.float64)), 0) / np.sum(weights))
    np.testing.assert_allclose(np.asarray(state.hessian_diag, np.float64) / scale, expected, rtol=1e-5)
    assert state.method_name == "squares"


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_basis_does_not_depend_on_the_size_of_a_gradient(scale):
    gradients = [normal(i, 3, 3) for i in range(4)]
    tx = curvax.with_eigenbasis(optax.identity(), every=1)
    (_, plain), (_, scaled) = (steps(tx, jnp.ones((3, 3)), [g * s for g in gradients]) for s in (1, scale))
    chex.assert_trees_all_close(plain.vectors, scaled.vectors, atol=1e-4)


def test_a_gradient_that_is_not_finite_leaves_no_trace():
    good = [normal(i, 3, 2) for i in range(3)]
    tx = curvax.with_eigenbasis(optax.identity(), every=1)
    _, state = steps(tx, jnp.ones((3, 2)), good)
    _, with_bad = steps(tx, jnp.ones((3, 2)), [good[0], good[0] * jnp.nan, good[1], good[1] * jnp.inf, good[2]])
    chex.assert_trees_all_close(state, with_bad)


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: curvax.cblr(0.1, method=curvax.SquaredGradients()), curvax.orthogonalize])
def test_zeros_stay_and_nan_is_passed_on(make):
    tx = make()
    w = {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "s": jnp.ones(()), "e": jnp.zeros((0, 4))}
    (zeros,), _ = steps(tx, w, [jax.tree.map(jnp.zeros_like, w)])
    chex.assert_trees_all_equal(zeros, jax.tree.map(jnp.zeros_like, w))
    (bad,), _ = steps(tx, w, [{**w, "w": w["w"].at[0, 0].set(jnp.nan)}])
    assert np.all(np.isnan(bad["w"]))


def test_polar_factors_are_those_of_the_singular_value_decomposition():
    """In ten steps all singular values come near 1, whatever the size of the gradient."""
    g = {"conv": normal(0, 2, 2, 3, 5), "b": jnp.array([3e30, 4e30]), "stack": normal(1, 4, 3, 6) * 1e-30}
    dims = {"conv": MuonDimensionNumbers((0, 1, 2), 3), "b": None, "stack": MuonDimensionNumbers(1, 2)}
    updates = curvax.orthogonalize(8, weight_dimension_numbers=dims).update(g, optax.EmptyState())[0]
    np.testing.assert_allclose(updates["b"], [0.6, 0.8], rtol=1e-6)
    for ours, matrix in zip(
        [updates["conv"].reshape(12, 5), *updates["stack"]], [g["conv"].reshape(12, 5), *g["stack"]], strict=True
    ):
        u, _, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
        inside = u.T @ ours @ vt.T
        np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=0.02)
        assert np.all((np.diag(inside) > 0.6) & (np.diag(inside) < 1.3))


@pytest.mark.parametrize("said", [False, True])
def test_a_stack_of_kernels_is_treated_as_its_layers(said):
    """The first axis of modules that `scan` stacks, or that dimension numbers leave out, counts layers of any size."""
    sizes = jnp.array([1.0, 1e-12, 1e12])
    gradients = [{"kernel": normal(i, 3, 4, 5) * sizes[:, None, None], "bias": normal(9 + i, 3, 5)} for i in range(2)]
    if said:
        gradients = [{"kernel": g["kernel"]} for g in gradients]
    apart = [[jax.tree.map(lambda x, i=i: x[i], g) for i in range(3)] for g in gradients]
    dims = {"kernel": MuonDimensionNumbers(1, 2)} if said else None

    def make(dims):
        cut = curvax.in_eigenbasis(optax.stateless(lambda g, _: jax.tree.map(lambda x: jnp.sign(x) * x**2, g)))
        inner = optax.chain(cut, curvax.orthogonalize(weight_dimension_numbers=dims))
        return curvax.with_eigenbasis(inner, every=1, weight_dimension_numbers=dims)

    (_, together), stacked = steps(make(dims), gradients[0], gradients)
    (_, alone), single = steps(make(None), apart[0], apart)
    for i in range(3):
        np.testing.assert_allclose(together["kernel"][i], alone[i]["kernel"], rtol=1e-3, atol=1e-3)
        vectors = single.vectors.rows[i]["kernel"][0]
        np.testing.assert_allclose(jnp.abs(vectors.T @ stacked.vectors.rows["kernel"][i]), np.eye(4), atol=1e-3)


def test_wide_sides_and_vectors_stay_in_coordinates():
    params = {"table": jnp.ones((100, 3)), "dense": {"kernel": jnp.ones((1, 3)), "bias": jnp.ones(3)}}
    state = curvax.with_eigenbasis(optax.identity(), max_size=50).init(params)
    sizes = jax.tree.map(jnp.size, state.vectors)
    assert sizes.rows == {"table": 1, "dense": {"kernel": 1, "bias": 1}}
    assert sizes.columns == {"table": 9, "dense": {"kernel": 9, "bias": 1}}


def test_bfloat16_parameters_have_statistics_in_float32():
    w, g = normal(0, 4, 3).astype(jnp.bfloat16), normal(1, 4, 3).astype(jnp.bfloat16)
    (updates,), state = steps(curvax.cblr(0.1, method=curvax.SquaredGradients()), w, [g])
    assert updates.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)} == {jnp.dtype("float32")}


def test_nnx_keeps_the_state_from_step_to_step():
    """`nnx.Optimizer` takes each array of a state for one like a parameter; its steps are those without it."""
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    tx = curvax.with_eigenbasis(curvax.in_eigenbasis(curvax.discard_small_gradients(0.5)), every=1)
    w = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer, state = nnx.Optimizer(model, tx, wrt=nnx.Param), tx.init(w)
    for i in range(3):
        g = {"kernel": normal(i, 3, 4), "bias": normal(i, 4)}
        updates, state = tx.update(g, state, w)
        w = optax.apply_updates(w, updates)
        grads = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(grads, g)
        optimizer.update(model, grads)
    chex.assert_trees_all_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), w, rtol=1e-5, atol=1e-6)


def test_map_params_takes_a_state_with_a_tree_like_the_parameters():
    """As who divides a state between devices does."""
    w = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    tx = curvax.cblr(0.1, method=curvax.SquaredGradients())
    names = optax.tree.map_params(tx, lambda x, name: name, tx.init(w), {"kernel": "k", "bias": "b"})
    assert names.vectors == names.moments == Sides(*2 * [{"kernel": "k", "bias": "b"}])


@pytest.mark.parametrize("whole", [True, False])
def test_steps_that_are_not_compiled_as_a_whole_compile_nothing_twice(whole):
    tx = curvax.cblr(0.1, method=curvax.SquaredGradients(), eigenbasis=whole, orthogonal=whole)
    w = {"kernel": normal(0, 3, 4), "bias": normal(1, 4)}
    state = tx.init(w)
    for _ in range(2):
        _, state = tx.update(w, state, w)
    with jax.no_tracing():
        tx.update(w, state, w)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: curvax.cblr(0.1, param_axis_name="d"), "need whole|eigenbasis=False, orthogonal=False"),
        (lambda: curvax.cblr(0.1, eigenbasis=1), "neither True nor False"),
        (lambda: curvax.with_eigenbasis(optax.sgd), "call its factory"),
        (lambda: curvax.with_eigenbasis(optax.identity(), max_size=-1), "max_size=-1"),
        (lambda: curvax.orthogonalize(0), "ns_steps=0"),
        (lambda: curvax.in_eigenbasis(optax.identity()).update(jnp.ones(2), optax.EmptyState()), "with_eigenbasis"),
        (lambda: matrices_of({"w": jnp.ones((2, 3))}, {"w": MuonDimensionNumbers(0, 2)}), "'w' has the shape"),
        (lambda: matrices_of({"w": jnp.ones((2, 3))}, {"w": MuonDimensionNumbers(0, 0)}), "each axis is one"),
        (lambda: matrices_of({"w": jnp.ones((2, 3))}, {"w": MuonDimensionNumbers(0.0, 1)}), "number of an axis"),
        (lambda: matrices_of({"w": jnp.ones((2, 3))}, {"w": (0, 1)}), "MuonDimensionNumbers"),
    ],
)
def test_what_is_wrong_is_refused_with_its_cure(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_gradients_of_each_device_alone_have_no_basis_for_all():
    """Inside `shard_map`, of parts of parameters or of parts of a batch, where their mean is the same as on one."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    tx, g = curvax.with_eigenbasis(curvax.in_eigenbasis(curvax.discard_small_gradients(0.5))), normal(0, 2, 4, 3)

    def run(mean):
        def local(g):
            return tx.update(mean(g[0]), tx.init(g[0]), g[0])[0][None]

        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=P("d")))(g)

    with pytest.raises(ValueError, match=r"differs between the devices along \('d',\)"):
        run(lambda g: g)
    whole = g.mean(0)
    wanted, _ = tx.update(whole, tx.init(whole), whole)
    np.testing.assert_allclose(run(lambda g: jax.lax.pmean(g, "d")), jnp.stack([wanted, wanted]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_curvature_in_coordinates_is_refused_in_a_basis():
    """As where `with_hessian_diag` stands around `cblr`; with the basis outside of both it works."""
    w = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
    loss = lambda w: jnp.sum((w["a"] @ w["b"] - 2) ** 2)
    inner = optax.partition({"cblr": curvax.cblr(0.1), "sgd": optax.sgd(0.1)}, {"a": "cblr", "b": "sgd"})
    tx = curvax.with_hessian_diag(inner, key=0)
    with pytest.raises(ValueError, match="put with_eigenbasis around"):
        tx.update(jax.grad(loss)(w), tx.init(w), w, obj_fn=loss)
    tx = curvax.with_eigenbasis(tx)
    updates, _ = tx.update(jax.grad(loss)(w), tx.init(w), w, obj_fn=loss)
    alone = curvax.cblr(0.1)
    by_itself, _ = alone.update(jax.grad(loss)(w), alone.init(w), w, obj_fn=loss)
    chex.assert_trees_all_close(updates["a"], by_itself["a"], rtol=1e-4)


def test_no_stack_of_matrices_is_factored_at_once_on_a_cpu():
    """Where XLA's threads, of which each stack takes some, would wait for each other for ever."""
    params = {"norm": jnp.ones((3, 4)), "kernels": [jnp.ones((3, 4, 4))] * 4}
    tx = curvax.cblr(0.1, method="squares")
    traced = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
    factored = [eqn for eqn in equations(traced) if eqn.primitive.name in ("eigh", "qr", "geqrf")]
    assert len(factored) >= 16
    assert all(eqn.invars[0].aval.shape[:-2] in ((), (1,)) for eqn in factored)


def test_what_is_in_the_basis_sees_float32_at_least():
    """Vectors, which are not rotated, as well."""
    seen = []
    look = optax.stateless(lambda g, _: (seen.extend(x.dtype for x in jax.tree.leaves(g)), g)[1])
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3, jnp.bfloat16)}
    (updates,), _ = steps(curvax.with_eigenbasis(curvax.in_eigenbasis(look)), params, [params])
    assert set(seen) == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
