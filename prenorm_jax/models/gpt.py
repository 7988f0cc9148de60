"""The GPT (Radford et al., 2019; sizes of Brown et al., 2020), in every variant."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from prenorm_jax import placement
from prenorm_jax.models import blocks, layers
from prenorm_jax.models.config import GPTConfig
from prenorm_jax.models.embedding import embed
from prenorm_jax.models.variants import variant

Array = jax.Array


class GPT(nnx.Module):
    """(B, L) token ids to (B, L, V) logits and the main branch after the embedding and after every block.

    A tied table stays in the Pre-LN coordinates in every variant: what is looked up there is mapped into the main branch's, and the
    final norm's value is mapped back before its scale and bias.

    >>> config = GPTConfig(width=8, depth=1, heads=2, mlp_width=16, context=4, vocab_size=11, vocab_multiple=4)
    >>> logits, intermediates = GPT(config, rngs=nnx.Rngs(0))(jnp.zeros((5, 3), jnp.int32))
    >>> logits.shape, intermediates["main_branch"].shape
    ((5, 3, 12), (2, 5, 3, 8))
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        this = variant(config)
        lanes, dtype = this.lanes(config.width), config.param_dtype
        self.embed = layers.Table(config.padded_vocab, config.width if config.tied else lanes, dtype, rngs=rngs)
        self.position = layers.Table(config.context, lanes, dtype, rngs=rngs)
        self.blocks = blocks.blocks(config, this, causal=True, rngs=rngs)
        if config.tied:
            self.norm: Any = layers.Affine(config.width, dtype, bias=config.bias)
        else:
            self.norm = layers.Norm(config, this)
            bias = layers.reader_bias(config, this, config.head_bias)
            self.head = layers.Linear(
                lanes, config.padded_vocab, bias=bias, init=layers.normal(0.02), dtype=dtype, rngs=rngs
            )
        self.config = config

    def __call__(
        self,
        tokens: Array,
        cache: Any = None,
        position: Array | int = 0,
        branch_scales: Array | None = None,
        only_last: bool = False,
        only_read: bool = False,
    ) -> tuple[Array, dict[str, Any]]:
        """The logits of the next token at every position.

        Args:
          tokens: (B, L) int ids in [0, vocab_size).
          cache: the keys and values of earlier tokens, from `empty_cache` or an earlier call, or None to attend within `tokens`.
          position: how many tokens the cache holds already.
          branch_scales: what each branch of each sample is multiplied by, (B, depth, 2), from `draw_branch_scales`; None for all ones.
          only_last: whether of each sequence the logits of the last position alone are computed, (B, 1, padded_vocab).
          only_read: whether "main_branch" is left out. (A ViT then leaves out more: its head may read fewer tokens.)

        Returns: logits (B, L, padded_vocab), float32 or wider, of which the first vocab_size columns mean something; and
          {"main_branch": (depth + 1, B, L, R), "last": (B, L, R), its last, "cache": the cache with these tokens, or None}, the first not
          with only_read.
        Raises: ValueError for more tokens than the context.
        """
        config, this = self.config, variant(self.config)
        batch, length = tokens.shape
        end = length + (position if isinstance(position, int) else 0)
        if end > config.context:
            raise ValueError(f"tokens: got {end} of them; expected at most the context, {config.context}")
        positions = placement.gathered(self.position.table[...], placement.POSITIONS)
        positions = jax.lax.dynamic_slice_in_dim(positions, position, length)

        def to_main_branch(rows: Array, positions: Array) -> Array:
            return ((this.write(rows) if config.tied else rows) + positions[None]).astype(config.dtype)

        x = embed(self.embed.table[...], positions, tokens, to_main_branch)
        x, states, cache = blocks.run(
            self.blocks,
            x.reshape(batch * length, -1),
            batch,
            cache,
            position,
            remat=config.recomputes,
            branch_scales=branch_scales,
            unroll=config.unroll,
        )
        read = x.reshape(batch, length, -1)[:, -1] if only_last else x
        logits = self._tied_logits(read) if config.tied else self.head(self.norm(read))
        # Behind a barrier the product stores its logits in its own dtype; without, XLA has it store them wide.
        logits = jax.lax.optimization_barrier(logits)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)).reshape(batch, -1, logits.shape[-1])
        x = x.reshape(batch, length, -1)
        assert states is not None
        kept = {} if only_read else {"main_branch": states.reshape(len(states), *x.shape)}
        return logits, {**kept, "last": x, "cache": cache}

    def _tied_logits(self, x: Array) -> Array:
        n = variant(self.config).norm_in_pre_ln(x, *self.norm.leaves(), eps=self.config.eps)
        table = placement.gathered(self.embed.table[...].astype(n.dtype), placement.TABLE)
        return n @ jax.lax.optimization_barrier(table).T


def empty_cache(config: GPTConfig, batch: int) -> Any:
    """Keys and values of no tokens yet, in the compute dtype: {"key", "value"} of (batch, heads, context, head width) a layer, in a list,
    or where layers run in one loop with these stacked, (depth, batch, ...)."""
    shape = (batch, config.heads, config.context, config.head_width)

    def empty(*layers: int) -> dict[str, Array]:
        return {name: jnp.zeros((*layers, *shape), config.dtype) for name in ("key", "value")}

    looped = config.scan_layers and not config.unroll
    return empty(config.depth) if looped else [empty() for _ in range(config.depth)]
