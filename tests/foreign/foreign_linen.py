"""The Transformer of `architecture`, in Flax Linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from architecture import BLOCK_EPS, CLASSES, EMBED_EPS, EXPERTS, FINAL_EPS, VOCABULARY, Config, sincos

normal = nn.initializers.normal(1.0, jnp.float32)


def layer_norm(c, name, eps):
    return nn.LayerNorm(eps, use_scale=c.norm_scale, use_bias=c.norm_bias, use_fast_variance=False, name=name)


class Writes(nn.Module):
    """The last linear map of a residual branch, with an adapter if there is one: (..., inputs) -> (..., written)."""

    c: Config
    inputs: tuple

    @nn.compact
    def __call__(self, x):
        inputs, outputs = self.inputs, self.c.written
        kernel = self.param("kernel", normal, (*inputs, outputs))
        y = jnp.tensordot(x, kernel, len(inputs)) + self.param("bias", normal, (outputs,)).reshape(1, 1, -1)
        if self.c.lora:
            a = self.param("lora_a", normal, (*inputs, self.c.lora))
            y = y + jnp.tensordot(x, a, len(inputs)) @ self.param("lora_b", normal, (self.c.lora, outputs))
        return y


class Attention(nn.Module):
    c: Config

    @nn.compact
    def __call__(self, n, memory=None):
        c = self.c
        sizes = {"query": c.heads, "key": c.kv_heads, "value": c.kv_heads}
        if c.qkv == "fused":
            qkv = nn.DenseGeneral((3, c.heads, c.head_dim), use_bias=c.reader_bias, name="qkv")(n)
            q, k, v = (qkv[..., part, :, :] for part in range(3))
        else:
            q, k, v = (
                self._project(n if name == "query" or memory is None else memory, name, size)
                for name, size in sizes.items()
            )
        if c.qk_norm:
            q, k = (nn.LayerNorm(use_bias=False, name=f"{name}_norm")(x) for name, x in (("query", q), ("key", k)))
        k, v = (jnp.repeat(x, c.heads // x.shape[-2], axis=-2) for x in (k, v))
        weights = jax.nn.softmax(jnp.einsum("blhk,bmhk->bhlm", q, k))
        y = jnp.einsum("bhlm,bmhk->blhk", weights, v)
        if c.qkv == "flat":
            return Writes(c, (c.heads * c.head_dim,), name="out")(y.reshape(*y.shape[:2], -1))
        return Writes(c, (c.heads, c.head_dim), name="out")(y)

    def _project(self, x, name, heads):
        c = self.c
        if c.qkv == "flat":
            y = nn.Dense(heads * c.head_dim, use_bias=c.reader_bias, name=name)(x)
            return y.reshape(*x.shape[:2], heads, c.head_dim)
        return nn.DenseGeneral((heads, c.head_dim), use_bias=c.reader_bias, name=name)(x)


class Mlp(nn.Module):
    c: Config

    @nn.compact
    def __call__(self, n):
        c = self.c
        y = jnp.tanh(nn.Dense(c.mlp_width, use_bias=c.reader_bias, name="up")(n))
        if c.mlp == "gated":
            y = y * nn.Dense(c.mlp_width, use_bias=c.reader_bias, name="gate")(n)
        return Writes(c, (c.mlp_width,), name="down")(y)


class Experts(nn.Module):
    c: Config

    @nn.compact
    def __call__(self, n):
        c = self.c
        chosen = jax.nn.softmax(nn.Dense(EXPERTS, use_bias=c.reader_bias, name="router")(n))
        y = jnp.einsum("bld,edf->blef", n, self.param("up", normal, (EXPERTS, n.shape[-1], c.mlp_width)))
        if c.reader_bias:
            y = y + self.param("up_bias", normal, (EXPERTS, c.mlp_width))[None, None]
        y = jnp.einsum("blef,efd->bled", jnp.tanh(y), self.param("down", normal, (EXPERTS, c.mlp_width, c.written)))
        y = y + self.param("down_bias", normal, (EXPERTS, c.written))[None, None]
        return jnp.einsum("bled,ble->bld", y, chosen)


class Block(nn.Module):
    c: Config

    @nn.compact
    def __call__(self, x, memory=None):
        c = self.c
        mlp = (Experts if c.mlp == "experts" else Mlp)(c, name="mlp")
        n = layer_norm(c, "norm1", BLOCK_EPS)(x)
        attended = self._out(Attention(c, name="attn")(n), 1)
        if c.parallel:
            return x + attended + self._out(mlp(n), 2)
        x = x + attended
        if c.cross:
            x = x + Attention(c, name="cross")(layer_norm(c, "norm3", BLOCK_EPS)(x), memory)
        return x + self._out(mlp(layer_norm(c, "norm2", BLOCK_EPS)(x)), 2)

    def _out(self, y, index):
        c = self.c
        if c.layer_scale:
            y = y * self.param(f"scale{index}", normal, (1, 1, y.shape[-1]) if index == 1 else y.shape[-1:]).reshape(
                1, 1, -1
            )
        if c.drop_path:
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - c.drop_path, (y.shape[0], 1, 1))
            y = jnp.where(kept, y / (1 - c.drop_path), 0)
        return nn.Dropout(c.dropout, deterministic=False, name=f"drop{index}")(y) if c.dropout else y


class Layers(nn.Module):
    c: Config

    @nn.compact
    def __call__(self, x, memory=None):
        block = nn.remat(Block) if self.c.remat else Block
        for index in range(self.c.depth):
            x = block(self.c, name=str(index))(x, memory)
        return x


class Constant(nn.Module):
    """Fixed positions, as a module of their own."""

    length: int
    width: int

    def __call__(self):
        return jnp.asarray(sincos(self.length, self.width))


class Transformer(nn.Module):
    c: Config
    write: object = None  # what a model does to its constants, if it is told to

    @nn.compact
    def __call__(self, inputs, memory=None):
        c = self.c
        if c.patches:
            x = nn.Conv(c.embedded, (2, 2), strides=(2, 2), padding="VALID", name="patch")(inputs)
            x = x.reshape(x.shape[0], -1, x.shape[-1])
        else:
            embed = nn.Embed(VOCABULARY, c.nominal if c.tied else c.embedded, name="embed")
            x = embed(inputs)
        x = x if c.positions_last else self._with_positions(x)
        for name in c.extra:
            token = self.param(name, normal, (1, 1, c.embedded))
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, c.embedded)).astype(x.dtype), x], axis=1)
        x = self._with_positions(x) if c.positions_last else x
        if c.segments:
            x = x + nn.Embed(2, c.embedded, name="segment")(jnp.arange(x.shape[1]) % 2)[None]
        x = nn.LayerNorm(EMBED_EPS, use_fast_variance=False, name="embed_norm")(x) if c.embed_norm else x

        if c.scan:
            block = nn.remat(Block) if c.remat else Block
            x, _ = nn.scan(
                lambda block, x, _: (block(x, memory), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=c.depth,
            )(block(c, name="blocks"), x, None)
        else:
            x = Layers(c, name="blocks")(x, memory)

        norm = layer_norm(c, "norm", FINAL_EPS)
        if c.final_norms == 2:
            head = nn.Dense(CLASSES, use_bias=c.reader_bias, name="head")
            return head(norm(x[:, 0])) + jnp.sin(head(layer_norm(c, "norm_too", BLOCK_EPS)(x.mean(axis=1))))
        x = {"first": x[:, 0], "mean": x.mean(axis=1)}.get(c.pool, x)
        n = norm(x)
        n = n.mean(axis=1) if c.pool == "mean after" else n
        if c.headless:
            return n
        if c.tied:
            return embed.attend(n)
        return [nn.Dense(CLASSES, use_bias=c.reader_bias, name=f"head{k or ''}")(n) for k in range(c.heads_read)]

    def _with_positions(self, x):
        length, c = x.shape[1], self.c
        if c.positions == "learned":
            return x + self.param("position", normal, (length, c.embedded))[None]
        if c.positions == "constant":
            constant = (
                Constant(length, c.nominal, name="sincos")()
                if self.write is None
                else self.write(sincos(length, c.nominal))
            )
            return x + constant[None].astype(x.dtype)
        return x


class EncoderDecoder(nn.Module):
    encoder_config: Config
    decoder_config: Config

    @nn.compact
    def __call__(self, source, target):
        memory = Transformer(self.encoder_config, name="encoder")(source)
        return Transformer(self.decoder_config, name="decoder")(target, memory)
