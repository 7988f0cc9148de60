"""Coordinates of the main branch along one axis: recentering, and the two bases of the compression to d - 1.

They serve weights and activations, host arrays (numpy, in whatever precision they come) and traced ones alike; an axis is negative.
Source: arXiv 2305.14858, section 3 ("drop"); the Householder basis "reflect" is this project's. With u = 1/sqrt(d) and v = u (1, ..., 1)
- e_d, H = I - v v^T / (1 - u) maps u (1, ..., 1) to e_d and is its own inverse, so the last coordinate of H x is sqrt(d) mean(x).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # a jax or a numpy array
Map = Callable[[Array, int], Array]


def recenter_activation(x: Any) -> jnp.ndarray:
    """x - mean(x) over the last axis: what a Pre-RMSNorm model does to a value that reaches its main branch otherwise than through a
    recentered weight (a constant such as sin-cos positions, a tied table's row, a norm's output, what dropout returns).

    Args:
      x: (..., d), floating. The arithmetic is float32 or wider, the result has x's dtype.

    >>> recenter_activation(jnp.array([1.0, 3.0]))
    Array([-1.,  1.], dtype=float32)
    """
    return _widened(recenter_axis, x)


def compress_activation(x: Any, basis: str = "reflect", *, layout: str = "compact") -> jnp.ndarray:
    """(..., d) -> (..., d - 1): the same for a Pre-CRMSNorm model; in the layout "packed" (..., d), with a zero in the spare lane.

    >>> compress_activation(jnp.array([1.0, 3.0]), "drop")
    Array([-1.], dtype=float32)
    """
    change, spare = basis_maps(basis)["writer"], clear_last if _is_packed(layout) else drop_last
    return _widened(lambda x, axis: spare(change(x, axis), axis), x)


def expand_activation(z: Any, basis: str = "reflect", *, layout: str = "compact") -> jnp.ndarray:
    """The inverse of `compress_activation`, (..., d - 1) -> (..., d), zero-mean: for what reads a compressed main branch in the Pre-LN
    coordinates (a tied table).

    >>> expand_activation(jnp.array([-1.0]), "drop")
    Array([-1.,  1.], dtype=float32)
    """
    return _widened(basis_maps(basis)["back_writer"], drop_last(z, -1) if _is_packed(layout) else z)


def _widened(change: Map, x: Any) -> jnp.ndarray:
    x = jnp.asarray(x)
    return change(x.astype(jnp.promote_types(x.dtype, jnp.float32)), -1).astype(x.dtype)


def _is_packed(layout: str) -> bool:
    if layout not in ("compact", "packed"):
        raise ValueError(f"layout: got {layout!r}; allowed: compact, packed")
    return layout == "packed"


def recenter_axis(w: Array, axis: int) -> Array:
    """w - mean(w) along an axis."""
    return w - w.mean(axis=axis, keepdims=True)


# Maps to coordinates, from d lanes to d: the first d - 1 are the coordinates, the last says nothing. What is wanted is either dropped
# (compact) or set (packed), and packed weights never change their shape on the way: a traced program maps a leaf in two passes.


def drop_writer(w: Array, axis: int) -> Array:
    """Coordinates of the recentered w: w_j - mean(w)."""
    return recenter_axis(w, axis)


def drop_reader(w: Array, axis: int) -> Array:
    """w_j - w_d."""
    return w - last(w, axis)


def undrop_writer(w: Array, axis: int) -> Array:
    """Appends -sum(w): (..., d-1, ...) -> (..., d, ...), zero-mean."""
    return xp(w).concatenate([w, -w.sum(axis=axis, keepdims=True)], axis=axis)


def reflect(w: Array, axis: int) -> Array:
    """H w along an axis.

    H w is blind to w + c 1 but for its last coordinate, the mean, so the last slice is subtracted first: a large mean then costs no
    precision. With y = w - c 1, (H y)_j = y_j - u^2 / (1 - u) sum(y) + u / (1 - u) y_d. c counts as a constant, so that the pull-back is as
    short as the map: one sum over the axis.
    """
    u = 1 / math.sqrt(w.shape[axis])
    y = w - _constant(last(w, axis))
    return y - (u * u / (1 - u)) * y.sum(axis=axis, keepdims=True) + (u / (1 - u)) * last(y, axis)


def _constant(w: Array) -> Array:
    return w if isinstance(w, np.ndarray) else jax.lax.stop_gradient(w)


def unreflect(w: Array, axis: int) -> Array:
    """H (w, 0) along an axis, zero-mean, the inverse of `reflect` there: (..., d-1, ...) -> (..., d, ...)."""
    u = 1 / math.sqrt(w.shape[axis] + 1)
    total = w.sum(axis=axis, keepdims=True)
    return xp(w).concatenate([w - (u * u / (1 - u)) * total, u * total], axis=axis)


def set_last(w: Array, value: Array | float, axis: int) -> Array:
    """w with its last slice replaced by `value`, which broadcasts against it."""
    if isinstance(w, np.ndarray) and isinstance(value, np.ndarray | float | int):
        return np.where(_is_last(w, axis), value, w)
    if isinstance(value, float | int):
        return jnp.where(_is_last(w, axis), value, w)
    return _set_last(w, value, axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _set_last(w: Array, value: Array, axis: int) -> Array:
    return jnp.where(_is_last(w, axis), value, w)


@_set_last.defjvp
def _set_last_tangents(axis: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """As a derivative, where() would pull the slice's gradient back as a sum over the whole array; a padded slice does it as a slice."""
    w, (dw, dvalue) = primals[0], tangents
    edges = [(w.shape[axis] - 1 if k - w.ndim == axis else 0, 0, 0) for k in range(w.ndim)]
    padded = jax.lax.pad(jnp.broadcast_to(dvalue, last(w, axis).shape), jnp.zeros((), dvalue.dtype), edges)
    return _set_last(*primals, axis), clear_last(dw, axis) + padded.astype(w.dtype)


def _is_last(w: Array, axis: int) -> Array:
    """True in the last slice, broadcasting against w."""
    lane = xp(w).arange(w.shape[axis]).reshape([-1 if k == axis else 1 for k in range(-w.ndim, 0)])
    return lane == w.shape[axis] - 1


def clear_last(w: Array, axis: int) -> Array:
    """w with zeros for its last slice."""
    return set_last(w, 0, axis)


def append_zero(w: Array, axis: int) -> Array:
    """Appends a zero slice: (..., d-1, ...) -> (..., d, ...)."""
    return xp(w).concatenate([w, xp(w).zeros_like(last(w, axis))], axis=axis)


def repeat_last(w: Array, axis: int) -> Array:
    """Appends the last slice once more."""
    return xp(w).concatenate([w, last(w, axis)], axis=axis)


def drop_last(w: Array, axis: int) -> Array:
    """All but the last slice."""
    return w[at(slice(None), slice(None, -1), axis=axis, rank=w.ndim)]


def last(w: Array, axis: int) -> Array:
    """The last slice, its axis kept."""
    return w[at(slice(None), slice(-1, None), axis=axis, rank=w.ndim)]


def along(row: Array, leaf: Array, axis: int) -> Array:
    """A (layers..., d) vector, shaped to multiply a (layers..., ..., d, ...) leaf along an axis. Ones between the layers and d, with which
    a parameter broadcasts against activations, are left out."""
    layers = _layers(row)
    shape = [*layers, *[1] * (leaf.ndim - len(layers))]
    shape[axis] = row.shape[-1]
    return row.reshape(shape)


def stacks(row: Array, leaf: Array, axis: int) -> bool:
    """Whether the leading (stacked) axes of a vector are those of a leaf, so that `along` serves."""
    layers = _layers(row)
    return leaf.shape[: len(layers)] == layers and leaf.ndim + axis >= len(layers)


def _layers(row: Array) -> tuple[int, ...]:
    return tuple(size for size in row.shape[:-1] if size != 1)


def at(others: Any, index: Any, *, axis: int, rank: int) -> tuple[Any, ...]:
    """An index: `index` on the axis, `others` on all others."""
    return tuple(index if position == rank + axis else others for position in range(rank))


@dataclasses.dataclass(frozen=True)
class Sums:
    """A map of `BASES`, or `recenter_axis`, as what a kernel computes: y <- y - share sum(y), with y = w - w_d where `from_last`. Its
    pull-back is g <- g - share sum(g), and pull sum(g) more in the last slice."""

    share: float = 0.0
    from_last: bool = False
    pull: float = 0.0


def as_sums(change: Map | None, width: int) -> Sums | None:
    """What a map from d = `width` lanes to d computes (None: nothing at all); None for another map.

    >>> as_sums(recenter_axis, 4)
    Sums(share=0.25, from_last=False, pull=0.0)
    """
    if change is None:
        return Sums()
    if change in (recenter_axis, drop_writer):
        return Sums(share=1 / width)
    if change is drop_reader:
        return Sums(from_last=True, pull=-1.0)
    u = 1 / math.sqrt(width)
    return Sums(share=u * u / (1 - u), from_last=True, pull=u / (1 - u)) if change is reflect else None


BASES: dict[str, dict[str, Map]] = {
    "reflect": {"writer": reflect, "reader": reflect, "back_writer": unreflect, "back_reader": unreflect},
    "drop": {"writer": drop_writer, "reader": drop_reader, "back_writer": undrop_writer, "back_reader": append_zero},
}
"""Basis -> the maps of a writer's and a reader's axis to its coordinates, d to d (the last lane says nothing), and back, d - 1 to d."""


def basis_maps(basis: str) -> dict[str, Map]:
    """The maps of a basis. Raises: ValueError for an unknown one."""
    if basis not in BASES:
        raise ValueError(f"basis: got {basis!r}; allowed: {', '.join(BASES)}")
    return BASES[basis]


def xp(w: Array) -> Any:
    """The array module of w."""
    return np if isinstance(w, np.ndarray) else jnp
