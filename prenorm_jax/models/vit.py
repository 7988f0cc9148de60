"""The Vision Transformer (Dosovitskiy et al., 2021), in every variant."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prenorm_jax.models import blocks
from prenorm_jax.models.config import ViTConfig
from prenorm_jax.models.variants import variant

Array = jax.Array


class Patches(nnx.Module):
    """Patch embedding, a convolution whose stride is its size: (B, H, W, C) -> (B, patches, R); kernel (P, P, C, R)."""

    def __init__(self, config: ViTConfig, lanes: int, *, rngs: nnx.Rngs):
        size, dtype = config.patch_size, jnp.dtype(config.param_dtype)
        shape = (size, size, config.channels, lanes)
        self.kernel = nnx.Param(blocks.normal((size * size * config.channels) ** -0.5)(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros((lanes,), dtype))

    def __call__(self, images: Array) -> Array:
        size, _, channels, lanes = self.kernel.shape
        batch, height, width, _ = images.shape
        x = images.reshape(batch, height // size, size, width // size, size, channels).swapaxes(2, 3)
        x = x.reshape(batch, -1, size * size * channels)
        return x @ self.kernel[...].reshape(-1, lanes).astype(x.dtype) + self.bias[...].astype(x.dtype)[None, None]


class Token(nnx.Module):
    """A learned vector (R,): the class token."""

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
        this = variant(config)
        lanes = this.lanes(config.width)
        self.patch = Patches(config, lanes, rngs=rngs)
        setattr(self, "class", Token(lanes, config.param_dtype) if config.pool == "cls" else None)
        learned = config.positions == "learned"
        self.position = blocks.Table(config.tokens, lanes, config.param_dtype, rngs=rngs) if learned else None
        self.blocks = blocks.blocks(config, this, causal=False, rngs=rngs)
        self.norm = blocks.Norm(config, this)
        self.head = blocks.Linear(
            lanes, config.classes, bias=this.reader_bias, init=blocks.normal(0.02), dtype=config.param_dtype, rngs=rngs
        )
        self.config = config

    def __call__(self, images: Array) -> tuple[Array, dict[str, Array]]:
        """Returns logits (B, classes), float32 or wider, and {"main_branch": (depth + 1, B, L, R)}.

        Raises: ValueError for images of another shape than the config's.
        """
        config, this = self.config, variant(self.config)
        expected = (config.image_size, config.image_size, config.channels)
        if images.shape[1:] != expected:
            raise ValueError(f"images: got shape {images.shape}; expected (batch, {', '.join(map(str, expected))})")
        batch = images.shape[0]
        x = self.patch(images.astype(config.dtype))
        class_token = getattr(self, "class")
        if class_token is not None:
            token = jnp.broadcast_to(class_token.token[...].astype(x.dtype), (batch, 1, x.shape[-1]))
            x = jnp.concatenate([token, x], axis=1)
        positions = self.position.table[...] if self.position else this.write(sincos(config))
        x = (x + positions[None]).astype(config.dtype)

        tokens, length = config.tokens, blocks.even_length(config, config.tokens)
        x = jnp.pad(x, [(0, 0), (0, length - tokens), (0, 0)]).reshape(batch * length, -1)
        seen = tokens if length > tokens else None
        x, states, _ = blocks.run(self.blocks, x, batch, length=seen, remat=config.remat)
        x = x.reshape(batch, length, -1)
        n = self.norm(x[:, 0]) if config.pool == "cls" else self.norm(x[:, :tokens]).mean(axis=1)
        logits = self.head(n)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return logits, {"main_branch": states.reshape(len(states), batch, length, -1)[:, :, :tokens]}


def sincos(config: ViTConfig) -> Array:
    """Fixed 2-d sine-cosine positions (L, D), zeros for the class token (Chen et al., 2021, MoCo v3, appendix)."""
    side = config.image_size // config.patch_size
    frequencies = 10000.0 ** -(np.arange(config.width // 4) / max(config.width // 4 - 1, 1))
    rows, columns = np.divmod(np.arange(side * side), side)
    angles = [position[:, None] * frequencies[None] for position in (columns, rows)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    table = np.concatenate([np.zeros((config.tokens - config.patches, config.width)), table])
    return jnp.asarray(table, jnp.promote_types(config.dtype, jnp.float32))
