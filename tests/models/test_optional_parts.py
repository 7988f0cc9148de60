"""What published checkpoints add to the plain models (LayerScale, registers, distillation, missing biases, other heads): one function in
every variant, and the parts do something."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prenorm_jax as pn
from prenorm_jax import models
from prenorm_jax.models import ConfigError, GPTConfig, ViTConfig

pytestmark = pytest.mark.slow  # on one Python

FLOAT64 = {"width": 8, "depth": 2, "heads": 2, "mlp_width": 12, "dtype": "float64", "param_dtype": "float64"}
VIT = ViTConfig(**FLOAT64, image_size=4, patch_size=2, channels=2, classes=3)
GPT = GPTConfig(**FLOAT64, context=6, vocab_size=11, vocab_multiple=4)
CONFIGS = {
    "distilled": dataclasses.replace(VIT, distilled="head", qkv_bias=False),
    "registers": dataclasses.replace(VIT, pool="cls_and_mean", registers=3, layer_scale=True, scan_layers=True),
    "pooled first": dataclasses.replace(
        VIT, pool="mean", class_token=True, norm_after_pool=True, registers=2, positioned="patches", pre_logits=5
    ),
    "features": dataclasses.replace(
        VIT, head=False, layer_scale=True, distilled="token", registers=1, positioned="all"
    ),
    "no bias": dataclasses.replace(GPT, bias=False),
    "no head bias": dataclasses.replace(GPT, tied=False, head_bias=False, qkv_bias=False),
}
VARIANTS = {
    "pre_rmsnorm": {"norm": "pre_rmsnorm"},
    "reflect packed": {"norm": "pre_crmsnorm"},
    "drop compact": {"norm": "pre_crmsnorm", "basis": "drop", "layout": "compact"},
}


def inputs(config):
    rng = np.random.default_rng(1)
    if isinstance(config, ViTConfig):
        return rng.normal(size=(3, config.image_size, config.image_size, config.channels))
    return rng.integers(config.vocab_size, size=(3, config.context))


def logits_of(config, params):
    return jax.jit(functools.partial(models.apply, config))(params, inputs(config))[0]


@functools.cache
def oracle(name, random_params):
    params = random_params(CONFIGS[name])
    return params, logits_of(CONFIGS[name], params)


def difference(actual, expected):
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_the_same_function(name, variant, random_params):
    params, expected = oracle(name, random_params)
    config = dataclasses.replace(CONFIGS[name], **VARIANTS[variant])
    native = models.native(params, config)
    assert difference(logits_of(config, models.running(native, config, "native")), expected) <= 1e-10
    shapes = jax.eval_shape(functools.partial(models.init, config, 0, "native"))
    assert jax.tree.map(lambda leaf: leaf.shape, native) == jax.tree.map(lambda leaf: leaf.shape, shapes)


@pytest.mark.parametrize("name", ["registers", "features", "no bias"])
def test_the_way_back_is_the_same_function_and_traced_transforms_agree(name, random_params, assert_same):
    params, expected = oracle(name, random_params)
    config = dataclasses.replace(CONFIGS[name], norm="pre_rmsnorm")
    assert difference(logits_of(CONFIGS[name], models.pre_ln(models.native(params, config), config)), expected) <= 1e-10
    traced = jax.jit(lambda params: models.running(params, config))(params)
    assert_same(traced, models.running(params, config), 1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_without_recentering_it_is_another_function(name, random_params):
    params, expected = oracle(name, random_params)
    config = dataclasses.replace(CONFIGS[name], norm="pre_rmsnorm")
    spec = models.main_branch(config)
    assert (
        difference(logits_of(config, pn.strip_affine(pn.fold_affine(params, spec), spec, layer_scales=True)), expected)
        >= 1e-3
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_every_leaf_matters(name, random_params):
    params, _ = oracle(name, random_params)
    gradient = jax.jit(
        jax.grad(lambda params: jnp.sum(jnp.sin(models.apply(CONFIGS[name], params, inputs(CONFIGS[name]))[0])))
    )(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        where = jax.tree_util.keystr(path)
        # A constant added to all keys changes no softmax.
        assert "'key']['bias'" in where or np.max(np.abs(leaf)) > 1e-6, where


def test_a_bias_that_the_pre_ln_model_has_no_place_for_is_refused(random_params):
    config = dataclasses.replace(CONFIGS["distilled"], norm="pre_rmsnorm")
    with pytest.raises(pn.LayoutError, match="qkv_bias"):
        models.pre_ln(models.native(random_params(config), config), config)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("registers", -1, "an integer >= 0"),
        ("pre_logits", 1.0, "an integer >= 0"),
        ("positioned", "none", "patches, special, all"),
        ("distilled", "yes", "none, token, head"),
        ("layer_scale", 1, "True or False"),
        ("norm_after_pool", True, "False unless pool = mean"),
    ],
)
def test_an_impossible_part_is_one_line(field, value, allowed):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(VIT, **{field: value})
    assert str(error.value) == f"model.{field}: got {value!r}; allowed: {allowed}"


def test_a_layer_scale_is_described_by_the_names_of_its_writer():
    with pytest.raises(pn.LayoutError, match="does not occur in the pattern"):
        pn.MainBranch([pn.Writer("out/{i}", scale="scale/{j}")], [pn.Norm([pn.Reader("up")])])
