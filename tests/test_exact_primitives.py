"""Every record of a primitive is of one that this JAX has, and what it says of derivatives and examples is true."""

import gc

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from curvax.exact import exact_diag, explain
from curvax.exact.equations import evaluate, in_slots, is_inexact, read
from curvax.exact.primitives import TABLE, Axis, Entries, Form, differentiable_slots, form, pull_axis, record
from curvax.exact.trace import flattened
from curvax.objective import Objective


def test_jax_has_every_primitive_of_its_versions_and_none_of_others():
    names = {found.name for found in gc.get_objects() if isinstance(found, jax.extend.core.Primitive)}
    expected = {name for name, known in TABLE.items() if known.versions[0] <= jax.__version_info__ < known.versions[1]}
    assert set(TABLE) & names == expected


POINTS = [np.random.default_rng(seed).normal(size=(3, 4)) for seed in (0, 1)]
INDICES = np.array([[2], [0]])
LOOKUP = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,))
PLACES = lax.ScatterDimensionNumbers((1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,))
windows = lambda x, start, function: lax.reduce_window(x, start, function, (2, 1), (1, 1), "VALID")
image = lambda x: x.reshape(3, 1, 4)
# Of two arrays (3, 4). Derivatives of others are not said to be of any form.
OPERATIONS = {
    "abs": lambda x, y: jnp.abs(x),
    "add": jnp.add,
    "broadcast_in_dim": lambda x, y: jnp.broadcast_to(x, (2, 3, 4)),
    "clamp": lambda x, y: lax.clamp(-0.5, x, 0.5),
    "complex": lax.complex,
    "concatenate": lambda x, y: jnp.concatenate([x, y]),
    "conj": lambda x, y: lax.conj(lax.complex(x, y)),
    "conv_general_dilated": lambda x, y: lax.conv(image(x), image(y)[:, :, :2], (1,), "SAME"),
    "convert_element_type": lambda x, y: x.astype(jnp.float32),
    "copy": lambda x, y: lax.copy_p.bind(x),
    "cummax": lambda x, y: lax.cummax(x, 1),
    "cummin": lambda x, y: lax.cummin(x, 1),
    "cumsum": lambda x, y: lax.cumsum(x, 1),
    "div": jnp.divide,
    "dot_general": lambda x, y: x @ y.T,
    "dynamic_slice": lambda x, y: lax.dynamic_slice_in_dim(x, 1, 2),
    "dynamic_update_slice": lambda x, y: lax.dynamic_update_slice(x, y[:1], (1, 0)),
    "fft": lambda x, y: jnp.fft.fft(x),
    "gather": lambda x, y: lax.gather(x, INDICES, LOOKUP, (1, 4)),
    "imag": lambda x, y: lax.imag(lax.complex(x, y)),
    "max": jnp.maximum,
    "min": jnp.minimum,
    "mul": jnp.multiply,
    "name": lambda x, y: jax.ad_checkpoint.checkpoint_name(x, "x"),
    "neg": lambda x, y: -x,
    "pad": lambda x, y: lax.pad(x, 0.0, ((1, 0, 1), (0, 0, 0))),
    "real": lambda x, y: lax.real(lax.complex(x, y)),
    "reduce_max": lambda x, y: jnp.max(x, 0),
    "reduce_min": lambda x, y: jnp.min(x, 0),
    "reduce_precision": lambda x, y: lax.reduce_precision(x, 11, 52),
    "reduce_sum": lambda x, y: jnp.sum(x, 0),
    "reduce_window_max": lambda x, y: windows(x, -jnp.inf, lax.max),
    "reduce_window_min": lambda x, y: windows(x, jnp.inf, lax.min),
    "reduce_window_sum": lambda x, y: windows(x, 0.0, lax.add),
    "rem": lax.rem,
    "reshape": lambda x, y: x.reshape(2, 3, 2),
    "rev": lambda x, y: lax.rev(x, (0,)),
    "scatter": lambda x, y: lax.scatter(x, INDICES, y[:2], PLACES),
    "scatter-add": lambda x, y: lax.scatter_add(x, INDICES, y[:2], PLACES),
    "scatter-sub": lambda x, y: lax.scatter_sub(x, INDICES, y[:2], PLACES),
    "select_n": lambda x, y: jnp.where(POINTS[0] > 0, x, y),
    "slice": lambda x, y: x[1:],
    "sort": lambda x, y: jnp.sort(x),
    "split": lambda x, y: lax.split(x, (2, 2), 1),
    "squeeze": lambda x, y: lax.squeeze(x[:1], (0,)),
    "stack": lambda x, y: jnp.stack([x, y], 1),
    "sub": jnp.subtract,
    "tile": lambda x, y: jnp.tile(x, (2, 1)),
    "triangular_solve": lambda x, y: jax.scipy.linalg.solve_triangular(x[:3, :3] + 3 * jnp.eye(3), y),
    "top_k": lambda x, y: lax.top_k(x, 2)[0],
    "transpose": lambda x, y: x.T,
    "unstack": lambda x, y: jnp.unstack(x, axis=1),
    "exp": lambda x, y: jnp.exp(x),
    "cholesky": lambda x, y: jnp.linalg.cholesky(jnp.stack([x @ x.T, y @ y.T]) + jnp.eye(3)[None]),
    "cumprod": lambda x, y: lax.cumprod(x, 1),
    "reduce_prod": lambda x, y: jnp.prod(x, 0),
}


def operation(name):
    """An equation, the operands that have a derivative, and its real or complex results as a function of these."""
    closed = flattened(jax.make_jaxpr(OPERATIONS[name])(*POINTS))
    env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env = evaluate(closed.jaxpr.eqns, env | dict(zip(closed.jaxpr.invars, map(jnp.asarray, POINTS), strict=True)))
    eqn = next(eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == name)
    values, slots = [read(env, atom) for atom in eqn.invars], differentiable_slots(eqn)
    smooth = lambda *varying: [x for x in in_slots(eqn, slots, values)(*varying) if is_inexact(x)]
    return eqn, slots, [values[slot] for slot in slots], smooth


def random_like(values):
    rng = np.random.default_rng(2)
    return [jnp.asarray(rng.normal(size=jnp.shape(x)), jnp.result_type(x)) for x in values]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_has_the_form_that_its_record_says(name):
    """Along a line through all operands, or one of them, there is no second derivative; where curved there is one."""
    eqn, _, values, function = operation(name)
    line = random_like(values)
    alone = [[x if i == j else jnp.zeros_like(x) for j, x in enumerate(line)] for i in range(len(line))]
    kind = form(eqn)
    numerator = record(eqn).numerator
    lines = {Form.BILINEAR: alone, Form.QUOTIENT: alone[numerator : numerator + 1]}.get(kind, [line])
    for line in lines:
        along = lambda t, line=line: function(*(x + t.astype(x.dtype) * d for x, d in zip(values, line, strict=True)))
        slope = lambda t, along=along: jax.jvp(along, (t,), (jnp.ones_like(t),))[1]
        bent = jax.jvp(slope, (jnp.zeros(()),), (jnp.ones(()),))[1]
        largest = max(float(jnp.abs(x).max()) for x in bent)
        assert largest > 0.1 if kind is Form.CURVED else largest == 0.0
    if kind is Form.LINEAR:
        for one, other in zip(function(*(-2 * x for x in values)), function(*values), strict=True):
            np.testing.assert_allclose(one, -2 * other, rtol=1e-6, atol=1e-12)


def examples(shape, axis, num_examples):
    """The example of each entry of an array."""
    index = np.arange(shape[axis.dim]).reshape([-1 if d == axis.dim else 1 for d in range(len(shape))])
    return np.broadcast_to(index // axis.inner % num_examples, shape)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_slice_of_an_operand_reaches_the_same_example_of_a_result(name):
    """Moved alone, along each axis that is said to be that of the examples; and some axis is, where any can be."""
    eqn, slots, values, function = operation(name)
    found = 0
    for result, out in enumerate(eqn.outvars):
        for dim, size in enumerate(out.aval.shape if is_inexact(out.aval) else ()):
            for place, slot in enumerate(slots):
                axis = pull_axis(eqn, slot, result, Axis(dim), size)
                if axis is None or size == 1:
                    continue
                found += 1
                mine = examples(values[place].shape, axis, size)
                for example in range(size):
                    still = [jnp.zeros_like(x) for x in values]
                    still[place] = jnp.where(mine == example, random_like(values)[place], 0)
                    moved = jax.jvp(function, values, still)[1][result]
                    reached = examples(out.aval.shape, Axis(dim), size)
                    assert not np.any(np.where(reached != example, moved, 0))
    assert found


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [name for name in OPERATIONS if TABLE[name].entries is not Entries.MIXED])
def test_entries_come_from_where_a_record_says(name):
    """Each is of its own place, or is one entry of the first operand or none: a row of zeros but for a single one."""
    eqn, _, (x, *others), function = operation(name)
    units = jnp.eye(x.size, dtype=x.dtype).reshape(-1, *x.shape)
    columns = jax.vmap(lambda unit: jax.jvp(lambda x: function(x, *others)[0], (x,), (unit,))[1])(units)
    matrix = np.abs(columns).reshape(x.size, -1).T
    assert np.all((matrix != 0).sum(1) <= 1)
    if record(eqn).entries is not Entries.MOVED:
        assert not np.any(matrix - np.diag(np.diag(matrix)))
    else:
        assert set(np.unique(matrix)) <= {0, 1}


# Whole networks of operations that few others use, against dense Hessians.

ROWS = np.random.default_rng(3).normal(size=(4, 3))
TOKENS = jnp.array([[0, 1, 1, 4], [2, 2, 3, 3], [4, 0, 1, 2], [3, 3, 3, 3]])
BAGS = jnp.array([[0, 0, 1, 1], [0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])


def stacked(w, x):
    hidden = x @ w
    pair = jnp.stack([hidden, jax.nn.relu(-hidden)], 1)
    return sum(jnp.unstack(jnp.tile(pair, (1, 1, 2)), axis=1))


def bags(w, x):
    """A sum of embeddings for each bag of an example's tokens: a scatter-add of rows."""
    sums = jax.vmap(lambda rows, bag: jax.ops.segment_sum(rows, bag, 2))(w[TOKENS], BAGS)
    return jax.nn.relu(sums).reshape(4, -1)


def transformed(w, x):
    return jnp.abs(jnp.fft.rfft(x @ w).real)


def whitened(w, x):
    """Each example divided by the Cholesky factor of its own matrix."""
    factors = jnp.linalg.cholesky(x[:, :, None] * x[:, None, :] + jnp.eye(3)[None])
    return lax.linalg.triangular_solve(factors, (x @ w)[..., None], left_side=True, lower=True)[..., 0]


def divided(w, x):
    """By a factor that is made of the parameter: curved."""
    factors = jnp.linalg.cholesky(w @ w.T + jnp.eye(3))
    return lax.linalg.triangular_solve(factors, x, lower=True, transpose_a=True)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("predict", "shape", "route"),
    [
        (stacked, (3, 2), "gauss-newton"),
        (bags, (5, 2), "gauss-newton"),
        (transformed, (3, 4), "gauss-newton"),
        (whitened, (3, 3), "gauss-newton"),
        (divided, (3, 3), "unit vectors"),
    ],
)
def test_a_network_has_the_diagonal_of_its_dense_hessian(predict, shape, route):
    w = jnp.asarray(np.random.default_rng(4).normal(size=shape))
    loss = lambda outputs, data: jax.nn.logsumexp(outputs, -1) - outputs[:, 0]
    objective = Objective(predict, loss, jnp.asarray(ROWS))
    (row,) = explain(objective, w).rows
    assert row.route == route
    value, grad, diag = jax.jit(exact_diag)(objective, w)
    expected, slope = jax.jit(jax.value_and_grad(objective))(w)
    dense = jax.jit(jax.hessian(objective))(w).reshape(w.size, w.size)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(grad, slope, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(diag.ravel(), jnp.diag(dense), rtol=1e-9, atol=1e-12)
