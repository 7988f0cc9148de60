"""Which checkpoints of HF transformers `prenorm convert` knows: config.json's `model_type` to an `Architecture`, as data.

An architecture names its main branches (`prenorm_jax.layouts.torch`), and what the names of its leaves don't tell: where config.json
says width, depth and eps, which leaves are beside all main branches, which LayerNorms are not on one, what is tied, and where a main
branch starts with something that no weight can recenter (a non-linearity, a norm with an affine, a constant): whoever runs the model
with RMSNorm recenters the input of that one module. Source: the models' code in transformers 5.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from prenorm_jax.layouts import torch
from prenorm_jax.main_branch import MainBranch
from prenorm_jax.main_branch.patterns import match

Config = Mapping[str, Any]
Keys = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stream:
    """One main branch of an architecture.

    Args:
      branch: its layout.
      first: the module whose input it is at first.
      width, layers, eps: the keys of config.json, dots for tables in tables; eps may be a number that the code has fixed.
      default_eps: where config.json does not say.
      starts: why the input of `first` has to be recentered at run time; None where all that starts it is weights.
      kept: norms of `branch` that stay LayerNorms -> why.
      lacking: leaves of `branch` that the model lacks in some layers.
      readers_layers: as `layers`, of another main branch whose layers read this one's last norm.
    """

    branch: MainBranch
    first: str
    width: str
    layers: str
    eps: str | float = 1e-5
    default_eps: float = 1e-5
    starts: str | None = None
    kept: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lacking: tuple[str, ...] = ()
    readers_layers: str = ""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How the checkpoints of one `model_type` are made.

    Args:
      streams: name -> main branch.
      base: what the names of the model without its head lack at their beginning.
      aliases: beginnings of names that mean other ones.
      beside: patterns of leaves that no main branch reaches; a checkpoint may lack them.
      kept: LayerNorms among them -> why they stay.
      table, head: the embedding table, and the head that may be tied to it.
      tied: whether they are, where config.json does not say.
      untie: whether the table writes to a main branch, so that it can be recentered only where the head has its own.
      refused: (key of config.json, value, why) that no weights can make up for.
      raw: the outputs that are a main branch as it is, which lose their mean.
    """

    streams: Mapping[str, Stream]
    base: str = ""
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    beside: tuple[str, ...] = ()
    kept: Mapping[str, str] = dataclasses.field(default_factory=dict)
    table: str | None = None
    head: str | None = None
    tied: bool = True
    untie: bool = True
    refused: tuple[tuple[str, Any, str], ...] = ()
    raw: tuple[str, ...] = ("hidden_states",)


BUFFERS = (
    "**position_ids",
    "**.inv_freq",
    "**.masked_bias",
    "**.causal_mask",
    "**.attn.bias",
    "**.attn.attention.bias",
    "**.attention.bias",
    "**relative_position_index",
)
"""Constants that checkpoints hold beside their weights; they are copied as they are, infinities and all."""


def is_buffer(name: str) -> bool:
    """Whether a tensor of this name is one of them."""
    return any(match(pattern, name) for pattern in BUFFERS)


MAY_LACK = re.compile(
    r"^(lm_head|score|qa_outputs|embed_out|proj_out|classifier|cls_classifier|distillation_classifier|text_projection|visual_projection)\."
    r"|\.(crossattention|ln_cross_attn|encoder_attn|encoder_attn_layer_norm|pooler)\."
    r"|_embeddings$|(mask|register|distillation)_tokens?$"
    r"|^dinov2.*\.mlp\.|^decoder\.|^head\.dense|^(beit\.pooler\.)?layernorm\.|lambda_[12]$"
)
"""The rules of a layout that a checkpoint may lack altogether, because it has no such head, token or layer."""

POST_LN = "its LayerNorms stand behind the residual sums (Post-LN): what they return is the main branch, so no mean there is redundant"
RAW = "the feature maps that it returns are its main branch as it is, mean and all"
RMS = "its norms are RMSNorms already: there is no mean to remove"

_POST_LN_MODELS = """
bert roberta xlm-roberta camembert distilbert albert electra deberta deberta-v2 mpnet longformer big_bird ernie funnel
nystromformer bart marian blenderbot-small openai-gpt layoutlm layoutlmv2 layoutlmv3 lxmert visual_bert squeezebert
"""
_RMS_MODELS = """
llama llama4 llama4_text mistral mixtral ministral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3 gemma3_text gemma3n phi3
t5 mt5 umt5 longt5 olmo2 olmo3 granite granitemoe deepseek_v2 deepseek_v3 smollm3 glm glm4 internlm3 jamba mamba mamba2 gpt_oss exaone4
helium recurrent_gemma
"""
REFUSED = {**dict.fromkeys(_POST_LN_MODELS.split(), POST_LN), **dict.fromkeys(_RMS_MODELS.split(), RMS)}
"""model_type -> why it is refused."""

_EMBEDDING_NORM = "normalises the embedding before the main branch starts"
_GPT: Keys = {"width": "n_embd", "layers": "n_layer", "eps": "layer_norm_epsilon"}
_PLAIN: Keys = {"width": "hidden_size", "layers": "num_hidden_layers"}
_HEAD: Keys = {"table": "transformer.wte.weight", "head": "lm_head.weight"}
_MODEL_HEAD: Keys = {"base": "model.", "table": "model.embed_tokens.weight", "head": "lm_head.weight"}


def _gpt(branch: MainBranch, tied: bool, beside: tuple[str, ...] = (), **keys: str) -> Architecture:
    stream = Stream(branch, "transformer.h.0", **{**_GPT, **keys})
    return Architecture({"transformer": stream}, "transformer.", beside=beside, tied=tied, **_HEAD)


def _plain(branch: MainBranch, eps: str, tied: bool, beside: tuple[str, ...] = ()) -> Architecture:
    stream = Stream(branch, "model.layers.0", **_PLAIN, eps=eps)
    return Architecture({"model": stream}, beside=beside, tied=tied, **_MODEL_HEAD)


def _opt(config: Config) -> Architecture:
    narrow = config.get("word_embed_proj_dim", config.get("hidden_size")) != config.get("hidden_size")
    branch = torch.HF_OPT_PROJECTED if narrow else torch.HF_OPT
    return Architecture(
        {"decoder": Stream(branch, "model.decoder.layers.0", **_PLAIN)},
        "model.",
        beside=("model.decoder.embed_tokens.weight", "lm_head.weight") if narrow else (),
        table="model.decoder.embed_tokens.weight",
        head="lm_head.weight",
        untie=not narrow,
        refused=(
            ("do_layer_norm_before", False, POST_LN),
            ("_remove_final_layer_norm", True, "without a final norm its head reads the mean of the main branch"),
        ),
    )


def _falcon(config: Config) -> Architecture:
    new, norms = config.get("new_decoder_architecture", False), config.get("num_ln_in_parallel_attn")
    if new and norms in (None, 2):
        branch = torch.HF_FALCON_TWO_NORMS
    elif new or config.get("parallel_attn", True):
        branch = torch.HF_FALCON_PARALLEL
    else:
        branch = torch.HF_FALCON
    stream = Stream(branch, "transformer.h.0", **_PLAIN, eps="layer_norm_epsilon")
    return Architecture(
        {"transformer": stream}, "transformer.", table="transformer.word_embeddings.weight", head="lm_head.weight"
    )


def _bloom(config: Config) -> Architecture:
    keys: Keys = {
        "width": "hidden_size" if "hidden_size" in config else "n_embed",
        "layers": "n_layer",
        "eps": "layer_norm_epsilon",
    }
    norm = "transformer.word_embeddings_layernorm"
    starts = "what starts it is a LayerNorm's output, whose affine gives it a mean"
    return Architecture(
        {"transformer": Stream(torch.HF_BLOOM, "transformer.h.0", **keys, starts=starts)},
        "transformer.",
        beside=("transformer.word_embeddings.weight", f"{norm}.*"),
        kept={norm: _EMBEDDING_NORM},
        table="transformer.word_embeddings.weight",
        head="lm_head.weight",
        untie=False,
        refused=(("apply_residual_connection_post_layernorm", True, POST_LN),),
    )


def _stablelm(config: Config) -> Architecture:
    parallel = config.get("use_parallel_residual", False)
    branch = torch.HF_STABLELM_PARALLEL if parallel else torch.HF_STABLELM
    return _plain(branch, "layer_norm_eps", tied=False, beside=("**.q_layernorm.**", "**.k_layernorm.**"))


def _vit(name: str, branch: MainBranch, **more: Any) -> Architecture:
    stream = Stream(branch, f"{name}.encoder.layer.0", **_PLAIN, eps="layer_norm_eps", default_eps=1e-12)
    return Architecture({name: stream}, f"{name}.", **more)


def _beit(config: Config) -> Architecture:
    pooled = config.get("use_mean_pooling", True)
    branch = torch.HF_BEIT if pooled else torch.HF_BEIT_CLASS_TOKEN
    raw = ("hidden_states", "last_hidden_state") if pooled else ("hidden_states",)
    refused = (("architectures", ["BeitBackbone"], RAW),)
    return _vit("beit", branch, beside=("**relative_position_bias_table",), raw=raw, refused=refused)


def _vit_mae() -> Architecture:
    encoder = Stream(torch.HF_VIT_MAE, "vit.encoder.layer.0", **_PLAIN, eps="layer_norm_eps", default_eps=1e-12)
    decoder = Stream(
        torch.HF_VIT_MAE_DECODER,
        "decoder.decoder_layers.0",
        "decoder_hidden_size",
        "decoder_num_hidden_layers",
        "layer_norm_eps",
        1e-12,
    )
    # transformers 5 saves them as the first, and loads both.
    aliases = {"decoder.decoder_encoder.layer.": "decoder.decoder_layers."}
    return Architecture({"vit": encoder, "decoder": decoder}, "vit.", aliases)


def _dinov2(name: str, branch: MainBranch) -> Architecture:
    stream = Stream(branch, f"{name}.encoder.layer.0", **_PLAIN, eps="layer_norm_eps", default_eps=1e-6)
    return Architecture(
        {name: stream}, f"{name}.", beside=("classifier.*",), refused=(("apply_layernorm", False, RAW),)
    )


_WHISPER = Architecture(
    {
        "encoder": Stream(
            torch.HF_WHISPER_ENCODER,
            "model.encoder.layers.0",
            "d_model",
            "encoder_layers",
            starts="what starts it is a GELU's output and sinusoids",
            readers_layers="decoder_layers",
        ),
        "decoder": Stream(torch.HF_WHISPER_DECODER, "model.decoder.layers.0", "d_model", "decoder_layers"),
    },
    "model.",
    beside=("model.encoder.conv1.*", "model.encoder.conv2.*", "model.encoder.embed_positions.weight"),
    table="model.decoder.embed_tokens.weight",
    head="proj_out.weight",
)
_XGLM = Architecture(
    {
        "model": Stream(
            torch.HF_XGLM,
            "model.layers.0",
            "d_model",
            "num_layers",
            starts="its positions are sinusoids that no checkpoint holds",
        )
    },
    **_MODEL_HEAD,
    beside=(
        "model.embed_tokens.weight",
        "model.embed_positions.weights",
        "**.encoder_attn.k_proj.*",
        "**.encoder_attn.v_proj.*",
    ),
    untie=False,
)
_MODERNBERT = Architecture(
    {
        "model": Stream(
            torch.HF_MODERNBERT,
            "model.layers.1",
            **_PLAIN,
            eps="norm_eps",
            starts="its first attention reads a LayerNorm's output as it is, so that can be recentered behind the first layer only",
            kept={"model.layers.0.mlp_norm": "stands before the place where the main branch can be recentered"},
            lacking=("model.layers.0.attn_norm.weight", "model.layers.0.attn_norm.bias"),
        )
    },
    "model.",
    beside=("model.embeddings.**", "head.norm.*", "decoder.*", "classifier.*"),
    kept={"model.embeddings.norm": _EMBEDDING_NORM, "head.norm": "stands in the head, behind a non-linearity"},
    table="model.embeddings.tok_embeddings.weight",
    head="decoder.weight",
    untie=False,
)


def _tower_keys(prefix: str, eps: float) -> Keys:
    keys = {"width": "hidden_size", "layers": "num_hidden_layers", "eps": "layer_norm_eps"}
    return {**{name: f"{prefix}{key}" for name, key in keys.items()}, "default_eps": eps}


def _clip_streams(text: str | None, vision: str | None) -> dict[str, Stream]:
    streams = {}
    if text is not None:
        keys = _tower_keys(text, 1e-5)
        streams["text_model"] = Stream(torch.HF_CLIP_TEXT, "text_model.encoder.layers.0", **keys)
    if vision is not None:
        keys, first = _tower_keys(vision, 1e-5), "vision_model.encoder.layers.0"
        starts = "what starts it is a norm's output, whose affine gives it a mean"
        streams["vision_model"] = Stream(torch.HF_CLIP_VISION, first, **keys, starts=starts)
        streams["vision_model.embeddings"] = Stream(torch.HF_CLIP_PATCHES, "vision_model.pre_layrnorm", **keys)
    return streams


_CLIP_RAW = ("hidden_states", "last_hidden_state of the vision model")
_SIGLIP_TEXT = Stream(torch.HF_SIGLIP_TEXT, "text_model.encoder.layers.0", **_tower_keys("text_config.", 1e-6))
_SIGLIP_VISION = Stream(torch.HF_SIGLIP_VISION, "vision_model.encoder.layers.0", **_tower_keys("vision_config.", 1e-6))
_SIGLIP = Architecture(
    {"text_model": _SIGLIP_TEXT, "vision_model": _SIGLIP_VISION},
    beside=("logit_scale", "logit_bias", "vision_model.head.**"),
    kept={"vision_model.head.layernorm": "stands in the pooling head, whose sum is an output as it is"},
)

ARCHITECTURES: dict[str, Architecture | Callable[[Config], Architecture]] = {
    "gpt2": _gpt(torch.HF_GPT2, tied=True, beside=("**.crossattention.c_attn.*",)),
    "gpt_neo": _gpt(torch.HF_GPT_NEO, tied=True, width="hidden_size", layers="num_layers"),
    "gptj": _gpt(torch.HF_GPTJ, tied=False),
    "codegen": _gpt(torch.HF_CODEGEN, tied=False),
    "gpt_neox": Architecture(
        {"gpt_neox": Stream(torch.HF_GPT_NEOX, "gpt_neox.layers.0", **_PLAIN, eps="layer_norm_eps")},
        "gpt_neox.",
        table="gpt_neox.embed_in.weight",
        head="embed_out.weight",
        tied=False,
    ),
    "opt": _opt,
    "bloom": _bloom,
    "falcon": _falcon,
    "mpt": Architecture(
        {"transformer": Stream(torch.HF_MPT, "transformer.blocks.0", "d_model", "n_layers", "layer_norm_epsilon")},
        "transformer.",
        **_HEAD,
    ),
    "phi": _plain(torch.HF_PHI, "layer_norm_eps", tied=False, beside=("**.q_layernorm.*", "**.k_layernorm.*")),
    "starcoder2": _plain(torch.HF_STARCODER2, "norm_epsilon", tied=True),
    "stablelm": _stablelm,
    "xglm": _XGLM,
    "whisper": _WHISPER,
    "modernbert": _MODERNBERT,
    "vit": _vit("vit", torch.HF_VIT),
    "deit": _vit("deit", torch.HF_DEIT),
    "vit_mae": _vit_mae(),
    "dinov2": _dinov2("dinov2", torch.HF_DINOV2),
    "dinov2_with_registers": _dinov2("dinov2_with_registers", torch.HF_DINOV2_REGISTERS),
    "beit": _beit,
    "clip": Architecture(_clip_streams("text_config.", "vision_config."), beside=("logit_scale",), raw=_CLIP_RAW),
    "clip_text_model": Architecture(_clip_streams("", None), "text_model."),
    "clip_vision_model": Architecture(_clip_streams(None, ""), "vision_model.", raw=_CLIP_RAW),
    "siglip": _SIGLIP,
}
"""model_type -> architecture, or what makes one of config.json."""
