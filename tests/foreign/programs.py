"""Small models, each one function of (layers, inputs), for what `architecture` has no field for; run in Linen and in NNX.

A body asks `layers` for a library's modules by name, and a name that is asked for twice is one module, used twice:

    embed(name, ids)      linear(name, x, features)      norm(name, x)      leaf(name, *shape): a bare parameter

`layers.width` is the lanes of the main branch as built, `layers.nominal` their number before any compression.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from architecture import VOCABULARY
from flax import nnx
from foreign_linen import zeros

EPS = 3e-2


@dataclasses.dataclass(frozen=True)
class Program:
    """A model's body: body(layers, inputs) -> outputs."""

    body: Callable[..., Any]
    width: int = 8
    nominal: int = 8
    inputs: int = 4  # tokens
    patches: bool = False
    mlp: str = "plain"


class LinenProgram(nn.Module):
    c: Program

    @nn.compact
    def __call__(self, *inputs):
        return self.c.body(_LinenLayers(self), *inputs)


class _LinenLayers:
    def __init__(self, module):
        self.module, self.made = module, {}
        self.width, self.nominal = module.c.width, module.c.nominal

    def embed(self, name, ids, size=VOCABULARY, width=None):
        return self._module(name, nn.Embed, size, width or self.width, embedding_init=zeros)(ids)

    def linear(self, name, x, features, bias=True):
        return self._module(name, nn.Dense, features, use_bias=bias, kernel_init=zeros)(x)

    def norm(self, name, x, scale=True, bias=True):
        return self._module(name, nn.LayerNorm, EPS, use_scale=scale, use_bias=bias, use_fast_variance=False)(x)

    def rms_norm(self, name, x):
        return self._module(name, nn.RMSNorm, EPS)(x)

    def leaf(self, name, *shape):
        return self._once(name, lambda: self.module.param(name, zeros, shape))

    def _module(self, name, kind, *args, **kwargs):
        return self._once(name, lambda: kind(*args, name=name, **kwargs))

    def _once(self, name, make):
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]


class NNXProgram(nnx.Module):
    """Its modules are made as its body asks for them, the first time that it runs."""

    def __init__(self, c, rngs, *inputs):
        self.c, self.rngs = c, rngs
        self(*inputs)
        del self.rngs

    def __call__(self, *inputs):
        return self.c.body(_NNXLayers(self), *inputs)


class _NNXLayers:
    def __init__(self, module):
        self.module = module
        self.width, self.nominal = module.c.width, module.c.nominal

    def embed(self, name, ids, size=VOCABULARY, width=None):
        return self._once(name, lambda rngs: nnx.Embed(size, width or self.width, dtype=float, rngs=rngs))(ids)

    def linear(self, name, x, features, bias=True):
        return self._once(name, lambda rngs: nnx.Linear(x.shape[-1], features, use_bias=bias, rngs=rngs))(x)

    def norm(self, name, x, scale=True, bias=True):
        fields = {"epsilon": EPS, "use_scale": scale, "use_bias": bias, "use_fast_variance": False}
        return self._once(name, lambda rngs: nnx.LayerNorm(x.shape[-1], **fields, rngs=rngs))(x)

    def rms_norm(self, name, x):
        return self._once(name, lambda rngs: nnx.RMSNorm(x.shape[-1], epsilon=EPS, rngs=rngs))(x)

    def leaf(self, name, *shape):
        return self._once(name, lambda rngs: nnx.Param(jax.random.normal(rngs.params(), shape)))[...]

    def _once(self, name, make):
        if not hasattr(self.module, name):
            setattr(self.module, name, make(self.module.rngs))
        return getattr(self.module, name)
