"""Multi-head attention, and which of its kernels serves.

Shapes: B batch, L tokens, N = B L, D nominal width, R lanes of the main branch, H heads, K head width, T cached tokens.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from prenorm_jax import placement
from prenorm_jax.hopper import attention as hopper
from prenorm_jax.models.config import ATTENTIONS, Transformer, require_one_of
from prenorm_jax.models.layers import Linear, Written, normal, read_together, reader_bias, shared
from prenorm_jax.models.variants import Variant

Array = jax.Array

TOGETHER = 2**13
"""From so many tokens on a device, one product makes queries, keys and values where a kernel takes them so: for fewer, it saves less than
it takes to put three matrices together (docs/performance-log.md)."""


class Attention(nnx.Module):
    """Multi-head attention from a normalised main branch to what it writes: (N, R) -> (N, R)."""

    def __init__(self, config: Transformer, variant: Variant, *, causal: bool, layers: tuple[int, ...], rngs: nnx.Rngs):
        linear = functools.partial(Linear, layers=layers, dtype=config.param_dtype, rngs=rngs)
        lanes = variant.lanes(config.width)
        bias = reader_bias(config, variant, config.bias and config.qkv_bias)
        self.query = linear(lanes, config.width, bias=bias)
        self.key = linear(lanes, config.width, bias=bias)
        self.value = linear(lanes, config.width, bias=bias)
        init = normal(1 / math.sqrt(2 * config.depth * config.width))
        self.out = linear(config.width, lanes, bias=config.bias, init=init, stored=placement.ROWS)
        self.heads, self.head_width = config.heads, config.head_width
        self.causal, self.implementation = causal, config.attention

    @jax.named_scope("attention")
    def __call__(
        self,
        n: Array,
        batch: int,
        cache: Any = None,
        position: Array | int = 0,
        length: int | None = None,
        read: int | None = None,
    ) -> tuple[Written, Any]:
        """Returns what it writes and, where a cache {"key", "value"} of (B, H, T, K) is given, that cache with these tokens in it.

        Of each sequence the first `length` tokens are seen, or all of them; the first `read` write, or all of them.
        """
        readers, tokens = (self.query, self.key, self.value), n.shape[0] // batch
        if cache is None and read is None and self._in_one_product(n, tokens):
            qkv = read_together(readers, n, self.heads).reshape(batch, tokens, self.heads, -1)
            y = _attend_on_even_rows("hopper", (qkv,), causal=False, length=length)
            return self.out.apart(y.reshape(n.shape[0], -1)), None
        rows = (first_tokens(n, batch, read), n, n) if read else shared(n, len(readers))
        q, k, v = (
            reader(share).reshape(batch, -1, self.heads, self.head_width)
            for reader, share in zip(readers, rows, strict=True)
        )
        if cache is not None:
            cache = {
                name: jax.lax.dynamic_update_slice_in_dim(
                    cache[name], new.swapaxes(1, 2).astype(cache[name].dtype), position, axis=2
                )
                for name, new in (("key", k), ("value", v))
            }
        if cache is None or (isinstance(position, int) and position == 0):  # nothing comes before these tokens
            # The other kernels are made for many queries.
            implementation = "xla" if read else self.implementation
            y = attend(q, k, v, causal=self.causal, length=length, implementation=implementation)
        else:
            seen = jnp.arange(cache["key"].shape[2])[None, :] <= position + jnp.arange(q.shape[1])[:, None]
            y = _attend_written_out(q, cache["key"], cache["value"], seen[None, None])
        return self.out.apart(y.reshape(-1, self.heads * self.head_width)), cache

    def _in_one_product(self, n: Array, tokens: int) -> bool:
        """Whether a kernel takes queries, keys and values as one product of n (N, R) makes them, and that pays: with tokens enough, and
        whole heads where a mesh splits the matrices."""
        if self.causal or placement.own(n.shape[0]) < TOGETHER:
            return False
        whole = placement.own(self.heads, (placement.TENSOR, placement.FSDP)) > 0
        return whole and attention_kernel(self.implementation, n.dtype, self.head_width, tokens, tokens) == "hopper"


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    mask: Array | None = None,
    length: int | None = None,
    implementation: str = "auto",
) -> Array:
    """softmax(q k^T / sqrt(K)) v for q (B, L, H, K) and k, v (B, T, H, K), the softmax in float32 or wider.

    Args:
      mask: (1 or B, 1 or H, L, T) bool, True where a key may be seen; "xla" alone takes one.
      length: how many keys of each sequence may be seen, from the first on; None: all.
      implementation: one of `ATTENTIONS`.
    """
    plain = mask is None and not causal
    kernel = attention_kernel(implementation, q.dtype, q.shape[-1], *((q.shape[1], k.shape[1]) if plain else ()))
    if kernel == "hopper" and not plain:
        raise ValueError(
            "model.attention: hopper's kernels see every key; for causal attention choose auto, cudnn or xla"
        )
    if kernel != "xla":
        return _attend_on_even_rows(kernel, (q, k, v), causal=causal, length=length)
    if length is not None:
        seen = (jnp.arange(k.shape[1]) < length)[None, None, None]
        mask = seen if mask is None else mask & seen
    if q.dtype == jnp.float64:  # jax.nn's takes its softmax in float32 whatever the dtype
        if causal:
            seen = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))[None, None]
            mask = seen if mask is None else mask & seen
        return _attend_written_out(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="xla")


def attention_kernel(implementation: str, dtype: Any, head_width: int, *lengths: int) -> str:
    """What one of `ATTENTIONS` comes to: "auto" is hopper where it serves (see `hopper.served`), else cudnn where that does (a GPU,
    bfloat16 or float16, a head width of a multiple of 8 up to 128), else xla.

    Args:
      lengths: of queries and keys, where every query may see the same keys.
    """
    require_one_of("model.attention", implementation, ATTENTIONS)
    if implementation != "auto":
        return implementation
    if lengths and hopper.served(dtype, head_width, *lengths):
        return "hopper"
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    served = half and head_width % 8 == 0 and head_width <= 128 and jax.default_backend() == "gpu"
    return "cudnn" if served else "xla"


# What a sequence's length has to be a multiple of. cuDNN differentiates even ones only.
MULTIPLES = {"xla": 1, "cudnn": 2, "hopper": hopper.ROWS}


def even_length(config: Transformer, length: int) -> int:
    """The length to run sequences of `length` tokens with: one that the attention's kernel takes (`MULTIPLES`). The 197 tokens of a ViT
    take a few more, which nobody sees. Adding them once costs a share of their number; in each attention it costs a third of it."""
    multiple = MULTIPLES[attention_kernel(config.attention, config.dtype, config.head_width, length, length)]
    return -(-length // multiple) * multiple


def first_tokens(x: Array, batch: int, count: int | None) -> Array:
    """Of the tokens of `batch` sequences (B L, R) the first `count` of each, (B count, R); None: all."""
    return x if count is None else x.reshape(batch, -1, x.shape[-1])[:, :count].reshape(batch * count, -1)


def _attend_on_even_rows(kernel: str, qkv: tuple[Array, ...], *, causal: bool, length: int | None) -> Array:
    """Attention in a kernel that takes some lengths alone. qkv: queries, keys and values, or one array of all where the kernel takes it."""
    queries, keys, multiple = qkv[0].shape[1], qkv[-1].shape[1], MULTIPLES[kernel]
    if queries % multiple:
        length = keys if length is None else length
        qkv = tuple(jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)]) for x in qkv)
    # The queries behind `length` attend as well: what nobody reads has to be finite all the same.
    if kernel == "hopper":
        seen = qkv[-1].shape[1] if length is None else length

        def attend(*qkv: Array) -> Array:
            return hopper.attend(qkv, seen)
    else:
        attend = functools.partial(_attend_in_cudnn, causal=causal, length=length)
    return placement.on_each_device(attend, qkv, (placement.HEADS,) * len(qkv), placement.HEADS)[:, :queries]


def _attend_in_cudnn(q: Array, k: Array, v: Array, *, causal: bool, length: int | None) -> Array:
    lengths = None if length is None else jnp.full((len(q),), length, jnp.int32)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def _attend_written_out(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """`attend` as its formula, for keys and values of (B, H, T, K), as a cache has them."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("blhk,bhtk->bhlt", q, k, preferred_element_type=wide) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhlt,bhtk->blhk", weights.astype(v.dtype), v)
