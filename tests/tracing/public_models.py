"""Public models, as their authors released them, through `convert`: the table in docs/tracing.md.

    pip install "transformers==4.52.4" && python tests/tracing/public_models.py

The Flax models of that release of `transformers` (one that still has them), with random parameters and small widths: the programs are
the released ones, the sizes are not. About a minute on two cores.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.tracing import convert

TEXT = {"vocab_size": 32, "max_position_embeddings": 16}
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {"image_size": 16, "patch_size": 8}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 16}
SEQ2SEQ = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, **TEXT,
}  # fmt: skip


def models() -> list[tuple[str, str, Any, str]]:
    """(name, class, configuration, output) of every model tried."""
    os.environ.update(USE_TORCH="0", USE_TF="0")
    import transformers as hf

    return [
        ("GPT-2", "FlaxGPT2LMHeadModel", hf.GPT2Config(**GPT), "logits"),
        ("GPT-2, untied", "FlaxGPT2LMHeadModel", hf.GPT2Config(**GPT, tie_word_embeddings=False), "logits"),
        ("GPT-Neo", "FlaxGPTNeoForCausalLM", hf.GPTNeoConfig(
            hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], **TEXT), "logits"),
        ("GPT-J", "FlaxGPTJForCausalLM", hf.GPTJConfig(rotary_dim=4, **GPT), "logits"),
        ("OPT", "FlaxOPTForCausalLM", hf.OPTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=16, **TEXT), "logits"),
        ("BLOOM", "FlaxBloomForCausalLM", hf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=32), "logits"),
        ("XGLM", "FlaxXGLMForCausalLM", hf.XGLMConfig(d_model=16, num_layers=2, attention_heads=2, ffn_dim=32, **TEXT), "logits"),
        ("RoBERTa-PreLayerNorm", "FlaxRobertaPreLayerNormModel", hf.RobertaPreLayerNormConfig(**SIZE, **TEXT), "last_hidden_state"),
        ("mBART", "FlaxMBartForConditionalGeneration", hf.MBartConfig(**SEQ2SEQ), "logits"),
        ("Pegasus", "FlaxPegasusForConditionalGeneration", hf.PegasusConfig(**SEQ2SEQ), "logits"),
        ("ViT", "FlaxViTForImageClassification", hf.ViTConfig(**SIZE, **IMAGE), "logits"),
        ("BEiT", "FlaxBeitForImageClassification", hf.BeitConfig(**SIZE, **IMAGE, vocab_size=32), "logits"),
        ("DINOv2", "FlaxDinov2ForImageClassification", hf.Dinov2Config(**SIZE, **IMAGE), "logits"),
        ("CLIP text", "FlaxCLIPTextModel", hf.CLIPTextConfig(**SIZE, **TEXT, eos_token_id=2), "last_hidden_state"),
        ("CLIP vision, pooled", "FlaxCLIPVisionModel", hf.CLIPVisionConfig(**SIZE, **IMAGE), "pooler_output"),
        ("CLIP vision, all tokens", "FlaxCLIPVisionModel", hf.CLIPVisionConfig(**SIZE, **IMAGE), "last_hidden_state"),
        ("BERT", "FlaxBertForMaskedLM", hf.BertConfig(**SIZE, **TEXT), "logits"),
        ("BART", "FlaxBartForConditionalGeneration", hf.BartConfig(**SEQ2SEQ), "logits"),
        ("LLaMA", "FlaxLlamaForCausalLM", hf.LlamaConfig(**SIZE, **TEXT), "logits"),
    ]  # fmt: skip


def shaken(params: Any) -> Any:
    """Parameters that hide nothing: no zero biases, no unit scales, a mean along every axis."""
    rng = np.random.default_rng(0)

    def shake(a: Any) -> Any:
        if not (hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.floating)):
            return a
        return a + jnp.asarray(0.1 + 0.1 * rng.standard_normal(a.shape), a.dtype)

    return jax.tree.map(shake, params)


def line(name: str, cls: str, fn: Any, params: Any, inputs: tuple[Any, ...], verbose: bool = False) -> str:
    """One line of the table: what was converted, at which cost, how exactly, and why the rest was not."""
    report = convert(fn, params, *inputs, partial=True).report
    if verbose:
        print(report)
    kept = {site.reason.split(" at ")[0].split(" (")[0] for site in report.sites if not site.converted}
    sums = f"{report.reductions_before} -> {report.reductions_after}"
    reason = "; ".join(sorted(kept)) or ("no mean is subtracted" if not report.sites else "")
    return f"| {name} | `{cls}` | {report.converted} of {len(report.sites)} | {sums} | {report.error:.0e} | {reason} |"


def row(name: str, cls: str, config: Any, output: str) -> str:
    """The line of one model of transformers."""
    import transformers as hf

    vision = hasattr(config, "image_size")
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 16, 16)), jnp.float32)
    inputs = pixels if vision else 3 + jnp.arange(8).reshape(2, 4)
    try:
        model = getattr(hf, cls)(config, input_shape=(1, 16, 16, 3) if vision else (1, 4))
    except Exception as error:  # a released model that no longer runs on this JAX
        return f"| {name} | `{cls}` | does not run: {type(error).__name__} | | | |"
    return line(name, cls, lambda p, x: model(x, params=p)[output], shaken(model.params), (inputs,))


if __name__ == "__main__":
    print("| model | class | norms converted | reductions | difference | the others |\n|---|---|---|---|---|---|")
    for model in models():
        print(row(*model), flush=True)
