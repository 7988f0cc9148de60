"""Kits of layers in five libraries, each made of that library's own modules, for the models in `architectures`.

`LIBRARIES[name](architecture)` is (fn, params): a function of the parameters, the inputs and, for a random architecture, a key.
"""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from architectures import HEADS, D, V
from flax import nnx

RATE = 0.4


def causal_mask(x):
    return np.tril(np.ones((x.shape[1], x.shape[1]), bool))


def cast(tree, dtype):
    """For libraries whose layers compute in the type of their parameters."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


# --- Flax Linen ---


class LinenBody(nn.Module):
    body: callable
    dtype: type

    @nn.compact
    def __call__(self, *inputs):
        return self.body(Linen(self, self.dtype), *inputs)


class Linen:
    def __init__(self, module, dtype, prefix="", made=None):
        self.module, self.dtype, self.prefix = module, dtype, prefix
        self.made = {} if made is None else made

    def scope(self, name):
        return Linen(self.module, self.dtype, f"{self.prefix}{name}_", self.made)

    def get(self, make, name, *args, **options):
        name = self.prefix + name
        if name not in self.made:
            self.made[name] = make(*args, name=name, dtype=self.dtype, **options)
        return self.made[name]

    def embed(self, name, tokens):
        return self.get(nn.Embed, name, V, D)(tokens)

    def unembed(self, name, x):
        return self.get(nn.Embed, name, V, D).attend(x)

    def linear(self, name, x, width):
        return self.get(nn.Dense, name, width)(x)

    def norm(self, name, x):
        return self.get(nn.LayerNorm, name)(x)

    def attention(self, name, x, memory=None, causal=False):
        mask = causal_mask(x)[None, None] if causal else None
        return self.get(nn.MultiHeadDotProductAttention, name, HEADS)(x, memory, mask=mask)

    def conv(self, name, images, width, patch):
        return self.get(nn.Conv, name, width, (patch, patch), strides=(patch, patch), padding="VALID")(images)

    def param(self, name, shape):
        return self.module.param(self.prefix + name, nn.initializers.normal(1.0), shape)

    def dropout(self, x):
        return nn.Dropout(RATE, deterministic=False)(x)

    def layers(self, name, n, body, x):
        scan = nn.scan(
            lambda module, x, _: (module(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=n,
        )
        return scan(LinenBody(body, self.dtype, name=name), x, None)[0]

    def remat(self, name, body, x):
        return nn.remat(LinenBody)(body, self.dtype, name=name)(x)


def linen(architecture):
    model = LinenBody(architecture.model, architecture.dtype)
    params = jax.jit(model.init)({"params": jax.random.key(0), "dropout": jax.random.key(1)}, *architecture.inputs())
    if architecture.random:
        return lambda p, *x: model.apply(p, *x[:-1], rngs={"dropout": x[-1]}), params
    return model.apply, params


# --- Flax NNX ---


class Holder(nnx.Module):
    """Modules by name, made when they are first asked for."""


class NNX:
    def __init__(self, holder, dtype, rngs, prefix="", key=None):
        self.holder, self.dtype, self.rngs, self.prefix, self.key = holder, dtype, rngs, prefix, key

    def scope(self, name):
        return NNX(self.holder, self.dtype, self.rngs, f"{self.prefix}{name}_", self.key)

    def get(self, name, make):
        name = self.prefix + name
        if not hasattr(self.holder, name):
            setattr(self.holder, name, make())
        return getattr(self.holder, name)

    def embed(self, name, tokens):
        return self.get(name, lambda: nnx.Embed(V, D, dtype=self.dtype, rngs=self.rngs))(tokens)

    def unembed(self, name, x):
        return getattr(self.holder, name).attend(x)

    def linear(self, name, x, width):
        return self.get(name, lambda: nnx.Linear(x.shape[-1], width, dtype=self.dtype, rngs=self.rngs))(x)

    def norm(self, name, x):
        return self.get(name, lambda: nnx.LayerNorm(D, dtype=self.dtype, rngs=self.rngs))(x)

    def attention(self, name, x, memory=None, causal=False):
        mask = causal_mask(x)[None, None] if causal else None
        make = lambda: nnx.MultiHeadAttention(HEADS, D, decode=False, dtype=self.dtype, rngs=self.rngs)  # noqa: E731
        return self.get(name, make)(x, memory, mask=mask)

    def conv(self, name, images, width, patch):
        size = (patch, patch)
        make = lambda: nnx.Conv(images.shape[-1], width, size, size, padding="VALID", dtype=self.dtype, rngs=self.rngs)  # noqa: E731
        return self.get(name, make)(images)

    def param(self, name, shape):
        return self.get(name, lambda: nnx.Param(jax.random.normal(self.rngs.params(), shape)))[...]

    def dropout(self, x):
        self.key = jax.random.fold_in(self.key, 1)
        return nnx.Dropout(RATE, deterministic=False)(x, rngs=nnx.Rngs(dropout=self.key))

    def filled(self, body, x, rngs):
        holder = Holder()
        body(NNX(holder, self.dtype, rngs), x)
        return holder

    def layers(self, name, n, body, x):
        make = nnx.vmap(lambda rngs: self.filled(body, x, rngs), in_axes=(nnx.StateAxes({...: 0}),), out_axes=0)
        stack = self.get(name, lambda: make(self.rngs.split(n)))
        step = lambda x, holder: body(NNX(holder, self.dtype, None), x)  # noqa: E731
        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, stack)

    def remat(self, name, body, x):
        holder = self.get(name, lambda: self.filled(body, x, self.rngs))
        return nnx.remat(lambda holder, x: body(NNX(holder, self.dtype, None), x))(holder, x)


def flax_nnx(architecture):
    holder = Holder()
    architecture.model(NNX(holder, architecture.dtype, nnx.Rngs(0), key=jax.random.key(0)), *architecture.inputs())
    graph, params, rest = nnx.split(holder, nnx.Param, ...)

    def fn(params, *inputs):
        *inputs, key = inputs if architecture.random else (*inputs, None)
        merged = nnx.merge(graph, params, rest)
        return architecture.model(NNX(merged, architecture.dtype, None, key=key), *inputs)

    return fn, params


# --- Haiku ---


class Haiku:
    def __init__(self, dtype, prefix="", made=None):
        self.dtype, self.prefix = dtype, prefix
        self.made = {} if made is None else made

    def scope(self, name):
        return Haiku(self.dtype, f"{self.prefix}{name}_", self.made)

    def get(self, make, name, *args, **options):
        name = self.prefix + name
        if name not in self.made:
            self.made[name] = make(*args, name=name, **options)
        return self.made[name]

    def embed(self, name, tokens):
        return self.get(hk.Embed, name, V, D)(tokens)

    def unembed(self, name, x):
        return x @ self.get(hk.Embed, name, V, D).embeddings.T

    def linear(self, name, x, width):
        return self.get(hk.Linear, name, width)(x)

    def norm(self, name, x):
        return self.get(hk.LayerNorm, name, -1, True, True)(x)

    def attention(self, name, x, memory=None, causal=False):
        memory = x if memory is None else memory
        options = {"model_size": D, "w_init": hk.initializers.VarianceScaling()}
        attend = self.get(hk.MultiHeadAttention, name, HEADS, D // HEADS, **options)
        return attend(x, memory, memory, causal_mask(x)[None, None] if causal else None)

    def conv(self, name, images, width, patch):
        return self.get(hk.Conv2D, name, width, patch, patch, padding="VALID")(images)

    def param(self, name, shape):
        return hk.get_parameter(self.prefix + name, shape, init=hk.initializers.RandomNormal())

    def dropout(self, x):
        return hk.dropout(hk.next_rng_key(), RATE, x)

    def layers(self, name, n, body, x):
        return hk.experimental.layer_stack(n, name=name)(lambda x: body(Haiku(self.dtype), x))(x)

    def remat(self, name, body, x):
        return hk.remat(lambda x: body(Haiku(self.dtype), x))(x)


def haiku(architecture):
    model = hk.transform(lambda *inputs: architecture.model(Haiku(architecture.dtype), *inputs))
    params = jax.jit(model.init)(jax.random.key(0), *architecture.inputs())

    def fn(params, *inputs):
        *inputs, key = inputs if architecture.random else (*inputs, None)
        return model.apply(cast(params, architecture.dtype), key, *inputs)

    return fn, params


# --- Equinox ---


def over(module, x, times):
    """A module that takes one example, for `times` leading axes."""
    for _ in range(times):
        module = jax.vmap(module)
    return module(x)


class Equinox:
    def __init__(self, tree, dtype, key, prefix=""):
        self.tree, self.dtype, self.key, self.prefix = tree, dtype, key, prefix

    def scope(self, name):
        return Equinox(self.tree, self.dtype, self.key, f"{self.prefix}{name}_")

    def next_key(self):
        self.key, own = jax.random.split(self.key)
        return own

    def get(self, name, make):
        name = self.prefix + name
        if name not in self.tree:
            self.tree[name] = make(self.next_key())
        return self.tree[name]

    def embed(self, name, tokens):
        return over(self.get(name, lambda key: eqx.nn.Embedding(V, D, key=key)), tokens, 2)

    def unembed(self, name, x):
        return x @ self.tree[name].weight.T

    def linear(self, name, x, width):
        return over(self.get(name, lambda key: eqx.nn.Linear(x.shape[-1], width, key=key)), x, x.ndim - 1)

    def norm(self, name, x):
        return over(self.get(name, lambda key: eqx.nn.LayerNorm(D)), x, x.ndim - 1)

    def attention(self, name, x, memory=None, causal=False):
        options = {"use_query_bias": True, "use_key_bias": True, "use_value_bias": True, "use_output_bias": True}
        attend = self.get(name, lambda key: eqx.nn.MultiheadAttention(HEADS, D, key=key, **options))
        mask = causal_mask(x) if causal else None
        return jax.vmap(lambda x, m: attend(x, m, m, mask))(x, x if memory is None else memory)

    def conv(self, name, images, width, patch):
        make = lambda key: eqx.nn.Conv2d(images.shape[-1], width, patch, patch, key=key)  # noqa: E731
        return jax.vmap(self.get(name, make))(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)

    def param(self, name, shape):
        return self.get(name, lambda key: jax.random.normal(key, shape))

    def dropout(self, x):
        return eqx.nn.Dropout(RATE)(x, key=self.next_key())

    def filled(self, body, x, key):
        tree = {}
        body(Equinox(tree, self.dtype, key), x)
        return tree

    def layers(self, name, n, body, x):
        make = lambda key: eqx.filter_vmap(lambda own: self.filled(body, x, own))(jax.random.split(key, n))  # noqa: E731
        arrays, static = eqx.partition(self.get(name, make), eqx.is_array)
        step = lambda x, own: (body(Equinox(eqx.combine(own, static), self.dtype, None), x), None)  # noqa: E731
        return jax.lax.scan(step, x, arrays)[0]

    def remat(self, name, body, x):
        tree = self.get(name, lambda key: self.filled(body, x, key))
        return eqx.filter_checkpoint(lambda tree, x: body(Equinox(tree, self.dtype, None), x))(tree, x)


def equinox(architecture):
    tree = {}
    architecture.model(Equinox(tree, architecture.dtype, jax.random.key(0)), *architecture.inputs())
    params, static = eqx.partition(tree, eqx.is_inexact_array)

    def fn(params, *inputs):
        *inputs, key = inputs if architecture.random else (*inputs, None)
        whole = eqx.combine(cast(params, architecture.dtype), static)
        return architecture.model(Equinox(whole, architecture.dtype, key), *inputs)

    return fn, params


# --- plain JAX ---


class Plain:
    def __init__(self, tree, dtype, key, prefix=""):
        self.tree, self.dtype, self.key, self.prefix = tree, dtype, key, prefix

    def scope(self, name):
        return Plain(self.tree, self.dtype, self.key, f"{self.prefix}{name}_")

    def next_key(self):
        self.key, own = jax.random.split(self.key)
        return own

    def param(self, name, shape):
        name = self.prefix + name
        if name not in self.tree:
            self.tree[name] = jax.random.normal(self.next_key(), shape)
        return self.tree[name]

    def embed(self, name, tokens):
        return self.param(name, (V, D))[tokens]

    def unembed(self, name, x):
        return x @ self.param(name, (V, D)).T

    def linear(self, name, x, width):
        return x @ self.param(f"{name}_kernel", (x.shape[-1], width)) + self.param(f"{name}_bias", (width,))

    def norm(self, name, x):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centered = wide - wide.mean(-1, keepdims=True)
        normal = centered * jax.lax.rsqrt(jnp.mean(centered**2, -1, keepdims=True) + 1e-5)
        return normal.astype(x.dtype) * self.param(f"{name}_scale", (D,)) + self.param(f"{name}_bias", (D,))

    def attention(self, name, x, memory=None, causal=False):
        heads = self.scope(name)
        memory = x if memory is None else memory
        q, k, v = (jnp.einsum("bld,dhk->blhk", y, heads.param(w, (D, HEADS, D // HEADS))) for y, w in zip(
            (x, memory, memory), "qkv", strict=True
        ))  # fmt: skip
        scores = jnp.einsum("blhk,bthk->bhlt", q, k)
        weights = jax.nn.softmax(jnp.where(causal_mask(x), scores, -1e9) if causal else scores)
        return jnp.einsum("bhlt,bthk,hkd->bld", weights, v, heads.param("o", (HEADS, D // HEADS, D)))

    def conv(self, name, images, width, patch):
        kernel = self.param(f"{name}_kernel", (patch, patch, images.shape[-1], width))
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(images, kernel, (patch, patch), "VALID", dimension_numbers=layout)
        return y + self.param(f"{name}_bias", (width,))

    def dropout(self, x):
        keep = jax.random.bernoulli(self.next_key(), 1 - RATE, x.shape)
        return jnp.where(keep, x / (1 - RATE), 0.0)

    def filled(self, body, x, key):
        tree = {}
        body(Plain(tree, self.dtype, key), x)
        return tree

    def layers(self, name, n, body, x):
        if name not in self.tree:
            trees = [self.filled(body, x, self.next_key()) for _ in range(n)]
            self.tree[name] = jax.tree.map(lambda *a: jnp.stack(a), *trees)
        return jax.lax.scan(lambda x, own: (body(Plain(own, self.dtype, None), x), None), x, self.tree[name])[0]

    def remat(self, name, body, x):
        if name not in self.tree:
            self.tree[name] = self.filled(body, x, self.next_key())
        return jax.checkpoint(lambda tree, x: body(Plain(tree, self.dtype, None), x))(self.tree[name], x)


def plain(architecture):
    params = {}
    architecture.model(Plain(params, architecture.dtype, jax.random.key(0)), *architecture.inputs())

    def fn(params, *inputs):
        *inputs, key = inputs if architecture.random else (*inputs, None)
        return architecture.model(Plain(cast(params, architecture.dtype), architecture.dtype, key), *inputs)

    return fn, params


LIBRARIES = {"Flax Linen": linen, "Flax NNX": flax_nnx, "Haiku": haiku, "Equinox": equinox, "plain JAX": plain}
