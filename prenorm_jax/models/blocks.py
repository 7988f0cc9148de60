"""The MLP and the residual blocks, for every variant.

Shapes: B batch, L tokens, N = B L, D nominal width, R lanes of the main branch, F mlp width, T cached tokens.
Tokens are flat, (N, R), outside attention: with a batch axis XLA may put it innermost and transpose around each norm.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import layout

from prenorm_jax import placement
from prenorm_jax.hopper import stack
from prenorm_jax.models import gelu
from prenorm_jax.models.attention import Attention, first_tokens
from prenorm_jax.models.config import Transformer
from prenorm_jax.models.layers import NOTHING, LayerScale, Linear, Norm, Written, add, normal, reader_bias
from prenorm_jax.models.stochastic_depth import of_sample
from prenorm_jax.models.variants import Variant

Array = jax.Array


class Mlp(nnx.Module):
    """Two linear maps with a GELU between them: (N, R) -> (N, R)."""

    def __init__(self, config: Transformer, variant: Variant, *, layers: tuple[int, ...], rngs: nnx.Rngs):
        linear = functools.partial(Linear, layers=layers, dtype=config.param_dtype, rngs=rngs)
        lanes = variant.lanes(config.width)
        self.up = linear(lanes, config.mlp_width, bias=reader_bias(config, variant, config.bias))
        init = normal(1 / math.sqrt(2 * config.depth * config.mlp_width))
        self.down = linear(config.mlp_width, lanes, bias=config.bias, init=init, stored=placement.ROWS)
        self.product = functools.partial(gelu.product, form=config.gelu)

    @jax.named_scope("mlp")
    def __call__(self, n: Array) -> Written:
        return self.down.apart(self.up(n), self.product)


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
        read: int | None = None,
    ) -> tuple[Array, Array, Written, Any]:
        """Takes the main branch and what the block before it wrote; returns their sum, and the same two behind this block: of all tokens,
        or of the first `read` ones of each sequence."""
        before, n = self.norm1.behind(x, written)
        written, cache = self.attn(n, batch, cache, position, length, read)
        written = of_sample(written if self.scale1 is None else self.scale1(written), branch_scales, 0)
        x, n = self.norm2.behind(first_tokens(before, batch, read), written)
        written = self.mlp(n)
        written = of_sample(written if self.scale2 is None else self.scale2(written), branch_scales, 1)
        return before, x, written, cache


Blocks = Block | nnx.List

FEW = 2**10
"""Of fewer tokens on a device the last block is computed for all, whatever is read of it: they take launches, not arithmetic."""


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


Places = Mapping[tuple[Any, ...], placement.Place]


def unstacked(tree: Any, places: Places) -> list[Any]:
    """A tree of stacked leaves (depth, ...) as one tree a layer. Its derivative puts the layers' gradients together in one array, where
    that of an index would add up arrays of all layers.

    Args:
      places: how the matrices of a layer are split, by the path of the module that has them; other leaves are whole.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    cuts = [_cut(leaf, _place(path, places)) for path, leaf in leaves]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*cuts, strict=True)]


def _places(block: Block) -> Places:
    """How the matrices of a block are split, by the path of the module that has them."""
    return {path: module.stored for path, module in nnx.iter_modules(block) if isinstance(module, Linear)}


def _place(path: tuple[Any, ...], places: Places) -> placement.Place:
    names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    return places.get(names[:-1], placement.UNSPLIT) if names[-1:] == ("kernel",) else placement.UNSPLIT


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _cut(leaf: Array, stored: placement.Place) -> tuple[Array, ...]:
    return tuple(leaf[i] for i in range(leaf.shape[0]))


_cut.defvjp(
    lambda leaf, stored: (_cut(leaf, stored), None), lambda stored, _, gradients: (_put_together(gradients, stored),)
)


def _put_together(arrays: tuple[Array, ...], stored: placement.Place) -> Array:
    """The arrays of all layers in one, each device with the shares that it has."""
    here = placement.sizes()
    split = placement.fitted(stored, arrays[0].shape, here) if here else placement.WHOLE
    parts = placement.parts(split, here)
    if parts > 1:
        put_together = _row_by_row
    elif stack.served(arrays):
        put_together = stack.stack
    else:
        return jnp.stack(arrays)
    stacked = placement.PartitionSpec(None, *split)
    return placement.on_each_device(lambda *own: put_together(list(own)), arrays, (split,) * len(arrays), stacked)


def _row_by_row(arrays: list[Array]) -> Array:
    """Of split arrays, stacked. A share of columns comes out of its exchange column by column; what an optimizer does with it would be
    done in that order too, with its own arrays turned around for it and back, if it weren't turned around once here."""
    stacked = jnp.stack(arrays)
    if jax.default_backend() != "gpu":
        return stacked
    rows_last = layout.Layout(major_to_minor=tuple(range(stacked.ndim)))
    return jax.lax.optimization_barrier(layout.with_layout_constraint(stacked, rows_last))


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
    read: int | None = None,
) -> tuple[Array, Array | None, Any]:
    """Runs all blocks on the main branch x (N, R).

    Args:
      cache: {"key", "value"} of (B, H, T, K) for each block, in a list, or stacked where the blocks run in one loop; or None.
        `position` is where in T these tokens begin.
      length: how many tokens of each sequence attention sees, from the first on; None: all.
      remat: None, or one of `REMAT_SAVES`: what the backward pass finds of each block; it recomputes the rest.
      branch_scales: (B, depth, 2), what the attention and the MLP of each block write is multiplied by, or None.
      unroll: whether stacked blocks run one by one, not in one loop.
      read: how many tokens of each sequence, from the first on, are read behind the last block; None: all. Blocks that run one by one
        compute no others there, unless all are few.

    Returns: the main branch after the last block (N, R), before and after every block (depth + 1, N, R), and the new cache. With `read`,
      the first is (B read, R) and the second None.
    """
    # Blocks are alike: one graph serves them all.
    graph, parameters = nnx.split(blocks if isinstance(blocks, Block) else blocks[0])

    def run_block(
        read: int | None, x: Array, written: Written, layer: tuple[Any, Any, Any]
    ) -> tuple[Array, Array, Written, Any]:
        state, cache, scales = layer
        before, x, written, cache = nnx.merge(graph, state)(x, written, batch, cache, position, length, scales, read)
        return before, placement.examples(x), written, cache

    def once(step: Any) -> Any:
        """In a program that is traced, blocks of one kind are traced and lowered once, and XLA inlines them: its program is the same.
        Outside of one they would be compiled again in each call."""
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat]) if remat else step
        return jax.jit(step) if isinstance(x, jax.core.Tracer) else step

    computed = read if placement.own(x.shape[0]) >= FEW else None
    step = once(functools.partial(run_block, None))
    last_step = once(functools.partial(run_block, computed)) if computed else step
    scales = None if branch_scales is None else jnp.moveaxis(branch_scales, 1, 0)
    x = placement.examples(x)
    if isinstance(blocks, Block) and not unroll:

        def scanned(x: Array, layer: tuple[Any, Any, Any]) -> tuple[Array, tuple[Array, Any]]:
            before, x, written, cache = step(x, NOTHING, layer)
            return add(x, written), (before, cache)

        last, (before, cache) = jax.lax.scan(scanned, x, (parameters, cache, scales))
        return first_tokens(last, batch, read), None if read else jnp.concatenate([before, last[None]]), cache

    if isinstance(blocks, Block):
        layers = unstacked(_narrow_matrices(parameters, x.dtype), _places(blocks))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(layers[0]))
    else:
        layers = [nnx.state(block) for block in blocks]
    written, states, caches = NOTHING, [], []
    for index in range(len(layers)):
        if isinstance(blocks, Block):  # what is no cut of a stack would be copied, and held until the backward pass
            ahead = placement.exchanged_beside(index, len(layers), size)
            layers[ahead], (x, written) = placement.in_turn(layers[ahead], (x, written))
        if remat:  # one array is held for a block, not two
            x, written = add(x, written), NOTHING
        of_layer = tuple(None if each is None else each[index] for each in (cache, scales))
        this_step = step if index + 1 < len(layers) else last_step
        before, x, written, layer_cache = this_step(x, written, (layers[index], *of_layer))
        states.append(before)
        caches.append(layer_cache)
    last = add(x, written) if computed else first_tokens(add(x, written), batch, read)
    return last, None if read else jnp.stack([*states, last]), None if cache is None else caches
