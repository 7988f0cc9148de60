"""One small model of every architecture that `prenorm convert` knows, in the variants that its config.json can ask for."""

import dataclasses
from collections.abc import Callable

import torch
import torchvision_names  # noqa: F401
import transformers as t

TOKENS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = {**TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
DECODER = {
    **TOKENS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
GROUPED = {**DECODER, "num_key_value_heads": 1}
FALCON = {**TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "bias": False}
OPT = {**DECODER, "ffn_dim": 24, "word_embed_proj_dim": 16}
WHISPER = {
    **TOKENS,
    "d_model": 16,
    **{
        f"{side}_{key}": size
        for side in ("encoder", "decoder")
        for key, size in (("layers", 2), ("ffn_dim", 24), ("attention_heads", 2))
    },
    "num_mel_bins": 4,
    "max_source_positions": 8,
    "max_target_positions": 16,
    "decoder_start_token_id": 1,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}
DINO = {**VISION, "mlp_ratio": 2}
TOWERS = {
    "text_config": {**DECODER, "hidden_size": 12, "projection_dim": 6},
    "vision_config": {**VISION, "projection_dim": 6},
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model class, its config, what it is run on, and which of its outputs have to stay."""

    kind: type
    config: Callable
    options: dict
    inputs: str = "tokens"
    outputs: tuple[str, ...] = ("logits",)


IMAGES = {"inputs": "images"}
HIDDEN = {"outputs": ("last_hidden_state",)}
MODELS = {
    "gpt2": Model(t.GPT2LMHeadModel, t.GPT2Config, GPT),
    "gpt2, untied": Model(t.GPT2LMHeadModel, t.GPT2Config, {**GPT, "tie_word_embeddings": False}),
    "gpt2, no head": Model(t.GPT2Model, t.GPT2Config, GPT, **HIDDEN),
    "gpt_neo": Model(
        t.GPTNeoForCausalLM,
        t.GPTNeoConfig,
        {**DECODER, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    "gptj": Model(t.GPTJForCausalLM, t.GPTJConfig, {**GPT, "rotary_dim": 2}),
    "gpt_neox": Model(t.GPTNeoXForCausalLM, t.GPTNeoXConfig, DECODER),
    "gpt_neox, sequential": Model(t.GPTNeoXForCausalLM, t.GPTNeoXConfig, {**DECODER, "use_parallel_residual": False}),
    "opt": Model(t.OPTForCausalLM, t.OPTConfig, OPT),
    "opt, no biases": Model(t.OPTForCausalLM, t.OPTConfig, {**OPT, "enable_bias": False}),
    "opt, projected": Model(t.OPTForCausalLM, t.OPTConfig, {**OPT, "word_embed_proj_dim": 8}),
    "bloom": Model(t.BloomForCausalLM, t.BloomConfig, {**TOKENS, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "falcon": Model(
        t.FalconForCausalLM,
        t.FalconConfig,
        {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},
    ),
    "falcon, parallel": Model(
        t.FalconForCausalLM, t.FalconConfig, {**FALCON, "multi_query": True, "parallel_attn": True}
    ),
    "falcon, new decoder": Model(
        t.FalconForCausalLM, t.FalconConfig, {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}
    ),
    "falcon, new decoder, one norm": Model(
        t.FalconForCausalLM,
        t.FalconConfig,
        {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ),
    "mpt": Model(
        t.MptForCausalLM, t.MptConfig, {**TOKENS, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 16}
    ),
    "phi": Model(t.PhiForCausalLM, t.PhiConfig, DECODER),
    "phi, norms per head": Model(t.PhiForCausalLM, t.PhiConfig, {**DECODER, "qk_layernorm": True}),
    "starcoder2": Model(t.Starcoder2ForCausalLM, t.Starcoder2Config, GROUPED),
    "codegen": Model(t.CodeGenForCausalLM, t.CodeGenConfig, {**GPT, "rotary_dim": 2}),
    "stablelm": Model(t.StableLmForCausalLM, t.StableLmConfig, GROUPED),
    "stablelm, parallel": Model(
        t.StableLmForCausalLM,
        t.StableLmConfig,
        {**GROUPED, "use_parallel_residual": True, "use_qkv_bias": True, "qk_layernorm": True},
    ),
    "xglm": Model(
        t.XGLMForCausalLM,
        t.XGLMConfig,
        {**TOKENS, "d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2, "max_position_embeddings": 16},
    ),
    "whisper": Model(t.WhisperForConditionalGeneration, t.WhisperConfig, WHISPER, "speech"),
    "modernbert": Model(
        t.ModernBertForMaskedLM,
        t.ModernBertConfig,
        {**DECODER, "num_hidden_layers": 3, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "vit": Model(t.ViTForImageClassification, t.ViTConfig, VISION, **IMAGES),
    "vit, pooler": Model(t.ViTModel, t.ViTConfig, VISION, "images", ("last_hidden_state", "pooler_output")),
    "deit": Model(t.DeiTForImageClassificationWithTeacher, t.DeiTConfig, VISION, **IMAGES),
    "dinov2": Model(t.Dinov2ForImageClassification, t.Dinov2Config, DINO, **IMAGES),
    "dinov2, swiglu": Model(t.Dinov2Model, t.Dinov2Config, {**DINO, "use_swiglu_ffn": True}, "images", **HIDDEN),
    "dinov2, registers": Model(
        t.Dinov2WithRegistersForImageClassification, t.Dinov2WithRegistersConfig, DINO, **IMAGES
    ),
    "clip": Model(
        t.CLIPModel,
        t.CLIPConfig,
        {**TOWERS, "projection_dim": 6},
        "pairs",
        ("text_embeds", "image_embeds", "logits_per_image"),
    ),
    "siglip": Model(
        t.SiglipModel,
        t.SiglipConfig,
        {**TOWERS, "text_config": DECODER},
        "pairs",
        ("text_embeds", "image_embeds", "logits_per_image"),
    ),
    "beit": Model(
        t.BeitForImageClassification,
        t.BeitConfig,
        {**VISION, "use_relative_position_bias": True, "layer_scale_init_value": 0.5},
        **IMAGES,
    ),
    "beit, class token": Model(
        t.BeitForImageClassification,
        t.BeitConfig,
        {**VISION, "use_mean_pooling": False, "use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0},
        **IMAGES,
    ),
    "vit_mae": Model(
        t.ViTMAEForPreTraining,
        t.ViTMAEConfig,
        {
            **VISION,
            **{
                f"decoder_{key}": VISION[key]
                for key in ("num_hidden_layers", "num_attention_heads", "intermediate_size")
            },
            "decoder_hidden_size": 12,
        },
        "masked images",
    ),
}


def perturbed(model: Model, dtype: torch.dtype) -> torch.nn.Module:
    """A model no parameter of which is as initialisation leaves it: gamma is not 1, beta not 0, and all that writes has a mean."""
    torch.manual_seed(0)
    made = model.kind(model.config(**model.options)).to(dtype).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter += 0.2 * torch.randn_like(parameter) + (0.3 if parameter.ndim < 2 else 0.5 / fan_in)
    return made


def inputs(model: Model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a model is called with."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens = torch.randint(3, 40, (4, 12), generator=generator)
    tokens[:, -1] = 2
    return {
        "tokens": lambda: {"input_ids": tokens},
        "images": lambda: {"pixel_values": normal(8, 3, 8, 8)},
        "masked images": lambda: {
            "pixel_values": normal(8, 3, 8, 8),
            "noise": torch.rand(8, 4, generator=generator, dtype=torch.float64),
        },
        "pairs": lambda: {"input_ids": tokens, "pixel_values": normal(8, 3, 8, 8)},
        "speech": lambda: {"input_features": normal(4, 4, 16), "decoder_input_ids": tokens},
    }[model.inputs]()


def outputs(model: Model, made: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """All outputs that have to stay, as one float64 vector, each divided by its largest value."""
    torch.set_default_dtype(dtype)  # XGLM's code makes a constant of the default dtype
    try:
        with torch.no_grad():
            result = made.to(dtype)(**inputs(model, dtype))
    finally:
        torch.set_default_dtype(torch.float32)
    return torch.cat([(value := result[name].double()).reshape(-1) / value.abs().max() for name in model.outputs])
