"""Every config of an experiment is one that can be, at every size; the recipes hold what their sources say."""

import importlib

import pytest

from prenorm_jax.models.config import GPT_SIZES, VIT_SIZES, ConfigError, GPTConfig
from prenorm_jax.training.experiment import read_experiment

NORMS = ("pre_ln", "pre_rmsnorm", "pre_crmsnorm")


def experiment(name, arg=""):
    return read_experiment(importlib.import_module(f"configs.{name}").get_config(arg).to_dict())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["digits", "stdlib", "deit3", "gpt_text", "vit_i1k", "gpt"])
def test_every_variant_can_be_chosen(name, norm):
    assert experiment(name, f"norm={norm}").model.norm == norm


@pytest.mark.parametrize("size", VIT_SIZES)
def test_every_vit_of_the_paper_has_a_recipe(size):
    patch = 14 if size in ("H", "G") else 16
    chosen = experiment("deit3", f"variant={size}/{patch}")
    assert chosen.model.width == VIT_SIZES[size]["width"]
    assert chosen.model.layer_scale


@pytest.mark.parametrize("corpus", ["wikitext", "openwebtext"])
@pytest.mark.parametrize("size", GPT_SIZES)
def test_every_gpt_of_the_paper_has_a_recipe(size, corpus):
    chosen = experiment("gpt_text", f"size={size},corpus={corpus}")
    assert chosen.model.depth == GPT_SIZES[size]["depth"]
    assert isinstance(chosen.model, GPTConfig)
    assert chosen.model.vocab_size == 50257


def test_s_16_is_deit_3_s_recipe():
    """Its training command for deit_small_patch16_LS (README_revenge.md)."""
    chosen = experiment("deit3")
    assert (chosen.model.width, chosen.model.patch_size, chosen.model.layer_scale_init) == (384, 16, 1e-4)
    assert (chosen.optimizer.name, chosen.optimizer.learning_rate, chosen.optimizer.weight_decay) == (
        "lamb",
        4e-3,
        0.05,
    )
    data, train = chosen.data, chosen.train
    assert (data.mixup, data.cutmix, data.colour_jitter, data.three_augment, data.repeats) == (0.8, 1.0, 0.3, True, 3)
    assert (data.crop, data.least_area, data.flip, data.eval_crop) == ("resized", 0.08, True, 1.0)
    assert (train.loss, train.label_smoothing, train.stochastic_depth) == ("sigmoid", 0.0, 0.05)
    assert train.batch_size * train.steps / 1_281_167 == pytest.approx(800, rel=2e-3)
    assert train.batch_size == 2048
    assert train.batch_size * chosen.optimizer.warmup_steps / 1_281_167 == pytest.approx(5, rel=2e-3)


def test_the_byte_level_gpt_has_10_to_30_million_parameters():
    from prenorm_jax import models

    assert 10e6 < models.count(experiment("stdlib").model) < 30e6


@pytest.mark.parametrize(
    ("name", "arg", "message"),
    [
        ("deit3", "epochs=none", "config arg: got epochs=none; allowed: a whole number above 0"),
        ("deit3", "variant=X/16", "model.variant's size: got 'X'"),
        ("deit3", "data=tfds", "config.data.name: got 'tfds'"),
        ("gpt_text", "corpus=pile", "config arg: got 'pile'; allowed: wikitext, openwebtext"),
    ],
)
def test_a_wrong_arg_is_one_line(name, arg, message):
    with pytest.raises(ConfigError) as error:
        experiment(name, arg)
    assert str(error.value).startswith(message)
