"""Main branches of Equinox models: modules as trees of arrays (eqx.filter(model, eqx.is_array)), weights (out, in); every eps is
eqx.nn.LayerNorm's default.

    EQUINOX_VIT     the ViT of Equinox's documentation (examples/vision_transformer): attention_blocks of layer_norm1, attention,
                    layer_norm2, linear1, linear2; a final norm and head in one Sequential, mlp.
    EQUINOX_GPT     a GPT of eqx.nn modules: embed and position, blocks of norm1, attention, norm2 and an eqx.nn.MLP, then norm and head.

A module can't gain a leaf: for q, k and v to take a norm's beta they need biases (use_query_bias=True and so on; zeros do). The
..._OWN_AFFINE descriptions are for attention without: the norms before it keep their affine.
"""

import dataclasses

from prenorm_jax.layouts.words import EQUINOX
from prenorm_jax.main_branch import MainBranch, Reader, Writer

EPS = 1e-5
OWN_AFFINE = "q, k and v have no bias to take its beta"
_PROJECTIONS = ("query_proj", "key_proj", "value_proj")


def _heads(path: str) -> list[Reader]:
    """eqx.nn.MultiheadAttention's maps of what it attends from and to."""
    return [EQUINOX.reader(f"{path}/{name}") for name in _PROJECTIONS]


def _own_affine(branch: MainBranch, norm: str, attention: str) -> MainBranch:
    """The same with attention that has no biases: the norm before it, the first, keeps its affine."""
    kept = EQUINOX.norm(norm, [], EPS, keep=OWN_AFFINE)
    weights = [f"{attention}/{name}/weight" for name in _PROJECTIONS]
    return dataclasses.replace(branch, norms=[kept, *branch.norms[1:]], others=weights)


_VIT = "attention_blocks/{i}"
EQUINOX_VIT = MainBranch(
    [
        *EQUINOX.writer("patch_embedding/linear"),
        Writer("positional_embedding"),
        Writer("cls_token"),
        *EQUINOX.writer(f"{_VIT}/attention/output_proj"),
        *EQUINOX.writer(f"{_VIT}/linear2"),
    ],
    [
        EQUINOX.norm(f"{_VIT}/layer_norm1", _heads(f"{_VIT}/attention"), EPS),
        EQUINOX.norm(f"{_VIT}/layer_norm2", [EQUINOX.reader(f"{_VIT}/linear1")], EPS),
        EQUINOX.norm("mlp/layers/0", [EQUINOX.reader("mlp/layers/1")], EPS),
    ],
)
EQUINOX_VIT_OWN_AFFINE = _own_affine(EQUINOX_VIT, f"{_VIT}/layer_norm1", f"{_VIT}/attention")

_GPT = "blocks/{i}"
EQUINOX_GPT = MainBranch(
    [
        Writer("embed/weight"),
        Writer("position"),
        *EQUINOX.writer(f"{_GPT}/attention/output_proj"),
        *EQUINOX.writer(f"{_GPT}/mlp/layers/1"),
    ],
    [
        EQUINOX.norm(f"{_GPT}/norm1", _heads(f"{_GPT}/attention"), EPS),
        EQUINOX.norm(f"{_GPT}/norm2", [EQUINOX.reader(f"{_GPT}/mlp/layers/0")], EPS),
        EQUINOX.norm("norm", [EQUINOX.reader("head")], EPS),
    ],
)
EQUINOX_GPT_OWN_AFFINE = _own_affine(EQUINOX_GPT, f"{_GPT}/norm1", f"{_GPT}/attention")
