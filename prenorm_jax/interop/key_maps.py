"""Our leaves and their tensors, family by family: tables that are read in both directions.

A row says which of our leaves one of their tensors is, and by which named reshape. `{i}` counts layers. Their names begin behind the
family's `base` (which files of bare models lack), except those that begin with a "/". A row whose leaves a config does not have is no
part of that checkpoint. Source of the names: transformers 5, timm 1.0, nanoGPT (model.py), big_vision (models/vit.py) and
vision_transformer (vit_jax/models_vit.py), as they write them to disk.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

Array = np.ndarray
Reshape = tuple[Callable[[Array, int], list[Array]], Callable[[list[Array], int], Array]]

RESHAPES: Mapping[str, Reshape] = {
    # name: (their tensor, heads) -> our leaves; (our leaves, heads) -> their tensor
    "same": (lambda x, _: [x], lambda ours, _: ours[0]),
    "transpose": (lambda x, _: [x.T], lambda ours, _: ours[0].T),  # (out, in)
    "conv": (lambda x, _: [x.transpose(2, 3, 1, 0)], lambda ours, _: ours[0].transpose(3, 2, 0, 1)),  # (out, in, P, P)
    "token": (lambda x, _: [x.reshape(-1)], lambda ours, _: ours[0].reshape(1, 1, -1)),
    "rows": (lambda x, _: [x[0]], lambda ours, _: ours[0][None]),
    "thirds": (lambda x, _: np.split(x, 3, -1), lambda ours, _: np.concatenate(ours, -1)),  # (in, 3 out), or a bias
    "thirds, transposed": (
        lambda x, _: [part.T for part in np.split(x, 3, 0)],
        lambda ours, _: np.concatenate([part.T for part in ours], 0),
    ),
    "two inputs, transposed": (
        lambda x, _: [part.T for part in np.split(x, 2, 1)],
        lambda ours, _: np.concatenate([part.T for part in ours], 1),
    ),
    "to heads": (  # (in, heads, head width)
        lambda x, _: [x.reshape(x.shape[0], -1)],
        lambda ours, heads: ours[0].reshape(ours[0].shape[0], heads, -1),
    ),
    "bias to heads": (lambda x, _: [x.reshape(-1)], lambda ours, heads: ours[0].reshape(heads, -1)),
    "from heads": (  # (heads, head width, out)
        lambda x, _: [x.reshape(-1, x.shape[-1])],
        lambda ours, heads: ours[0].reshape(heads, -1, ours[0].shape[-1]),
    ),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """Our leaves, their tensor, and the name of the reshape between them."""

    ours: tuple[str, ...]
    theirs: str
    reshape: str = "same"


def _row(ours: str, theirs: str, reshape: str = "same") -> Row:
    return Row(tuple(ours.split()), theirs, reshape)


def _torch(ours: str, theirs: str, kernel: str = "transpose", bias: str = "same") -> list[Row]:
    """A linear map, or several of ours side by side in one of theirs."""
    names = ours.split()
    return [
        Row(tuple(f"{name}/kernel" for name in names), f"{theirs}.weight", kernel),
        Row(tuple(f"{name}/bias" for name in names), f"{theirs}.bias", bias),
    ]


def _torch_norm(ours: str, theirs: str) -> list[Row]:
    return [_row(f"{ours}/scale", f"{theirs}.weight"), _row(f"{ours}/bias", f"{theirs}.bias")]


def _flax(ours: str, theirs: str, kernel: str = "same", bias: str = "same") -> list[Row]:
    return [_row(f"{ours}/kernel", f"{theirs}/kernel", kernel), _row(f"{ours}/bias", f"{theirs}/bias", bias)]


def _flax_norm(ours: str, theirs: str) -> list[Row]:
    return [_row(f"{ours}/scale", f"{theirs}/scale"), _row(f"{ours}/bias", f"{theirs}/bias")]


QKV = "blocks/{i}/attn/query blocks/{i}/attn/key blocks/{i}/attn/value"


def _gpt2(kernel: str, thirds: str) -> list[Row]:
    return [
        _row("embed/table", "wte.weight"),
        _row("position/table", "wpe.weight"),
        *_torch_norm("blocks/{i}/norm1", "h.{i}.ln_1"),
        *_torch(QKV, "h.{i}.attn.c_attn", thirds, "thirds"),
        *_torch("blocks/{i}/attn/out", "h.{i}.attn.c_proj", kernel),
        *_torch_norm("blocks/{i}/norm2", "h.{i}.ln_2"),
        *_torch("blocks/{i}/mlp/up", "h.{i}.mlp.c_fc", kernel),
        *_torch("blocks/{i}/mlp/down", "h.{i}.mlp.c_proj", kernel),
        *_torch_norm("norm", "ln_f"),
        _row("head/kernel", "/lm_head.weight", "transpose"),
    ]


GPT2 = _gpt2("same", "thirds")  # its Conv1D has (in, out)
NANOGPT = _gpt2("transpose", "thirds, transposed")


def _hf_vit(norm1: str, norm2: str, up: str, down: str) -> list[Row]:
    attention = "encoder.layer.{i}.attention"
    return [
        *_torch("patch", "embeddings.patch_embeddings.projection", "conv"),
        _row("class/token", "embeddings.cls_token", "token"),
        _row("distilled/token", "embeddings.distillation_token", "token"),
        _row("registers/table", "embeddings.register_tokens", "rows"),
        _row("position/table", "embeddings.position_embeddings", "rows"),
        *_torch_norm("blocks/{i}/norm1", f"encoder.layer.{{i}}.{norm1}"),
        *(
            row
            for name in ("query", "key", "value")
            for row in _torch(f"blocks/{{i}}/attn/{name}", f"{attention}.attention.{name}")
        ),
        *_torch("blocks/{i}/attn/out", f"{attention}.output.dense"),
        _row("blocks/{i}/scale1/scale", "encoder.layer.{i}.layer_scale1.lambda1"),
        *_torch_norm("blocks/{i}/norm2", f"encoder.layer.{{i}}.{norm2}"),
        *_torch("blocks/{i}/mlp/up", f"encoder.layer.{{i}}.{up}"),
        *_torch("blocks/{i}/mlp/down", f"encoder.layer.{{i}}.{down}"),
        _row("blocks/{i}/scale2/scale", "encoder.layer.{i}.layer_scale2.lambda1"),
        *_torch_norm("norm", "layernorm"),
        *_torch("pre_logits", "pooler.dense"),
    ]


_HF_VIT = _hf_vit("layernorm_before", "layernorm_after", "intermediate.dense", "output.dense")
HF_VIT = [*_HF_VIT, *_torch("head", "/classifier")]
HF_DEIT_TEACHER = [
    *_HF_VIT,
    *_torch("head", "/cls_classifier"),
    *_torch("head_distilled", "/distillation_classifier"),
]
HF_DINOV2 = [
    *_hf_vit("norm1", "norm2", "mlp.fc1", "mlp.fc2"),
    _row("head/kernel head_mean/kernel", "/classifier.weight", "two inputs, transposed"),
    _row("head/bias", "/classifier.bias"),
]


def _timm(final_norm: str) -> list[Row]:
    return [
        *_torch("patch", "patch_embed.proj", "conv"),
        _row("class/token", "cls_token", "token"),
        _row("distilled/token", "dist_token", "token"),
        _row("registers/table", "reg_token", "rows"),
        _row("position/table", "pos_embed", "rows"),
        *_torch_norm("blocks/{i}/norm1", "blocks.{i}.norm1"),
        *_torch(QKV, "blocks.{i}.attn.qkv", "thirds, transposed", "thirds"),
        *_torch("blocks/{i}/attn/out", "blocks.{i}.attn.proj"),
        _row("blocks/{i}/scale1/scale", "blocks.{i}.ls1.gamma"),
        *_torch_norm("blocks/{i}/norm2", "blocks.{i}.norm2"),
        *_torch("blocks/{i}/mlp/up", "blocks.{i}.mlp.fc1"),
        *_torch("blocks/{i}/mlp/down", "blocks.{i}.mlp.fc2"),
        _row("blocks/{i}/scale2/scale", "blocks.{i}.ls2.gamma"),
        *_torch_norm("norm", final_norm),
        *_torch("head", "head"),
        *_torch("head_distilled", "head_dist"),
    ]


TIMM = _timm("norm")
TIMM_POOLED_FIRST = _timm("fc_norm")


def _google(position: str, norm2: str, attention: str, mlp: str) -> list[Row]:
    block = "Transformer/encoderblock_{i}"
    return [
        *_flax("patch", "embedding"),
        _row("class/token", "cls", "token"),
        _row("position/table", position, "rows"),
        *_flax_norm("blocks/{i}/norm1", f"{block}/LayerNorm_0"),
        *(
            row
            for name in ("query", "key", "value")
            for row in _flax(f"blocks/{{i}}/attn/{name}", f"{block}/{attention}/{name}", "to heads", "bias to heads")
        ),
        *_flax("blocks/{i}/attn/out", f"{block}/{attention}/out", "from heads"),
        *_flax_norm("blocks/{i}/norm2", f"{block}/{norm2}"),
        *_flax("blocks/{i}/mlp/up", f"{block}/{mlp}/Dense_0"),
        *_flax("blocks/{i}/mlp/down", f"{block}/{mlp}/Dense_1"),
        *_flax_norm("norm", "Transformer/encoder_norm"),
        *_flax("pre_logits", "pre_logits"),
        *_flax("head", "head"),
    ]


BIG_VISION = _google("pos_embedding", "LayerNorm_1", "MultiHeadDotProductAttention_0", "MlpBlock_0")
VISION_TRANSFORMER = _google(
    "Transformer/posembed_input/pos_embedding", "LayerNorm_2", "MultiHeadDotProductAttention_1", "MlpBlock_3"
)
