"""Architectures that are no textbook blocks, in plain JAX: what converts, at which cost, and what does not."""

import jax
import jax.numpy as jnp
import pytest
from test_plain import B, D, L, V, affine, attention, block, block_params, normal, rsqrt_norm, tokens

pytestmark = pytest.mark.slow


def plain_norm(x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def mlp_params(d=D, h=12):
    return {"up": normal(d, h), "up_b": normal(h), "down": normal(h, d), "down_b": normal(d)}


def mlp(h, p):
    return jax.nn.gelu(h @ p["up"] + p["up_b"][None, None]) @ p["down"] + p["down_b"][None, None]


def test_mlp_mixer_recenters_what_mixes_tokens(check):
    def fn(p, x):
        x = x @ p["in"]
        for b in p["blocks"]:
            x = x + jnp.swapaxes(mlp(jnp.swapaxes(rsqrt_norm(x, b["ln1"]), 1, 2), b["token"]), 1, 2)
            x = x + mlp(rsqrt_norm(x, b["ln2"]), b["channel"])
        return rsqrt_norm(x, p["ln"]).mean(1) @ p["head"]

    blocks = [{"ln1": affine(), "ln2": affine(), "token": mlp_params(L, 6), "channel": mlp_params()} for _ in range(2)]
    params = {"in": normal(5, D), "blocks": blocks, "ln": affine(), "head": normal(D, 3)}
    check(fn, params, normal(B, L, 5), sites=5, added=2)


def test_a_non_linear_stem_is_recentered_once(check):
    def fn(p, audio):
        x = jax.nn.gelu(
            jax.lax.conv_general_dilated(audio, p["conv"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        )
        x = block(x + p["pos"][None], p["block"], rsqrt_norm)
        return rsqrt_norm(x, p["ln"]) @ p["head"]

    params = {
        "conv": normal(3, 5, D),
        "pos": normal(L, D),
        "block": block_params(),
        "ln": affine(),
        "head": normal(D, 3),
    }
    check(fn, params, normal(B, 2 * L, 5), sites=3, added=1)


def test_a_norm_at_the_end_of_each_branch(check):
    def fn(p, t):
        x = p["emb"][t]
        for b in p["blocks"]:
            x = x + rsqrt_norm(mlp(rsqrt_norm(x, b["ln1"]), b), b["ln2"])
        return rsqrt_norm(x, p["ln"]) @ p["head"]

    blocks = [{"ln1": affine(), "ln2": affine(), **mlp_params()} for _ in range(2)]
    check(fn, {"emb": normal(V, D), "blocks": blocks, "ln": affine(), "head": normal(D, 3)}, tokens(), sites=5, added=2)


def test_modulated_blocks(check):
    """adaLN-zero: shift, scale and gate come from a condition; a gate per channel has to be recentered behind."""

    def fn(p, x, c):
        x = x @ p["in"]
        for b in p["blocks"]:
            shift, scale, gate = jnp.split(jax.nn.silu(c) @ b["mod"], 3, -1)
            h = plain_norm(x) * (1 + scale[:, None]) + shift[:, None]
            x = x + gate[:, None] * mlp(h, b)
        shift, scale = jnp.split(jax.nn.silu(c) @ p["mod"], 2, -1)
        return (plain_norm(x) * (1 + scale[:, None]) + shift[:, None]) @ p["head"]

    blocks = [{"mod": normal(6, 3 * D), **mlp_params()} for _ in range(2)]
    params = {"in": normal(5, D), "blocks": blocks, "mod": normal(6, 2 * D), "head": normal(D, 3)}
    check(fn, params, normal(B, L, 5), normal(B, 6), sites=3, added=2)


def test_two_towers_of_different_widths(check):
    def tower(p, x):
        x = block(x, p["block"], rsqrt_norm)
        return rsqrt_norm(x, p["ln"]) @ p["head"]

    def fn(p, image, t):
        x = jnp.concatenate([jnp.broadcast_to(p["cls"], (B, 1, D)), image @ p["patch"]], 1)
        a = tower(p["image"], rsqrt_norm(x, p["pre"]))[:, 0]
        y = p["emb"][t]
        y = y + mlp(plain_norm(y), p["wide"])
        y = plain_norm(y)[jnp.arange(B), jnp.argmax(t, -1)] @ p["text_head"]
        a, b = a / jnp.linalg.norm(a, axis=-1, keepdims=True), y / jnp.linalg.norm(y, axis=-1, keepdims=True)
        return jnp.exp(p["logit_scale"]) * a @ b.T

    params = {
        "cls": normal(1, 1, D), "patch": normal(5, D), "pre": affine(), "emb": normal(V, 12), "wide": mlp_params(12),
        "image": {"block": block_params(), "ln": affine(), "head": normal(D, 3)},
        "text_head": normal(12, 3), "logit_scale": jnp.asarray(0.1),
    }  # fmt: skip
    out = check(fn, params, normal(B, L, 5), tokens(), sites=6, added=1)
    assert sorted({s.width for s in out.report.sites}) == [8, 12]


def test_windows_and_shifts(check):
    """Shifted windows move tokens, not features; merging four tokens takes their joint mean, so that stream has to keep its own."""

    def windows(x):
        return x.reshape(B, 2, 2, 2, 2, D).transpose(0, 1, 3, 2, 4, 5).reshape(B * 4, 4, D)

    def back(x):
        return x.reshape(B, 2, 2, 2, 2, D).transpose(0, 1, 3, 2, 4, 5).reshape(B, 4, 4, D)

    def fn(p, image, merge=False):
        x = image @ p["patch"]
        h = jnp.roll(rsqrt_norm(x, p["a"]["ln1"]), (-1, -1), (1, 2))
        x = x + jnp.roll(back(attention(windows(h), p["a"]["attn"])), (1, 1), (1, 2))
        x = x + mlp(rsqrt_norm(x, p["a"]["ln2"]).reshape(B, 16, D), p["a"]).reshape(x.shape)
        if merge:
            y = x.reshape(B, 2, 2, 2, 2, D).transpose(0, 1, 3, 2, 4, 5).reshape(B, 4, 4 * D)
            return plain_norm(y) @ p["merge"]
        return rsqrt_norm(x, p["ln"]).mean((1, 2)) @ p["head"]

    def norm_rank4(fn):
        return lambda p, image: fn(p, image)

    params = {
        "patch": normal(5, D),
        "a": block_params(),
        "ln": affine(),
        "head": normal(D, 3),
        "merge": normal(4 * D, 6),
    }
    params["a"]["ln1"] = jax.tree.map(lambda a: a[None], params["a"]["ln1"])
    params["a"]["ln2"] = jax.tree.map(lambda a: a[None], params["a"]["ln2"])
    params["ln"] = jax.tree.map(lambda a: a[None], params["ln"])
    check(norm_rank4(fn), params, normal(B, 4, 4, 5), sites=3)
    out = check(lambda p, i: fn(p, i, True), params, normal(B, 4, 4, 5), sites=0, kept=3, partial=True)
    assert "mean of its input is wanted" in out.report.sites[0].reason


def test_experts_with_dispatch_and_combine(check):
    def fn(p, t):
        x = p["emb"][t]
        h = rsqrt_norm(x, p["ln1"]).reshape(-1, D)
        gates = jax.nn.softmax(h @ p["router"])
        expert = jnp.argmax(gates, -1)
        slot = jnp.cumsum(jax.nn.one_hot(expert, 3), 0) - 1
        dispatch = jax.nn.one_hot(expert, 3)[..., None] * jax.nn.one_hot(slot.max(-1).astype(int), 4)[:, None]
        inside = jnp.einsum("gec,gm->ecm", dispatch, h)
        outside = jnp.einsum("ech,ehm->ecm", jax.nn.relu(jnp.einsum("ecm,emh->ech", inside, p["wi"])), p["wo"])
        x = x + jnp.einsum("gec,ecm->gm", dispatch * gates[..., None], outside).reshape(x.shape)
        return rsqrt_norm(x, p["ln"]) @ p["head"]

    params = {
        "emb": normal(V, D), "ln1": affine(), "router": normal(D, 3), "wi": normal(3, D, 6), "wo": normal(3, 6, D), "ln": affine(),
        "head": normal(D, 3),
    }  # fmt: skip
    out = check(fn, params, tokens(), sites=2)
    assert ("wo", (-1,)) in out.report.leaves


def test_layers_dropped_by_cond_and_by_sample(check):
    def fn(p, t, key):
        x = p["emb"][t]
        for k, b in enumerate(p["blocks"]):
            keep = jax.random.bernoulli(jax.random.fold_in(key, k), 0.5, (B, 1, 1))
            x = jnp.where(keep, block(x, b, rsqrt_norm), x)
        x = jax.lax.cond(jax.random.bernoulli(key), lambda y: block(y, p["blocks"][0], rsqrt_norm), lambda y: y, x)
        return rsqrt_norm(x, p["ln"]) @ p["head"]

    params = {"emb": normal(V, D), "blocks": [block_params()], "ln": affine(), "head": normal(D, 3)}
    check(fn, params, tokens(), jax.random.key(0), sites=5)


def test_embeddings_concatenated_over_features(check):
    def fn(p, t):
        x = jnp.concatenate([p["a"][t], p["b"][t] * 3.0], -1)
        x = block(x, p["block"], rsqrt_norm)
        return rsqrt_norm(x, p["ln"]) @ p["head"]

    params = {"a": normal(V, 3), "b": normal(V, D - 3), "block": block_params(), "ln": affine(), "head": normal(D, 3)}
    check(fn, params, tokens(), sites=3, added=1)


def test_a_convolution_reads_the_stream(check):
    """A position convolution needs the mean of what it reads; the stream behind it is another one, and may lose it."""

    def fn(p, t):
        x = p["emb"][t]
        kernel = p["depthwise"][:, None]
        x = x + jax.lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=D
        )
        x = block(x, p["block"], rsqrt_norm)
        return rsqrt_norm(x, p["ln"]) @ p["head"]

    params = {
        "emb": normal(V, D),
        "depthwise": normal(3, D),
        "block": block_params(),
        "ln": affine(),
        "head": normal(D, 3),
    }
    check(fn, params, tokens(), sites=3, added=1)


def test_latents_read_by_cross_attention(check):
    def fn(p, x):
        z = jnp.broadcast_to(p["latent"][None], (B, 3, D))
        memory = plain_norm(x @ p["in"])
        for b in p["blocks"]:
            h = rsqrt_norm(z, b["ln1"])
            s = jnp.einsum("bld,bmd->blm", h @ b["q"], memory @ b["k"])
            z = z + jax.nn.softmax(s) @ (memory @ b["v"]) @ b["o"]
            z = z + mlp(rsqrt_norm(z, b["ln2"]), b)
        return rsqrt_norm(z, p["ln"]).mean(1) @ p["head"]

    blocks = [{"ln1": affine(), "ln2": affine(), **{k: normal(D, D) for k in "qkvo"}, **mlp_params()} for _ in range(1)]
    params = {"latent": normal(3, D), "in": normal(5, D), "blocks": blocks, "ln": affine(), "head": normal(D, 3)}
    check(fn, params, normal(B, L, 5), sites=4)


def test_a_layer_scale_that_is_multiplied_by_a_number(check):
    def fn(p, t):
        x = p["emb"][t]
        for b in p["blocks"]:
            x = x + (0.5 * b["lambda"])[None, None] * mlp(rsqrt_norm(x, b["ln"]), b)
        return rsqrt_norm(x, p["ln"]) @ p["head"]

    blocks = [{"lambda": normal(D), "ln": affine(), **mlp_params()} for _ in range(2)]
    params = {"emb": normal(V, D), "blocks": blocks, "ln": affine(), "head": normal(D, 3)}
    out = check(fn, params, tokens(), sites=3, fold=True, grads=True)
    assert set(out.report.absorbed) == {"blocks/0/lambda", "blocks/1/lambda"}
    stacked = {**params, "blocks": jax.tree.map(lambda *a: jnp.stack(a), *blocks)}

    def scanned(p, t):
        def step(x, b):
            return x + (0.5 * b["lambda"])[None, None] * mlp(rsqrt_norm(x, b["ln"]), b), None

        x, _ = jax.lax.scan(step, p["emb"][t], p["blocks"])
        return rsqrt_norm(x, p["ln"]) @ p["head"]

    out = check(scanned, stacked, tokens(), sites=2, fold=True)
    assert out.report.absorbed == ("blocks/lambda",)
    assert "blocks/ln/scale" in out.report.folded
