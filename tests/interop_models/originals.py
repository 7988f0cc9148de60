"""The ViTs of big_vision and vision_transformer in Linen, small, with their modules' names and functions; written from a description."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from prenorm_jax.paths import leaves

WIDTH, HEADS, MLP, CLASSES, IMAGE = 16, 2, 24, 3, 8
NAMES = {  # norm, attention, norm, MLP
    "big_vision": ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"),
    "vision_transformer": ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"),
}


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(MLP)(x))
        return nn.Dense(x.shape[-1])(y)


class Block(nn.Module):
    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x, _=None):
        norm1, attention, norm2, mlp = self.names
        y = LayerNorm(name=norm1)(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, name=attention)(y, y)
        return x + Mlp(name=mlp)(LayerNorm(name=norm2)(x)), None


LayerNorm = functools.partial(nn.LayerNorm, use_fast_variance=False)


class Positions(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.param("pos_embedding", nn.initializers.normal(), (1, *x.shape[1:]))


class Encoder(nn.Module):
    family: str
    scanned: bool

    @nn.compact
    def __call__(self, x):
        names = NAMES[self.family]
        x = Positions(name="posembed_input")(x) if self.family == "vision_transformer" else x
        if self.scanned:
            stack = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=2
            )
            x, _ = stack(names, name="encoderblock")(x, None)
        else:
            for i in range(2):
                x, _ = Block(names, name=f"encoderblock_{i}")(x)
        return LayerNorm(name="encoder_norm")(x)


class ViT(nn.Module):
    """big_vision adds positions before the class token, and vision_transformer after it."""

    family: str
    class_token: bool = True
    rep_size: bool = False
    scanned: bool = False
    head: bool = True

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(WIDTH, (4, 4), strides=(4, 4), padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, WIDTH)
        if self.family == "big_vision":
            x = x + self.param("pos_embedding", nn.initializers.normal(), (1, *x.shape[1:]))
        if self.class_token:
            token = self.param("cls", nn.initializers.zeros, (1, 1, WIDTH))
            x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        x = Encoder(self.family, self.scanned, name="Transformer")(x)
        x = x[:, 0] if self.class_token else x.mean(axis=1)
        x = nn.tanh(nn.Dense(5, name="pre_logits")(x)) if self.rep_size else x
        return nn.Dense(CLASSES, name="head")(x) if self.head else x


MODELS = {
    "big_vision": ViT("big_vision"),
    "big_vision, scanned, pooled": ViT("big_vision", class_token=False, scanned=True),
    "big_vision, pre-logits": ViT("big_vision", rep_size=True),
    "vision_transformer": ViT("vision_transformer"),
    "vision_transformer, features": ViT("vision_transformer", head=False),
    "vision_transformer, pre-logits": ViT("vision_transformer", rep_size=True),
}


def perturbed(model, seed=0, dtype=np.float64):
    """Parameters, nested, none of which hides anything: gamma is not 1, beta not 0, everything has a mean."""
    images = jnp.zeros((1, IMAGE, IMAGE, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        fan_in = np.prod(shape.shape[1:-1] if len(shape.shape) > 3 else shape.shape[:-1]) if shape.shape else 1
        value = rng.normal(size=shape.shape) / np.sqrt(max(fan_in, 1)) + 0.1
        return (value + 1 if path[-1].key == "scale" else value).astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def save(params, file, prefix=""):
    """As those projects write them: an .npz with one array a leaf."""
    np.savez(file, **{prefix + path: value for path, value in leaves(params).items()})
