"""Equinox layouts, on modules with the public ones' fields: modules stay modules, and their weights are (out, in)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prenorm_jax as pn
from prenorm_jax import layouts
from prenorm_jax.paths import TreeError

pytestmark = pytest.mark.slow  # on one Python

D, VOCAB, CLASSES = 6, 7, 3
TEXT = jnp.array([[1, 2, 6, 3], [5, 1, 0, 2]])
IMAGES = np.random.default_rng(1).normal(size=(2, 4, 12))  # four patches of 2 x 2 x 3
KEY = jax.random.key(0)


def attention(biased):
    biases = dict.fromkeys(("use_query_bias", "use_key_bias", "use_value_bias", "use_output_bias"), biased)
    return eqx.nn.MultiheadAttention(2, D, **biases, key=KEY)


class AttentionBlock(eqx.Module):
    layer_norm1: eqx.nn.LayerNorm
    layer_norm2: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    linear1: eqx.nn.Linear
    linear2: eqx.nn.Linear

    def __init__(self, biased):
        self.layer_norm1, self.layer_norm2 = eqx.nn.LayerNorm(D), eqx.nn.LayerNorm(D)
        self.attention = attention(biased)
        self.linear1, self.linear2 = eqx.nn.Linear(D, 9, key=KEY), eqx.nn.Linear(9, D, key=KEY)

    def __call__(self, x):
        h = jax.vmap(self.layer_norm1)(x)
        x = x + self.attention(h, h, h)
        h = jax.nn.gelu(jax.vmap(self.linear1)(jax.vmap(self.layer_norm2)(x)))
        return x + jax.vmap(self.linear2)(h)


class PatchEmbedding(eqx.Module):
    linear: eqx.nn.Linear


class VisionTransformer(eqx.Module):
    patch_embedding: PatchEmbedding
    positional_embedding: jax.Array
    cls_token: jax.Array
    attention_blocks: list
    mlp: eqx.nn.Sequential

    def __init__(self, biased):
        self.patch_embedding = PatchEmbedding(eqx.nn.Linear(12, D, key=KEY))
        self.positional_embedding, self.cls_token = jnp.zeros((5, D)), jnp.zeros((1, D))
        self.attention_blocks = [AttentionBlock(biased) for _ in range(2)]
        self.mlp = eqx.nn.Sequential([eqx.nn.LayerNorm(D), eqx.nn.Linear(D, CLASSES, key=KEY)])

    def __call__(self, patches):
        x = jnp.concatenate([self.cls_token, jax.vmap(self.patch_embedding.linear)(patches)])
        x = x + self.positional_embedding
        for block in self.attention_blocks:
            x = block(x)
        return self.mlp(x[0])


class Block(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, biased):
        self.norm1, self.norm2 = eqx.nn.LayerNorm(D), eqx.nn.LayerNorm(D)
        self.attention, self.mlp = attention(biased), eqx.nn.MLP(D, D, 9, 1, jax.nn.gelu, key=KEY)

    def __call__(self, x):
        h = jax.vmap(self.norm1)(x)
        x = x + self.attention(h, h, h, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))


class GPT(eqx.Module):
    embed: eqx.nn.Embedding
    position: jax.Array
    blocks: list
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, biased):
        self.embed, self.position = eqx.nn.Embedding(VOCAB, D, key=KEY), jnp.zeros((4, D))
        self.blocks = [Block(biased) for _ in range(2)]
        self.norm, self.head = eqx.nn.LayerNorm(D), eqx.nn.Linear(D, VOCAB, key=KEY)

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


class RMSNorm(eqx.Module):
    weight: jax.Array
    bias: jax.Array
    eps: float = eqx.field(static=True)

    def __call__(self, x, *, key=None):
        return pn.rms_norm(x, self.weight, self.bias, eps=self.eps)


def at(module, path):
    """The part of a module at "blocks/0/norm1"."""
    for name in path.split("/"):
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module


@pytest.mark.parametrize(
    ("model", "spec", "inputs", "biased"),
    [
        (VisionTransformer, layouts.EQUINOX_VIT, IMAGES, True),
        (VisionTransformer, layouts.EQUINOX_VIT_OWN_AFFINE, IMAGES, False),
        (GPT, layouts.EQUINOX_GPT, TEXT, True),
        (GPT, layouts.EQUINOX_GPT_OWN_AFFINE, TEXT, False),
    ],
)
def test_equinox(model, spec, inputs, biased, randomized, check_layout):
    params, static = eqx.partition(model(biased), eqx.is_array)

    def run(params, norms):
        whole = eqx.combine(jax.tree.map(jnp.asarray, params), static)
        for path, eps in norms.items():
            norm = at(whole, path)
            whole = eqx.tree_at(lambda m, path=path: at(m, path), whole, RMSNorm(norm.weight, norm.bias, eps))
        return jax.vmap(whole)(inputs)

    params = randomized(params)
    assert isinstance(pn.to_pre_rmsnorm(params, spec), model)
    check_layout(spec, params, run, keeps=0 if biased else 2)


def test_a_module_can_not_gain_a_bias(randomized):
    params = randomized(eqx.filter(GPT(biased=False), eqx.is_array))
    with pytest.raises(TreeError, match="blocks/0/attention/query_proj/bias: can't be added to this container"):
        pn.fold_affine(params, layouts.EQUINOX_GPT)
