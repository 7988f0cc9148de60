"""Layouts of state dicts of HF transformers, on models written here with their names: flat, dotted, kernels (out, in) but for GPT-2's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prenorm_jax import layouts

D, HEADS, MLP, VOCAB, CLASSES = 6, 2, 9, 7, 3
TEXT = jnp.array([[1, 2, 6, 3], [5, 1, 0, 2]])
IMAGES = np.random.default_rng(1).normal(size=(2, 3, 4, 4))


def norm(params, norms, name, x, default):
    """RMSNorm at the eps that `norms` has for it, or LayerNorm; written out, so that an eps may be traced."""
    scale, bias = (params[f"{name}.{leaf}"][None, None] for leaf in ("weight", "bias"))
    if f"{name}.weight" not in norms:
        x = x - x.mean(-1, keepdims=True)
    eps = norms.get(f"{name}.weight", default)
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * scale + bias


def add_bias(params, name, y):
    return y + params[f"{name}.bias"][None, None] if f"{name}.bias" in params else y


def linear(params, name, x):
    return add_bias(params, name, x @ params[f"{name}.weight"].T)


def conv1d(params, name, x):
    return add_bias(params, name, x @ params[f"{name}.weight"])


def attend(q, k, v, causal):
    q, k, v = (part.reshape(*part.shape[:2], HEADS, -1) for part in (q, k, v))
    scores = jnp.einsum("bqhk,bthk->bhqt", q, k)
    if causal:
        scores = jnp.where(jnp.tri(q.shape[1], dtype=bool)[None, None], scores, -jnp.inf)
    return jnp.einsum("bhqt,bthk->bqhk", jax.nn.softmax(scores), v).reshape(*q.shape[:2], D)


@jax.jit
def gpt2(params, norms):
    x = params["transformer.wte.weight"][TEXT] + params["transformer.wpe.weight"][None, : TEXT.shape[1]]
    for i in range(2):
        h = f"transformer.h.{i}"
        n = norm(params, norms, f"{h}.ln_1", x, 1e-5)
        x = x + conv1d(
            params, f"{h}.attn.c_proj", attend(*jnp.split(conv1d(params, f"{h}.attn.c_attn", n), 3, -1), True)
        )
        n = norm(params, norms, f"{h}.ln_2", x, 1e-5)
        x = x + conv1d(params, f"{h}.mlp.c_proj", jax.nn.gelu(conv1d(params, f"{h}.mlp.c_fc", n)))
    return linear(params, "lm_head", norm(params, norms, "transformer.ln_f", x, 1e-5))


GPT2 = {
    "transformer.wte.weight": (VOCAB, D),
    "transformer.wpe.weight": (5, D),
    **{
        f"transformer.h.{i}.{name}.{leaf}": shape if leaf == "weight" else shape[-1:]
        for i in range(2)
        for name, shape in {
            "ln_1": (D,),
            "ln_2": (D,),
            "attn.c_attn": (D, 3 * D),
            "attn.c_proj": (D, D),
            "mlp.c_fc": (D, MLP),
            "mlp.c_proj": (MLP, D),
        }.items()
        for leaf in ("weight", "bias")
    },
    "transformer.ln_f.weight": (D,),
    "transformer.ln_f.bias": (D,),
    "lm_head.weight": (VOCAB, D),
}


@jax.jit
def vit(params, norms):
    kernel = params["vit.embeddings.patch_embeddings.projection.weight"]
    x = jax.lax.conv_general_dilated(IMAGES, kernel, (2, 2), "VALID").reshape(len(IMAGES), D, -1).swapaxes(1, 2)
    x = add_bias(params, "vit.embeddings.patch_embeddings.projection", x)
    x = jnp.concatenate([jnp.broadcast_to(params["vit.embeddings.cls_token"], (len(x), 1, D)), x], 1)
    x = x + params["vit.embeddings.position_embeddings"]
    for i in range(2):
        layer = f"vit.encoder.layer.{i}"
        n = norm(params, norms, f"{layer}.layernorm_before", x, 1e-12)
        attention = f"{layer}.attention"
        qkv = (linear(params, f"{attention}.attention.{name}", n) for name in ("query", "key", "value"))
        x = x + linear(params, f"{attention}.output.dense", attend(*qkv, False))
        n = norm(params, norms, f"{layer}.layernorm_after", x, 1e-12)
        x = x + linear(params, f"{layer}.output.dense", jax.nn.gelu(linear(params, f"{layer}.intermediate.dense", n)))
    return linear(params, "classifier", norm(params, norms, "vit.layernorm", x, 1e-12)[:, :1])


VIT = {
    "vit.embeddings.cls_token": (1, 1, D),
    "vit.embeddings.position_embeddings": (1, 5, D),
    **{
        f"{name}.{leaf}": shape if leaf == "weight" else shape[:1]
        for name, shape in {
            "vit.embeddings.patch_embeddings.projection": (D, 3, 2, 2),
            "vit.layernorm": (D,),
            "classifier": (CLASSES, D),
            **{
                f"vit.encoder.layer.{i}.{name}": shape
                for i in range(2)
                for name, shape in {
                    "layernorm_before": (D,),
                    "layernorm_after": (D,),
                    **dict.fromkeys([f"attention.attention.{name}" for name in ("query", "key", "value")], (D, D)),
                    "attention.output.dense": (D, D),
                    "intermediate.dense": (MLP, D),
                    "output.dense": (D, MLP),
                }.items()
            },
        }.items()
        for leaf in ("weight", "bias")
    },
}


@pytest.mark.parametrize(
    ("layout", "shapes", "model"),
    [(layouts.HF_TORCH_GPT2, GPT2, gpt2), (layouts.HF_TORCH_VIT, VIT, vit)],
    ids=["gpt2", "vit"],
)
def test_a_state_dict(layout, shapes, model, randomized, check_layout):
    zeros = functools.partial(np.zeros, dtype=np.float64)
    check_layout(layout, randomized({name: zeros(shape) for name, shape in shapes.items()}), model)
