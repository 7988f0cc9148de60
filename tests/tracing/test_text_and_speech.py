"""Language and speech models in the manner of public code: what converts, at which cost, and what is left alone for which reason."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_plain import normal

pytestmark = pytest.mark.slow

D, F, V, H, B, L = 8, 12, 11, 2, 2, 4


def tokens(b=B, n=L):
    return (jnp.arange(b * n).reshape(b, n) * 5 + 1) % V


def layer_norm(p, x, eps=1e-5):
    mu = jnp.mean(x, axis=-1, keepdims=True)
    var = jnp.mean(jnp.square(x - mu), axis=-1, keepdims=True)
    y = (x - mu) * jax.lax.rsqrt(var + eps)
    return y * jnp.broadcast_to(p["g"], y.shape) + jnp.broadcast_to(p["b"], y.shape)


def ln(d=D):
    return {"g": normal(d), "b": normal(d)}


def dense(p, x):
    y = jnp.einsum("...i,io->...o", x, p["w"])
    return y + jnp.broadcast_to(p["b"], y.shape) if "b" in p else y


def linear(i, o, bias=True):
    return {"w": normal(i, o), **({"b": normal(o)} if bias else {})}


def heads(x):
    return x.reshape(*x.shape[:-1], H, -1)


def attend(q, k, v, bias=None):
    s = jnp.einsum("...qhd,...khd->...hqk", q, k) / np.sqrt(q.shape[-1])
    s = s if bias is None else s + bias
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(s, axis=-1), v).reshape((*q.shape[:-2], -1))


def causal(n):
    return jnp.where(jnp.tril(jnp.ones((n, n), bool)), 0.0, -1e9)[None, None]


def mha(p, x, y=None, bias=None):
    y = x if y is None else y
    return dense(p["o"], attend(heads(dense(p["q"], x)), heads(dense(p["k"], y)), heads(dense(p["v"], y)), bias))


def mha_params(d=D, kv=None):
    kv = kv or d
    return {"q": linear(d, d), "k": linear(kv, d, bias=False), "v": linear(kv, d), "o": linear(d, d)}


def mlp(p, x, act=jax.nn.gelu):
    return dense(p["fc2"], act(dense(p["fc1"], x)))


def mlp_params(d=D, f=F):
    return {"fc1": linear(d, f), "fc2": linear(f, d)}


def rotate(x):
    angle = jnp.arange(x.shape[-3])[:, None] * (10.0 ** -jnp.arange(x.shape[-1] // 2))[None]
    sin, cos = jnp.repeat(jnp.sin(angle), 2, -1)[None, :, None], jnp.repeat(jnp.cos(angle), 2, -1)[None, :, None]
    turned = jnp.stack((-x[..., 1::2], x[..., ::2]), axis=-1).reshape(x.shape)
    return x * cos + turned * sin


# --- encoders and decoders ---


def test_speech_to_text(check):
    """Two strided convolutions with gelu in front of fixed sinusoids; cross attention in every decoder layer; a tied head."""
    grid = np.random.default_rng(0).standard_normal((L, D))

    def encoder_layer(p, x):
        x = x + mha(p["attn"], layer_norm(p["attn_ln"], x))
        return x + mlp(p["mlp"], layer_norm(p["mlp_ln"], x))

    def fn(p, mel, tokens):
        conv = lambda x, k, b, s: (  # noqa: E731
            jax.lax.conv_general_dilated(x, k, (s,), ((1, 1),), dimension_numbers=("NWC", "WIO", "NWC")) + b[None, None]
        )
        x = jax.nn.gelu(conv(mel, p["conv1"], p["conv1_b"], 1))
        x = jax.nn.gelu(conv(x, p["conv2"], p["conv2_b"], 2)) + grid[None]
        for b in p["encoder"]:
            x = encoder_layer(b, x)
        memory = layer_norm(p["ln_post"], x)
        y = jnp.take(p["embed"], tokens, axis=0) + p["positions"][None, : tokens.shape[1]]
        for b in p["decoder"]:
            y = y + mha(b["attn"], layer_norm(b["attn_ln"], y), bias=causal(tokens.shape[1]))
            y = y + mha(b["cross"], layer_norm(b["cross_ln"], y), memory)
            y = y + mlp(b["mlp"], layer_norm(b["mlp_ln"], y))
        return layer_norm(p["ln"], y) @ p["embed"].T

    layer = lambda: {"attn": mha_params(), "attn_ln": ln(), "mlp": mlp_params(), "mlp_ln": ln()}  # noqa: E731
    params = {
        "conv1": normal(3, 5, D), "conv1_b": normal(D), "conv2": normal(3, D, D), "conv2_b": normal(D), "encoder": [layer(), layer()],
        "ln_post": ln(), "embed": normal(V, D), "positions": normal(16, D),
        "decoder": [{**layer(), "cross": mha_params(), "cross_ln": ln()}],
        "ln": ln(),
    }  # fmt: skip
    check(fn, params, normal(B, 2 * L, 5), tokens(), sites=9, added=2)


def test_norm_behind_the_embedding_and_alibi(check):
    def fn(p, t):
        x = layer_norm(p["embed_ln"], p["embed"][t])
        slopes = 2.0 ** -jnp.arange(1, H + 1)
        bias = causal(t.shape[1]) + slopes[None, :, None, None] * jnp.arange(t.shape[1])[None, None, None, :]
        for b in p["h"]:
            y = layer_norm(b["ln1"], x)
            qkv = dense(b["qkv"], y).reshape(*y.shape[:2], H, 3, D // H)
            x = x + dense(b["o"], attend(qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :], bias))
            x = x + mlp(b["mlp"], layer_norm(b["ln2"], x))
        return layer_norm(p["ln_f"], x) @ p["embed"].T

    block = lambda: {"ln1": ln(), "ln2": ln(), "qkv": linear(D, 3 * D), "o": linear(D, D), "mlp": mlp_params()}  # noqa: E731
    params = {"embed": normal(V, D), "embed_ln": ln(), "h": [block(), block()], "ln_f": ln()}
    check(fn, params, tokens(), sites=5, kept=1, added=1)


@pytest.mark.parametrize("norms", [1, 2])
def test_parallel_attention_with_one_or_two_norms(check, norms):
    def fn(p, t):
        x = p["embed"][t]
        for b in p["h"]:
            a = layer_norm(b["ln_attn"], x)
            m = a if norms == 1 else layer_norm(b["ln_mlp"], x)
            q, k, v = jnp.split(dense(b["qkv"], a), [D, D + D // H], -1)  # one key and one value for all heads
            k, v = (jnp.broadcast_to(y[:, :, None], (*y.shape[:2], H, D // H)) for y in (k, v))
            attn = dense(b["o"], attend(rotate(heads(q)), rotate(k), v, causal(t.shape[1])))
            x = mlp(b["mlp"], m) + attn + x
        return layer_norm(p["ln_f"], x) @ p["head"]

    block = lambda: {  # noqa: E731
        "ln_attn": ln(), **({"ln_mlp": ln()} if norms == 2 else {}), "qkv": linear(D, D + 2 * D // H, bias=False),
        "o": linear(D, D, bias=False),
        "mlp": {"fc1": linear(D, F, bias=False), "fc2": linear(F, D, bias=False)},
    }  # fmt: skip
    params = {"embed": normal(V, D), "h": [block(), block()], "ln_f": ln(), "head": normal(D, V)}
    check(fn, params, tokens(), sites=2 * norms + 1)


def test_a_projection_from_a_narrower_embedding(check):
    """OPT's smallest sibling: 3-wide tokens are projected up, and the result down again before the tied head."""

    def fn(p, t):
        x = p["embed"][t] @ p["project_in"] + p["pos"][t.shape[1] + jnp.arange(t.shape[1])][None]
        for b in p["layers"]:
            x = x + mha(b["attn"], layer_norm(b["ln1"], x), bias=causal(t.shape[1]))
            x = x + mlp(b["mlp"], layer_norm(b["ln2"], x), jax.nn.relu)
        return (layer_norm(p["ln"], x) @ p["project_out"]) @ p["embed"].T

    layer = {"attn": mha_params(), "ln1": ln(), "mlp": mlp_params(), "ln2": ln()}
    params = {
        "embed": normal(V, 3), "project_in": normal(3, D), "project_out": normal(D, 3), "pos": normal(16, D), "layers": [layer], "ln": ln(),
    }  # fmt: skip
    out = check(fn, params, tokens(), sites=3)
    assert "embed" not in dict(out.report.leaves)


def test_a_norm_that_subtracts_no_mean_is_no_site(check):
    def t5_norm(p, x):
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * p[None, None]

    def fn(p, t):
        x = p["shared"][t]
        x = x + mha(p["attn"], t5_norm(p["ln1"], x))
        return t5_norm(p["ln2"], x) @ p["shared"].T * D**-0.5

    params = {"shared": normal(V, D), "attn": mha_params(), "ln1": normal(D), "ln2": normal(D)}
    check(fn, params, tokens(), sites=0, partial=True)


def test_half_step_feed_forwards_and_a_norm_at_the_block_end(check):
    """Conformer: the stream is what the block's last norm returns, so only within a block it may lose its mean."""

    def fn(p, x):
        x = dense(p["in"], x)
        for b in p["blocks"]:
            x = x + 0.5 * mlp(b["ff1"], layer_norm(b["ff1_ln"], x), jax.nn.swish)
            x = x + mha(b["attn"], layer_norm(b["attn_ln"], x))
            y = dense(b["pw1"], layer_norm(b["conv_ln"], x))
            y = y[..., :D] * jax.nn.sigmoid(y[..., D:])
            y = jax.lax.conv_general_dilated(
                y, b["dw"][:, None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=D
            )
            y = (y - b["mean"][None, None]) / jnp.sqrt(b["var"][None, None] ** 2 + 1e-3)
            x = x + dense(b["pw2"], jax.nn.swish(y))
            x = x + 0.5 * mlp(b["ff2"], layer_norm(b["ff2_ln"], x), jax.nn.swish)
            x = layer_norm(b["ln"], x)
        return x @ p["head"]

    block = lambda: {  # noqa: E731
        "ff1": mlp_params(), "ff1_ln": ln(), "attn": mha_params(), "attn_ln": ln(), "conv_ln": ln(), "pw1": linear(D, 2 * D),
        "dw": normal(3, D),
        "mean": normal(D), "var": normal(D), "pw2": linear(D, D), "ff2": mlp_params(), "ff2_ln": ln(), "ln": ln(),
    }  # fmt: skip
    params = {"in": linear(5, D), "blocks": [block(), block()], "head": normal(D, V)}
    check(fn, params, normal(B, L, 5), sites=10, added=1)


# --- one set of weights, many uses ---


class Shared(nn.Module):
    """One pre-norm block at every depth behind factorized embeddings, through nn.scan with broadcast parameters."""

    @nn.compact
    def __call__(self, t):
        x = (
            nn.Dense(D, name="up")(nn.Embed(V, 4, name="word")(t))
            + nn.Embed(16, D, name="pos")(jnp.arange(t.shape[1]))[None]
        )

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                h = nn.LayerNorm(name="ln1")(x)
                x = x + nn.MultiHeadDotProductAttention(H, name="attn")(h)
                h = nn.LayerNorm(name="ln2")(x)
                return x + nn.Dense(D, name="out")(nn.gelu(nn.Dense(F, name="in")(h))), None

        scan = nn.scan(Layer, variable_broadcast="params", split_rngs={"params": False}, length=3)
        x, _ = scan(name="layer")(x, None)
        return nn.Dense(V)(nn.LayerNorm(name="final")(x))


def test_one_block_at_every_depth_through_scan(check):
    model = Shared()
    out = check(model.apply, model.init(jax.random.key(0), tokens()), tokens(), sites=3)
    assert [s.trips for s in out.report.sites] == [3, 3, 1]


def test_one_network_for_two_inputs(check):
    def encode(p, t):
        x = p["embed"][t]
        x = x + mlp(p["mlp"], layer_norm(p["ln1"], x))
        return layer_norm(p["ln"], x).mean(1) @ p["head"]

    def fn(p, a, b):
        return jnp.sum(jnp.abs(encode(p, a) - encode(p, b)), -1)

    params = {"embed": normal(V, D), "mlp": mlp_params(), "ln1": ln(), "ln": ln(), "head": normal(D, 3)}
    check(fn, params, tokens(), tokens()[::-1], sites=4)


# --- generation ---


def decoder_step(p, cache, token, i):
    """One token through a decoder whose keys and values are kept."""
    x = p["embed"][token] + jax.lax.dynamic_index_in_dim(p["pos"], i, keepdims=True)
    new = []
    for b, (ks, vs) in zip(p["h"], cache, strict=True):
        h = layer_norm(b["ln1"], x)
        q, k, v = (heads(dense(b["attn"][n], h)) for n in "qkv")
        ks = jax.lax.dynamic_update_slice(ks, k[:, None], (0, i, 0, 0))
        vs = jax.lax.dynamic_update_slice(vs, v[:, None], (0, i, 0, 0))
        bias = jnp.where(jnp.arange(ks.shape[1]) <= i, 0.0, -1e9)[None, None, None]
        x = x + dense(b["attn"]["o"], attend(q[:, None], ks, vs, bias))[:, 0]
        x = x + mlp(b["mlp"], layer_norm(b["ln2"], x))
        new.append((ks, vs))
    return layer_norm(p["ln_f"], x) @ p["head"], new


def decoder():
    block = {"ln1": ln(), "ln2": ln(), "attn": mha_params(), "mlp": mlp_params()}
    return {"embed": normal(V, D), "pos": normal(16, D), "h": [block], "ln_f": ln(), "head": normal(D, V)}


def empty_cache(n=6):
    return [(jnp.zeros((B, n, H, D // H)), jnp.zeros((B, n, H, D // H)))]


def test_a_decode_step_with_a_cache(check):
    check(decoder_step, decoder(), empty_cache(), tokens()[:, 0], jnp.asarray(1), sites=3)


def test_generation_in_a_while_loop(check):
    def fn(p, prompt, length):
        def step(state):
            i, token, out, cache = state
            logits, cache = decoder_step(p, cache, token, i)
            token = jnp.argmax(logits, -1)
            return i + 1, token, out.at[:, i].set(token), cache

        out = jnp.zeros((B, 6), prompt.dtype)
        state = jax.lax.while_loop(lambda s: s[0] < length, step, (jnp.zeros_like(length), prompt, out, empty_cache()))
        return state[2], decoder_step(p, state[3], state[1], state[0])[0]

    check(fn, decoder(), tokens()[:, 0], jnp.asarray(4), sites=6)


# --- other mixers ---


def test_linear_attention(check):
    def fn(p, t):
        x = p["embed"][t]
        for b in p["h"]:
            h = layer_norm(b["ln1"], x)
            q, k, v = (heads(dense(b["attn"][n], h)) for n in "qkv")
            q, k = (jax.nn.elu(jnp.einsum("blhd,dm->blhm", y, b["features"])) + 1 for y in (q, k))
            kv = jnp.cumsum(jnp.einsum("blhm,blhd->blhmd", k, v), 1)
            z = jnp.einsum("blhm,blhm->blh", q, jnp.cumsum(k, 1))[..., None]
            x = x + dense(b["attn"]["o"], (jnp.einsum("blhm,blhmd->blhd", q, kv) / z).reshape(x.shape))
            x = x + mlp(b["mlp"], layer_norm(b["ln2"], x))
        return layer_norm(p["ln_f"], x) @ p["head"]

    block = {"ln1": ln(), "ln2": ln(), "attn": mha_params(), "mlp": mlp_params(), "features": normal(D // H, 3)}
    check(fn, {"embed": normal(V, D), "h": [block], "ln_f": ln(), "head": normal(D, V)}, tokens(), sites=3)


def test_gated_pair_updates(check):
    """Evoformer's manner: each update has its own norm, ends in a gate per channel, and the pair stream is read at every pair."""

    def gated(p, x, y):
        return jax.nn.sigmoid(dense(p["gate"], x)) * dense(p["out"], y)

    def fn(p, single, pair):
        m, z = dense(p["single"], single), dense(p["pair"], pair)
        for b in p["blocks"]:
            h, bias = layer_norm(b["ln_m"], m), dense(b["bias"], layer_norm(b["ln_z"], z))
            q, k, v = (heads(dense(b[n], h)) for n in "qkv")
            y = attend(q, k, v, jnp.moveaxis(bias, -1, 1)) * jax.nn.sigmoid(dense(b["g"], h))
            m = m + dense(b["o"], y)
            m = m + mlp(b["mlp"], layer_norm(b["ln_t"], m), jax.nn.relu)
            h = layer_norm(b["ln_op"], m)
            left, right = dense(b["left"], h), dense(b["right"], h)
            z = z + dense(b["outer"], jnp.einsum("bic,bjd->bijcd", left, right).reshape(*z.shape[:3], -1))
            h = layer_norm(b["ln_tri"], z)
            t = jnp.einsum("bikc,bjkc->bijc", dense(b["ta"], h), dense(b["tb"], h))
            z = z + gated(b["tri"], h, layer_norm(b["ln_tri_out"], t))
            z = z + mlp(b["zmlp"], layer_norm(b["ln_zt"], z), jax.nn.relu)
        return layer_norm(p["ln_out"], m) @ p["head"], layer_norm(p["ln_pair"], z) @ p["distogram"]

    dp = 6
    block = lambda: {  # noqa: E731
        "ln_m": ln(), "ln_z": ln(dp), "bias": linear(dp, H, bias=False), **{n: linear(D, D) for n in "qkvgo"}, "mlp": mlp_params(),
        "ln_t": ln(), "ln_op": ln(), "left": linear(D, 2), "right": linear(D, 2),
        "outer": linear(4, dp), "ln_tri": ln(dp), "ta": linear(dp, 3), "tb": linear(dp, 3), "ln_tri_out": ln(3),
        "tri": {"gate": linear(dp, dp), "out": linear(3, dp)}, "zmlp": mlp_params(dp, 7),
        "ln_zt": ln(dp),
    }  # fmt: skip
    params = {
        "single": linear(5, D), "pair": linear(3, dp), "blocks": [block()], "ln_out": ln(), "ln_pair": ln(dp), "head": normal(D, 3),
        "distogram": normal(dp, 4),
    }  # fmt: skip
    check(fn, params, normal(B, L, 5), normal(B, L, L, 3), sites=8, kept=1, added=1)
