"""What the blocks are made of: linear maps, tables, norms on the main branch.

Shapes: N = B L tokens of a batch, D nominal width, R lanes of the main branch.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from prenorm_jax import norms, placement
from prenorm_jax.models.config import Transformer
from prenorm_jax.models.variants import Variant

Array = jax.Array
Init = Callable[[Array, tuple[int, ...], Any], Array]
Product = Callable[[Array, Array], Array]


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
        y, bias = self.apart(x)
        return y if bias is None else y + bias.astype(y.dtype)[None]

    def narrow(self, dtype: Any) -> Array:
        """The whole kernel in a dtype."""
        return placement.gathered(self.kernel[...].astype(dtype), self.stored)

    def matrix(self, dtype: Any) -> Array:
        """The kernel as it multiplies an x of this dtype."""
        # Behind a barrier the cast (and the weight map before it) stays out of the product, whose kernel then takes bias and residual.
        return jax.lax.optimization_barrier(self.narrow(dtype))

    def apart(self, x: Array, product: Product = jnp.matmul) -> tuple[Array, Array | None]:
        """The product of x and the kernel, made by `product`, and the bias that is to be added to it."""
        return product(x, self.matrix(x.dtype)), None if self.bias is None else self.bias[...]


def read_together(readers: Sequence[Linear], x: Array, heads: int) -> Array:
    """What several linear maps make of x, in one product: (N, R) -> (N, heads * maps * K), a head's columns of each side by side."""

    def by_head(arrays: list[Array]) -> Array:
        stacked = jnp.stack([array.reshape(*array.shape[:-1], heads, -1) for array in arrays], axis=-2)
        return stacked.reshape(*arrays[0].shape[:-1], -1)

    y = x @ jax.lax.optimization_barrier(by_head([reader.narrow(x.dtype) for reader in readers]))
    biases = [reader.bias[...] for reader in readers if reader.bias is not None]
    return y + by_head(biases).astype(y.dtype)[None] if biases else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def shared(x: Array, readers: int) -> tuple[Array, ...]:
    """x, for as many products. The gradient is the sum of theirs, each added to what was there before: XLA takes an addition into the
    product that stands first in it, and the derivative as JAX writes it has that the other way round."""
    return (x,) * readers


def _sum_of_shares(readers: int, _: None, dxs: tuple[Array, ...]) -> tuple[Array]:
    return (functools.reduce(lambda total, dx: dx + total, dxs),)


shared.defvjp(lambda x, readers: (shared(x, readers), None), _sum_of_shares)


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
