"""The Vision Transformer (Dosovitskiy et al., 2021), in every variant."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prenorm_jax import placement
from prenorm_jax.models import blocks, layers
from prenorm_jax.models.attention import even_length
from prenorm_jax.models.config import ViTConfig
from prenorm_jax.models.variants import variant

Array = jax.Array


class Patches(nnx.Module):
    """Patch embedding, a convolution whose stride is its size: (B, H, W, C) -> (B, patches, R); kernel (P, P, C, R)."""

    def __init__(self, config: ViTConfig, lanes: int, *, rngs: nnx.Rngs):
        size, dtype = config.patch_size, jnp.dtype(config.param_dtype)
        shape = (size, size, config.channels, lanes)
        self.kernel = nnx.Param(layers.normal((size * size * config.channels) ** -0.5)(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros((lanes,), dtype))

    def __call__(self, images: Array) -> Array:
        size, _, channels, lanes = self.kernel.shape
        batch, height, width, _ = images.shape
        x = images.reshape(batch, height // size, size, width // size, size, channels).swapaxes(2, 3)
        x = x.reshape(batch, -1, size * size * channels)
        kernel = placement.gathered(self.kernel[...], placement.PATCHES)
        return x @ kernel.reshape(-1, lanes).astype(x.dtype) + self.bias[...].astype(x.dtype)[None, None]


class Token(nnx.Module):
    """A learned vector (R,): the class token, or the distillation token."""

    def __init__(self, lanes: int, dtype: str):
        self.token = nnx.Param(jnp.zeros((lanes,), jnp.dtype(dtype)))


class ViT(nnx.Module):
    """(B, H, W, C) images to (B, classes) logits and the main branch after the embedding and after every block.

    >>> config = ViTConfig(width=8, depth=1, heads=2, mlp_width=16, image_size=4, patch_size=2, channels=1, classes=3)
    >>> logits, intermediates = ViT(config, rngs=nnx.Rngs(0))(jnp.zeros((5, 4, 4, 1)))
    >>> logits.shape, intermediates["main_branch"].shape
    ((5, 3), (2, 5, 5, 8))
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        this, dtype = variant(config), config.param_dtype
        lanes = this.lanes(config.width)
        self.patch = Patches(config, lanes, rngs=rngs)
        setattr(self, "class", Token(lanes, dtype) if config.has_class_token else None)
        self.distilled = Token(lanes, dtype) if config.distilled != "none" else None
        self.registers = layers.Table(config.registers, lanes, dtype, rngs=rngs) if config.registers else None
        learned = config.positions == "learned"
        self.position = layers.Table(config.position_rows, lanes, dtype, rngs=rngs) if learned else None
        self.blocks = blocks.blocks(config, this, causal=False, rngs=rngs)
        reads = bool(config.final_readers)
        self.norm: Any = layers.Norm(config, this) if reads else layers.Affine(config.width, dtype, bias=config.bias)
        linear = functools.partial(layers.Linear, init=layers.normal(0.02), dtype=dtype, rngs=rngs)
        own = {"head_mean": False}  # the bias of `head` is there already
        for name in config.final_readers:
            outputs = config.pre_logits or config.classes
            setattr(self, name, linear(lanes, outputs, bias=layers.reader_bias(config, this, own.get(name, True))))
        if config.head and config.pre_logits:
            self.head = linear(config.pre_logits, config.classes)
        self.config = config

    def __call__(
        self, images: Array, branch_scales: Array | None = None, only_read: bool = False
    ) -> tuple[Array, dict[str, Array]]:
        """Returns logits (B, classes), or features where there is no head, float32 or wider, and {"main_branch":
        (depth + 1, B, L, R), before and after every block, "last": (B, L, R), after the last one}.

        Args:
          branch_scales: what each branch of each sample is multiplied by, (B, depth, 2), from `draw_branch_scales`; None for all ones.
          only_read: whether of the last block those tokens alone are computed that the head reads (`config.read_tokens`): the logits are
            the same, "last" has these tokens, "main_branch" is left out. Blocks that run in one loop compute all, and so do a few tokens.

        Raises: ValueError for images of another shape than the config's.
        """
        config = self.config
        expected = (config.image_size, config.image_size, config.channels)
        if images.shape[1:] != expected:
            raise ValueError(f"images: got shape {images.shape}; expected (batch, {', '.join(map(str, expected))})")
        batch = images.shape[0]
        x = self.patch(placement.examples(images.astype(config.dtype)))
        first = [token.token[...][None] for token in (getattr(self, "class"), self.distilled) if token is not None]
        first += [self.registers.table[...]] if self.registers is not None else []
        if first:
            rows = jnp.concatenate(first).astype(x.dtype)[None]
            x = jnp.concatenate([jnp.broadcast_to(rows, (batch, *rows.shape[1:])), x], axis=1)
        x = (x + self._positions()[None]).astype(config.dtype)

        tokens, length = config.tokens, even_length(config, config.tokens)
        x = jnp.pad(x, [(0, 0), (0, length - tokens), (0, 0)]).reshape(batch * length, -1)
        seen = tokens if length > tokens else None
        x, states, _ = blocks.run(
            self.blocks,
            x,
            batch,
            length=seen,
            remat=config.recomputes,
            unroll=config.unroll,
            branch_scales=branch_scales,
            read=config.read_tokens if only_read else None,
        )
        x = x.reshape(batch, -1, x.shape[-1])
        logits = self._head(self._pooled(x))
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if only_read:
            return logits, {"last": x[:, : config.read_tokens or tokens]}
        assert states is not None
        states = states.reshape(len(states), *x.shape)[:, :, :tokens]
        return logits, {"main_branch": states, "last": x[:, :tokens]}

    def _positions(self) -> Array:
        """What is added to the tokens, (L, R): nothing to those that the table has no row for."""
        config = self.config
        if self.position is None:
            return variant(config).write(sincos(config))
        table = placement.gathered(self.position.table[...], placement.POSITIONS)
        missing = config.tokens - config.position_rows
        if not missing:
            return table
        before = config.position_rows - config.patches
        return jnp.concatenate([table[:before], jnp.zeros((missing, table.shape[1]), table.dtype), table[before:]])

    def _pooled(self, x: Array) -> list[Array]:
        """The normalised (B, R) that the readers of the final norm read, in their order; for features in (B, D).

        x is (B, L or more, R), or of these tokens those that are read: what attention does not see counts for nothing here either.
        """
        config = self.config
        first, patches = x[:, 0], x[:, config.tokens - config.patches : config.tokens]

        def norm(x: Array) -> Array:
            if config.final_readers:
                return self.norm(x)
            return variant(config).norm_in_pre_ln(x, *self.norm.leaves(), eps=config.eps)

        if config.norm_after_pool:
            return [norm(patches.mean(axis=1))]
        if config.pool == "cls_and_mean":
            return [norm(first), norm(patches).mean(axis=1)]
        if config.distilled == "head":
            return [norm(first), norm(x[:, 1])]
        return [norm(first) if config.pool == "cls" else norm(patches).mean(axis=1)]

    def _head(self, pooled: list[Array]) -> Array:
        config = self.config
        if not config.final_readers:
            return jnp.concatenate(pooled, axis=-1)
        read = [getattr(self, name)(n) for name, n in zip(config.final_readers, pooled, strict=True)]
        if config.pre_logits:
            hidden = jnp.tanh(read[0])
            return self.head(hidden) if config.head else hidden
        return sum(read[1:], read[0]) / (2 if config.distilled == "head" else 1)


def sincos(config: ViTConfig) -> Array:
    """Fixed 2-d sine-cosine positions (L, D), zeros for the class token (Chen et al., 2021, MoCo v3, appendix)."""
    side = config.image_size // config.patch_size
    frequencies = 10000.0 ** -(np.arange(config.width // 4) / max(config.width // 4 - 1, 1))
    rows, columns = np.divmod(np.arange(side * side), side)
    angles = [position[:, None] * frequencies[None] for position in (columns, rows)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    table = np.concatenate([np.zeros((config.tokens - config.patches, config.width)), table])
    return jnp.asarray(table, jnp.promote_types(config.dtype, jnp.float32))
