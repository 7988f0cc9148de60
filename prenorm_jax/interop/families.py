"""The families of checkpoints that our ViT and GPT can run: how each is recognised, and what its config says in our words.

A family is a key map and a function from what a checkpoint says (config.json, what lies beside its tensors, the tensors' shapes) to the
fields of our config, eps and the form of the GELU among them. What our models can't express is refused with the reason; what a
checkpoint does not say, such as the number of heads of a bare state dict, has to be given.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from prenorm_jax.interop import key_maps
from prenorm_jax.interop.key_maps import Row
from prenorm_jax.interop.source import ImportRefused, Says, Source
from prenorm_jax.interop.tensors import Tensor
from prenorm_jax.models import GPTConfig, ViTConfig

Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """One way to write our models to disk.

    Args:
      name: as the command line and files call it.
      model: our config's class.
      rows: its key map.
      fields: of our config, from what a checkpoint says. Raises ImportRefused.
      base: what stands before most names, but not in the files of bare models.
      tied: their name -> the tensor that it repeats (a tied head).
      kept: pattern of their names -> why it is no part of the function; such tensors are carried along.
      antialias: how the family's library resizes positions: bicubic with antialiasing, or without.
      value_range: preprocessing where no file says it: images are resized and mapped to -1..1.
    """

    name: str
    model: type[ViTConfig] | type[GPTConfig]
    rows: list[Row]
    fields: Callable[[Source], Fields]
    base: str = ""
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kept: Mapping[str, str] = dataclasses.field(default_factory=dict)
    antialias: bool = True
    value_range: bool = False


def recognise(source: Source, name: str = "") -> Family:
    """The family that a checkpoint belongs to, or the one that was asked for. Raises: ImportRefused where it is none that is known."""
    known = {family.name: family for family in FAMILIES}
    if name:
        if name not in known:
            raise ImportRefused(f"family: got {name!r}; allowed: {', '.join(known)}")
        return known[name]
    path, config, names = source.checkpoint.path, source.checkpoint.config or {}, source.tensors
    model_type: Any = config.get("model_type")
    if model_type in HUGGING_FACE:
        return known[HUGGING_FACE[model_type](names)]
    if model_type is not None:
        reason = INEXPRESSIBLE.get(model_type, "this model type is not known here")
        raise ImportRefused(
            f"{path}: model_type {model_type!r} can't run as our ViT or GPT: {reason}; "
            "`prenorm convert` changes a checkpoint in place of its names"
        )
    for found, is_it in SIGNATURES.items():
        if is_it(source):
            return known[found]
    raise ImportRefused(
        f"{path}: no family has these names ({', '.join(list(names)[:3])}, ...) and no config.json says its model_type; "
        f"name it with --family: {', '.join(known)}"
    )


HUGGING_FACE: Mapping[str, Callable[[Mapping[str, Tensor]], str]] = {
    "gpt2": lambda names: "hf_gpt2",
    "vit": lambda names: "hf_vit",
    "deit": lambda names: "hf_deit_teacher" if "cls_classifier.weight" in names else "hf_deit",
    "dinov2": lambda names: "hf_dinov2",
    "dinov2_with_registers": lambda names: "hf_dinov2_registers",
}

SIGNATURES: Mapping[str, Callable[[Source], bool]] = {
    "nanogpt": lambda source: "model_args" in source.checkpoint.metadata,
    "timm_vit_pooled_first": lambda source: {"blocks.0.attn.qkv.weight", "fc_norm.weight"} <= set(source.tensors),
    "timm_vit": lambda source: (
        "blocks.0.attn.qkv.weight" in source.tensors and "patch_embed.proj.weight" in source.tensors
    ),
    "big_vision": lambda source: _has(source, r"Transformer/encoderblock(_0)?/MultiHeadDotProductAttention_0/"),
    "vision_transformer": lambda source: _has(source, r"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/"),
}

_ROTARY = "its positions are rotary, and ours are added to the tokens"
_RMS = "it has RMSNorm already: there is no mean to remove"
_POST = "its norms come after the residual sum (Post-LN)"
INEXPRESSIBLE: Mapping[str, str] = {
    **dict.fromkeys(
        ["gpt_neox", "gptj", "codegen", "phi", "stablelm", "starcoder2", "modernbert", "persimmon"], _ROTARY
    ),
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "t5", "phi3"], _RMS),
    **dict.fromkeys(["bert", "roberta", "distilbert", "openai-gpt", "electra", "albert"], _POST),
    **dict.fromkeys(["bloom", "mpt", "falcon"], "its attention has linear biases (ALiBi), or rotary positions"),
    "gpt_neo": "its attention is not scaled by the head width, and is local in every second layer",
    "opt": "its MLP has a ReLU",
    "clip": "it is two towers, with a norm before the first block",
    "siglip": "it is two towers, pooled by an attention",
    "beit": "its attention has relative positions",
    "vit_mae": "it is an encoder and a decoder on a random part of the patches",
    "whisper": "it is an encoder and a decoder",
}


def _has(source: Source, pattern: str) -> bool:
    return any(re.match(pattern, name) for name in source.tensors)


# What configs say, family by family.


def _hf_gpt2(source: Source) -> Fields:
    says = source.says
    says.only(
        "scores are divided by the root of the head width",
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
    )
    says.only("ours is a decoder alone", add_cross_attention=False)
    width = says.count("n_embd", says.values.get("hidden_size"))
    return {
        "width": width,
        "depth": says.count("n_layer", says.values.get("num_hidden_layers")),
        "heads": says.count("n_head", says.values.get("num_attention_heads")),
        "mlp_width": says.count("n_inner", 4 * width),
        "context": says.count("n_positions", says.values.get("max_position_embeddings")),
        "vocab_size": says.count("vocab_size"),
        "tied": says.flag("tie_word_embeddings", True),
        "head_bias": False,
        "eps": says.number("layer_norm_epsilon", 1e-5),
        "gelu": says.gelu("activation_function", "gelu_new"),
    }


NANOGPT_ARGS = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}


def _nanogpt(source: Source) -> Fields:
    args = source.checkpoint.metadata.get("model_args")
    where = f"{source.checkpoint.path}: model_args"
    if not isinstance(args, Mapping):
        raise ImportRefused(f"{where}: missing; expected what nanoGPT's train.py saves beside the tensors")
    unknown = sorted(set(args) - NANOGPT_ARGS)
    if unknown:
        raise ImportRefused(
            f"{where}: {unknown[0]}: not an argument of nanoGPT's model; a changed model can't be known"
        )
    says = Says(args, where)
    width = says.count("n_embd")
    return {
        "width": width,
        "depth": says.count("n_layer"),
        "heads": says.count("n_head"),
        "mlp_width": 4 * width,
        "context": says.count("block_size"),
        "vocab_size": says.count("vocab_size"),
        "bias": says.flag("bias", False),
        "tied": True,
        "eps": 1e-5,
        "gelu": "erf",  # nn.GELU(); before March 2023 it was the tanh form: give gelu=tanh for such a file
    }


def _hf_vit(source: Source) -> Fields:
    says = source.says
    return {
        **_hf_vision(source),
        "mlp_width": says.count("intermediate_size"),
        "eps": says.number("layer_norm_eps", 1e-12),
    }


def _hf_deit(source: Source) -> Fields:
    heads = "head" if "cls_classifier.weight" in source.tensors else "token"
    return {**_hf_vit(source), "distilled": heads}


def _hf_dinov2(source: Source) -> Fields:
    says = source.says
    says.only("our MLP is not gated", use_swiglu_ffn=False)
    fields = _hf_vision(source)
    return {
        **fields,
        "mlp_width": int(fields["width"] * says.number("mlp_ratio", 4)),
        "eps": says.number("layer_norm_eps", 1e-6),
        "layer_scale": True,
        "pool": "cls_and_mean" if fields["head"] else "cls",
        "classes": fields["classes"],
    }


def _hf_dinov2_registers(source: Source) -> Fields:
    return {**_hf_dinov2(source), "registers": source.says.count("num_register_tokens", 4)}


def _hf_vision(source: Source) -> Fields:
    says, names = source.says, source.tensors
    heads = [name for name in ("classifier.weight", "cls_classifier.weight") if name in names]
    classes = names[heads[0]].shape[0] if heads else 1
    labels = says.values.get("id2label")
    if heads and isinstance(labels, Mapping) and len(labels) != classes:
        raise ImportRefused(
            f"{says.where} has {len(labels)} labels, and {heads[0]} {classes} rows; which of the two is right?"
        )
    pooled = any(name.endswith("pooler.dense.weight") for name in names)
    if pooled:
        says.only("our pre-logits are a linear map and a tanh", pooler_act="tanh")
    width = says.count("hidden_size")
    return {
        "width": width,
        "depth": says.count("num_hidden_layers"),
        "heads": says.count("num_attention_heads"),
        "image_size": says.count("image_size", 224),
        "patch_size": says.count("patch_size", 16),
        "channels": says.count("num_channels", 3),
        "classes": classes,
        "head": bool(heads),
        "pre_logits": says.count("pooler_output_size", width) if pooled else 0,
        "qkv_bias": says.flag("qkv_bias", True),
        "gelu": says.gelu("hidden_act", "gelu"),
    }


# timm: a model's name says its heads, where model_args do not. Names of changed blocks are not among these.
TIMM_NAME = re.compile(
    r"(?:vit|deit|deit3)_(tiny|small|medium|betwixt|base|large|huge)(?:_distilled)?_patch\d+(?:_reg\d+)?(?:_gap)?(?:_dinov2|_\d+)(?:\..*)?"
)
TIMM_HEADS = {"tiny": 3, "small": 6, "medium": 8, "betwixt": 10, "base": 12, "large": 16, "huge": 16}
# Arguments that change no function, or whose effect is read off the tensors.
TIMM_ARGS = {
    *(
        "num_heads",
        "act_layer",
        "img_size",
        "global_pool",
        "num_classes",
        "in_chans",
        "patch_size",
        "embed_dim",
        "depth",
    ),
    *("mlp_ratio", "qkv_bias", "init_values", "class_token", "no_embed_class", "reg_tokens", "fc_norm", "weight_init"),
    *("dynamic_img_size", "dynamic_img_pad", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate"),
    *("attn_drop_rate", "drop_path_rate", "fix_init"),
}


def _timm(source: Source) -> Fields:
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    says = source.says
    args = Says(says.values.get("model_args", {}), f"{says.where}, model_args")
    unknown = sorted(
        key for key, value in args.values.items() if key not in TIMM_ARGS and value not in (None, False, "")
    )
    if unknown:
        raise ImportRefused(f"{args.where}: {unknown[0]}={args.values[unknown[0]]!r}: our ViT has no such part")
    for part, reason in TIMM_PARTS.items():
        if any(re.match(part, name) for name in shapes):
            raise ImportRefused(f"{source.checkpoint.path}: {part.rstrip('.')}: {reason}")
    width, channels, patch, _ = _shape(shapes, "patch_embed.proj.weight", 4, source)
    special = ("cls_token" in shapes) + ("dist_token" in shapes)
    registers = shapes["reg_token"][1] if "reg_token" in shapes else 0
    norm_after_pool = "fc_norm.weight" in shapes
    pool = args.values.get("global_pool") or says.values.get("global_pool")
    pool = pool or ("avg" if norm_after_pool or "cls_token" not in shapes else "token")
    if pool not in ("token", "avg"):
        raise ImportRefused(
            f"{args.where}: global_pool: got {pool!r}; allowed: token, avg (our ViT pools in no other way)"
        )
    fields: Fields = {
        "width": width,
        "depth": _layers(shapes, r"blocks\.(\d+)\."),
        "heads": _timm_heads(source, args, width),
        "mlp_width": _shape(shapes, "blocks.0.mlp.fc1.weight", 2, source)[0],
        "patch_size": patch,
        "channels": channels,
        "classes": shapes["head.weight"][0] if "head.weight" in shapes else 1,
        "head": "head.weight" in shapes,
        "pool": "mean" if pool == "avg" else "cls",
        "class_token": "cls_token" in shapes,
        "norm_after_pool": norm_after_pool,
        "distilled": ("head" if "head_dist.weight" in shapes else "token") if "dist_token" in shapes else "none",
        "registers": registers,
        "layer_scale": "blocks.0.ls1.gamma" in shapes,
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "eps": 1e-6,
        "gelu": args.gelu("act_layer", "gelu"),
    }
    rows = _shape(shapes, "pos_embed", 3, source)[1]
    images = args.values.get("img_size") or (says.values.get("pretrained_cfg") or {}).get("input_size", [None])[-1]
    images = images or source.given.get("image_size")
    # The rows of the table are those of the patches, and of the special tokens, and of the registers: which sums are squares?
    prefixes = {"special": special, "patches": 0, "all": special + registers}
    sides = {name: math.isqrt(max(rows - less, 0)) for name, less in prefixes.items()}
    fits = {name: side * patch for name, side in sides.items() if side**2 + prefixes[name] == rows and side}
    told = {name: size for name, size in fits.items() if size == images} or fits
    if len(set(told.values())) != 1:
        raise ImportRefused(
            f"{source.checkpoint.path}: pos_embed has {rows} rows, which is a square grid and special tokens in {len(told)} ways; "
            "give image_size, or config.json with pretrained_cfg.input_size"
        )
    positioned = next(iter(told))
    return {**fields, "positioned": positioned, "image_size": told[positioned]}


TIMM_PARTS: Mapping[str, str] = {
    r"norm_pre\.": "a norm before the first block, which our ViT has not",
    r"attn_pool\.": "it pools by an attention, which our ViT has not",
    r"blocks\.0\.attn\.[qk]_norm\.": "queries and keys have norms, which ours have not",
    r"blocks\.0\.attn\.norm\.": "attention has a norm of its own, which ours has not",
    r"blocks\.0\.mlp\.norm\.": "the MLP has a norm of its own, which ours has not",
    r"blocks\.0\.mlp\.fc1_[gx]\.": "the MLP is gated, and ours is not",
}


def _timm_heads(source: Source, args: Says, width: int) -> int:
    if "heads" in source.given:
        return int(source.given["heads"])
    if "num_heads" in args.values:
        return args.count("num_heads")
    name = (source.checkpoint.config or {}).get("architecture", "")
    match = TIMM_NAME.fullmatch(name)
    if not match:
        raise ImportRefused(
            f"{source.checkpoint.path}: nothing says how many heads it has (architecture {name!r}, width {width}); give heads"
        )
    return TIMM_HEADS[match[1]]


def _google(source: Source, attention: str, position: str, positioned: str) -> Fields:
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    for part, reason in GOOGLE_PARTS.items():
        if any(name.startswith(part) for name in shapes):
            raise ImportRefused(f"{source.checkpoint.path}: {part}: {reason}")
    patch, _, channels, width = _shape(shapes, "embedding/kernel", 4, source)
    block = "Transformer/encoderblock_0"
    has_class = "cls" in shapes
    fields: Fields = {
        "width": width,
        "depth": _layers(shapes, r"Transformer/encoderblock_(\d+)/"),
        "heads": _shape(shapes, f"{block}/{attention}/query/kernel", 3, source)[1],
        "mlp_width": next(
            (shape[-1] for name, shape in shapes.items() if re.match(rf"{block}/Mlp\w+/Dense_0/kernel", name)), 0
        ),
        "patch_size": patch,
        "channels": channels,
        "classes": shapes["head/kernel"][1] if "head/kernel" in shapes else 1,
        "head": "head/kernel" in shapes,
        "pool": "cls" if has_class else "mean",
        "pre_logits": shapes["pre_logits/kernel"][1] if "pre_logits/kernel" in shapes else 0,
        "positioned": positioned,
        "eps": 1e-6,
        "gelu": "tanh",
    }
    if position not in shapes:
        if "image_size" not in source.given:
            raise ImportRefused(f"{source.checkpoint.path}: no {position}: positions are fixed sines; give image_size")
        return {**fields, "positions": "sincos"}
    patches = shapes[position][1] - (has_class and positioned == "special")
    if math.isqrt(patches) ** 2 != patches:
        raise ImportRefused(
            f"{source.checkpoint.path}: {position} has {shapes[position][1]} rows, no square grid of patches"
        )
    return {**fields, "image_size": math.isqrt(patches) * patch}


GOOGLE_PARTS: Mapping[str, str] = {
    "MAPHead_0": "it pools by an attention (pool_type='map'), which our ViT has not",
    "probe": "it pools by an attention (pool_type='map'), which our ViT has not",
    "conv_root": "it is a hybrid with a ResNet, which our ViT has not",
    "block1": "it is a hybrid with a ResNet, which our ViT has not",
}


def _big_vision(source: Source) -> Fields:
    return _google(source, "MultiHeadDotProductAttention_0", "pos_embedding", "patches")


def _vision_transformer(source: Source) -> Fields:
    position = "Transformer/posembed_input/pos_embedding"
    return _google(source, "MultiHeadDotProductAttention_1", position, "special")


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, rank: int, source: Source) -> tuple[int, ...]:
    if len(shapes.get(name, ())) != rank:
        found = shapes.get(name, "no such tensor")
        raise ImportRefused(f"{source.checkpoint.path}: {name}: got {found}; expected a tensor of rank {rank}")
    return shapes[name]


def _layers(shapes: Mapping[str, Any], pattern: str) -> int:
    return 1 + max((int(match[1]) for name in shapes if (match := re.match(pattern, name))), default=-1)


_MASKS = {r"h\.\d+\.attn\.(masked_)?bias": "the causal mask"}
_MASK_TOKEN = {r"embeddings\.mask_token": "stands for patches that pretraining hides"}

FAMILIES = (
    Family(
        "hf_gpt2",
        GPTConfig,
        key_maps.GPT2,
        _hf_gpt2,
        base="transformer.",
        tied={"/lm_head.weight": "wte.weight"},
        kept=_MASKS,
    ),
    Family(
        "nanogpt",
        GPTConfig,
        key_maps.NANOGPT,
        _nanogpt,
        base="transformer.",
        tied={"/lm_head.weight": "wte.weight"},
        kept=_MASKS,
    ),
    *(
        Family(name, ViTConfig, rows, fields, base=base, kept=_MASK_TOKEN, antialias=False)
        for name, rows, fields, base in (
            ("hf_vit", key_maps.HF_VIT, _hf_vit, "vit."),
            ("hf_deit", key_maps.HF_VIT, _hf_deit, "deit."),
            ("hf_deit_teacher", key_maps.HF_DEIT_TEACHER, _hf_deit, "deit."),
            ("hf_dinov2", key_maps.HF_DINOV2, _hf_dinov2, "dinov2."),
            ("hf_dinov2_registers", key_maps.HF_DINOV2, _hf_dinov2_registers, "dinov2_with_registers."),
        )
    ),
    Family("timm_vit", ViTConfig, key_maps.TIMM, _timm),
    Family("timm_vit_pooled_first", ViTConfig, key_maps.TIMM_POOLED_FIRST, _timm),
    Family("big_vision", ViTConfig, key_maps.BIG_VISION, _big_vision, value_range=True),
    Family("vision_transformer", ViTConfig, key_maps.VISION_TRANSFORMER, _vision_transformer, value_range=True),
)
