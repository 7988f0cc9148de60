"""In what a transform computes, and how much of a leaf at a time.

Concrete arrays are computed in float64 on the host and rounded once to their storage dtype. A large leaf goes through in slices, so
that a conversion needs the memory of the tree, of its copy and of a few slices. Traced arrays are computed whole, in float32 or wider.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # a jax or a numpy array

SLICE = 2**22
"""How many entries of a leaf are widened at a time: 32 MiB of float64."""


def wide(leaf: Array) -> Array:
    """float64 on the host for a concrete array, at least float32 for a traced one."""
    if isinstance(leaf, jax.core.Tracer):
        return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    return np.asarray(leaf).astype(np.float64)


def narrow(value: Array, like: Array) -> Array:
    """Back to the storage dtype, the kind of array and (where the shape is kept) the devices, with one rounding."""
    if not isinstance(value, np.ndarray):
        return value.astype(like.dtype)
    return placed(rounded(value, like.dtype), like)


def placed(value: np.ndarray, like: Array) -> Array:
    """A host array as the kind of array that `like` is and, where the shape is kept, on its devices."""
    if isinstance(like, np.ndarray):
        return value
    concrete = isinstance(like, jax.Array) and not isinstance(like, jax.core.Tracer)
    same_place = concrete and like.committed and value.shape == like.shape  # type: ignore[attr-defined]
    return jax.device_put(value, like.sharding) if same_place else jnp.asarray(value)  # type: ignore[attr-defined]


def rounded(value: np.ndarray, dtype: Any) -> np.ndarray:
    """A host array in another dtype, rounded once. numpy takes float64 to bfloat16 by way of float32, and rounds twice: where float32
    lands half-way between two bfloat16 numbers, one step back towards the value says on which side of that it is."""
    if value.dtype != np.float64 or dtype != jnp.bfloat16:
        return value.astype(dtype)
    with np.errstate(over="ignore"):
        near = np.array(value, np.float32)
    bits = near.reshape(-1).view(np.uint32)
    halfway = np.flatnonzero((bits & 0xFFFF) == 0x8000)
    found, wanted = np.abs(near.reshape(-1)[halfway].astype(np.float64)), np.abs(value.reshape(-1)[halfway])
    bits[halfway] += (wanted > found).astype(np.uint32) - (wanted < found)
    return near.astype(dtype)


def in_slices(
    change: Callable[..., Sequence[Array | None]],
    arrays: Sequence[Array | None],
    likes: Sequence[Array],
    axis: int,
) -> list[Array | None]:
    """change(*arrays) with every array wide and every result narrow, a slice at a time where the arrays are concrete.

    Args:
      change: acts along `axis` alone, element by element along the others; may return None for an array.
      arrays: of one rank; each axis of each is as long as the first one's, or 1. None is passed on.
      likes: the array whose dtype, kind and devices each result takes.
      axis: negative.

    >>> ones = jnp.ones((2, 3))
    >>> in_slices(lambda x, row: (x * row, x.sum(-1, keepdims=True)), [ones, jnp.arange(3.0)[None]], [ones, ones], axis=-1)
    [Array([[0., 1., 2.], [0., 1., 2.]], dtype=float32), Array([[3.], [3.]], dtype=float32)]
    """
    given = [array for array in arrays if array is not None]
    if any(isinstance(array, jax.core.Tracer) for array in given):
        whole = change(*(None if array is None else wide(array) for array in arrays))
        return [None if value is None else narrow(value, like) for value, like in zip(whole, likes, strict=True)]
    hosts = [None if array is None else np.asarray(array) for array in arrays]
    shape = given[0].shape
    results: list[np.ndarray | None] = [None] * len(likes)
    for index in _slices(shape, axis):
        values = change(*(None if host is None else wide(host[_clipped(index, host.shape)]) for host in hosts))
        for k, (value, like) in enumerate(zip(values, likes, strict=True)):
            if value is None:
                continue
            if results[k] is None:
                size = value.shape[axis]
                results[k] = _empty([size if j - len(shape) == axis else n for j, n in enumerate(shape)], like.dtype)
            results[k][index] = rounded(value, like.dtype)  # type: ignore[index]
    return [None if value is None else placed(value, like) for value, like in zip(results, likes, strict=True)]


def _slices(shape: Sequence[int], axis: int) -> Iterator[tuple[slice, ...]]:
    """Indices that cover a shape, none of them larger than SLICE unless the axis alone is; the first axes are cut first."""
    index = [slice(0, n) for n in shape]

    def cut(index: list[slice], k: int) -> Iterator[tuple[slice, ...]]:
        size = int(np.prod([part.stop - part.start for part in index]))
        if size <= SLICE or k == len(shape):
            yield tuple(index)
        elif k - len(shape) == axis or shape[k] == 1:
            yield from cut(index, k + 1)
        else:
            step = max(SLICE * shape[k] // size, 1)
            for start in range(0, shape[k], step):
                yield from cut([*index[:k], slice(start, min(start + step, shape[k])), *index[k + 1 :]], k + 1)

    # The axis that change acts along is taken whole, also where change makes it longer or shorter.
    for found in cut(index, 0):
        yield tuple(slice(None) if k - len(shape) == axis else part for k, part in enumerate(found))


def _clipped(index: Sequence[slice], shape: Sequence[int]) -> tuple[slice, ...]:
    """The index for an array that may be 1 long where others are longer."""
    return tuple(slice(None) if n == 1 else part for part, n in zip(index, shape, strict=True))


def _empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Memory aligned so that jax takes it as it is, instead of copying it."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count].view(dtype).reshape(shape)
