"""Image models in the manner of public code: what converts, at which cost, and what is left alone for which reason."""

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_plain import normal
from test_text_and_speech import (
    B,
    D,
    F,
    H,
    L,
    V,
    dense,
    layer_norm,
    linear,
    ln,
    mha,
    mha_params,
    mlp,
    mlp_params,
    tokens,
)

pytestmark = pytest.mark.slow


def image(n=4, channels=3):
    return jnp.asarray(np.random.default_rng(1).standard_normal((B, n, n, channels)))


def patches(p, x):
    y = jax.lax.conv_general_dilated(x, p["w"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + p["b"][None, None, None]


def block(p, x):
    x = x + mha(p["attn"], layer_norm(p["ln1"], x))
    return x + mlp(p["mlp"], layer_norm(p["ln2"], x))


def block_params():
    return {"attn": mha_params(), "ln1": ln(), "mlp": mlp_params(), "ln2": ln()}


def test_two_towers_with_a_norm_in_front(check):
    def vision(p, x):
        x = patches(p["patch"], x).reshape(B, -1, D)
        x = jnp.concatenate([jnp.tile(p["class"][None, None], (B, 1, 1)), x], 1) + p["pos"][None]
        x = layer_norm(p["ln_pre"], x)
        for b in p["blocks"]:
            x = block(b, x)
        return layer_norm(p["ln_post"], x[:, 0]) @ p["proj"]

    def text(p, t):
        x = p["embed"][t] + p["pos"][None]
        for b in p["blocks"]:
            x = block(b, x)
        x = layer_norm(p["ln_final"], x)
        return x[jnp.arange(B), jnp.argmax(t, -1)] @ p["proj"]

    def fn(p, x, t):
        a, b = vision(p["vision"], x), text(p["text"], t)
        a, b = (y / jnp.linalg.norm(y, axis=-1, keepdims=True) for y in (a, b))
        logits = jnp.exp(p["scale"]) * a @ b.T
        return logits, logits.T

    params = {
        "vision": {"patch": {"w": normal(2, 2, 3, D), "b": normal(D)}, "class": normal(D), "pos": normal(5, D), "ln_pre": ln(),
                   "blocks": [block_params()], "ln_post": ln(), "proj": normal(D, 3)},
        "text": {"embed": normal(V, D), "pos": normal(L, D), "blocks": [block_params()], "ln_final": ln(), "proj": normal(D, 3)},
        "scale": normal(),
    }  # fmt: skip
    check(fn, params, image(), tokens(), sites=7, added=1)


class LayerScale(nnx.Module):
    def __init__(self, d):
        self.gamma = nnx.Param(jnp.full((d,), 0.1))

    def __call__(self, x):
        return x * self.gamma[...][None, None]


class ScaledBlock(nnx.Module):
    """SwiGLU, LayerScale and stochastic depth by sample."""

    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(D, epsilon=1e-6, rngs=rngs), nnx.LayerNorm(D, epsilon=1e-6, rngs=rngs)
        self.qkv, self.proj = nnx.Linear(D, 3 * D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)
        self.w12, self.w3 = nnx.Linear(D, 2 * F, rngs=rngs), nnx.Linear(F, D, rngs=rngs)
        self.ls1, self.ls2 = LayerScale(D), LayerScale(D)

    def __call__(self, x, key):
        q, k, v = jnp.moveaxis(self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, H, D // H), 2, 0)
        y = self.proj(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
        x = x + self.drop(self.ls1(y), key)
        a, b = jnp.split(self.w12(self.norm2(x)), 2, -1)
        return x + self.ls2(self.w3(jax.nn.silu(a) * b))

    def drop(self, y, key):
        keep = jax.random.bernoulli(key, 0.9, (y.shape[0], 1, 1))
        return jnp.where(keep, y / 0.9, jnp.zeros_like(y))


class Registers(nnx.Module):
    def __init__(self, rngs):
        self.patch = nnx.Conv(3, D, (2, 2), strides=2, padding="VALID", rngs=rngs)
        self.cls, self.reg, self.pos = (nnx.Param(jnp.ones((1, n, D))) for n in (1, 2, 4))
        self.mask = nnx.Param(jnp.ones((D,)))
        self.blocks = nnx.List([ScaledBlock(rngs) for _ in range(2)])
        self.norm, self.head = nnx.LayerNorm(D, rngs=rngs), nnx.Linear(2 * D, 3, rngs=rngs)

    def __call__(self, x, mask, key):
        x = self.patch(x).reshape(x.shape[0], -1, D)
        x = jnp.where(mask[..., None], self.mask[...][None, None], x) + self.pos[...]
        tile = lambda p: jnp.broadcast_to(p[...], (x.shape[0], *p.shape[1:]))  # noqa: E731
        x = jnp.concatenate([tile(self.cls), tile(self.reg), x], 1)
        for block in self.blocks:
            x = block(x, key)
        x = self.norm(x)
        return self.head(jnp.concatenate([x[:, 0], x[:, 3:].mean(1)], -1))


def test_layer_scale_registers_and_mask_tokens(check):
    graph, state = nnx.split(Registers(nnx.Rngs(0)))
    fn = lambda s, *x: nnx.merge(graph, s)(*x)  # noqa: E731
    mask = jnp.asarray([[True, False, False, True]] * B)
    out = check(fn, state, image(), mask, jax.random.key(0), sites=5)
    assert len(out.report.absorbed) == 4


class MaskedAutoencoder(nn.Module):
    """The encoder sees a random half; the decoder fills the rest with a mask token, puts all in order, and predicts pixels."""

    @nn.compact
    def __call__(self, x, key):
        x = nn.Conv(D, (2, 2), (2, 2), padding="VALID")(x).reshape(x.shape[0], -1, D)
        n, half = x.shape[1], x.shape[1] // 2
        x = x + jnp.asarray(np.random.default_rng(0).standard_normal((1, n, D)))
        order = jnp.argsort(jax.random.uniform(key, (x.shape[0], n)), axis=1)
        back = jnp.argsort(order, axis=1)
        x = jnp.take_along_axis(x, order[:, :half, None], axis=1)
        x = self.layer(x, D)
        x = nn.Dense(6)(nn.LayerNorm()(x))
        mask = self.param("mask", nn.initializers.normal(1.0), (1, 1, 6))
        x = jnp.concatenate([x, jnp.tile(mask, (x.shape[0], n - half, 1))], 1)
        x = jnp.take_along_axis(x, back[:, :, None], axis=1)
        x = x + jnp.asarray(np.random.default_rng(1).standard_normal((1, n, 6)))
        x = self.layer(x, 6)
        return nn.Dense(12)(nn.LayerNorm()(x))

    @nn.compact
    def layer(self, x, d):
        x = x + nn.MultiHeadDotProductAttention(H)(nn.LayerNorm()(x))
        return x + nn.Dense(d)(nn.gelu(nn.Dense(F)(nn.LayerNorm()(x))))


def test_a_masked_autoencoder(check):
    model = MaskedAutoencoder()
    params = model.init(jax.random.key(0), image(), jax.random.key(1))
    out = check(model.apply, params, image(), jax.random.key(1), sites=6)
    assert sorted(s.width for s in out.report.sites) == [6, 6, 6, D, D, D]


def test_latents_that_read_bytes(check):
    """Haiku's manner: a latent array, cross attention to a wide input that has a norm of its own, and one block for all depths."""

    def model(x):
        norm = lambda y, name: hk.LayerNorm(-1, True, True, name=name)(y)  # noqa: E731
        z = hk.get_parameter("latents", [3, D], init=hk.initializers.RandomNormal())
        z = jnp.broadcast_to(z[None], (x.shape[0], 3, D))
        inputs = norm(x, "input")
        attention = hk.MultiHeadAttention(1, D, w_init=hk.initializers.VarianceScaling(), model_size=D, name="cross")
        z = z + attention(norm(z, "query"), inputs, inputs)
        hidden, out, before = hk.Linear(F), hk.Linear(D), hk.LayerNorm(-1, True, True, name="shared")
        for _ in range(2):
            z = z + out(jax.nn.gelu(hidden(before(z))))
        return hk.Linear(V)(norm(z, "final").mean(1))

    model = hk.without_apply_rng(hk.transform(model))
    x = normal(B, L, 6)
    params = model.init(jax.random.key(0), x)
    out = check(model.apply, params, x, sites=4, kept=1)
    assert "input of the program" in next(s.reason for s in out.report.sites if not s.converted)


@pytest.mark.parametrize("norm_first", [True, False], ids=["merge, then norm", "norm, then merge"])
def test_windowed_stages_with_patch_merging(check, norm_first):
    """A norm over four concatenated tokens takes their joint mean: the first stage may lose its mean only without it."""

    def merge(x):
        h, w = x.shape[1] // 2, x.shape[2] // 2
        return x.reshape(B, h, 2, w, 2, -1).transpose(0, 1, 3, 4, 2, 5).reshape(B, h, w, -1)

    def attention(p, x):
        n = x.shape[1] // 2
        y = x.reshape(B, n, 2, n, 2, -1).transpose(0, 1, 3, 2, 4, 5).reshape(B * n * n, 4, -1)
        y = mha(p, y, bias=p["table"][p_index].transpose(2, 0, 1)[None])
        return y.reshape(B, n, n, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)

    p_index = np.abs(np.arange(4)[:, None] - np.arange(4)[None])

    def stage(p, x, shift):
        h = layer_norm(p["ln1"], x)
        h = jnp.roll(attention(p["attn"], jnp.roll(h, (-shift, -shift), (1, 2))), (shift, shift), (1, 2))
        x = x + h
        return x + mlp(p["mlp"], layer_norm(p["ln2"], x))

    def fn(p, x):
        x = stage(p["a"], patches(p["patch"], x), 1)
        x = layer_norm(p["merge_ln"], merge(x)) if norm_first else merge(layer_norm(p["merge_ln"], x))
        x = stage(p["b"], x @ p["reduce"], 0)
        return layer_norm(p["ln"], x).mean((1, 2)) @ p["head"]

    def stage_params(d):
        attn = {"q": linear(d, d), "k": linear(d, d), "v": linear(d, d), "o": linear(d, d), "table": normal(4, H)}
        return {"attn": attn, "ln1": ln(d), "ln2": ln(d), "mlp": mlp_params(d)}

    params = {
        "patch": {"w": normal(2, 2, 3, D), "b": normal(D)}, "a": stage_params(D), "merge_ln": ln(4 * D if norm_first else D),
        "reduce": normal(4 * D, 10), "b": stage_params(10), "ln": ln(10), "head": normal(10, 3),
    }  # fmt: skip
    out = check(fn, params, image(8), sites=3 if norm_first else 6, kept=3 if norm_first else 0)
    assert sum("the mean of its input is wanted" in s.reason for s in out.report.sites) == (2 if norm_first else 0)


def test_depthwise_convolutions_on_the_stream(check):
    """ConvNeXt: the norm stands behind a depthwise convolution, which can't be recentered in its weights but feature by feature in
    what it reads; LayerScale; a norm in front of each downsampling convolution."""

    def block(p, x):
        y = jax.lax.conv_general_dilated(
            x, p["dw"][:, :, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=D
        )
        y = layer_norm(p["ln"], y + p["dw_b"][None, None, None])
        return x + p["gamma"][None, None, None] * mlp(p["mlp"], y)

    def fn(p, x):
        x = layer_norm(p["stem_ln"], patches(p["stem"], x))
        for b in p["blocks"]:
            x = block(b, x)
        return layer_norm(p["ln"], x.mean((1, 2))) @ p["head"]

    b = lambda: {"dw": normal(3, 3, D), "dw_b": normal(D), "ln": ln(), "gamma": normal(D), "mlp": mlp_params()}  # noqa: E731
    params = {
        "stem": {"w": normal(2, 2, 3, D), "b": normal(D)},
        "stem_ln": ln(),
        "blocks": [b(), b()],
        "ln": ln(),
        "head": normal(D, 3),
    }
    out = check(fn, params, image(8), sites=1, kept=3)
    assert sum("does not pay" in s.reason for s in out.report.sites) == 3


def test_modulation_by_a_condition(check):
    """DiT: adaLN-zero. Scale and shift stand behind the norm; the gate is per channel and per sample, so each branch is recentered
    as it runs, and two norms a block pay for two branches only with the final one's help."""

    def fn(p, x, t):
        c = mlp(
            p["time"],
            jnp.concatenate([jnp.sin(t[:, None] * jnp.arange(3)[None]), jnp.cos(t[:, None] * jnp.arange(3)[None])], -1),
        )

        def plain(x):
            m = x.mean(-1, keepdims=True)
            return (x - m) * jax.lax.rsqrt(((x - m) ** 2).mean(-1, keepdims=True) + 1e-6)

        x = x @ p["in"] + p["pos"][None]
        for b in p["blocks"]:
            s1, k1, g1, s2, k2, g2 = jnp.split(dense(b["ada"], jax.nn.silu(c))[:, None], 6, axis=-1)
            x = x + g1 * mha(b["attn"], plain(x) * (1 + k1) + s1)
            x = x + g2 * mlp(b["mlp"], plain(x) * (1 + k2) + s2)
        s, k = jnp.split(dense(p["ada"], jax.nn.silu(c))[:, None], 2, axis=-1)
        return (plain(x) * (1 + k) + s) @ p["out"]

    b = lambda: {"ada": linear(D, 6 * D), "attn": mha_params(), "mlp": mlp_params()}  # noqa: E731
    params = {
        "time": mlp_params(6), "in": normal(5, D), "pos": normal(L, D), "blocks": [b(), b()], "ada": linear(D, 2 * D), "out": normal(D, 3),
    }  # fmt: skip
    params["time"]["fc2"] = linear(F, D)
    check(fn, params, normal(B, L, 5), normal(B), sites=5, added=4)
