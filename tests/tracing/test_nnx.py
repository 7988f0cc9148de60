"""Flax NNX models, through split and merge: what is asked of them beyond the cells of `test_matrix`."""

import jax
import jax.numpy as jnp
from flax import nnx

D, V = 8, 11


class Block(nnx.Module):
    def __init__(self, rngs):
        self.ln1, self.ln2 = nnx.LayerNorm(D, rngs=rngs), nnx.LayerNorm(D, use_bias=False, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, D, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(D, 2 * D, rngs=rngs), nnx.Linear(2 * D, D, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.down(nnx.gelu(self.up(self.ln2(x))))


class GPT(nnx.Module):
    def __init__(self, rngs, layers=1, scan=False):
        self.embed, self.position = nnx.Embed(V, D, dtype=jnp.float64, rngs=rngs), nnx.Param(jnp.ones((1, 16, D)))
        self.scan, self.layers = scan, layers
        if scan:
            make = nnx.vmap(lambda r: Block(r), in_axes=(nnx.StateAxes({...: 0}),), out_axes=0)
            self.blocks = make(rngs.split(layers))
        else:
            self.blocks = nnx.List([Block(rngs) for _ in range(layers)])
        self.final, self.head = nnx.LayerNorm(D, rngs=rngs), nnx.Linear(D, V, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position[:, : tokens.shape[1]]
        if self.scan:
            x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        else:
            for block in self.blocks:
                x = block(x)
        return self.head(self.final(x))


def tokens(b=2, n=4):
    return jnp.arange(b * n).reshape(b, n) % V


def split(model):
    graph, state = nnx.split(model, nnx.Param, ...)[0], nnx.state(model, nnx.Param)
    rest = nnx.state(model, nnx.Not(nnx.Param))
    return lambda state, *inputs: nnx.merge(graph, state, rest)(*inputs), state


def test_looped_gpt(check):
    fn, state = split(GPT(nnx.Rngs(0)))
    out = check(fn, state, tokens(), sites=3, others=[(tokens(3, 6),)], halves=True)
    assert ("blocks/0/down/kernel", (-1,)) in out.report.leaves


def test_scanned_gpt(check):
    fn, state = split(GPT(nnx.Rngs(0), layers=3, scan=True))
    out = check(fn, state, tokens(), sites=3, grads=True)
    assert out.report.reductions_before == 14
    assert out.report.reductions_after == 7
    assert ("blocks/down/kernel", (-1,)) in out.report.leaves


def test_vmapped_conversion(check):
    fn, state = split(GPT(nnx.Rngs(0)))
    out = check(fn, state, tokens(), sites=3)
    batched = jax.vmap(out.fn, in_axes=(None, 0))(out.params, jnp.stack([tokens(), tokens() + 1]))
    assert batched.shape == (2, 2, 4, V)
