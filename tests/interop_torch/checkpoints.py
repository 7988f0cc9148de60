"""Small models of the reference libraries: name -> how to make it, how to write it, how to run it."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchvision_names  # noqa: F401
import transformers
from torch import nn
from torch.nn import functional

# isort: split
import timm
from timm.models._hub import save_for_hf

WIDTH, DEPTH, HEADS, CLASSES, CONTEXT, VOCABULARY = 16, 2, 2, 3, 6, 11
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "image_size": 8,
    "patch_size": 4,
}
VIT = {**SIZES, "intermediate_size": 24, "num_labels": CLASSES}
DINO = {**SIZES, "mlp_ratio": 2, "num_labels": CLASSES, "layerscale_value": 0.5}
GPT2 = {
    "n_embd": WIDTH,
    "n_layer": DEPTH,
    "n_head": HEADS,
    "n_positions": CONTEXT,
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TIMM = {"img_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2, "num_classes": CLASSES}


@dataclasses.dataclass(frozen=True)
class Case:
    """A reference model: `make` builds it, `save(model, folder)` writes it, `run(model, inputs)` gives what ours has to give."""

    family: str
    make: Callable[[], nn.Module]
    save: Callable[[nn.Module, Any], Any]
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    tokens: bool = False


def inputs(case, seed=0, size=8):
    """Images (B, C, H, W), float64 that float32 holds exactly, or tokens (B, L)."""
    rng = np.random.default_rng(seed)
    if case.tokens:
        return rng.integers(VOCABULARY, size=(16, CONTEXT))
    return rng.normal(size=(16, 3, size, size)).astype(np.float32).astype(np.float64)


def perturbed(case, seed=0):
    """A model of which nothing is as its initialisation leaves it."""
    torch.manual_seed(seed)
    model = case.make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * max(float(parameter.std(correction=0)), 0.5) * torch.randn_like(parameter)
    return model


def logits(case, model, x, dtype):
    x = torch.from_numpy(x)
    with torch.no_grad():
        return case.run(model.to(dtype), x if case.tokens else x.to(dtype)).double().numpy()


def _save_pretrained(model, folder):
    model.save_pretrained(folder)


def _save_as_hub_gpt2(model, folder):
    """As the first GPT-2 files are: bare names, and the causal masks among the tensors."""
    from safetensors.torch import save_file

    model.save_pretrained(folder)
    state = {
        name.removeprefix("transformer."): leaf for name, leaf in model.state_dict().items() if name != "lm_head.weight"
    }
    for layer in range(DEPTH):
        state[f"h.{layer}.attn.bias"] = torch.ones(CONTEXT, CONTEXT).tril()[None, None]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _save_timm(model, folder):
    save_for_hf(model, folder, safe_serialization=True)


def _timm(name, **options):
    return lambda: timm.create_model(name, **{**TIMM, **options})


def _save_bare_timm(model, folder):
    """A state dict without a config, as training scripts leave them."""
    folder.mkdir()
    torch.save({"state_dict": model.state_dict()}, folder / "pytorch_model.bin")


class NanoGPT(nn.Module):
    """nanoGPT's function and names, written from its description: Linear layers, exact GELU, eps 1e-5, one table for both ends."""

    class Norm(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))
            self.bias = nn.Parameter(torch.zeros(WIDTH)) if bias else None

        def forward(self, x):
            return functional.layer_norm(x, (WIDTH,), self.weight, self.bias, 1e-5)

    class Attention(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
            self.c_proj = nn.Linear(WIDTH, WIDTH, bias=bias)
            self.register_buffer("bias", torch.ones(CONTEXT, CONTEXT).tril()[None, None])

        def forward(self, x):
            batch, length, _ = x.shape
            q, k, v = (y.view(batch, length, HEADS, -1).transpose(1, 2) for y in self.c_attn(x).split(WIDTH, dim=2))
            scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(self.bias == 0, -math.inf)
            return self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, WIDTH))

    class Mlp(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.c_fc, self.c_proj = nn.Linear(WIDTH, 4 * WIDTH, bias=bias), nn.Linear(4 * WIDTH, WIDTH, bias=bias)

        def forward(self, x):
            return self.c_proj(functional.gelu(self.c_fc(x)))

    class Block(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.ln_1, self.attn = NanoGPT.Norm(bias), NanoGPT.Attention(bias)
            self.ln_2, self.mlp = NanoGPT.Norm(bias), NanoGPT.Mlp(bias)

        def forward(self, x):
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))

    def __init__(self, bias):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "wpe": nn.Embedding(CONTEXT, WIDTH),
                "h": nn.ModuleList([NanoGPT.Block(bias) for _ in range(DEPTH)]),
                "ln_f": NanoGPT.Norm(bias),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.args = {
            "n_layer": DEPTH,
            "n_head": HEADS,
            "n_embd": WIDTH,
            "block_size": CONTEXT,
            "bias": bias,
            "vocab_size": VOCABULARY,
            "dropout": 0.0,
        }

    def forward(self, tokens):
        x = self.transformer.wte(tokens) + self.transformer.wpe.weight[: tokens.shape[1]]
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def _save_nanogpt(prefix):
    def save(model, folder):
        folder.mkdir()
        state = {prefix + name: leaf for name, leaf in model.state_dict().items()}
        torch.save({"model": state, "model_args": model.args, "iter_num": 5, "config": {}}, folder / "ckpt.pt")

    return save


def _logits(model, x):
    return model(x).logits


def _plain(model, x):
    return model(x)


def _pooled(model, x):
    return model(x).pooler_output


HF = transformers
CASES = {
    "gpt2": Case("hf_gpt2", lambda: HF.GPT2LMHeadModel(HF.GPT2Config(**GPT2)), _save_pretrained, _logits, True),
    "gpt2, untied": Case(
        "hf_gpt2",
        lambda: HF.GPT2LMHeadModel(HF.GPT2Config(**GPT2, tie_word_embeddings=False, n_inner=24)),
        _save_pretrained,
        _logits,
        True,
    ),
    "gpt2, bare names": Case(
        "hf_gpt2", lambda: HF.GPT2LMHeadModel(HF.GPT2Config(**GPT2)), _save_as_hub_gpt2, _logits, True
    ),
    "nanogpt": Case("nanogpt", lambda: NanoGPT(True), _save_nanogpt("_orig_mod."), _plain, True),
    "nanogpt, no bias": Case("nanogpt", lambda: NanoGPT(False), _save_nanogpt("module."), _plain, True),
    "vit": Case("hf_vit", lambda: HF.ViTForImageClassification(HF.ViTConfig(**VIT)), _save_pretrained, _logits),
    "vit, no qkv bias": Case(
        "hf_vit",
        lambda: HF.ViTForImageClassification(HF.ViTConfig(**VIT, qkv_bias=False, hidden_act="gelu_pytorch_tanh")),
        _save_pretrained,
        _logits,
    ),
    "vit, pooler": Case("hf_vit", lambda: HF.ViTModel(HF.ViTConfig(**VIT)), _save_pretrained, _pooled),
    "deit": Case("hf_deit", lambda: HF.DeiTForImageClassification(HF.DeiTConfig(**VIT)), _save_pretrained, _logits),
    "deit, teacher": Case(
        "hf_deit_teacher",
        lambda: HF.DeiTForImageClassificationWithTeacher(HF.DeiTConfig(**VIT)),
        _save_pretrained,
        _logits,
    ),
    "dinov2": Case(
        "hf_dinov2", lambda: HF.Dinov2ForImageClassification(HF.Dinov2Config(**DINO)), _save_pretrained, _logits
    ),
    "dinov2, features": Case("hf_dinov2", lambda: HF.Dinov2Model(HF.Dinov2Config(**DINO)), _save_pretrained, _pooled),
    "dinov2, registers": Case(
        "hf_dinov2_registers",
        lambda: HF.Dinov2WithRegistersForImageClassification(HF.Dinov2WithRegistersConfig(**DINO)),
        _save_pretrained,
        _logits,
    ),
    "timm": Case("timm_vit", _timm("vit_tiny_patch16_224", patch_size=4), _save_timm, _plain),
    "timm, dinov2": Case(
        "timm_vit", _timm("vit_small_patch14_reg4_dinov2", patch_size=4, qkv_bias=False), _save_timm, _plain
    ),
    "timm, pooled": Case("timm_vit", _timm("vit_base_patch16_gap_224", patch_size=4), _save_timm, _plain),
    "timm, pooled first": Case(
        "timm_vit_pooled_first", _timm("vit_tiny_patch16_224", patch_size=4, global_pool="avg"), _save_timm, _plain
    ),
    "timm, pooled first, no class token": Case(
        "timm_vit_pooled_first",
        _timm("vit_base_patch16_gap_224", patch_size=4, fc_norm=True),
        _save_timm,
        _plain,
    ),
    "timm, deit": Case("timm_vit", _timm("deit_tiny_distilled_patch16_224", patch_size=4), _save_timm, _plain),
    "timm, features": Case(
        "timm_vit", _timm("vit_tiny_patch16_224", patch_size=4, num_classes=0), _save_bare_timm, _plain
    ),
}


def config_json(folder):
    return json.loads((folder / "config.json").read_text())
