"""Main branches of public Flax Linen models, named as their sources name them; eps are those sources' defaults.

    LM1B                    flax, examples/lm1b: the language model with a head of its own. Its q, k and v have no bias and gain one, so
                            build the converted attention with use_bias=True (and a zero output bias). Where the positions are not
                            learned they are a constant with a mean: recenter once what the first block is given.
    LM1B_OWN_AFFINE         the same, but the norms before attention keep their affine: no leaf is gained.
    LM1B_TIED               logits_via_embedding: the table stays as it is; recenter once what the first block is given.
    vision_transformer(...)  google-research/vision_transformer and big_vision, looped or scanned, every pooling.
    HF_FLAX_GPT2(_TIED), HF_FLAX_VIT    transformers, FlaxGPT2LMHeadModel and FlaxViTForImageClassification.

A norm is on the main branch only if it is named here: the one inside a MAP head is not, and has to stay a LayerNorm.
"""

import dataclasses

from prenorm_jax.layouts.words import FLAX, FLAX_CONV1D
from prenorm_jax.main_branch import MainBranch, Reader, Writer

TIED = "tied table: its rows are read behind this affine"

# flax, examples/lm1b/models.py


def _heads(path: str) -> list[Reader]:
    """q, k and v of nn.MultiHeadDotProductAttention: kernels (d, heads, head_dim)."""
    return [FLAX.reader(f"{path}/{name}", axis=-3) for name in ("query", "key", "value")]


_LM1B_BLOCK = "decoder/encoderdecoderblock_{i}"
_LM1B_ATTENTION = f"{_LM1B_BLOCK}/{{attention}}"  # SelfAttention_0 or MultiHeadDotProductAttention_0, as flax went

LM1B = MainBranch(
    writers=[
        Writer("decoder/Embed_0/embedding"),
        Writer("decoder/posembed_output/pos_embedding", optional=True),
        *FLAX.writer(f"{_LM1B_BLOCK}/*/out"),
        *FLAX.writer(f"{_LM1B_BLOCK}/MlpBlock_0/Dense_1"),
    ],
    norms=[
        FLAX.norm(f"{_LM1B_BLOCK}/LayerNorm_0", _heads(_LM1B_ATTENTION), 1e-6),
        FLAX.norm(f"{_LM1B_BLOCK}/LayerNorm_1", [FLAX.reader(f"{_LM1B_BLOCK}/MlpBlock_0/Dense_0")], 1e-6),
        FLAX.norm("decoder/encoderdecoder_norm", [FLAX.reader("decoder/logitdense")], 1e-6),
    ],
)
LM1B_OWN_AFFINE = dataclasses.replace(
    LM1B,
    norms=[
        FLAX.norm(f"{_LM1B_BLOCK}/LayerNorm_0", [], 1e-6, keep="q, k and v have no bias to take its beta"),
        *LM1B.norms[1:],
    ],
    others=[f"{_LM1B_ATTENTION}/{name}/kernel" for name in ("query", "key", "value")],
)
LM1B_TIED = dataclasses.replace(
    LM1B,
    writers=LM1B.writers[1:],
    norms=[*LM1B.norms[:2], FLAX.norm("decoder/encoderdecoder_norm", [], 1e-6, keep=TIED)],
    others=["decoder/Embed_0/embedding"],
)

# google-research/vision_transformer, vit_jax/models_vit.py; google-research/big_vision, models/vit.py

MODULES = {
    "linen": ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"),
    "pre-linen": ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"),
}
"""The modules of a block in the order of their calls: by Linen's counters, and as in the released .npz checkpoints."""

READS_THE_END = {"head": ("head",), "pre_logits": ("pre_logits",), "map": ()}
"""Which dense layers of the top level read the final norm: the head, or the pre-logits layer before it, or neither."""


def vision_transformer(end: str = "head", names: str = "linen") -> MainBranch:
    """The main branch of a ViT of google-research/vision_transformer or big_vision: looped ("encoderblock_3") or scanned
    ("encoderblock", layers first), with or without a class token, its positions in any of the three places where they have been.

    Args:
      end: what reads the final norm: "head" (the class token's, or the mean's: pooling commutes with a linear map behind the norm),
        "pre_logits" (representation_size, rep_size), or "map" (the MAP head's keys and values, whose own stream stays as it is).
      names: "linen", or "pre-linen" for the released .npz files.

    Raises: ValueError for another word. Sin-cos positions are a constant: recenter once what the first block is given.

    >>> vision_transformer("map").norms[-1].readers[0].kernel
    'MAPHead_0/MultiHeadDotProductAttention_0/key/kernel'
    """
    for argument, value, known in (("end", end, READS_THE_END), ("names", names, MODULES)):
        if value not in known:
            raise ValueError(f"{argument}: got {value!r}; allowed: {', '.join(known)}")
    norm1, attention, norm2, mlp = (f"Transformer/{{block}}/{name}" for name in MODULES[names])
    readers = [FLAX.reader(path) for path in READS_THE_END[end]]
    others = []
    if end == "map":
        pool = "MAPHead_0/MultiHeadDotProductAttention_0"
        readers = [FLAX.reader(f"{pool}/{name}", axis=-3) for name in ("key", "value")]
        others = [
            "MAPHead_0/probe",
            f"{pool}/query/*",
            f"{pool}/out/*",
            "MAPHead_0/LayerNorm_0/*",
            "MAPHead_0/MlpBlock_0/*/*",
        ]
    if end != "head":
        others.append("head/*")
    positions = ("pos_embedding", "Transformer/pos_embedding", "Transformer/posembed_input/pos_embedding")
    return MainBranch(
        writers=[
            *FLAX.writer("embedding"),
            Writer("cls", optional=True),
            *(Writer(path, optional=True) for path in positions),
            *FLAX.writer(f"{attention}/out"),
            *FLAX.writer(f"{mlp}/Dense_1"),
        ],
        norms=[
            FLAX.norm(norm1, _heads(attention), 1e-6),
            FLAX.norm(norm2, [FLAX.reader(f"{mlp}/Dense_0")], 1e-6),
            FLAX.norm("Transformer/encoder_norm", readers, 1e-6),
        ],
        others=others,
    )


# transformers, models/gpt2/modeling_flax_gpt2.py

_GPT2_BLOCK = "transformer/h/{i}"
_GPT2_NORMS = [
    FLAX_CONV1D.norm(f"{_GPT2_BLOCK}/ln_1", [FLAX_CONV1D.reader(f"{_GPT2_BLOCK}/attn/c_attn")], 1e-5),
    FLAX_CONV1D.norm(f"{_GPT2_BLOCK}/ln_2", [FLAX_CONV1D.reader(f"{_GPT2_BLOCK}/mlp/c_fc")], 1e-5),
]
HF_FLAX_GPT2 = MainBranch(
    writers=[
        Writer("transformer/wte/embedding"),
        Writer("transformer/wpe/embedding"),
        *FLAX_CONV1D.writer(f"{_GPT2_BLOCK}/attn/c_proj"),
        *FLAX_CONV1D.writer(f"{_GPT2_BLOCK}/mlp/c_proj"),
    ],
    norms=[*_GPT2_NORMS, FLAX.norm("transformer/ln_f", [FLAX.reader("lm_head")], 1e-5)],
    width=(f"{_GPT2_BLOCK}/attn/c_proj/kernel", -1),
)
"""tie_word_embeddings=False. The head has no bias in its source and gains one."""
HF_FLAX_GPT2_TIED = dataclasses.replace(
    HF_FLAX_GPT2,
    writers=HF_FLAX_GPT2.writers[1:],
    norms=[*_GPT2_NORMS, FLAX.norm("transformer/ln_f", [], 1e-5, keep=TIED)],
    others=["transformer/wte/embedding"],
)
"""As released. The table stays as it is, and the final norm's affine with it; recenter once what is looked up there."""

# transformers, models/vit/modeling_flax_vit.py

_HF_LAYER = "vit/encoder/layer/{i}"
HF_FLAX_VIT = MainBranch(
    writers=[
        Writer("vit/embeddings/cls_token"),
        Writer("vit/embeddings/position_embeddings"),
        *FLAX.writer("vit/embeddings/patch_embeddings/projection"),
        *FLAX.writer(f"{_HF_LAYER}/attention/output/dense"),
        *FLAX.writer(f"{_HF_LAYER}/output/dense"),
    ],
    norms=[
        FLAX.norm(
            f"{_HF_LAYER}/layernorm_before",
            [FLAX.reader(f"{_HF_LAYER}/attention/attention/{name}") for name in ("query", "key", "value")],
            1e-12,
        ),
        FLAX.norm(f"{_HF_LAYER}/layernorm_after", [FLAX.reader(f"{_HF_LAYER}/intermediate/dense")], 1e-12),
        FLAX.norm("vit/layernorm", [FLAX.reader("classifier")], 1e-12),
    ],
    width=(f"{_HF_LAYER}/attention/output/dense/kernel", -2),
)
