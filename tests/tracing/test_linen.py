"""Flax Linen models: what is asked of them beyond the cells of `test_matrix`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

D, V = 8, 11


class Block(nn.Module):
    dtype: jnp.dtype = jnp.float64
    fast: bool = True
    dropout: float = 0.0
    layer_scale: bool = False

    @nn.compact
    def __call__(self, x, mask=None):
        def norm(name):
            return nn.LayerNorm(use_fast_variance=self.fast, dtype=self.dtype, name=name)

        def attend(name, h):
            return nn.MultiHeadDotProductAttention(2, dtype=self.dtype, name=name)(h, mask=mask)

        def mlp(h):
            return nn.Dense(D, dtype=self.dtype)(nn.gelu(nn.Dense(2 * D, dtype=self.dtype)(h)))

        def out(name, y):
            if self.layer_scale:
                y = y * self.param(name, nn.initializers.ones, (1, 1, D)).astype(y.dtype)
            return nn.Dropout(self.dropout, deterministic=self.dropout == 0)(y)

        h = norm("ln1")(x)
        x = x + out("ls1", attend("attn", h))
        return x + out("ls2", mlp(norm("ln2")(x)))


class GPT(nn.Module):
    layers: int = 1
    tied: bool = False
    block: dict = None
    remat: bool = False
    scan: bool = False
    embed_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float64

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(V, D, dtype=self.dtype)
        position = self.param("position", nn.initializers.normal(1.0), (16, D))
        x = embed(tokens) + position[None, : tokens.shape[1]].astype(self.dtype)
        x = nn.Dropout(self.embed_dropout, deterministic=self.embed_dropout == 0)(x)
        mask = nn.make_causal_mask(tokens)
        options = {"dtype": self.dtype, **(self.block or {})}
        cls = nn.remat(Block) if self.remat else Block
        if self.scan:
            body = nn.scan(
                lambda m, x, _: (m(x, mask), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.layers,
            )
            x, _ = body(cls(**options, name="blocks"), x, None)
        else:
            for k in range(self.layers):
                x = cls(**options, name=f"block{k}")(x, mask)
        x = nn.LayerNorm(name="final", dtype=self.dtype)(x)
        return embed.attend(x) if self.tied else nn.Dense(V, use_bias=False, dtype=self.dtype)(x)


def tokens(b=2, n=4):
    return jnp.arange(b * n).reshape(b, n) % V


def build(model, *args, **kw):
    return jax.jit(model.init)({"params": jax.random.key(0), "dropout": jax.random.key(1)}, *args, **kw)


@pytest.mark.parametrize("fast", [True, False])
def test_gpt(check, fast):
    model = GPT(block={"fast": fast})
    out = check(model.apply, build(model, tokens()), tokens(), sites=3, others=[(tokens(3, 6),)], halves=True)
    assert out.report.reductions_before == 6
    assert out.report.reductions_after == 3
    assert any("block0" in s.where for s in out.report.sites)


def test_tied_gpt_recenters_what_is_looked_up(check):
    model = GPT(tied=True)
    out = check(
        model.apply,
        build(model, tokens()),
        tokens(),
        sites=3,
        added=1,
        others=[(tokens(1, 3),)],
        grads=True,
        halves=True,
    )
    assert not any("embedding" in path for path, _ in out.report.leaves)


def test_a_tied_scanned_gpt_recenters_once(check):
    """What is looked up, before the loop, and not the carry at every iteration."""
    model = GPT(layers=3, scan=True, tied=True)
    out = check(model.apply, build(model, tokens()), tokens(), sites=3, added=1)
    assert (out.report.reductions_before, out.report.reductions_after) == (14, 8)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers_is_not_unrolled(check, remat):
    model = GPT(layers=3, scan=True, remat=remat)
    out = check(model.apply, build(model, tokens()), tokens(), sites=3, grads=not remat, halves=True)
    assert [s.trips for s in out.report.sites] == [3, 3, 1]
    assert out.report.reductions_before == 14
    assert out.report.reductions_after == 7
    eqns = jax.make_jaxpr(out.fn)(out.params, tokens())
    assert str(eqns).count("scan[") == 1
    assert ("remat" in str(eqns) or "checkpoint" in str(eqns)) == remat


def test_dropout_everywhere_does_not_pay(check):
    model = GPT(block={"dropout": 0.4}, embed_dropout=0.3)
    fn = lambda p, t, key: model.apply(p, t, rngs={"dropout": key})  # noqa: E731
    out = check(fn, build(model, tokens()), tokens(), jax.random.key(3), sites=0, kept=3, partial=True)
    assert all("in all, 3 added and 3 removed" in s.reason for s in out.report.sites)
    check(fn, build(model, tokens()), tokens(), jax.random.key(3), sites=3, added=3, activations="always")


def sincos(n, d):
    angle = np.arange(n)[:, None] / 100.0 ** (np.arange(d // 2)[None] / d)
    return np.concatenate([np.sin(angle), np.cos(angle)], -1)


class ViT(nn.Module):
    pool: str = "class"
    layer_scale: bool = False
    sincos: bool = False
    registers: int = 0

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(D, (2, 2), strides=(2, 2), padding="VALID", name="patch")(images)
        x = x.reshape(x.shape[0], -1, D)
        n = x.shape[1]
        position = (
            jnp.asarray(sincos(n, D)) if self.sincos else self.param("pos", nn.initializers.normal(1.0), (1, n, D))[0]
        )
        x = x + position[None]
        extra = [self.param("cls", nn.initializers.normal(1.0), (1, 1, D))] if self.pool == "class" else []
        if self.registers:
            extra.append(self.param("reg", nn.initializers.normal(1.0), (1, self.registers, D)))
        x = jnp.concatenate([*(jnp.tile(e, (x.shape[0], 1, 1)) for e in extra), x], 1)
        for k in range(1):
            x = Block(layer_scale=self.layer_scale, name=f"block{k}")(x)
        if self.pool == "mean":
            x = x.mean(1)
        elif self.pool == "class":
            x = x[:, 0]
        return nn.Dense(5)(nn.LayerNorm(name="norm")(x))


def images(b=2, s=4):
    return jnp.asarray(np.random.default_rng(0).standard_normal((b, s, s, 3)))


@pytest.mark.parametrize(
    "options",
    [{"registers": 2}, {"sincos": True, "pool": "mean"}],
    ids=["registers", "sincos"],
)
def test_vit(check, options):
    model = ViT(**options)
    check(model.apply, build(model, images()), images(), sites=3, others=[(images(3),)], halves=True)


def test_layer_scale_moves_into_its_writers(check):
    """diag(lambda) W is recentered, not W."""
    model = ViT(layer_scale=True)
    out = check(model.apply, build(model, images()), images(), sites=3, others=[(images(3),)], grads=True, halves=True)
    assert len(out.report.absorbed) == 2
    assert out.report.reductions_after == 3


def test_group_norm_of_one_group_behind_a_gpt(check):
    """It takes its statistics from a copy in another shape, and must not hold up the LayerNorms of its stream."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(V, D)(tokens)
            x = x + nn.Dense(D)(nn.gelu(nn.Dense(2 * D)(nn.LayerNorm()(x))))
            return nn.Dense(V)(nn.GroupNorm(num_groups=1, reduction_axes=(-1,))(x))

    model = Model()
    check(model.apply, build(model, tokens()), tokens(), sites=2, others=[(tokens(3, 5),)], grads=True, halves=True)


def test_post_ln_is_kept(check):
    class PostLN(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(V, D)(tokens)
            for _ in range(2):
                x = nn.LayerNorm()(x + nn.Dense(D)(nn.relu(nn.Dense(2 * D)(x))))
            return nn.Dense(V)(x)

    model = PostLN()
    out = check(model.apply, build(model, tokens()), tokens(), sites=0, kept=2, partial=True)
    assert all("does not pay" in s.reason for s in out.report.sites)
