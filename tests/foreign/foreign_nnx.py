"""The Transformer of `architecture`, in Flax NNX."""

import jax
import jax.numpy as jnp
from architecture import BLOCK_EPS, CLASSES, EMBED_EPS, EXPERTS, FINAL_EPS, VOCABULARY, sincos
from flax import nnx


def parameter(rngs, *shape):
    return nnx.Param(jax.random.normal(rngs.params(), shape))


def layer_norm(c, eps, rngs):
    return nnx.LayerNorm(
        c.width, epsilon=eps, use_scale=c.norm_scale, use_bias=c.norm_bias, use_fast_variance=False, rngs=rngs
    )


class Writes(nnx.Module):
    """The last linear map of a residual branch, with an adapter if there is one: (..., inputs) -> (..., written)."""

    def __init__(self, c, inputs, rngs):
        self.kernel, self.bias = parameter(rngs, *inputs, c.written), parameter(rngs, c.written)
        self.lora_a = nnx.data(nnx.LoRAParam(jnp.ones((*inputs, c.lora))) if c.lora else None)
        self.lora_b = nnx.data(nnx.LoRAParam(jnp.ones((c.lora, c.written))) if c.lora else None)
        self.axes = len(inputs)

    def __call__(self, x):
        y = jnp.tensordot(x, self.kernel[...], self.axes) + self.bias[...].reshape(1, 1, -1)
        if self.lora_a is not None:
            y = y + jnp.tensordot(x, self.lora_a[...], self.axes) @ self.lora_b[...]
        return y


class Attention(nnx.Module):
    def __init__(self, c, rngs):
        def general(*shape):
            return nnx.LinearGeneral(c.width, shape, use_bias=c.reader_bias, rngs=rngs)

        if c.qkv == "fused":
            self.qkv = general(3, c.heads, c.head_dim)
        for name, heads in (("query", c.heads), ("key", c.kv_heads), ("value", c.kv_heads)):
            if c.qkv == "heads":
                setattr(self, name, general(heads, c.head_dim))
            elif c.qkv == "flat":
                setattr(self, name, nnx.Linear(c.width, heads * c.head_dim, use_bias=c.reader_bias, rngs=rngs))
        if c.qk_norm:
            self.query_norm = nnx.LayerNorm(c.head_dim, use_bias=False, rngs=rngs)
            self.key_norm = nnx.LayerNorm(c.head_dim, use_bias=False, rngs=rngs)
        self.out = Writes(c, (c.heads * c.head_dim,) if c.qkv == "flat" else (c.heads, c.head_dim), rngs)
        self.c = c

    def __call__(self, n, memory=None):
        c = self.c
        memory = n if memory is None else memory
        if c.qkv == "fused":
            q, k, v = (self.qkv(n)[..., part, :, :] for part in range(3))
        else:
            q, k, v = (
                f(x).reshape(*x.shape[:2], -1, c.head_dim)
                for f, x in ((self.query, n), (self.key, memory), (self.value, memory))
            )
        if c.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        k, v = (jnp.repeat(x, c.heads // x.shape[-2], axis=-2) for x in (k, v))
        weights = jax.nn.softmax(jnp.einsum("blhk,bmhk->bhlm", q, k))
        y = jnp.einsum("bhlm,bmhk->blhk", weights, v)
        return self.out(y.reshape(*y.shape[:2], -1) if c.qkv == "flat" else y)


class Mlp(nnx.Module):
    def __init__(self, c, rngs):
        self.up = nnx.Linear(c.width, c.mlp_width, use_bias=c.reader_bias, rngs=rngs)
        self.gate = nnx.Linear(c.width, c.mlp_width, use_bias=c.reader_bias, rngs=rngs) if c.mlp == "gated" else None
        self.down = Writes(c, (c.mlp_width,), rngs)

    def __call__(self, n):
        y = jnp.tanh(self.up(n))
        return self.down(y if self.gate is None else y * self.gate(n))


class Experts(nnx.Module):
    def __init__(self, c, rngs):
        self.router = nnx.Linear(c.width, EXPERTS, use_bias=c.reader_bias, rngs=rngs)
        self.up = parameter(rngs, EXPERTS, c.width, c.mlp_width)
        self.up_bias = nnx.data(parameter(rngs, EXPERTS, c.mlp_width) if c.reader_bias else None)
        self.down, self.down_bias = (
            parameter(rngs, EXPERTS, c.mlp_width, c.written),
            parameter(rngs, EXPERTS, c.written),
        )

    def __call__(self, n):
        y = jnp.einsum("bld,edf->blef", n, self.up[...])
        y = y if self.up_bias is None else y + self.up_bias[...][None, None]
        y = jnp.einsum("blef,efd->bled", jnp.tanh(y), self.down[...]) + self.down_bias[...][None, None]
        return jnp.einsum("bled,ble->bld", y, jax.nn.softmax(self.router(n)))


class Block(nnx.Module):
    def __init__(self, c, rngs):
        self.norm1 = layer_norm(c, BLOCK_EPS, rngs)
        self.norm2 = None if c.parallel else layer_norm(c, BLOCK_EPS, rngs)
        self.attn, self.mlp = Attention(c, rngs), (Experts if c.mlp == "experts" else Mlp)(c, rngs)
        if c.cross:
            self.norm3, self.cross = layer_norm(c, BLOCK_EPS, rngs), Attention(c, rngs)
        if c.layer_scale:
            self.scale1, self.scale2 = parameter(rngs, 1, 1, c.width), parameter(rngs, c.width)
        if c.dropout or c.drop_path:  # stochastic depth is one draw for a sample
            dims = (1, 2) if c.drop_path else ()
            self.drop1 = nnx.Dropout(c.dropout or c.drop_path, broadcast_dims=dims, rngs=rngs)
            self.drop2 = nnx.Dropout(c.dropout or c.drop_path, broadcast_dims=dims, rngs=rngs)
        self.c = c

    def __call__(self, x, memory=None):
        n = self.norm1(x)
        attended = self._out(self.attn(n), 1)
        if self.norm2 is None:
            return x + attended + self._out(self.mlp(n), 2)
        x = x + attended
        if self.c.cross:
            x = x + self.cross(self.norm3(x), memory)
        return x + self._out(self.mlp(self.norm2(x)), 2)

    def _out(self, y, index):
        if self.c.layer_scale:
            y = y * getattr(self, f"scale{index}")[...].reshape(1, 1, -1)
        return getattr(self, f"drop{index}")(y) if self.c.dropout or self.c.drop_path else y


class Constant(nnx.Module):
    """Fixed positions, as a module of their own."""

    def __init__(self, length, width):
        self.length, self.width = length, width

    def __call__(self):
        return jnp.asarray(sincos(self.length, self.width))


class Transformer(nnx.Module):
    def __init__(self, c, rngs, write=None):
        self.c, self.write = c, write
        if c.patches:
            self.patch = nnx.Conv(3, c.embedded, (2, 2), strides=(2, 2), padding="VALID", rngs=rngs)
        else:
            self.embed = nnx.Embed(VOCABULARY, c.nominal if c.tied else c.embedded, dtype=float, rngs=rngs)
        for name in c.extra:
            setattr(self, name, parameter(rngs, 1, 1, c.embedded))
        length = c.tokens if c.positions_last else c.inputs
        if c.positions == "learned":
            self.position = parameter(rngs, length, c.embedded)
        elif c.positions == "constant" and write is None:
            self.sincos = Constant(length, c.nominal)
        self.segment = nnx.Embed(2, c.embedded, dtype=float, rngs=rngs) if c.segments else None
        self.embed_norm = (
            nnx.LayerNorm(c.embedded, epsilon=EMBED_EPS, use_fast_variance=False, rngs=rngs) if c.embed_norm else None
        )
        if c.scan:
            self.blocks = nnx.vmap(lambda rngs: Block(c, rngs), in_axes=(nnx.StateAxes({...: 0}),), out_axes=0)(
                rngs.split(c.depth)
            )
        else:
            self.blocks = nnx.List([Block(c, rngs) for _ in range(c.depth)])
        self.norm = layer_norm(c, FINAL_EPS, rngs)
        self.norm_too = layer_norm(c, BLOCK_EPS, rngs) if c.final_norms == 2 else None
        for k in range(c.heads_read if not (c.headless or c.tied) else 0):
            setattr(self, f"head{k or ''}", nnx.Linear(c.width, CLASSES, use_bias=c.reader_bias, rngs=rngs))

    def __call__(self, inputs, memory=None):
        c = self.c
        if c.patches:
            x = self.patch(inputs)
            x = x.reshape(x.shape[0], -1, x.shape[-1])
        else:
            x = self.embed(inputs)
        x = x if c.positions_last else self._with_positions(x)
        for name in c.extra:
            token = getattr(self, name)[...]
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, x.shape[-1])), x], axis=1)
        x = self._with_positions(x) if c.positions_last else x
        x = x + self.segment(jnp.arange(x.shape[1]) % 2)[None] if self.segment is not None else x
        x = self.embed_norm(x) if self.embed_norm is not None else x

        def run(block, x):
            return (nnx.remat(type(block).__call__) if c.remat else type(block).__call__)(block, x, memory)

        if c.scan:
            x = nnx.scan(lambda x, block: run(block, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        else:
            for block in self.blocks:
                x = run(block, x)

        if self.norm_too is not None:
            return self.head(self.norm(x[:, 0])) + jnp.sin(self.head(self.norm_too(x.mean(axis=1))))
        x = {"first": x[:, 0], "mean": x.mean(axis=1)}.get(c.pool, x)
        n = self.norm(x)
        n = n.mean(axis=1) if c.pool == "mean after" else n
        if c.headless:
            return n
        if c.tied:
            return self.embed.attend(n)
        return [getattr(self, f"head{k or ''}")(n) for k in range(c.heads_read)]

    def _with_positions(self, x):
        if self.c.positions == "learned":
            return x + self.position[...][None]
        if self.c.positions == "constant":
            return x + (self.sincos() if self.write is None else self.write(sincos(x.shape[1], self.c.nominal)))[None]
        return x


class EncoderDecoder(nnx.Module):
    def __init__(self, encoder_config, decoder_config, rngs):
        self.encoder, self.decoder = Transformer(encoder_config, rngs), Transformer(decoder_config, rngs)

    def __call__(self, source, target):
        return self.decoder(target, self.encoder(source))
