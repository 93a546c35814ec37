"""A few fixed programs and trees of the fuzzers, and the proof that they see what is wrong."""

import random

import hypothesis
import jax
import pytest

from tests.fuzz.programs import methods
from tests.fuzz.programs.judge import judge, prepare
from tests.fuzz.programs.search import describe, shrink
from tests.fuzz.programs.spec import Choice, Spec, random_spec, write
from tests.fuzz.trees import values
from tests.fuzz.trees.examples import NAMES, examples
from tests.fuzz.trees.properties import check
from tests.fuzz.trees.run import Broken

# Layers, loss and a method beside the exact one: small programs of every kind.
PROGRAMS = [
    ("dense activation", "cross_entropy", "default"),
    ("convolution_2d activation", "squared_of_any_rank", "ggn"),
    ("convolution_1d pools", "elementwise", "default"),
    ("batch_norm_in_training dense", "soft_labels", "ggn_batch"),
    ("layer_norm dense", "z_loss", "hutchinson"),
    ("embedding gathers_by_data", "reinforce", "default"),
    ("dense scatters sorts", "squared", "xdiag"),
    ("einsum_reordered", "masked_tokens", "default"),
    ("recurrence", "cross_entropy", "basis"),
    ("scanned_layers", "squared", "ggn_batch"),
    ("loop_of_data rematerialised", "poisson", "default"),
    ("branch_per_example", "hinge", "ggn"),
    ("complex_kernel", "squared", "ggn_mc"),
    ("dense custom_backward_rule", "squared", "hutchinson"),
    ("tied_embedding", "padded_labels", "ggn_batch"),
    ("used_twice", "cosine", "xdiag"),
    ("attention", "tokens_over_batch", "default"),
    ("dense", "two_heads", "ggn_mc"),
    ("dense", "contrastive", "default"),
    ("unlikely", "squared_for_some", "default"),
    ("mapped_over_kernels dropout", "class_weights", "ggn"),
]
TOKENS = ("convolution_1d", "einsum_reordered", "recurrence", "attention")


@pytest.fixture(autouse=True)
def unfiltered_tracebacks():
    """A raw error is known by the file that raised it."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


@pytest.mark.slow_but_for("tied_embedding")
@pytest.mark.parametrize(("layers", "loss", "method"), PROGRAMS)
def test_programs(layers, loss, method):
    case = prepare(a_spec(*layers.split(), loss=loss))
    assert len(case.program.layers) == len(layers.split())
    findings, _ = judge(case, ["exact", method], repeats=32)
    assert not findings, describe(case, findings[0])


@pytest.mark.slow_but_for("scale_by_lars", "with_probes")
@pytest.mark.parametrize("name", NAMES)
def test_trees(name):
    @hypothesis.seed(0)
    @hypothesis.settings(max_examples=5, database=None, deadline=None)
    @hypothesis.given(examples(name, few=True))
    def holds(example):
        check(example)

    holds()


def a_spec(*layers, loss="cross_entropy", **changes):
    """A small program of these layers."""
    choices = tuple(Choice(name, 1) for name in layers)
    form = (3, 3, 1) if "convolution_2d" in layers else (2, 3) if set(layers) & set(TOKENS) else (3,)
    return Spec(seed=0, batch=2, form=form, layers=choices, loss=Choice(loss, 4), **changes)


def scaled(monkeypatch, factor):
    """Makes every method's diagonals wrong by a factor."""
    run = methods.run

    def wrong(*args, **kwargs):
        estimate = run(*args, **kwargs)
        return estimate._replace(diag=jax.tree.map(lambda x: x * factor, estimate.diag))

    monkeypatch.setattr(methods, "run", wrong)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "factor", "kind"), [("exact", 1 + 1e-6, "wrong"), ("hutchinson", 1.5, "biased")])
def test_a_wrong_diagonal_is_found_and_shrunk(monkeypatch, method, factor, kind):
    scaled(monkeypatch, factor)
    case = prepare(a_spec("layer_norm", "dense", "activation", penalty="l2"))
    [finding], outcome = judge(case, [method], repeats=64)
    assert (finding.kind, outcome[method]) == (kind, "fails")
    if method == "exact":
        small, finding = shrink(case, finding)
        assert len(small.program.layers) <= 1 and small.spec.penalty is None
        # What is printed is a program.
        compile(describe(small, finding), "finding", "exec")


@pytest.mark.slow
def test_one_percent_of_an_unlikely_class_is_found(monkeypatch):
    case = prepare(a_spec("unlikely", double=False))
    assert not judge(case, ["exact"])[0]
    scaled(monkeypatch, 1.01)
    assert judge(case, ["exact"])[0]


def test_programs_follow_from_their_seed():
    texts = [write(random_spec(seed)).text for seed in range(20)]
    random.seed(1)
    assert texts == [write(random_spec(seed)).text for seed in range(20)]
    assert len(set(texts)) == 20


def test_a_wrong_update_is_found(monkeypatch):
    monkeypatch.setitem(values._RULES, "scale_by_lars", lambda **_: values.reference.lars(1.001))
    with pytest.raises(Broken):
        test_trees("scale_by_lars")
