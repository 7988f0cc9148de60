"""What pre-norm models look like, each written once: a kit (`libraries`) supplies the layers, so the same model exists in five libraries.

A kit has `embed`, `unembed`, `linear`, `norm`, `attention`, `conv`, `param`, `dropout`, `layers` and `remat`; each takes the name that its
parameters go by. Every size is another number, so that a sum over D entries is a sum over features.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

D, HEADS, F, V, B, L, LAYERS, EXPERTS = 8, 2, 12, 11, 2, 5, 3, 3


def tokens(length=L):
    return jnp.arange(B * length).reshape(B, length) % V


def images():
    return jnp.asarray(np.random.default_rng(0).standard_normal((B, 4, 4, 3)))


def mlp(kit, name, x):
    return kit.linear(f"{name}_down", jax.nn.gelu(kit.linear(f"{name}_up", x, F)), D)


def block(kit, x, memory=None, causal=True, attention=None, branch=lambda name, y: y):
    """One pre-norm block; `branch` is what happens to a branch's output in front of the main branch."""
    attend = attention or (lambda kit, n: kit.attention("attention", n, causal=causal))
    x = x + branch("attention", attend(kit, kit.norm("norm1", x)))
    if memory is not None:
        x = x + kit.attention("cross", kit.norm("norm3", x), memory)
    return x + branch("mlp", mlp(kit, "mlp", kit.norm("norm2", x)))


def parallel_block(kit, x):
    n = kit.norm("norm1", x)
    return x + kit.attention("attention", n, causal=True) + mlp(kit, "mlp", n)


def embedded(kit, t):
    return kit.embed("embed", t) + kit.param("position", (16, D)).astype(kit.dtype)[: t.shape[1]]


def gpt(body=block, tied=False, start=embedded):
    def model(kit, t):
        x = body(kit, start(kit, t))
        n = kit.norm("final", x)
        return kit.unembed("embed", n) if tied else kit.linear("head", n, V)

    return model


def behind_a_norm(kit, t):
    return kit.norm("norm0", embedded(kit, t))


def in_a_scan(kit, x):
    return kit.layers("blocks", LAYERS, block, x)


def in_remat(kit, x):
    return kit.remat("block", block, x)


def with_dropout(kit, x):
    return block(kit, x, branch=lambda name, y: kit.dropout(y))


def split_heads(kit, n):
    return [kit.linear(name, n, D).reshape(*n.shape[:2], HEADS, -1) for name in ("query", "key", "value")]


def weighed(kit, scores, v):
    causal = np.tril(np.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    return kit.linear("output", jnp.einsum("bhlt,bthk->blhk", weights, v).reshape(*v.shape[:2], D), D)


def rotated(x):
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None, None] / 10.0 ** np.arange(half)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)


def rotary(kit, n):
    q, k, v = split_heads(kit, n)
    return weighed(kit, jnp.einsum("blhk,bthk->bhlt", rotated(q), rotated(k)), v)


def alibi(kit, n):
    q, k, v = split_heads(kit, n)
    distance = np.arange(n.shape[1])[:, None] - np.arange(n.shape[1])
    slopes = 2.0 ** -np.arange(1, HEADS + 1)[:, None, None]
    return weighed(kit, jnp.einsum("blhk,bthk->bhlt", q, k) - slopes * distance, v)


def experts(kit, x):
    """Two of the experts for each token, weighed by the router."""
    x = x + kit.attention("attention", kit.norm("norm1", x), causal=True)
    n = kit.norm("norm2", x)
    top, chosen = jax.lax.top_k(jax.nn.softmax(kit.linear("router", n, EXPERTS)), 2)
    weights = (jax.nn.one_hot(chosen, EXPERTS, dtype=x.dtype) * top[..., None]).sum(2)
    up, down = kit.param("up", (EXPERTS, D, F)), kit.param("down", (EXPERTS, F, D))
    y = jnp.einsum("bleh,ehd->bled", jax.nn.silu(jnp.einsum("bld,edh->bleh", n, up)), down)
    return x + jnp.einsum("bled,ble->bld", y, weights)


def encoder_decoder(kit, source, target):
    x, y = (kit.embed("embed", t) for t in (source, target))
    memory = kit.norm("memory", block(kit.scope("encoder"), x, causal=False))
    y = block(kit.scope("decoder"), y, memory)
    return kit.linear("head", kit.norm("final", y), V)


def patches(kit, images):
    x = kit.conv("patches", images, D, 2)
    return x.reshape(x.shape[0], -1, D)


def vit(kit, images):
    """Class token, registers, learned positions, LayerScale."""
    x = patches(kit, images) + kit.param("position", (4, D))
    extra = [jnp.tile(kit.param(name, (1, n, D)), (x.shape[0], 1, 1)) for name, n in (("class", 1), ("registers", 2))]
    x = jnp.concatenate([*extra, x], 1)
    x = block(kit, x, causal=False, branch=lambda name, y: kit.param(f"{name}_scale", (D,)) * y)
    return kit.linear("head", kit.norm("final", x)[:, 0], 3)


def pooled_vit(kit, images):
    """Fixed sin-cos positions, a mean over patches in front of the last norm."""
    angle = np.arange(4)[:, None] / 100.0 ** (np.arange(D // 2) / D)
    x = patches(kit, images) + np.concatenate([np.sin(angle), np.cos(angle)], -1)
    x = block(kit, x, causal=False).mean(1)
    return kit.linear("head", kit.norm("final", x), 3)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model, example inputs, the number of its norms (counted as often as they run), and of the activations to be recentered."""

    model: Callable
    norms: int = 3
    added: int = 0
    inputs: Callable = lambda: (tokens(),)
    random: bool = False  # takes a key behind its inputs
    dtype: type = jnp.float64


ARCHITECTURES = {
    "GPT, untied": Architecture(gpt()),
    "GPT, tied": Architecture(gpt(tied=True), added=1),
    "ViT: convolved patches, class token, registers, LayerScale": Architecture(vit, inputs=lambda: (images(),)),
    "ViT: sin-cos positions, mean pooling": Architecture(pooled_vit, inputs=lambda: (images(),)),
    "parallel blocks": Architecture(gpt(parallel_block), norms=2),
    "encoder and decoder": Architecture(encoder_decoder, norms=7, inputs=lambda: (tokens(), tokens(4))),
    "scan over layers": Architecture(gpt(in_a_scan), norms=2 * LAYERS + 1),
    "remat": Architecture(gpt(in_remat)),
    "bfloat16": Architecture(gpt(), dtype=jnp.bfloat16),
    "dropout in training": Architecture(gpt(with_dropout), added=2, random=True),
    "LayerNorm behind the embedding": Architecture(gpt(start=behind_a_norm), norms=4, added=1),
    "mixture of experts": Architecture(gpt(experts)),
    "rotary positions": Architecture(gpt(lambda kit, x: block(kit, x, attention=rotary))),
    "ALiBi": Architecture(gpt(lambda kit, x: block(kit, x, attention=alibi))),
}
