"""Programs made to fool the converter: whatever it does to them, the function must stay the same, and so must its gradients.

A few of them at each run; `tests/tracing/trap_search.py` looks at thousands.
"""

import functools

import jax
import pytest
import trap_search
from hypothesis import HealthCheck, example, given, settings
from trap_programs import TRAPS, build, folds, inputs, parameters, parts, policies, programs, traps

import prenorm_jax as pn
from conftest import worst
from prenorm_jax.tracing import ConversionError, convert, trace

PLAIN = ("residual", "two-pass", "mlp", 0)


@pytest.mark.slow  # on one Python
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(programs, policies, folds)
def test_random_programs_stay_the_same(program, activations, fold):
    found = trap_search.examine(program, activations, fold, gradients=len(program[1]) == 1)
    assert not found.differs, f"{found}\n{found.report}"


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(programs, policies)
@example(("norm behind the embedding", (PLAIN,), "two-pass", "head"), "pays")
@example(("embedding", (PLAIN,), "two-pass", "affine, scaled by row"), "pays")
@example(("embedding", (PLAIN,), "two-pass", "bias, scaled by row"), "pays")
@example(("embedding", (PLAIN,), "two-pass", "affine and head"), "pays")
def test_described_programs_stay_the_same(program, activations):
    fn, params, x = build(program), parameters(), inputs()
    with jax.numpy_rank_promotion("allow"):
        try:
            branches = trace(fn, params, *x, activations=activations, width="each")
        except ConversionError:
            return
        branches = [b for b in branches if b.writers or any(n.readers for n in b.norms)]  # not only activations
        for transform in (pn.fold_affine, pn.recenter, pn.to_pre_rmsnorm):
            new = functools.reduce(transform, branches, params)
            assert worst(fn(params, *x), fn(new, *x)) < 1e-10


def test_the_search_converts_something():
    program = (
        "embedding",
        (PLAIN, ("residual", "fast", "linear", 1), ("loop", "var", "mlp", 0)),
        "var",
        "affine and head",
    )
    found = trap_search.examine(program, "pays", False)
    assert found.report.converted == len(found.report.sites) == 4
    assert not found.differs
    assert found.control > 1e-3


def test_every_trap_is_a_part_of_some_program():
    every = {
        name
        for kind in ("NORMS", "BRANCHES", "STREAMS", "STARTS", "ENDS")
        for name in getattr(trap_search.programs, kind)
    }
    assert set.union(*TRAPS.values()) <= every
    program = ("embedding", (("Post-LN", "rms", "relu", 0), ("residual", "rms", "mlp", 0)), "rms", "head")
    assert traps(program) == {"a ReLU between writer and norm", "Post-LN", "parameters used twice", "RMSNorm models"}
    assert parts(program) == {"embedding", "Post-LN", "residual", "rms", "relu", "mlp", "head"}


@pytest.mark.parametrize(
    ("lie", "program"),
    [
        ("every shift believed", ("embedding", (("residual", "two-pass", "raw reader", 0),), "two-pass", "head")),
        ("every shift believed", ("embedding", (PLAIN,), "two-pass", "mean returned")),
        ("every zero mean believed", ("embedding", (("residual", "two-pass", "relu", 0),), "two-pass", "head")),
        ("every zero mean believed", ("embedding", (("residual", "two-pass", "scaled by a leaf", 0),), "two-pass", "head")),
        ("every zero mean believed", ("embedding", (("residual", "two-pass", "gated by channel", 0),), "two-pass", "head")),
    ],
    ids=["raw reader", "mean returned", "relu", "gate", "glu"],
)  # fmt: skip
def test_an_analysis_that_lies_is_caught(lie, program):
    assert trap_search.caught(lie, program)
    assert not trap_search.examine(program, "always", False).differs
    with trap_search.LIES[lie][0](), pytest.raises(ConversionError, match="verification failed"):
        convert(build(program), parameters(), *inputs(), partial=True, activations="always")


def test_the_search_reports_what_differs(monkeypatch, tmp_path):
    """A search whose converter is wrong finds that, and says so."""
    program = ("embedding", (PLAIN,), "two-pass", "mean returned")
    found = trap_search.Search()
    found.look(program, "always", False, lies=True)
    assert not found.mismatches
    assert found.controls["every shift believed"] == {"tried": 1, "caught": 1}
    with trap_search.every_shift_is_believed():
        found.look(program, "always", True)
    assert len(found.mismatches) == 1
    docs = tmp_path / "docs.md"
    docs.write_text(f"before {trap_search.START}old{trap_search.END} after")
    trap_search.write(found.summary(), docs)
    assert "2 programs, 1 mismatches" in docs.read_text()
    assert docs.read_text().startswith("before")
