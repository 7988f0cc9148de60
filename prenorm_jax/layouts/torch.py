"""The main branches of checkpoints as HF transformers saves them, in the dotted names of a state dict.

Written for a model with its head and an embedding table that is not tied to it; `interop` unties what is tied, leaves out what a
checkpoint may lack, and reads from config.json what the names don't say. A model with several main branches has one layout for each;
the leaves that none of them names are beside them (rotary tables, masks, norms per head). Source: the models' code in transformers 5.
"""

from collections.abc import Mapping, Sequence

from prenorm_jax.layouts.words import TORCH, TORCH_CONV1D, Words
from prenorm_jax.main_branch import MainBranch, Reader, Writer

Tables = Sequence[str | Writer]
Reads = Mapping[str, Sequence[str]]


def _branch(
    tables: Tables,
    writes: Sequence[str | tuple[str, str]],
    reads: Reads,
    words: Words = TORCH,
    keep: str = "its output is the model's",
) -> MainBranch:
    """A main branch in short: tables and linear maps (with the LayerScale behind them, if any) that write to it; norm -> linear maps
    that read what it returns; why a norm that none reads keeps its affine. Heads are plain linear maps in a model of Conv1D, too."""

    def readers(paths: Sequence[str]) -> list[Reader]:
        return [(words if "{i}" in path else TORCH).reader(path) for path in paths]

    linear = [(path, None) if isinstance(path, str) else path for path in writes]
    return MainBranch(
        writers=[
            *(Writer(table) if isinstance(table, str) else table for table in tables),
            *(writer for path, scale in linear for writer in words.writer(path, scale=scale)),
        ],
        norms=[words.norm(norm, readers(paths), keep=None if paths else keep) for norm, paths in reads.items()],
    )


def _blocks(block: str, paths: Sequence[str]) -> list[str]:
    return [f"{block}.{path}" for path in paths]


def _decoder(
    block: str,
    tables: Tables,
    writes: Sequence[str],
    reads: Reads,
    final: tuple[str, Sequence[str]],
    words: Words = TORCH,
    keep: str = "its output is the model's",
) -> MainBranch:
    """A stack of blocks behind tables and before a final norm; names of `writes` and `reads` are those inside the block."""
    inside = {f"{block}.{norm}": _blocks(block, paths) for norm, paths in reads.items()}
    return _branch(tables, _blocks(block, writes), {**inside, final[0]: final[1]}, words, keep)


_QKV = ("q_proj", "k_proj", "v_proj")
_HEADS = ("score", "classifier", "qa_outputs")  # of classes that label texts, tokens and spans


def _attention(name: str) -> list[str]:
    return [f"{name}.{part}" for part in _QKV]


HF_GPT2 = _decoder(
    "transformer.h.{i}",
    ["transformer.wte.weight", "transformer.wpe.weight"],
    ["attn.c_proj", "mlp.c_proj", "crossattention.c_proj"],
    {"ln_1": ["attn.c_attn"], "ln_2": ["mlp.c_fc"], "ln_cross_attn": ["crossattention.q_attn"]},
    ("transformer.ln_f", ["lm_head", *_HEADS]),
    TORCH_CONV1D,
)
HF_GPT_NEO = _decoder(
    "transformer.h.{i}",
    ["transformer.wte.weight", "transformer.wpe.weight"],
    ["attn.attention.out_proj", "mlp.c_proj"],
    {"ln_1": _attention("attn.attention"), "ln_2": ["mlp.c_fc"]},
    ("transformer.ln_f", ["lm_head", *_HEADS]),
)
HF_GPTJ = _decoder(
    "transformer.h.{i}",
    ["transformer.wte.weight"],
    ["attn.out_proj", "mlp.fc_out"],
    {"ln_1": [*_attention("attn"), "mlp.fc_in"]},
    ("transformer.ln_f", ["lm_head", *_HEADS]),
)
HF_CODEGEN = _decoder(
    "transformer.h.{i}",
    ["transformer.wte.weight"],
    ["attn.out_proj", "mlp.fc_out"],
    {"ln_1": ["attn.qkv_proj", "mlp.fc_in"]},
    ("transformer.ln_f", ["lm_head"]),
)
HF_GPT_NEOX = _decoder(
    "gpt_neox.layers.{i}",
    ["gpt_neox.embed_in.weight"],
    ["attention.dense", "mlp.dense_4h_to_h"],
    {"input_layernorm": ["attention.query_key_value"], "post_attention_layernorm": ["mlp.dense_h_to_4h"]},
    ("gpt_neox.final_layer_norm", ["embed_out", *_HEADS]),
)
HF_OPT = _decoder(
    "model.decoder.layers.{i}",
    ["model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"],
    ["self_attn.out_proj", "fc2"],
    {"self_attn_layer_norm": _attention("self_attn"), "final_layer_norm": ["fc1"]},
    ("model.decoder.final_layer_norm", ["lm_head", *_HEADS]),
)
HF_OPT_PROJECTED = MainBranch(
    writers=[Writer("model.decoder.project_in.weight", -2), *HF_OPT.writers[1:]],
    norms=[
        *HF_OPT.norms[:-1],
        TORCH.norm("model.decoder.final_layer_norm", [TORCH.reader("model.decoder.project_out")]),
    ],
)
"""OPT whose embedding is narrower than its main branch: a projection writes and another reads, the table is on neither."""
HF_BLOOM = _decoder(
    "transformer.h.{i}",
    [],
    ["self_attention.dense", "mlp.dense_4h_to_h"],
    {"input_layernorm": ["self_attention.query_key_value"], "post_attention_layernorm": ["mlp.dense_h_to_4h"]},
    ("transformer.ln_f", ["lm_head", *_HEADS]),
)
"""What starts BLOOM's main branch is a LayerNorm's output: it is recentered by whoever runs the model."""


def _falcon(reads: Reads) -> MainBranch:
    return _decoder(
        "transformer.h.{i}",
        ["transformer.word_embeddings.weight"],
        ["self_attention.dense", "mlp.dense_4h_to_h"],
        reads,
        ("transformer.ln_f", ["lm_head", *_HEADS]),
    )


HF_FALCON = _falcon(
    {"input_layernorm": ["self_attention.query_key_value"], "post_attention_layernorm": ["mlp.dense_h_to_4h"]}
)
"""Falcon with attention, then MLP (falcon-rw)."""
HF_FALCON_PARALLEL = _falcon({"input_layernorm": ["self_attention.query_key_value", "mlp.dense_h_to_4h"]})
"""Falcon with attention and MLP beside each other behind one norm (falcon-7b, falcon-11b)."""
HF_FALCON_TWO_NORMS = _falcon(
    {"ln_attn": ["self_attention.query_key_value"], "ln_mlp": ["mlp.dense_h_to_4h"]},
)
"""Falcon with attention and MLP beside each other, each behind a norm of its own (falcon-40b, falcon-180b)."""
HF_MPT = _decoder(
    "transformer.blocks.{i}",
    ["transformer.wte.weight"],
    ["attn.out_proj", "ffn.down_proj"],
    {"norm_1": ["attn.Wqkv"], "norm_2": ["ffn.up_proj"]},
    ("transformer.norm_f", ["lm_head", *_HEADS]),
)
HF_PHI = _decoder(
    "model.layers.{i}",
    ["model.embed_tokens.weight"],
    ["self_attn.dense", "mlp.fc2"],
    {"input_layernorm": [*_attention("self_attn"), "mlp.fc1"]},
    ("model.final_layernorm", ["lm_head", *_HEADS]),
)
"""Phi-1, Phi-1.5 and Phi-2."""
HF_STARCODER2 = _decoder(
    "model.layers.{i}",
    ["model.embed_tokens.weight"],
    ["self_attn.o_proj", "mlp.c_proj"],
    {"input_layernorm": _attention("self_attn"), "post_attention_layernorm": ["mlp.c_fc"]},
    ("model.norm", ["lm_head", *_HEADS]),
)
_STABLELM_MLP = ["mlp.gate_proj", "mlp.up_proj"]


def _stablelm(reads: Reads) -> MainBranch:
    return _decoder(
        "model.layers.{i}",
        ["model.embed_tokens.weight"],
        ["self_attn.o_proj", "mlp.down_proj"],
        reads,
        ("model.norm", ["lm_head", *_HEADS]),
    )


HF_STABLELM = _stablelm({"input_layernorm": _attention("self_attn"), "post_attention_layernorm": _STABLELM_MLP})
HF_STABLELM_PARALLEL = _stablelm({"input_layernorm": [*_attention("self_attn"), *_STABLELM_MLP]})
HF_XGLM = _decoder(
    "model.layers.{i}",
    [],
    ["self_attn.out_proj", "encoder_attn.out_proj", "fc2"],
    {
        "self_attn_layer_norm": _attention("self_attn"),
        "encoder_attn_layer_norm": ["encoder_attn.q_proj"],
        "final_layer_norm": ["fc1"],
    },
    ("model.layer_norm", ["lm_head"]),
)
"""XGLM's positions are sinusoids that no checkpoint holds: what starts its main branch is recentered by whoever runs the model."""
_WHISPER_READ = {"self_attn_layer_norm": _attention("self_attn"), "final_layer_norm": ["fc1"]}
HF_WHISPER_ENCODER = _decoder(
    "model.encoder.layers.{i}",
    [],
    ["self_attn.out_proj", "fc2"],
    _WHISPER_READ,
    (
        "model.encoder.layer_norm",
        ["model.decoder.layers.{j}.encoder_attn.k_proj", "model.decoder.layers.{j}.encoder_attn.v_proj"],
    ),
)
"""What starts Whisper's encoder is a GELU's output: it is recentered by whoever runs the model."""
HF_WHISPER_DECODER = _decoder(
    "model.decoder.layers.{i}",
    ["model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"],
    ["self_attn.out_proj", "encoder_attn.out_proj", "fc2"],
    {**_WHISPER_READ, "encoder_attn_layer_norm": ["encoder_attn.q_proj"]},
    ("model.decoder.layer_norm", ["proj_out"]),
)
HF_MODERNBERT = _decoder(
    "model.layers.{i}",
    [],
    ["attn.Wo", "mlp.Wo"],
    {"attn_norm": ["attn.Wqkv"], "mlp_norm": ["mlp.Wi"]},
    ("model.final_norm", ["head.dense"]),
)
"""From ModernBERT's second layer on: its first reads the embedding's norm as it is, so its main branch is recentered behind that layer."""

# Image and text encoders.

_VIT_READ = {
    "layernorm_before": [f"attention.attention.{name}" for name in ("query", "key", "value")],
    "layernorm_after": ["intermediate.dense"],
}


def _patches(embeddings: str, patch: str, *tables: str) -> list[str | Writer]:
    """A convolution (d, channels, height, width) and the tables and tokens beside it."""
    return [
        Writer(f"{embeddings}.{patch}.weight", -4),
        Writer(f"{embeddings}.{patch}.bias", optional=True),
        *(f"{embeddings}.{table}" for table in tables),
    ]


def _vit(name: str, heads: Sequence[str], *tables: str) -> MainBranch:
    return _decoder(
        f"{name}.encoder.layer.{{i}}",
        _patches(f"{name}.embeddings", "patch_embeddings.projection", "position_embeddings", "cls_token", *tables),
        ["attention.output.dense", "output.dense"],
        _VIT_READ,
        (f"{name}.layernorm", heads),
    )


HF_VIT = _vit("vit", ["classifier", "vit.pooler.dense"], "mask_token")
HF_DEIT = _vit(
    "deit",
    ["classifier", "cls_classifier", "distillation_classifier", "deit.pooler.dense"],
    "distillation_token",
    "mask_token",
)
HF_VIT_MAE = _vit("vit", ["decoder.decoder_embed"])
HF_VIT_MAE_DECODER = _decoder(
    "decoder.decoder_layers.{i}",
    [
        Writer("decoder.decoder_embed.weight", -2),
        "decoder.decoder_embed.bias",
        "decoder.mask_token",
        "decoder.decoder_pos_embed",
    ],
    ["attention.output.dense", "output.dense"],
    _VIT_READ,
    ("decoder.decoder_norm", ["decoder.decoder_pred"]),
)


def _dinov2(name: str) -> MainBranch:
    layer = f"{name}.encoder.layer.{{i}}"
    tables = ("position_embeddings", "cls_token", "mask_token", "register_tokens")
    return _branch(
        _patches(f"{name}.embeddings", "patch_embeddings.projection", *tables),
        [
            (f"{layer}.attention.output.dense", f"{layer}.layer_scale1.lambda1"),
            (f"{layer}.mlp.fc2", f"{layer}.layer_scale2.lambda1"),
            (f"{layer}.mlp.weights_out", f"{layer}.layer_scale2.lambda1"),
        ],
        {
            f"{layer}.norm1": [f"{layer}.attention.attention.{part}" for part in ("query", "key", "value")],
            f"{layer}.norm2": [f"{layer}.mlp.fc1", f"{layer}.mlp.weights_in"],
            f"{name}.layernorm": [],
        },
        keep="its output is the model's, and a classifier reads two tokens of it side by side",
    )


HF_DINOV2 = _dinov2("dinov2")
HF_DINOV2_REGISTERS = _dinov2("dinov2_with_registers")


def _beit(last: Reads) -> MainBranch:
    layer = "beit.encoder.layer.{i}"
    tables = ("position_embeddings", "cls_token", "mask_token")
    return _branch(
        _patches("beit.embeddings", "patch_embeddings.projection", *tables),
        [(f"{layer}.attention.output.dense", f"{layer}.lambda_1"), (f"{layer}.output.dense", f"{layer}.lambda_2")],
        {**{f"{layer}.{norm}": _blocks(layer, paths) for norm, paths in _VIT_READ.items()}, **last},
    )


HF_BEIT = _beit({"beit.pooler.layernorm": ["classifier"], "layernorm": ["lm_head"]})
"""BEiT whose last norm stands behind the mean over its patches."""
HF_BEIT_CLASS_TOKEN = _beit({"beit.layernorm": ["classifier"]})


def _tower(name: str, tables: Tables, final: tuple[str, Sequence[str]], keep: str = "") -> MainBranch:
    """One tower of CLIP or SigLIP."""
    return _decoder(
        f"{name}.encoder.layers.{{i}}",
        tables,
        ["self_attn.out_proj", "mlp.fc2"],
        {"layer_norm1": _attention("self_attn"), "layer_norm2": ["mlp.fc1"]},
        final,
        keep=keep,
    )


_TEXT_TABLES = [f"text_model.embeddings.{table}_embedding.weight" for table in ("token", "position")]
_VISION_TABLES = _patches("vision_model.embeddings", "patch_embedding", "position_embedding.weight")
HF_CLIP_TEXT = _tower("text_model", _TEXT_TABLES, ("text_model.final_layer_norm", ["text_projection"]))
HF_CLIP_VISION = _tower("vision_model", [], ("vision_model.post_layernorm", ["visual_projection"]))
"""What starts it is the output of `HF_CLIP_PATCHES`' norm: it is recentered by whoever runs the model."""
HF_CLIP_PATCHES = _branch(
    [*_VISION_TABLES, "vision_model.embeddings.class_embedding"],
    [],
    {"vision_model.pre_layrnorm": []},
    keep="its output starts the main branch",
)
HF_SIGLIP_TEXT = _tower("text_model", _TEXT_TABLES, ("text_model.final_layer_norm", ["text_model.head"]))
HF_SIGLIP_VISION = _tower(
    "vision_model",
    _VISION_TABLES,
    ("vision_model.post_layernorm", []),
    keep="the pooling head's one projection for query, key and value reads it, and the query's part of that reads the probe",
)
