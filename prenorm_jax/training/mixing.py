"""Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019): each example and its neighbour become two blends, and so do their labels.

What is mixed with what is a matter of rows (2k and 2k + 1), so that it does not depend on how a batch is spread over processes or
devices. One blend serves a batch; it is five numbers, (share, top, left, bottom, right): outside the box an example keeps `share` of
itself and takes the rest from its neighbour, inside it is its neighbour. Mixup has an empty box, CutMix a share of 1.
"""

import jax
import jax.numpy as jnp
import numpy as np


def draw_mix(rng: np.random.Generator, mixup: float, cutmix: float) -> np.ndarray:
    """The blend of a batch, (5,) float32: Mixup's share or CutMix's area from Beta(a, a); where both a are above 0, either as often.

    >>> draw_mix(np.random.default_rng(0), 0.8, 0.0)[1:].tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    if mixup > 0 and (cutmix == 0 or rng.random() < 0.5):
        return np.array([rng.beta(mixup, mixup), 0, 0, 0, 0], np.float32)
    half = np.sqrt(1 - rng.beta(cutmix, cutmix)) / 2
    centre = rng.random(2)
    # What hangs over the edge is cut off, and the label's share is that of the pixels that are left.
    return np.array([1, *np.clip(centre - half, 0, 1), *np.clip(centre + half, 0, 1)], np.float32)


def mix(images: jax.Array, targets: jax.Array, blend: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images (B, H, W, C) float, targets (B, classes) of sum 1 and the blend (B, 5), the same in both rows of a pair -> both mixed."""
    share, top, left, bottom, right = jnp.moveaxis(blend, 1, 0)
    rows, columns = (_centres(size) for size in images.shape[1:3])
    down = (rows >= top[:, None]) & (rows < bottom[:, None])
    across = (columns >= left[:, None]) & (columns < right[:, None])
    kept = jnp.where(down[:, :, None] & across[:, None, :], 0, share[:, None, None])
    of_pixel, of_label = kept[..., None].astype(images.dtype), kept.mean((1, 2))[:, None].astype(targets.dtype)
    mixed = of_pixel * images + (1 - of_pixel) * neighbours(images)
    return mixed, of_label * targets + (1 - of_label) * neighbours(targets)


def neighbours(x: jax.Array) -> jax.Array:
    """Rows 2k and 2k + 1 exchanged.

    >>> neighbours(jnp.arange(4)).tolist()
    [1, 0, 3, 2]
    """
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def _centres(size: int) -> jax.Array:
    """Where the centres of `size` pixels are, from 0 to 1, (1, size)."""
    return ((jnp.arange(size) + 0.5) / size)[None].astype(jnp.float32)
