"""One function in every form: exact in float64, no worse than Pre-LN in float32 and bfloat16, and the check can fail."""

import dataclasses

import jax
import numpy as np
import pytest

from prenorm_jax import models
from prenorm_jax.measure import equivalence
from prenorm_jax.measure.equivalence import (
    EQUIVALENT,
    PRE_LN,
    TOLERANCES,
    Form,
    compare,
    errors,
    perturbed,
    run,
    shifted,
)

COMPACT = (Form("pre_crmsnorm", "reflect", "compact"), Form("pre_crmsnorm", "drop", "compact"))


def config_of(kind, depth, width=64):
    shape = {"width": width, "depth": depth, "heads": 4, "mlp_width": 4 * width, "scan_layers": True}
    if kind == "vit":
        return models.ViTConfig(**shape, image_size=16, patch_size=4, channels=3, classes=100)
    return models.GPTConfig(**shape, context=16, vocab_size=61, vocab_multiple=64, tied=kind == "gpt-tied")


def inputs_of(config, seed, batch=16):
    rng = np.random.default_rng(seed)
    if isinstance(config, models.ViTConfig):
        return rng.normal(size=(batch, 16, 16, 3))
    return rng.integers(0, config.vocab_size, size=(batch, config.context))


def square_loss(logits):
    return (jax.nn.log_softmax(logits) ** 2).mean()


@pytest.mark.parametrize("kind", ["vit", "gpt", pytest.param("gpt-tied", marks=pytest.mark.slow)])
def test_float64_logits_and_gradients_are_the_oracles(kind):
    config = config_of(kind, depth=3, width=16)
    params, inputs = perturbed(models.init(config, 0), 1), inputs_of(config, 2, batch=4)
    oracle = run(PRE_LN.of(config), params, inputs, square_loss, "float64")
    for form in (*EQUIVALENT, *COMPACT):
        found = errors(run(form.of(config), params, inputs, square_loss, "float64"), oracle)
        assert found.logits_max <= TOLERANCES["float64"], form
        assert found.gradient_max <= TOLERANCES["float64"], form
        assert found.loss <= TOLERANCES["float64"], form
        assert max(found.stream_rms) <= TOLERANCES["float64"], form
    unrecentered = run(EQUIVALENT[0].of(config), params, inputs, square_loss, "float64", control=True)
    assert errors(unrecentered, oracle).logits_max >= TOLERANCES["negative_control"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "depth"), [("vit", 12), ("gpt", 12), ("gpt-tied", 24), ("vit", 24), ("gpt", 24)])
def test_in_low_precision_no_form_is_worse_than_its_bound(kind, depth):
    config = config_of(kind, depth)
    dtypes = ("float32", "bfloat16")
    missed = {(dtype, form.name): 0.0 for dtype in dtypes for form in (PRE_LN, *EQUIVALENT)}
    for seed in range(5):
        params, inputs = perturbed(models.init(config, seed), seed), inputs_of(config, seed)
        oracle = run(PRE_LN.of(config), params, inputs, None, "float64")
        for dtype in dtypes:
            for form in (PRE_LN, *EQUIVALENT):
                outcome = run(form.of(config), params, inputs, None, dtype)
                missed[dtype, form.name] += errors(outcome, oracle).logits_rms / 5
    for dtype in dtypes:
        for form, bound in TOLERANCES["ratio"].items():
            assert missed[dtype, form] <= bound * missed[dtype, "pre_ln"], (dtype, form, missed)
    # Negative control: bfloat16 is told from float32 by four orders of magnitude, so the errors measure rounding.
    assert missed["bfloat16", "pre_ln"] > 1e3 * missed["float32", "pre_ln"]


@pytest.mark.parametrize("kind", ["vit", "gpt"])
def test_a_main_branch_with_a_mean_hurts_pre_ln_alone(kind):
    """Writers with a mean of three standard deviations: the converted models don't see it, LayerNorm pays for it."""
    config = config_of(kind, 24)
    plain = perturbed(models.init(config, 0), 0)
    inputs = inputs_of(config, 1)
    params = shifted(plain, config, 3.0)
    # Float64 parameters rounded to float32 are another function, so the shifted model is judged by its own oracle.
    oracle = run(PRE_LN.of(config), params, inputs, None, "float64")
    missed = {
        form.name: errors(run(form.of(config), params, inputs, None, "float32"), oracle).logits_rms
        for form in (PRE_LN, *EQUIVALENT)
    }
    for form in EQUIVALENT:
        assert 10 * missed[form.name] <= missed["pre_ln"], missed


def test_a_report_says_what_does_not_hold():
    config = config_of("gpt", depth=2, width=16)
    params, inputs = perturbed(models.init(config, 0), 1), inputs_of(config, 2, batch=2)
    report = compare(config, params, inputs, square_loss, ("float64",))
    assert report.failures == []
    assert "Everything holds" in report.as_markdown()

    broken = {"float64": {**report.errors["float64"], "pre_rmsnorm": report.control}}
    lines = equivalence._failures(dataclasses.replace(report, errors=broken))
    assert [line.split(":")[0] for line in lines] == ["float64 pre_rmsnorm", "float64 pre_rmsnorm"]
    blind = dataclasses.replace(report, control=report.errors["float64"]["pre_rmsnorm"])
    assert "negative control" in equivalence._failures(blind)[0]
