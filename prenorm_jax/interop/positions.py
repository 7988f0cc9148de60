"""Position tables of another grid: bicubic interpolation, as the libraries that publish vision checkpoints do it.

Two conventions are in use. With antialiasing (timm): Keys' kernel with a = -1/2, stretched where the grid shrinks, weights cut off at the
border and normalised. Without (transformers): Keys' kernel with a = -3/4 on four neighbours, those beyond the border repeating it.
"""

import math

import numpy as np


def resized(table: np.ndarray, side: int, *, prefix: int = 0, antialias: bool = True) -> np.ndarray:
    """A position table for another square grid.

    Args:
      table: (prefix + old side squared, D); the first `prefix` rows belong to no patch and stay.
      side: patches along an edge of the new grid.
      antialias: which convention.

    Returns: (prefix + side squared, D), in the table's dtype; computed in float64.

    >>> resized(np.arange(4.0)[:, None], 1)
    array([[1.5]])
    """
    first, grid = table[:prefix], table[prefix:].astype(np.float64)
    old = math.isqrt(len(grid))
    weights = _antialiased(old, side) if antialias else _four_neighbours(old, side)
    grid = np.einsum("ai,bj,ijd->abd", weights, weights, grid.reshape(old, old, -1), optimize=True)
    return np.concatenate([first, grid.reshape(side * side, -1).astype(table.dtype)])


def _keys(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic kernel (1981)."""
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _centres(old: int, new: int) -> np.ndarray:
    """Where the new cells' centres are, in old cells' units."""
    return (np.arange(new) + 0.5) * old / new


def _antialiased(old: int, new: int) -> np.ndarray:
    stretch = max(old / new, 1.0)
    weights = _keys((np.arange(old)[None] + 0.5 - _centres(old, new)[:, None]) / stretch, -0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def _four_neighbours(old: int, new: int) -> np.ndarray:
    positions = _centres(old, new) - 0.5
    weights = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        neighbours = np.floor(positions) + offset
        rows, columns = np.arange(new), np.clip(neighbours, 0, old - 1).astype(int)
        np.add.at(weights, (rows, columns), _keys(positions - neighbours, -0.75))
    return weights
