"""Attention, MLP and the residual blocks, for every variant.

Shapes: B batch, L tokens, N = B L, D nominal width, R lanes of the main branch, H heads, K head width, F mlp width, T cached tokens.
Tokens are flat, (N, R), outside attention: with a batch axis XLA may put it innermost and transpose around each norm.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from prenorm_jax import norms, placement
from prenorm_jax.models import hopper
from prenorm_jax.models.config import ATTENTIONS, Transformer, require_one_of
from prenorm_jax.models.gelu import gelu
from prenorm_jax.models.stochastic_depth import of_sample
from prenorm_jax.models.variants import Variant

Array = jax.Array
Init = Callable[[Array, tuple[int, ...], Any], Array]


def normal(stddev: float) -> Init:
    """Truncated normal initialisation with a standard deviation of `stddev`."""
    return jax.nn.initializers.truncated_normal(stddev)


class Linear(nnx.Module):
    """x @ kernel + bias in the dtype of x; kernel (layers..., inputs, outputs)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        layers: tuple[int, ...] = (),
        init: Init | None = None,
        stored: placement.Place = placement.COLUMNS,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        init = init or normal(1 / math.sqrt(inputs))
        self.kernel = nnx.Param(init(rngs.params(), (*layers, inputs, outputs), jnp.dtype(dtype)))
        self.bias = nnx.Param(jnp.zeros((*layers, outputs), jnp.dtype(dtype))) if bias else None
        self.stored = stored

    def __call__(self, x: Array) -> Array:
        return self.biased(x @ self.matrix(x.dtype))

    def matrix(self, dtype: Any) -> Array:
        """The kernel as it multiplies an x of this dtype."""
        # Behind a barrier the cast (and the weight map before it) stays out of the product, whose kernel then takes bias and residual.
        return jax.lax.optimization_barrier(placement.gathered(self.kernel[...].astype(dtype), self.stored))

    def biased(self, y: Array) -> Array:
        """A product, with the bias."""
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)[None]

    def apart(self, x: Array) -> tuple[Array, Array | None]:
        """The product, and the bias that is to be added to it."""
        return x @ self.matrix(x.dtype), None if self.bias is None else self.bias[...]


@jax.custom_vjp
def products(x: Array, matrices: tuple[Array, ...]) -> tuple[Array, ...]:
    """x @ W for several W (inputs, outputs): (N, inputs) -> (N, outputs) each.

    The gradient of x is a sum of products, each of which adds what was there before: XLA takes an addition into the product that stands
    first in it, and the derivative as JAX writes it has that the other way round.
    """
    return tuple(x @ matrix for matrix in matrices)


def _products_backward(
    kept: tuple[Array, tuple[Array, ...]], dys: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...]]:
    x, matrices = kept
    dx = dys[0] @ matrices[0].T
    for dy, matrix in zip(dys[1:], matrices[1:], strict=True):
        dx = dy @ matrix.T + dx
    return dx, tuple(x.T @ dy for dy in dys)


products.defvjp(lambda x, matrices: (products(x, matrices), (x, matrices)), _products_backward)


class Table(nnx.Module):
    """Learned rows (rows, R): positions, or a vocabulary."""

    def __init__(self, rows: int, lanes: int, dtype: str, *, rngs: nnx.Rngs):
        self.table = nnx.Param(normal(0.02)(rngs.params(), (rows, lanes), jnp.dtype(dtype)))


Written = tuple[Array | None, Array | None]
"""What a residual branch writes, (N, R) and the bias (R,) that belongs to it: on its way to the main branch."""
NOTHING: Written = (None, None)


class Norm(nnx.Module):
    """The variant's norm of the main branch, with a scale and a bias where the variant's norms have them."""

    def __init__(self, config: Transformer, variant: Variant, layers: tuple[int, ...] = ()):
        shape, dtype = (*layers, config.width), jnp.dtype(config.param_dtype)
        self.scale = nnx.Param(jnp.ones(shape, dtype)) if variant.affine else None
        self.bias = nnx.Param(jnp.zeros(shape, dtype)) if variant.affine and config.bias else None
        self.norm = functools.partial(variant.norm, eps=config.eps)
        self.kind = variant.kind(variant.lanes(config.width), config.eps) if variant.kind else None

    @jax.named_scope("norm")
    def __call__(self, x: Array) -> Array:
        return self.norm(x, *self.leaves())

    @jax.named_scope("norm")
    def behind(self, x: Array, written: Written) -> tuple[Array, Array]:
        """The main branch with what was written to it, and its norm: in the backward pass, their gradients are one."""
        if self.kind is None:
            x = add(x, written)
            return x, self.norm(x)
        return norms.add_and_norm(x, *written, *self.leaves(), self.kind)

    def leaves(self) -> tuple[Array | None, Array | None]:
        """Scale and bias."""
        return tuple(leaf if leaf is None else leaf[...] for leaf in (self.scale, self.bias))  # type: ignore[return-value]


def add(x: Array, written: Written) -> Array:
    """The main branch with what was written to it."""
    y, bias = written
    if y is None:
        return x
    return x + (y if bias is None else y + bias.astype(y.dtype)[None])


class Affine(nnx.Module):
    """A scale and a bias (D,) of a norm that is applied elsewhere."""

    def __init__(self, width: int, dtype: str, *, bias: bool = True):
        self.scale = nnx.Param(jnp.ones((width,), jnp.dtype(dtype)))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.dtype(dtype))) if bias else None

    def leaves(self) -> tuple[Array, Array | None]:
        """Scale and bias."""
        return self.scale[...], None if self.bias is None else self.bias[...]


class LayerScale(nnx.Module):
    """What a branch writes, times a learned vector (D,). A leaf of the Pre-LN model alone (`layer_scale`)."""

    def __init__(self, width: int, dtype: str, layers: tuple[int, ...] = (), init: float = 1.0):
        self.scale = nnx.Param(jnp.full((*layers, width), init, jnp.dtype(dtype)))

    def __call__(self, written: Written) -> Written:
        y, bias = written
        assert y is not None
        y = y if bias is None else y + bias.astype(y.dtype)[None]
        return y * self.scale[...].astype(y.dtype)[None], None


def reader_bias(config: Transformer, variant: Variant, own: bool) -> bool:
    """Whether a reader has a bias as a leaf: its `own`, or one that takes the norm's bias where the variant's norms have none."""
    return variant.reader_bias and (own or (config.bias and not variant.affine))


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
        self.heads, self.causal, self.implementation = config.heads, causal, config.attention

    @jax.named_scope("attention")
    def __call__(
        self, n: Array, batch: int, cache: Any = None, position: Array | int = 0, length: int | None = None
    ) -> tuple[Written, Any]:
        """Returns what it writes and, where a cache {"key", "value"} of (B, T, H, K) is given, that cache with these tokens in it.

        Of each sequence the first `length` tokens are seen, or all of them.
        """
        readers = (self.query, self.key, self.value)
        read = products(n, tuple(reader.matrix(n.dtype) for reader in readers))
        q, k, v = (
            reader.biased(y).reshape(batch, -1, self.heads, y.shape[-1] // self.heads)
            for reader, y in zip(readers, read, strict=True)
        )
        if cache is None:
            y = attend(q, k, v, causal=self.causal, length=length, implementation=self.implementation)
        else:
            cache = {
                name: jax.lax.dynamic_update_slice_in_dim(cache[name], new.astype(cache[name].dtype), position, axis=1)
                for name, new in (("key", k), ("value", v))
            }
            seen = jnp.arange(cache["key"].shape[1])[None, :] <= position + jnp.arange(q.shape[1])[:, None]
            y = attend(q, cache["key"], cache["value"], mask=seen[None, None], implementation="xla")
        return self.out.apart(y.reshape(n.shape[0], -1)), cache


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
        return _attend_on_even_rows(kernel, q, k, v, causal=causal, length=length)
    if length is not None:
        seen = (jnp.arange(k.shape[1]) < length)[None, None, None]
        mask = seen if mask is None else mask & seen
    if q.dtype == jnp.float64:
        return _attend_in_float64(q, k, v, causal=causal, mask=mask)
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


def _attend_on_even_rows(kernel: str, q: Array, k: Array, v: Array, *, causal: bool, length: int | None) -> Array:
    queries = q.shape[1]
    multiple = MULTIPLES[kernel]
    if queries % multiple:
        length = k.shape[1] if length is None else length
        q, k, v = (jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)]) for x in (q, k, v))
    # The queries behind `length` attend as well: what nobody reads has to be finite all the same.
    if kernel == "hopper":
        attend = functools.partial(_attend_on_hopper, length=k.shape[1] if length is None else length)
    else:
        attend = functools.partial(_attend_in_cudnn, causal=causal, length=length)
    return placement.on_each_device(attend, (q, k, v), (placement.HEADS,) * 3, placement.HEADS)[:, :queries]


def _attend_on_hopper(q: Array, k: Array, v: Array, *, length: int) -> Array:
    return hopper.attend(q, k, v, length)


def _attend_in_cudnn(q: Array, k: Array, v: Array, *, causal: bool, length: int | None) -> Array:
    lengths = None if length is None else jnp.full((len(q),), length, jnp.int32)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def _attend_in_float64(q: Array, k: Array, v: Array, *, causal: bool, mask: Array | None) -> Array:
    """`attend` written out: jax.nn's takes its softmax in float32 whatever the dtype."""
    scores = jnp.einsum("blhk,bthk->bhlt", q, k) / math.sqrt(q.shape[-1])
    if causal:
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
        mask = seen if mask is None else mask & seen
    weights = jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhlt,bthk->blhk", weights, v)


class Mlp(nnx.Module):
    """Two linear maps with a GELU between them: (N, R) -> (N, R)."""

    def __init__(self, config: Transformer, variant: Variant, *, layers: tuple[int, ...], rngs: nnx.Rngs):
        linear = functools.partial(Linear, layers=layers, dtype=config.param_dtype, rngs=rngs)
        lanes = variant.lanes(config.width)
        self.up = linear(lanes, config.mlp_width, bias=reader_bias(config, variant, config.bias))
        init = normal(1 / math.sqrt(2 * config.depth * config.mlp_width))
        self.down = linear(config.mlp_width, lanes, bias=config.bias, init=init, stored=placement.ROWS)
        self.gelu = jax.named_scope("gelu")(functools.partial(gelu, form=config.gelu))

    @jax.named_scope("mlp")
    def __call__(self, n: Array) -> Written:
        return self.down.apart(self.gelu(self.up(n)))


class Block(nnx.Module):
    """x <- x + attention(norm(x)); x <- x + mlp(norm(x)). With `layers=(depth,)` its leaves hold a stack of blocks, for `lax.scan`."""

    def __init__(
        self, config: Transformer, variant: Variant, *, causal: bool, layers: tuple[int, ...] = (), rngs: nnx.Rngs
    ):
        self.norm1 = Norm(config, variant, layers)
        self.attn = Attention(config, variant, causal=causal, layers=layers, rngs=rngs)
        self.norm2 = Norm(config, variant, layers)
        self.mlp = Mlp(config, variant, layers=layers, rngs=rngs)
        scaled = config.layer_scale and variant.affine
        scale = functools.partial(LayerScale, config.width, config.param_dtype, layers, config.layer_scale_init)
        self.scale1 = scale() if scaled else None
        self.scale2 = scale() if scaled else None

    def __call__(
        self,
        x: Array,
        written: Written,
        batch: int,
        cache: Any = None,
        position: Array | int = 0,
        length: int | None = None,
        branch_scales: Array | None = None,
    ) -> tuple[Array, Array, Written, Any]:
        """Takes the main branch and what the block before it wrote; returns their sum, and the same two behind this block."""
        before, n = self.norm1.behind(x, written)
        written, cache = self.attn(n, batch, cache, position, length)
        written = of_sample(written if self.scale1 is None else self.scale1(written), branch_scales, 0)
        x, n = self.norm2.behind(before, written)
        written = self.mlp(n)
        written = of_sample(written if self.scale2 is None else self.scale2(written), branch_scales, 1)
        return before, x, written, cache


Blocks = Block | nnx.List


def _saves_activations(primitive: Any, *_: Any, **__: Any) -> bool:
    """Anything but weights that were gathered, and copies of them."""
    return primitive.name not in ("sharding_constraint", "optimization_barrier", "name")


REMAT_POLICIES = {
    "nothing": None,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "activations": _saves_activations,
}


def blocks(config: Transformer, variant: Variant, *, causal: bool, rngs: nnx.Rngs) -> Blocks:
    """`config.depth` blocks: a list of them, or one whose leaves are stacked (`config.scan_layers`)."""
    block = functools.partial(Block, config, variant, causal=causal, rngs=rngs)
    if config.scan_layers:
        return block(layers=(config.depth,))
    return nnx.List([block() for _ in range(config.depth)])


def _narrow_matrices(state: Any, dtype: Any) -> Any:
    """Stacked parameters with their matrices as they multiply an x of this dtype: one kernel each, where a layer's each would be one a
    layer. Behind a barrier XLA does not pull it into them again."""

    def narrow(path: Any, leaf: Array) -> Array:
        is_matrix = any(getattr(key, "key", None) == "kernel" for key in path)
        return jax.lax.optimization_barrier(leaf.astype(dtype)) if is_matrix else leaf

    return jax.tree_util.tree_map_with_path(narrow, state)


@jax.custom_vjp
def unstacked(tree: Any) -> list[Any]:
    """A tree of stacked leaves (depth, ...) as one tree a layer. Its derivative puts the layers' gradients together in one array, where
    that of an index would add up arrays of all layers."""
    depth = jax.tree.leaves(tree)[0].shape[0]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(depth)]


unstacked.defvjp(
    lambda tree: (unstacked(tree), None), lambda _, layers: (jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers),)
)


def run(
    blocks: Blocks,
    x: Array,
    batch: int,
    cache: Any = None,
    position: Array | int = 0,
    *,
    length: int | None = None,
    remat: str | None = None,
    branch_scales: Array | None = None,
    unroll: bool = False,
) -> tuple[Array, Array, Any]:
    """Runs all blocks on the main branch x (N, R).

    Args:
      cache: {"key", "value"} of (depth, B, T, H, K), or None; `position` is where in T these tokens begin.
      length: how many tokens of each sequence attention sees, from the first on; None: all.
      remat: None, or one of `REMAT_SAVES`: what the backward pass finds of each block; it recomputes the rest.
      branch_scales: (B, depth, 2), what the attention and the MLP of each block write is multiplied by, or None.
      unroll: whether stacked blocks run one by one, not in one loop.

    Returns: the main branch after the last block (N, R), before and after every block (depth + 1, N, R), and the new cache.
    """
    graph: Any
    states: Any

    def step(x: Array, written: Written, layer: tuple[Any, Any, Any]) -> tuple[Array, Array, Written, Any]:
        state, cache, scales = layer
        before, x, written, cache = nnx.merge(graph, state)(x, written, batch, cache, position, length, scales)
        return before, placement.examples(x), written, cache

    step = jax.checkpoint(step, policy=REMAT_POLICIES[remat]) if remat else step
    scales = None if branch_scales is None else jnp.moveaxis(branch_scales, 1, 0)
    x = placement.examples(x)
    if isinstance(blocks, Block) and not unroll:
        graph, state = nnx.split(blocks)

        def scanned(x: Array, layer: tuple[Any, Any, Any]) -> tuple[Array, tuple[Array, Any]]:
            before, x, written, cache = step(x, NOTHING, layer)
            return add(x, written), (before, cache)

        last, (before, cache) = jax.lax.scan(scanned, x, (state, cache, scales))
        return last, jnp.concatenate([before, last[None]]), cache

    if isinstance(blocks, Block):
        graph, state = nnx.split(blocks)
        layers = [(graph, layer) for layer in unstacked(_narrow_matrices(state, x.dtype))]
    else:
        layers = [nnx.split(block) for block in blocks]
    states, caches, written = [], [], NOTHING
    for index, (graph, state) in enumerate(layers):  # noqa: B007
        of_layer = jax.tree.map(lambda leaf, i=index: leaf[i], (cache, scales))
        before, x, written, layer_cache = step(x, written, (state, *of_layer))
        states.append(before)
        caches.append(layer_cache)
    last = add(x, written)
    return last, jnp.stack([*states, last]), jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
