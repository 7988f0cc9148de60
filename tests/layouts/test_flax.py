"""Flax Linen layouts, on Linen models with the public ones' names: lm1b, vision_transformer and big_vision, HF's GPT-2 and ViT."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import prenorm_jax as pn
from prenorm_jax import layouts
from prenorm_jax.layouts.flax import MODULES

pytestmark = pytest.mark.slow  # on one Python

D, HEADS, MLP, VOCAB, TOKENS, CLASSES = 6, 2, 9, 7, 4, 3
TEXT = jnp.array([[1, 2, 6, 3], [5, 1, 0, 2]])
IMAGES = np.random.default_rng(1).normal(size=(2, 4, 4, 3))


def run(model, inputs):
    """run(params, norms) of a Linen model: nn.LayerNorm becomes RMSNorm in the modules named."""

    def call(params, norms):
        def as_rms_norm(call, args, kwargs, context):
            module, path = context.module, "/".join(context.module.path)
            if not isinstance(module, nn.LayerNorm) or path not in norms:
                return call(*args, **kwargs)
            used.add(path)
            own = module.variables["params"]
            return pn.rms_norm(args[0], own["scale"], own["bias"], eps=norms[path])

        used = set()
        with nn.intercept_methods(as_rms_norm):
            out = model.apply({"params": params}, inputs)
        assert used == set(norms), "a norm that the layout names was not called"
        return out

    return call


def init(model, inputs):
    """Shapes of its parameters: nothing is computed."""
    return jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]


class MlpBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(MLP)(x))
        return nn.Dense(x.shape[-1])(y)


class Block(nn.Module):
    """The block of lm1b, vision_transformer and big_vision; `names` of its four modules in the order of their calls."""

    names: tuple[str, ...] = MODULES["linen"]
    bias: bool = True
    causal: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        norm1, attention, norm2, mlp = self.names
        mask = nn.make_causal_mask(jnp.zeros(x.shape[:2])) if self.causal else None
        y = nn.LayerNorm(name=norm1)(x)
        attend = nn.MultiHeadDotProductAttention(HEADS, qkv_features=2 * HEADS, use_bias=self.bias, name=attention)
        x = x + attend(y, y, mask=mask)
        return x + MlpBlock(name=mlp)(nn.LayerNorm(name=norm2)(x)), None


class AddPositionEmbs(nn.Module):
    learned: bool = True

    @nn.compact
    def __call__(self, x):
        if not self.learned:
            return x + jnp.sin(jnp.arange(x.shape[1] * D) + 0.5).reshape(1, -1, D)
        return x + self.param("pos_embedding", nn.initializers.normal(), (1, x.shape[1], D))


class Decoder(nn.Module):
    attention: str
    bias: bool
    learned: bool
    tied: bool
    recenter: bool

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, D)
        x = AddPositionEmbs(self.learned, name="posembed_output")(embed(tokens))
        if self.recenter:
            x = x - x.mean(-1, keepdims=True)
        names = ("LayerNorm_0", self.attention, "LayerNorm_1", "MlpBlock_0")
        for i in range(2):
            x, _ = Block(names, self.bias, causal=True, name=f"encoderdecoderblock_{i}")(x)
        x = nn.LayerNorm(name="encoderdecoder_norm")(x)
        return embed.attend(x) / D**0.5 if self.tied else nn.Dense(VOCAB, name="logitdense")(x)


class Lm1b(nn.Module):
    attention: str = "SelfAttention_0"
    bias: bool = False
    learned: bool = False
    tied: bool = False
    recenter: bool = False

    @nn.compact
    def __call__(self, tokens):
        fields = (self.attention, self.bias, self.learned, self.tied, self.recenter)
        return Decoder(*fields, name="decoder")(tokens)


@pytest.mark.parametrize("attention", ["SelfAttention_0", "MultiHeadDotProductAttention_0"])
def test_lm1b_whose_norms_before_attention_keep_their_affine(attention, randomized, check_layout):
    model = Lm1b(attention, learned=True)
    check_layout(layouts.LM1B_OWN_AFFINE, randomized(init(model, TEXT)), run(model, TEXT), keeps=2)


def test_lm1b_whose_attention_gains_biases(randomized, check_layout):
    """The tree gains q, k and v biases; a model with biases runs it, given a zero one for the output map."""
    model, biased = Lm1b(learned=True), Lm1b(learned=True, bias=True)
    params = randomized(init(model, TEXT))

    def call(params, norms):
        attention = params["decoder"]["encoderdecoderblock_0"]["SelfAttention_0"]
        if "bias" not in attention["query"]:
            return run(model, TEXT)(params, norms)
        blocks = {
            name: {**block, "SelfAttention_0": {**block["SelfAttention_0"], "out": with_zero_bias(block)}}
            for name, block in params["decoder"].items()
            if name.startswith("encoderdecoderblock")
        }
        return run(biased, TEXT)({"decoder": {**params["decoder"], **blocks}}, norms)

    def with_zero_bias(block):
        return {**block["SelfAttention_0"]["out"], "bias": np.zeros(D)}

    check_layout(layouts.LM1B, params, call)


@pytest.mark.parametrize("learned", [True, False])
def test_lm1b_tied_and_with_sinusoids_recenters_its_start_once(learned, randomized, check_layout):
    model = Lm1b(bias=True, learned=learned, tied=True)
    params = randomized(init(model, TEXT))
    recentering = dataclasses.replace(model, recenter=True)

    def call(params, norms):
        return run(recentering if norms else model, TEXT)(params, norms)

    check_layout(layouts.LM1B_TIED, params, call, keeps=1)


class Encoder(nn.Module):
    names: tuple[str, ...]
    scanned: bool
    positions: str

    @nn.compact
    def __call__(self, x):
        if self.positions == "Transformer/posembed_input/pos_embedding":
            x = AddPositionEmbs(name="posembed_input")(x)
        if self.scanned:
            split = {"params": True}
            stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs=split, in_axes=nn.broadcast, length=2)
            x, _ = stack(self.names, name="encoderblock")(x, None)
        else:
            for i in range(2):
                x, _ = Block(self.names, name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class MAPHead(nn.Module):
    @nn.compact
    def __call__(self, x):
        probe = jnp.tile(self.param("probe", nn.initializers.normal(), (1, 1, D)), [len(x), 1, 1])
        x = nn.MultiHeadDotProductAttention(HEADS, qkv_features=2 * HEADS)(probe, x)
        return (x + MlpBlock()(nn.LayerNorm()(x)))[:, 0]


class VisionTransformer(nn.Module):
    pool: str
    rep_size: bool = False
    names: tuple[str, ...] = MODULES["linen"]
    scanned: bool = False
    positions: str = "pos_embedding"

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(D, (2, 2), strides=(2, 2), padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, D)
        if self.positions == "pos_embedding":
            x = x + self.param("pos_embedding", nn.initializers.normal(), (1, x.shape[1], D))
        if self.pool == "tok":
            x = jnp.concatenate([jnp.tile(self.param("cls", nn.initializers.zeros, (1, 1, D)), [len(x), 1, 1]), x], 1)
        x = Encoder(self.names, self.scanned, self.positions, name="Transformer")(x)
        x = MAPHead()(x) if self.pool == "map" else x.mean(1) if self.pool == "gap" else x[:, 0]
        if self.rep_size:
            x = nn.tanh(nn.Dense(5, name="pre_logits")(x))
        return nn.Dense(CLASSES, name="head")(x)


IN_ENCODER = "Transformer/posembed_input/pos_embedding"


@pytest.mark.parametrize(
    ("end", "names", "fields"),
    [
        ("head", "linen", {"pool": "tok", "positions": IN_ENCODER}),  # vision_transformer
        ("pre_logits", "pre-linen", {"pool": "tok", "rep_size": True, "positions": IN_ENCODER}),  # its .npz files
        ("head", "linen", {"pool": "gap"}),  # big_vision
        ("head", "linen", {"pool": "tok", "scanned": True}),
        ("map", "linen", {"pool": "map", "scanned": True}),
        ("map", "linen", {"pool": "map"}),
    ],
    ids=["vit, token", "npz, pre_logits", "gap", "token, scanned", "map, scanned", "map"],
)
def test_vision_transformer_and_big_vision(end, names, fields, randomized, check_layout):
    model = VisionTransformer(names=MODULES[names], **fields)
    params = randomized(init(model, IMAGES))
    check_layout(layouts.vision_transformer(end, names), params, run(model, IMAGES))


def test_a_vision_transformer_described_by_another_end_is_refused(randomized):
    params = randomized(init(VisionTransformer("gap", rep_size=True), IMAGES))
    with pytest.raises(pn.LayoutError, match=r"pre_logits/bias .*no rule covers it"):
        pn.to_pre_rmsnorm(params, layouts.vision_transformer("head"))
    with pytest.raises(ValueError, match="end: got 'gap'; allowed: head, pre_logits, map"):
        layouts.vision_transformer("gap")


class Conv1D(nn.Module):
    """x @ kernel.T + bias, kernel (out, in)."""

    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (self.features, x.shape[-1]))
        return x @ kernel.T + self.param("bias", nn.initializers.zeros, (self.features,))[None, None]


class Attend(nn.Module):
    """Attention whose maps are given by name: fused (one name) or separate (three)."""

    linear: Any
    reads: tuple[str, ...]
    writes: str | None
    causal: bool

    @nn.compact
    def __call__(self, x):
        out = [self.linear((3 if len(self.reads) == 1 else 1) * D, name=name)(x) for name in self.reads]
        q, k, v = (
            part.reshape(*x.shape[:2], HEADS, -1) for part in (jnp.split(out[0], 3, -1) if len(out) == 1 else out)
        )
        mask = nn.make_causal_mask(jnp.zeros(x.shape[:2])) if self.causal else None
        y = nn.dot_product_attention(q, k, v, mask=mask).reshape(x.shape)
        return self.linear(D, name=self.writes)(y) if self.writes else y


class GPT2Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Conv1D(D, name="c_proj")(nn.gelu(Conv1D(MLP, name="c_fc")(x)))


class GPT2Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(1e-5, name="ln_1")(x)
        x = x + Attend(Conv1D, ("c_attn",), "c_proj", causal=True, name="attn")(y)
        return x + GPT2Mlp(name="mlp")(nn.LayerNorm(1e-5, name="ln_2")(x))


class GPT2Blocks(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = GPT2Block(name=str(i))(x)
        return x


class GPT2Model(nn.Module):
    tied: bool
    recenter: bool

    @nn.compact
    def __call__(self, tokens):
        wte = nn.Embed(VOCAB, D, name="wte")
        x = wte(tokens)
        if self.recenter:
            x = x - x.mean(-1, keepdims=True)
        x = x + nn.Embed(TOKENS, D, name="wpe")(jnp.arange(tokens.shape[1]))[None]
        x = nn.LayerNorm(1e-5, name="ln_f")(GPT2Blocks(name="h")(x))
        return wte.attend(x) if self.tied else x


class GPT2(nn.Module):
    tied: bool = False
    recenter: bool = False
    head_bias: bool = False

    @nn.compact
    def __call__(self, tokens):
        x = GPT2Model(self.tied, self.recenter, name="transformer")(tokens)
        return x if self.tied else nn.Dense(VOCAB, use_bias=self.head_bias, name="lm_head")(x)


def test_hf_gpt2_untied_gains_a_bias_in_its_head(randomized, check_layout):
    params = randomized(init(GPT2(), TEXT))
    assert layouts.HF_FLAX_GPT2.resolve(params).width == D

    def call(params, norms):
        return run(GPT2(head_bias="bias" in params["lm_head"]), TEXT)(params, norms)

    check_layout(layouts.HF_FLAX_GPT2, params, call)


def test_hf_gpt2_tied_recenters_what_is_looked_up(randomized, check_layout):
    params = randomized(init(GPT2(tied=True), TEXT))

    def call(params, norms):
        return run(GPT2(tied=True, recenter=bool(norms)), TEXT)(params, norms)

    check_layout(layouts.HF_FLAX_GPT2_TIED, params, call, keeps=1)


class Dense(nn.Module):
    """A module around one called dense, as HF's outputs are."""

    features: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features, name="dense")(x)


class ViTAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = Attend(nn.Dense, ("query", "key", "value"), None, causal=False, name="attention")(x)
        return Dense(D, name="output")(y)


class ViTLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + ViTAttention(name="attention")(nn.LayerNorm(1e-12, name="layernorm_before")(x))
        y = nn.LayerNorm(1e-12, name="layernorm_after")(x)
        return x + Dense(D, name="output")(nn.gelu(Dense(MLP, name="intermediate")(y)))


class ViTEncoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = ViTLayer(name=str(i))(x)
        return x


class ViTPatches(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Conv(D, (2, 2), strides=(2, 2), padding="VALID", name="projection")(images).reshape(2, -1, D)


class ViTEmbeddings(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = ViTPatches(name="patch_embeddings")(images)
        token = self.param("cls_token", nn.initializers.zeros, (1, 1, D))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, D)), x], 1)
        return x + self.param("position_embeddings", nn.initializers.zeros, (1, x.shape[1], D))


class ViTStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        return ViTEncoder(name="layer")(x)


class ViTModel(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = ViTStack(name="encoder")(ViTEmbeddings(name="embeddings")(images))
        return nn.LayerNorm(1e-12, name="layernorm")(x)


class ViT(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(CLASSES, name="classifier")(ViTModel(name="vit")(images)[:, 0])


def test_hf_vit(randomized, check_layout):
    params = randomized(init(ViT(), IMAGES))
    assert layouts.HF_FLAX_VIT.resolve(params).width == D
    check_layout(layouts.HF_FLAX_VIT, params, run(ViT(), IMAGES))
