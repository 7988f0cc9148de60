"""The main branches of the models that we know: data, in the words of `main_branch`."""

from prenorm_jax.layouts.equinox import EQUINOX_GPT, EQUINOX_GPT_OWN_AFFINE, EQUINOX_VIT, EQUINOX_VIT_OWN_AFFINE
from prenorm_jax.layouts.flax import (
    HF_FLAX_GPT2,
    HF_FLAX_GPT2_TIED,
    HF_FLAX_VIT,
    LM1B,
    LM1B_OWN_AFFINE,
    LM1B_TIED,
    vision_transformer,
)
from prenorm_jax.layouts.haiku import HAIKU_GPT, HAIKU_VIT, haiku_gpt
from prenorm_jax.layouts.ours import GPT, GPT_TIED, VIT

__all__ = [
    "EQUINOX_GPT",
    "EQUINOX_GPT_OWN_AFFINE",
    "EQUINOX_VIT",
    "EQUINOX_VIT_OWN_AFFINE",
    "GPT",
    "GPT_TIED",
    "HAIKU_GPT",
    "HAIKU_VIT",
    "HF_FLAX_GPT2",
    "HF_FLAX_GPT2_TIED",
    "HF_FLAX_VIT",
    "LM1B",
    "LM1B_OWN_AFFINE",
    "LM1B_TIED",
    "VIT",
    "haiku_gpt",
    "vision_transformer",
]
