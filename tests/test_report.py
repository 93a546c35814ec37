"""The report of a network: its numbers against NumPy and known values, what it says, and how it looks."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.reports import measure, table

RNG = np.random.default_rng(0)
B = 32
X = RNG.normal(size=(B, 6)).astype(np.float32)
#: Two kernels and a bias; a norm's scale and a scalar, which follow no kernel; and what no derivative reaches.
PARAMS = {
    "hidden": {"kernel": RNG.normal(size=(6, 8)).astype(np.float32) / 2, "bias": np.full(8, 0.1, np.float32)},
    "head": {"kernel": RNG.normal(size=(8, 3)).astype(np.float32) / 3},
    "norm": {"scale": np.ones(3, np.float32)},
    "temp": np.zeros((), np.float32),
    "stopped": np.ones((8, 3), np.float32),
    "spare": {"unused": np.ones(3, np.float32)},
}
KERNELS = ("hidden", "head")
DATA = {"x": X, "y": np.arange(B, dtype=np.int32) % 3}


def predict(params, data):
    hidden = jnp.tanh(data["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    logits = jnp.exp(params["temp"]) * params["norm"]["scale"][None] * (hidden @ params["head"]["kernel"])
    return logits + jnp.sum(jax.lax.stop_gradient(params["stopped"]))


def loss(logits, data):
    return optax.softmax_cross_entropy_with_integer_labels(logits, data["y"])


OBJECTIVE = curvax.Objective(predict, loss, DATA)


@pytest.fixture(scope="module")
def exact():
    """Other output that reads all examples is no part of the loss."""
    with_metrics = lambda p, d: (predict(p, d), jnp.mean(predict(p, d)))
    return curvax.report(curvax.Objective(with_metrics, loss, DATA, has_aux=True), PARAMS)


@pytest.fixture(scope="module")
def estimate():
    return curvax.report(OBJECTIVE, PARAMS, method=curvax.Hutchinson(8), num_samples=64)


def shuffled(x):
    """The examples in the order in which a report divides them."""
    return x[np.asarray(jax.random.permutation(jax.random.key(0), len(x)))]


def rows(report):
    return {row["layer"]: row for row in report.layers}


def test_norms_medians_and_radii_are_those_of_numpy(exact):
    grads = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.grad(OBJECTIVE)(PARAMS))
    for module in KERNELS:
        w, g, row = PARAMS[module]["kernel"], grads[module]["kernel"], rows(exact)[f"{module}/kernel"]
        expected = {
            "weight_norm": np.linalg.norm(w),
            "weight_median": np.median(np.abs(w)),
            "gradient_norm": np.linalg.norm(g),
            "gradient_median": np.median(np.abs(g)),
            "radius_lars": np.linalg.norm(w) / np.linalg.norm(g),
            "radius_mclr": np.median(np.abs(w)) / np.median(np.abs(g)),
            "radius_percent_delta": w.size / np.sum(np.abs(g / w)),
            "approximate_radius_50": np.sort(np.abs(w / g).ravel())[(w.size - 1) // 2],
        }
        for name, value in expected.items():
            np.testing.assert_allclose(row[name], value, rtol=1e-4, err_msg=name)
    assert exact.params == sum(x.size for x in jax.tree.leaves(PARAMS)) and exact.num_examples == B
    np.testing.assert_allclose(exact.loss, OBJECTIVE(PARAMS), rtol=1e-6)


def test_curvature_is_that_of_the_dense_hessian(exact):
    diag = jax.tree.map(lambda x: np.asarray(x, np.float64), curvax.hessian_diag(OBJECTIVE, PARAMS, "basis"))
    for module in KERNELS:
        h, row = diag[module]["kernel"], rows(exact)[f"{module}/kernel"]
        np.testing.assert_allclose(row["curvature"], h.mean(), rtol=1e-4)
        assert row["curvature_error"] == 0 and row["negative"] == pytest.approx(np.mean(h < 0))
        radius = 1 / (np.abs(h) + 0.1 * np.abs(h).mean())
        np.testing.assert_allclose(row["radius_95"], np.sort(radius.ravel())[int(0.95 * (h.size - 1))], rtol=1e-3)


def test_the_rates_are_those_of_the_layers_over_that_of_all_together(exact):
    """A step of the whole at rate 1 is as long as the layers' steps are together."""
    for name in ("lars", "mclr", "percent_delta"):
        gradient = np.array([row["gradient_norm"] for row in exact.layers])
        rate = np.array([row[f"rate_{name}"] for row in exact.layers])
        np.testing.assert_allclose(np.linalg.norm(rate * gradient), np.linalg.norm(gradient), rtol=1e-5)


def test_what_follows_no_kernel_has_the_radius_that_the_optimizers_give_it(exact):
    found = rows(exact)
    of = lambda name: np.array([found[f"{module}/kernel"][name] for module in KERNELS])
    for name in ("lars", "mclr", "percent_delta"):
        together = np.sqrt(np.sum((of(f"radius_{name}") * of("gradient_norm")) ** 2) / np.sum(of("gradient_norm") ** 2))
        np.testing.assert_allclose(found["norm"][f"radius_{name}"], together, rtol=1e-4)


@pytest.mark.slow
def test_a_single_draw_is_not_called_exact():
    saddle = lambda w: jnp.sum(jnp.array([1.0, -1.0, -1.0]) * w**2)
    found = curvax.report(saddle, jnp.ones(3), method="hutchinson", num_samples=1)
    (layer,) = found.layers
    assert layer["curvature"] == pytest.approx(-2 / 3) and layer["negative"] == pytest.approx(2 / 3)
    assert np.isnan(layer["curvature_error"]) and "±?" in str(found) and "(all)" in str(found)
    assert not any("saddle" in sentence for sentence in found.findings)
    assert "examples can be told apart" in found.noise_reason


def expected_noise_scale():
    gradient = lambda data: jax.grad(dataclasses.replace(OBJECTIVE, data=data))(PARAMS)
    flat = lambda grad: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grad)]).astype(np.float64)
    parts = [flat(gradient({name: shuffled(x)[i::8] for name, x in DATA.items()})) for i in range(8)]
    small, large = np.mean([part @ part for part in parts]), np.sum(np.mean(parts, 0) ** 2)
    return (small - large) / (1 / 4 - 1 / 32) / ((32 * large - 4 * small) / 28)


def test_the_noise_scale_counts_biases(exact):
    np.testing.assert_allclose(exact.critical_batch_size, expected_noise_scale(), rtol=1e-3)


@pytest.mark.parametrize("scale", [1e30, np.nan, 0.0])
def test_the_noise_scale_has_no_range_and_a_gradient_without_information_is_not_called_noise(scale):
    scaled = lambda logits, data: data["scale"] * loss(logits, data)
    found = curvax.report(curvax.Objective(predict, scaled, {**DATA, "scale": np.float32(scale)}), PARAMS)
    if scale == 1e30:
        np.testing.assert_allclose(found.critical_batch_size, expected_noise_scale(), rtol=1e-3)
    else:
        said = "The gradient is zero" if scale == 0 else "not finite"
        assert any(said in x for x in found.findings) and not any("all is noise" in x for x in found.findings)


@pytest.mark.slow
def test_a_broken_bias_is_seen():
    params = {"a": {"kernel": jnp.ones((6, 3)), "bias": jnp.array([0.0, 1.0, 1.0])}}
    objective = curvax.Objective(lambda p, d: d["x"] @ p["a"]["kernel"] + jnp.sqrt(p["a"]["bias"])[None], loss, DATA)
    found = curvax.report(objective, params)
    assert "not finite" in found.findings[0] and found.layers[0]["non_finite_gradient"] == pytest.approx(1 / 21)


@pytest.mark.slow
def test_an_estimate_is_within_its_standard_errors(exact, estimate):
    assert estimate.method == "Hutchinson(num_samples=8), 64 draws"
    for row in estimate.layers:
        expected = rows(exact)[row["layer"]]["curvature"]
        assert row["curvature_error"] > 0 or expected == 0
        assert abs(row["curvature"] - expected) <= 5 * row["curvature_error"]


@pytest.mark.slow
def test_the_noise_scale_is_that_of_gaussian_gradients():
    """The loss (w - x)^2 / 2 of one weight has the gradient w - x: signal and noise are those of x."""
    x = 2 + 3 * np.random.default_rng(1).normal(size=(40_000, 1))
    objective = curvax.Objective(lambda w, x: w["w"] - x, lambda z, x: z[:, 0] ** 2 / 2, jnp.asarray(x, jnp.float32))
    found = curvax.report(objective, {"w": jnp.zeros((1, 1))})
    # Eight parts know a variance to a relative sqrt(2 / 7).
    assert found.critical_batch_size == pytest.approx(9 / 4, rel=5 * np.sqrt(2 / 7))
    parts = shuffled(x).reshape(-1, 8).mean(0)
    noise = parts.var(ddof=1) * 5000
    np.testing.assert_allclose(found.critical_batch_size, noise / (x.mean() ** 2 - noise / 40_000), rtol=1e-3)


@pytest.mark.slow
def test_what_no_derivative_reaches_is_named(exact):
    assert set(exact.unreached) == {"spare/unused", "stopped"}
    assert any("No derivative reaches spare/unused, stopped" in sentence for sentence in exact.findings)
    # Nor are their units called dead.
    assert not any("dead" in sentence for sentence in exact.findings)
    # A constant slope depends on nothing either, but reaches its parameter.
    assert not measure.unreached(jnp.sum, jnp.ones((2, 2)), jnp.ones((2, 2)))


@pytest.mark.slow
def test_dead_units_are_counted():
    params = {"kernel": jnp.ones((6, 4)).at[:, :3].set(-1.0), "head": jnp.ones((4, 3))}
    positive = {**DATA, "x": np.abs(X)}
    objective = curvax.Objective(lambda p, d: jax.nn.relu(d["x"] @ p["kernel"]) @ p["head"], loss, positive)
    found = rows(curvax.report(objective, params, layers="array", method="exact"))
    assert found["kernel"]["dead"] == 0.75 and found["kernel"]["units"] == 4 and found["head"]["dead"] == 0


@pytest.mark.slow
def test_coupled_examples_have_no_noise_scale():
    centred = lambda p, d: (z := predict(p, d)) - z.mean(0, keepdims=True)
    found = curvax.report(curvax.Objective(centred, loss, DATA), PARAMS)
    assert found.critical_batch_size is None and found.layers[0]["critical_batch_size"] is None
    assert any("not proved to treat examples apart" in sentence for sentence in found.findings)


def finite(**changes):
    """A report in which nothing stands out, but for what is changed in its first layer, or in it."""
    layer = {
        "layer": "a", "is_kernel": True, "units": 8, "dead": 0.0, "non_finite": 0.0, "non_finite_gradient": 0.0,
        "weight_norm": 1.0, "gradient_norm": 1.0, "radius_lars": 1.0, "negative": 0.0, "curvature": 1.0,
        "curvature_error": 0.0,
    }  # fmt: skip
    own = {name: changes.pop(name) for name in list(changes) if name in layer}
    fields = {
        "loss": 1.0, "params": 8, "num_examples": 64, "critical_batch_size": 64.0, "noise_reason": "", "method": "",
        "unreached": (), "hidden_stacks": (), "cost": "",
    }  # fmt: skip
    return curvax.Report(layers=[layer | own, layer | {"layer": "b"}], **(fields | changes))


@pytest.mark.parametrize(
    ("below", "above", "said"),
    [
        ({"radius_lars": 99.0}, {"radius_lars": 101.0}, "The radius of a is 101 times that of b"),
        ({"radius_lars": 1e3, "gradient_norm": 0.0}, {"radius_lars": 1e3}, "The radius of a is 1,000 times that of b"),
        ({"critical_batch_size": 33.0}, {"critical_batch_size": 16.0}, "64 is 4.0 times the noise scale"),
        ({"critical_batch_size": 255.0}, {"critical_batch_size": 640.0}, "64 is 1/10 of the noise scale"),
        ({}, {"critical_batch_size": np.inf}, "all is noise"),
        ({"dead": 0.25}, {"dead": 0.5}, "50 % of the 8 columns of a have no gradient"),
        ({"negative": 0.4}, {"negative": 0.5}, "50 % of the curvature of a is negative"),
        ({"curvature_error": 0.5}, {"curvature_error": 0.6}, "a is known to its order of magnitude"),
        ({}, {"non_finite": 0.1}, "10 % of the curvature of a are not finite"),
        ({}, {"non_finite_gradient": 1.0}, "100 % of the gradient of a are not finite"),
        ({}, {"weight_norm": 0.0}, "a: all zeros"),
        ({}, {"unreached": ("x",)}, "No derivative reaches x"),
    ],
)
def test_what_stands_out_is_said_from_its_threshold_on(below, above, said):
    assert finite(**below).findings == []
    (sentence,) = finite(**above).findings
    assert said in sentence


def test_it_fits_a_hundred_columns_and_goes_into_json(exact, estimate, monkeypatch):
    for report in (exact, estimate):
        for use_rich in (True, False):
            monkeypatch.setattr(table.importlib.util, "find_spec", lambda name, use=use_rich: use or None)
            text = table.text(report, color=False)
            assert max(map(len, text.splitlines())) <= 100 and "\x1b" not in text
            assert "hidden/kernel" in text and text.splitlines()[-1].startswith("Cost: ")
        assert "\x1b[1m" not in str(report)
    said = json.loads(json.dumps(exact.to_dict()))
    assert said["layers"][0]["layer"] == exact.layers[0]["layer"] and said["findings"] == exact.findings
    assert all(isinstance(x, str | float | int | bool) or x is None for row in said["layers"] for x in row.values())
    assert exact._repr_html_().count("<tr>") == 2 * (1 + len(exact.layers))


@pytest.mark.parametrize(
    ("x", "text"), [(0.0, "0"), (1.0, "1"), (0.0123456, "0.0123"), (12345.0, "1.2e4"), (-3.2e-7, "-3.2e-7")]
)
def test_numbers_are_short(x, text):
    assert table.number(x) == text


@pytest.mark.parametrize(
    ("x", "text"), [(12, "12"), (4640, "4640"), (131072, "131k"), (2.5e6, "2.5M"), (np.inf, "inf")]
)
def test_counts_are_short(x, text):
    assert table.count(x) == text


def test_the_plot_has_a_bar_for_each_layer_and_source(exact):
    (axes,) = exact.plot().axes
    # Without a gradient there is no radius by curvature, and an infinite one by eq. 17; and no logarithm shows zero.
    medians = [row[name] for name in ("radius_50", "approximate_radius_50") for row in exact.layers]
    expected = [x for x in medians if np.isfinite(x) and x > 0]
    assert axes.get_yscale() == "log" and len(expected) > len(exact.layers)
    np.testing.assert_allclose([patch.get_height() for patch in axes.patches], expected)
    assert [text.get_text() for text in axes.texts] == ["∞"] * int(np.sum(np.isinf(medians)))


def test_a_plot_without_matplotlib_says_what_to_install(exact, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        exact.plot()


def test_progress_is_said_after_two_seconds(monkeypatch, capsys):
    monkeypatch.setattr("curvax.reports.report.PATIENCE", 0.0)
    curvax.report(lambda w: jnp.sum(w**2), jnp.ones(2))
    assert "curvax.report: curvature ..." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": {}}, "no parameters to report on"),
        ({"method": "newton"}, "'newton' is unknown"),
        ({"num_samples": 0}, "num_samples=0 is out of range"),
        ({"key": "seed"}, "no random key"),
        ({"layers": "rows"}, "layers='rows' is not a way"),
    ],
)
def test_errors_say_what_to_pass(change, message):
    arguments = {"objective": lambda w: jnp.sum(w**2), "params": jnp.ones(2), "method": "hutchinson"} | change
    with pytest.raises(ValueError, match=message):
        curvax.report(**arguments)


def test_the_order_of_examples_does_not_matter():
    """Examples with a period of eight, of which every eighth would see one class alone."""
    x = np.where(np.arange(4096) % 8 == 0, 8.0, 0.0)[:, None] + np.random.default_rng(2).normal(size=(4096, 1))
    objective = curvax.Objective(lambda w, x: w["w"] - x, lambda z, x: z[:, 0] ** 2 / 2, jnp.asarray(x, jnp.float32))
    found = curvax.report(objective, {"w": jnp.zeros((1, 1))})
    assert found.critical_batch_size == pytest.approx(x.var() / x.mean() ** 2, rel=5 * np.sqrt(2 / 7))


def test_the_matrix_is_named(exact):
    assert "the Hessian's diagonal" in str(exact)
    of_outputs = dataclasses.replace(exact, method=f"{curvax.GaussNewton(1)!r}, 2 draws")
    assert "the Gauss-Newton matrix's diagonal" in str(of_outputs)


def test_a_scanned_network_has_the_rows_of_its_layers_in_a_list():
    """Noise, curvature and radii of every layer; where there is no vector beside the kernels the trace shows them."""
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape) / 2
    scan = {"blocks": {"w": normal(0, 3, 4, 4), "v": normal(1, 3, 4, 4)}, "head": normal(2, 4, 2)}
    in_list = {"blocks": [jax.tree.map(lambda x, i=i: x[i], scan["blocks"]) for i in range(3)], "head": scan["head"]}
    block = lambda h, p: (jax.nn.relu(h @ p["w"]) @ p["v"], None)
    x = normal(3, 16, 4)

    def scanned(params, data):
        return jax.lax.scan(block, data, params["blocks"])[0] @ params["head"]

    def written_out(params, data):
        for p in params["blocks"]:
            data, _ = block(data, p)
        return data @ params["head"]

    of = lambda predict, params: curvax.report(
        curvax.Objective(predict, lambda z, d: jnp.sum(z**2, 1), x), params, method="ggn"
    )
    found, wanted = of(scanned, scan), of(written_out, in_list)
    layers = [(f"blocks/{name}[{i}]", f"blocks/{i}/{name}") for name in "wv" for i in range(3)] + [("head", "head")]
    for ours, theirs in layers:
        numbers = {k: v for k, v in rows(wanted)[theirs].items() if k != "layer"}
        for name, value in numbers.items():
            np.testing.assert_allclose(rows(found)[ours][name], value, rtol=2e-4, atol=1e-6, err_msg=f"{ours} {name}")
    assert found.critical_batch_size == pytest.approx(wanted.critical_batch_size, rel=1e-3)
    assert found.hidden_stacks == ("blocks/v", "blocks/w") and not wanted.hidden_stacks
    assert "a scan runs over their layers" in str(found) and "scan" not in str(wanted)
