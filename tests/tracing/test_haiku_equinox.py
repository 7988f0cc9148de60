"""Haiku and Equinox models: what is asked of them beyond the cells of `test_matrix`."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp

import prenorm_jax as pn
from conftest import shaken, widened, worst
from prenorm_jax.tracing import convert, trace

D, V = 8, 11


def tokens(b=2, n=4):
    return jnp.arange(b * n).reshape(b, n) % V


def haiku_gpt(tokens):
    x = (
        hk.Embed(V, D)(tokens)
        + hk.get_parameter("position", [1, 16, D], init=hk.initializers.RandomNormal())[:, : tokens.shape[1]]
    )
    for k in range(1):
        h = hk.LayerNorm(-1, True, True, name=f"ln1_{k}")(x)
        mask = jnp.tril(jnp.ones((1, 1, tokens.shape[1], tokens.shape[1])))
        attention = hk.MultiHeadAttention(
            2, D // 2, w_init=hk.initializers.VarianceScaling(), model_size=D, name=f"attn_{k}"
        )
        x = x + attention(h, h, h, mask)
        h = hk.LayerNorm(-1, True, False, name=f"ln2_{k}")(x)
        x = x + hk.Linear(D)(jax.nn.gelu(hk.Linear(2 * D)(h)))
    return hk.Linear(V)(hk.LayerNorm(-1, True, True, name="final")(x))


def test_haiku_gpt(check):
    model = hk.without_apply_rng(hk.transform(haiku_gpt))
    with jax.numpy_rank_promotion("allow"):
        params = model.init(jax.random.key(0), tokens())
        check(model.apply, params, tokens(), sites=3, others=[(tokens(3, 5),)], grads=True, halves=True)


def test_haiku_linear_takes_a_norms_bias():
    """It broadcasts its bias to the whole of its result."""
    model = hk.without_apply_rng(hk.transform(haiku_gpt))
    with jax.numpy_rank_promotion("allow"):
        params = shaken(widened(model.init(jax.random.key(0), tokens())))
        wanted = model.apply(params, tokens())
        branch = trace(model.apply, params, tokens())
        assert [norm.keep for norm in branch.norms] == [None] * 3
        biases = {reader.kernel: reader.bias for norm in branch.norms for reader in norm.readers}
        assert biases["attn_0/query/w"] == "attn_0/query/b"
        assert biases["linear_2/w"] == "linear_2/b"
        out = convert(model.apply, params, tokens(), fold=True)
        assert {"final/scale", "final/offset", "ln1_0/scale", "ln1_0/offset", "ln2_0/scale"} == set(out.report.folded)
        for fn, new in ((model.apply, pn.fold_affine(params, branch)), (out.fn, out.params)):
            assert jnp.all(new["final"]["scale"] == 1)
            assert worst(wanted, fn(new, tokens())) < 1e-10


class Block(eqx.Module):
    ln1: eqx.nn.LayerNorm
    ln2: eqx.nn.LayerNorm
    attn: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.ln1, self.ln2 = eqx.nn.LayerNorm(D), eqx.nn.LayerNorm(D, use_bias=False)
        self.attn = eqx.nn.MultiheadAttention(2, D, use_output_bias=True, key=key)
        self.mlp = eqx.nn.MLP(D, D, 2 * D, 1, jax.nn.gelu, key=key)

    def __call__(self, x):
        h = jax.vmap(self.ln1)(x)
        x = x + self.attn(h, h, h)
        return x + jax.vmap(self.mlp)(jax.vmap(self.ln2)(x))


class GPT(eqx.Module):
    embed: eqx.nn.Embedding
    position: jax.Array
    blocks: list
    final: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        self.embed, self.position = eqx.nn.Embedding(V, D, key=key), jax.random.normal(key, (16, D))
        self.blocks = [Block(k) for k in jax.random.split(key, 1)]
        self.final, self.head = eqx.nn.LayerNorm(D), eqx.nn.Linear(D, V, key=key)

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens) + self.position[: tokens.shape[0]]
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.final)(x))


def test_equinox_gpt(check):
    params, static = eqx.partition(GPT(jax.random.key(0)), eqx.is_inexact_array)
    fn = lambda p, t: jax.vmap(eqx.combine(p, static))(t)  # noqa: E731
    check(fn, params, tokens(), sites=3, others=[(tokens(3, 5),)], grads=True, halves=True)


def test_a_whole_equinox_module_as_parameters(check):
    """Functions and numbers among the leaves are part of the program."""
    model = GPT(jax.random.key(0))
    out = convert(lambda m, t: jax.vmap(m)(t), model, tokens())
    assert out.report.converted == 3
    assert isinstance(out.params, GPT)
    assert jnp.allclose(jax.vmap(model)(tokens()), out.fn(out.params, tokens()))
