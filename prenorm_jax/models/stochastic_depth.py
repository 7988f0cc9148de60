"""Stochastic depth (Huang et al., 2016): in training a sample skips a residual branch now and then, and what is left is scaled up.

One number for a sample and branch keeps a zero mean zero: with the same numbers the variants stay the same function.
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def draw_branch_scales(key: Array, batch: int, depth: int, rate: float) -> Array:
    """What each branch (attention, MLP) of each sample is multiplied by, (B, depth, 2) float32.

    0 with probability `rate`, else 1 / (1 - rate), so that the mean is 1.
    """
    kept = jax.random.bernoulli(key, 1 - rate, (batch, depth, 2))
    return jnp.where(kept, 1 / (1 - rate), 0).astype(jnp.float32)


def of_sample(written: tuple[Array | None, Array | None], scales: Array | None, branch: int) -> tuple[Any, Any]:
    """What a branch writes, (N, R) and a bias (R,) or None, times its sample's scale, of (B, 2) or None for all ones."""
    if scales is None:
        return written
    y, bias = written
    assert y is not None
    y = y if bias is None else y + bias.astype(y.dtype)[None]
    of_token = jnp.repeat(scales[:, branch], y.shape[0] // scales.shape[0])
    return y * of_token.astype(y.dtype)[:, None], None
