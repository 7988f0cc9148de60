"""Every impossible setting is one line that names the field, what was given and what is allowed; every named size is the paper's."""

import dataclasses

import pytest

from prenorm_jax.models import GPT_SIZES, VIT_SIZES, ConfigError, GPTConfig, ViTConfig, gpt_config, vit_config

VIT = ViTConfig(width=8, depth=2, heads=2, mlp_width=16, image_size=8, patch_size=4)
GPT = GPTConfig(width=8, depth=2, heads=2, mlp_width=16)


@pytest.mark.parametrize(
    ("config", "field", "value", "allowed"),
    [
        (VIT, "width", 0, "an integer > 0, below 2**31"),
        (VIT, "width", 8.0, "an integer > 0, below 2**31"),
        (VIT, "depth", -1, "an integer > 0, below 2**31"),
        (VIT, "heads", 0, "an integer > 0, below 2**31"),
        (VIT, "heads", 3, "a divisor of model.width = 8"),
        (VIT, "mlp_width", "16", "an integer > 0, below 2**31"),
        (VIT, "norm", "pre_norm", "pre_ln, pre_rmsnorm, pre_crmsnorm, no_norm"),
        (VIT, "basis", "rotate", "reflect, drop"),
        (VIT, "layout", "dense", "packed, compact"),
        (VIT, "eps", 0.0, "a float > 0"),
        (VIT, "eps", -1e-6, "a float > 0"),
        (VIT, "eps", float("nan"), "a float > 0"),
        (VIT, "eps", "1e-6", "a float > 0"),
        (VIT, "gelu", "relu", "tanh, erf"),
        (VIT, "dtype", "int8", "bfloat16, float16, float32, float64"),
        (VIT, "param_dtype", "f32", "bfloat16, float16, float32, float64"),
        (VIT, "attention", "flash", "auto, xla, cudnn, hopper"),
        (VIT, "scan_layers", "no", "True or False"),
        (VIT, "remat", 1, "True or False"),
        (VIT, "image_size", 0, "an integer > 0, below 2**31"),
        (VIT, "patch_size", 3, "a divisor of model.image_size = 8"),
        (VIT, "channels", 0, "an integer > 0, below 2**31"),
        (VIT, "classes", 0, "an integer > 0, below 2**31"),
        (VIT, "pool", "max", "cls, mean, cls_and_mean"),
        (VIT, "positions", "rotary", "learned, sincos"),
        (GPT, "context", 0, "an integer > 0, below 2**31"),
        (GPT, "vocab_size", 0, "an integer > 0, below 2**31"),
        (GPT, "vocab_multiple", 0, "an integer > 0, below 2**31"),
        (GPT, "tied", "yes", "True or False"),
    ],
)
def test_an_impossible_value_is_one_line(config, field, value, allowed):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(config, **{field: value})
    assert str(error.value) == f"model.{field}: got {value!r}; allowed: {allowed}"


def test_a_width_of_one_and_a_width_without_sincos_positions_are_refused():
    with pytest.raises(ConfigError, match=r"model.width: got 1; allowed: at least 2"):
        GPTConfig(width=1, depth=1, heads=1, mlp_width=1)
    with pytest.raises(ConfigError, match=r"model.positions: got 'sincos'; .*model.width = 6"):
        dataclasses.replace(VIT, width=6, positions="sincos")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vit_config("X/16"), "model.variant's size: got 'X'; allowed: Ti, S, B, L, H, G"),
        (lambda: vit_config("B"), "model.variant's patch size: got ''; allowed: an integer, as in B/16"),
        (lambda: vit_config("B/x"), "model.variant's patch size: got 'x'; allowed: an integer, as in B/16"),
        (lambda: vit_config("B/0"), "model.patch_size: got 0; allowed: an integer > 0, below 2**31"),
        (lambda: vit_config("B/15"), "model.patch_size: got 15; allowed: a divisor of model.image_size = 224"),
        (lambda: gpt_config("huge"), "model.size: got 'huge'; allowed: small, medium, large, xl, 2.7b, 6.7b, 13b"),
    ],
)
def test_an_unknown_size_is_one_line(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value) == message


def test_sizes_are_the_paper_s():
    def numbers(sizes):
        return {name: tuple(shape.values()) for name, shape in sizes.items()}

    assert numbers(VIT_SIZES) == {
        "Ti": (192, 12, 3, 768),
        "S": (384, 12, 6, 1536),
        "B": (768, 12, 12, 3072),
        "L": (1024, 24, 16, 4096),
        "H": (1280, 32, 16, 5120),
        "G": (1664, 48, 16, 8192),
    }
    assert numbers(GPT_SIZES) == {
        "small": (768, 12, 12, 3072),
        "medium": (1024, 24, 16, 4096),
        "large": (1536, 24, 16, 6144),
        "xl": (2048, 24, 16, 8192),
        "2.7b": (2560, 32, 32, 10240),
        "6.7b": (4096, 32, 32, 16384),
        "13b": (5120, 40, 40, 20480),
    }


def test_fields_override_a_named_size_and_derived_numbers_follow():
    config = vit_config("S/16", classes=10, pool="mean")
    assert (config.classes, config.patches, config.tokens, config.head_width) == (10, 196, 196, 64)
    assert vit_config("S/16").tokens == 197
    assert (gpt_config("small").padded_vocab, gpt_config("small", vocab_multiple=1).padded_vocab) == (50304, 50257)
    assert gpt_config("small", vocab_size=256).padded_vocab == 256
