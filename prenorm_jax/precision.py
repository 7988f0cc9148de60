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
        return leaf.astype(single_or_wider(leaf.dtype))
    return np.asarray(leaf).astype(np.float64)


def single_or_wider(dtype: Any) -> Any:
    """float32, or the dtype if that is wider. Of 8 bits and fewer JAX promotes none.

    >>> single_or_wider(jnp.float8_e4m3fn).__name__, single_or_wider(np.dtype("float64"))
    ('float32', dtype('float64'))
    """
    return dtype if jnp.dtype(dtype).itemsize > 4 else jnp.float32


def narrow(value: Array, like: Array) -> Array:
    """Back to the storage dtype, the kind of array and (where the shape is kept) the devices, with one rounding."""
    return placed(rounded(value, like.dtype), like)


def placed(value: Array, like: Array) -> Array:
    """A host array as the kind of array that `like` is and, where the shape is kept, on its devices. Takes the memory of `value`."""
    if not isinstance(value, np.ndarray) or isinstance(like, np.ndarray):
        return value
    if not isinstance(like, jax.Array) or isinstance(like, jax.core.Tracer):
        return jnp.asarray(value)
    # On a CPU jnp.asarray copies; device_put doesn't, where the memory is aligned.
    return jax.device_put(value, like.sharding if like.committed and value.shape == like.shape else None)


def rounded(value: Array, dtype: Any) -> Array:
    """An array in another dtype, rounded once. numpy takes float64 to bfloat16 by way of float32, and rounds twice: where float32
    lands half-way between two bfloat16 numbers, one step back towards the value says on which side of that it is."""
    if not isinstance(value, np.ndarray) or value.dtype != np.float64 or dtype != jnp.bfloat16:
        return value.astype(dtype)
    with np.errstate(over="ignore"):
        near = np.array(value, np.float32)
    bits = near.reshape(-1).view(np.uint32)
    halfway = np.flatnonzero((bits & 0xFFFF) == 0x8000)
    found, wanted = np.abs(near.reshape(-1)[halfway].astype(np.float64)), np.abs(value.reshape(-1)[halfway])
    bits[halfway] += (wanted > found).astype(np.uint32) - (wanted < found)
    return near.astype(dtype)


def in_slices(
    change: Callable[..., Sequence[Array | None]], arrays: Sequence[Array | None], dtypes: Sequence[Any], axis: int
) -> list[Array]:
    """change(*arrays) with every array wide and every result rounded, a slice at a time where the arrays are concrete.

    Args:
      change: acts along `axis` alone, element by element along the others; may return None for an array.
      arrays: of one rank; each axis of each is as long as the first one's, or 1. None is passed on.
      dtypes: of the results.
      axis: negative.

    Returns: arrays of the host, or traced ones; see `placed`.

    >>> change = lambda x, row: (x * row, x.sum(-1, keepdims=True))
    >>> [found.tolist() for found in in_slices(change, [jnp.ones((2, 3)), jnp.arange(3)[None]], [np.float32] * 2, axis=-1)]
    [[[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], [[3.0], [3.0]]]
    """
    given = [array for array in arrays if array is not None]
    if any(isinstance(array, jax.core.Tracer) for array in given):
        whole = change(*(None if array is None else wide(array) for array in arrays))
        return [None if value is None else rounded(value, dtype) for value, dtype in zip(whole, dtypes, strict=True)]
    hosts = [None if array is None else np.asarray(array) for array in arrays]
    shape = given[0].shape
    results: list[Any] = [None] * len(dtypes)
    for index in _slices(shape, axis):
        values = change(*(None if host is None else wide(host[_clipped(index, host.shape)]) for host in hosts))
        for k, (value, dtype) in enumerate(zip(values, dtypes, strict=True)):
            if value is None:
                continue
            if results[k] is None:
                size = value.shape[axis]
                results[k] = aligned([size if j - len(shape) == axis else n for j, n in enumerate(shape)], dtype)
            results[k][index] = rounded(value, dtype)
    return results


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


def aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Uninitialised memory that jax takes as it is on a CPU, instead of copying it: it begins at a multiple of 64 bytes."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count].view(dtype).reshape(shape)
