"""Stochastic depth: a sample's own branches are skipped, the rest is scaled up, and the variants stay one function with the same draws."""

import dataclasses

import jax
import numpy as np
import pytest

from prenorm_jax import models
from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.models.stochastic_depth import draw_branch_scales

SIZES = {"width": 16, "depth": 3, "heads": 2, "mlp_width": 24, "dtype": "float64", "param_dtype": "float64"}
VIT = ViTConfig(**SIZES, image_size=6, patch_size=3, channels=2, classes=5, layer_scale=True)
GPT = GPTConfig(**SIZES, context=6, vocab_size=11, vocab_multiple=8)
FORMS = [
    {"norm": "pre_rmsnorm"},
    {"norm": "pre_crmsnorm", "basis": "reflect", "layout": "packed"},
    {"norm": "pre_crmsnorm", "basis": "reflect", "layout": "compact"},
    {"norm": "pre_crmsnorm", "basis": "drop", "layout": "packed"},
]


def inputs_of(config, batch=5):
    rng = np.random.default_rng(0)
    if isinstance(config, ViTConfig):
        return rng.normal(size=(batch, config.image_size, config.image_size, config.channels)) + 0.5
    return rng.integers(config.vocab_size, size=(batch, config.context))


def logits(config, params, scales, inputs):
    running = models.running(params, config)
    return jax.jit(lambda running: models.apply(config, running, inputs, branch_scales=scales)[0])(running)


def scales_of(config, rate=0.4, batch=5):
    return draw_branch_scales(jax.random.key(3), batch, config.depth, rate)


@pytest.mark.parametrize("config", [VIT, GPT], ids=["vit", "gpt"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))
def test_every_variant_is_the_same_function_with_the_same_draws(random_params, config, form):
    params, inputs, scales = random_params(config), inputs_of(config), scales_of(config)
    expected = logits(config, params, scales, inputs)
    np.testing.assert_allclose(
        logits(dataclasses.replace(config, **form), params, scales, inputs), expected, rtol=0, atol=1e-9
    )
    # The negative controls: no draws, and other draws, are other functions.
    for other in (None, draw_branch_scales(jax.random.key(4), 5, config.depth, 0.4)):
        assert np.abs(np.asarray(logits(config, params, other, inputs) - expected)).max() > 1e-3


@pytest.mark.parametrize("config", [VIT, GPT], ids=["vit", "gpt"])
def test_scanned_unrolled_and_recomputed_layers_take_the_same_draws(random_params, config):
    params, inputs, scales = random_params(config), inputs_of(config), scales_of(config)
    expected = logits(config, params, scales, inputs)
    scanned = dataclasses.replace(config, scan_layers=True, remat=True)
    for stacked in (scanned, dataclasses.replace(scanned, unroll=True)):
        found = logits(stacked, models.stack_layers(params), scales, inputs)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def test_a_sample_that_skips_every_branch_is_its_embedding(random_params):
    params, inputs = random_params(VIT), inputs_of(VIT)
    scales = np.ones((5, VIT.depth, 2), np.float32)
    scales[2] = 0
    _, intermediates = models.apply(VIT, models.running(params, VIT), inputs, branch_scales=scales)
    states = np.asarray(intermediates["main_branch"])
    np.testing.assert_array_equal(states[-1, 2], states[0, 2])
    plain = models.apply(VIT, models.running(params, VIT), inputs)[1]["main_branch"]
    others = [0, 1, 3, 4]
    np.testing.assert_allclose(states[:, others], plain[:, others], rtol=0, atol=1e-12)


def test_draws_have_the_rate_and_a_mean_of_one():
    scales = np.asarray(draw_branch_scales(jax.random.key(0), 4000, 3, 0.2))
    assert set(np.unique(scales)) == {0.0, np.float32(1.25)}
    np.testing.assert_allclose(scales.mean(0), 1, atol=0.04)


def test_layer_scale_begins_where_the_config_says():
    params = models.init(dataclasses.replace(VIT, layer_scale_init=1e-4), 0)
    scale = np.asarray(params["blocks"]["1"]["scale2"]["scale"])
    np.testing.assert_array_equal(scale, np.full(16, 1e-4))
