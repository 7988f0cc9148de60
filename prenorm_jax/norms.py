"""LayerNorm, RMSNorm and CRMSNorm as plain functions of an activation, with their gradients.

With d the nominal width of the main branch and n the normalised value (source: arXiv 2305.14858, section 3; the `reflect`
basis is this project's):

    layer_norm      x in R^d:      n = (x - mean x) / sqrt(mean((x - mean x)^2) + eps)
    rms_norm        x in R^d:      n = x / sqrt(mean(x^2) + eps)
    crms_norm       z in R^(d-1):  n = z / sqrt((sum z^2 + (sum z)^2) / d + eps)     basis "drop", the paper's
                                   n = z / sqrt(sum z^2 / d + eps)                    basis "reflect"
    crms_norm_packed               the same on d lanes, of which the first d-1 live; the spare lane's input is ignored and 1 is
                                   written there, so that a reader's bias can be that lane's row of its kernel

and y = n * scale + bias where they are given. Statistics are float32 or wider, y has x's dtype.

All four are one formula: with xhat the live (and, for LayerNorm, centred) part of x and s its sum of squares (plus the squared sum in
basis "drop"), n = xhat r with r = 1 / sqrt(s / d + eps), and backwards, for g = dy * scale,

    dxhat = r g - (r^3 / d) (sum g xhat) (xhat + [drop] sum xhat).

The forward pass keeps x and the scale alone: the statistics are computed anew in the backward pass, from an x behind a barrier. Where a
compiler finds them again and keeps them, the forward pass becomes two kernels that both read x, which takes longer.

On the main branch a norm stands behind an addition, and `add_and_norm` is both at once: in the backward pass the two gradients of the
main branch and the sum over rows that is the bias's gradient belong to one pass (`prenorm_jax.hopper.norm_gradient` on the GPUs it is for).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from prenorm_jax import placement
from prenorm_jax.hopper import norm_gradient

Array = jax.Array
BASES = ("reflect", "drop")


@dataclasses.dataclass(frozen=True)
class Kind:
    """Which of the four norms: static data of the one formula."""

    eps: float
    divisor: int  # d
    centred: bool = False  # subtract the mean first
    squared_sum: bool = False  # add (sum z)^2 to the sum of squares
    spare_lane: bool = False  # the last lane is not live: ignored in x, 1 in y


def layer_norm(x: Array, scale: Array | None = None, bias: Array | None = None, *, eps: float) -> Array:
    """LayerNorm over the last axis, with the two-pass variance.

    Args:
      x: (..., d), floating.
      scale: (d,) gamma, or None for 1.
      bias: (d,) beta, or None for 0.
      eps: added to the variance, > 0 or 0.

    Returns: (..., d) in x's dtype.
    Raises: ValueError for an x that is not floating, a scale or bias of another width, a negative eps.

    >>> layer_norm(jnp.array([1.0, 3.0]), eps=0.0)
    Array([-1.,  1.], dtype=float32)
    """
    return norm(x, scale, bias, layer(x.shape[-1], eps))


def rms_norm(x: Array, scale: Array | None = None, bias: Array | None = None, *, eps: float) -> Array:
    """RMSNorm over the last axis; equals `layer_norm` wherever x has zero mean (identity 1 of the paper).

    Args, returns, raises: as `layer_norm`.

    >>> rms_norm(jnp.array([3.0, 3.0]), eps=0.0)
    Array([1., 1.], dtype=float32)
    """
    return norm(x, scale, bias, rms(x.shape[-1], eps))


def crms_norm(
    z: Array, scale: Array | None = None, bias: Array | None = None, *, eps: float, basis: str = "reflect"
) -> Array:
    """CRMSNorm of a compressed, zero-mean main branch: RMSNorm of the R^d vector that z stands for, in z's coordinates.

    Args:
      z: (..., d-1), floating.
      scale, bias: (d-1,) in the compressed coordinates, or None.
      eps: the LayerNorm's.
      basis: "reflect" or "drop" (the paper's): which d-1 coordinates z holds; see `prenorm_jax.compress`.

    Returns: (..., d-1) in z's dtype.
    Raises: as `layer_norm`, and for an unknown basis.

    >>> crms_norm(jnp.array([1.0]), eps=0.0, basis="drop")  # stands for (1, -1)
    Array([1.], dtype=float32)
    """
    return norm(z, scale, bias, crms(z.shape[-1], eps, basis))


def crms_norm_packed(
    x: Array, scale: Array | None = None, bias: Array | None = None, *, eps: float, basis: str = "reflect"
) -> Array:
    """`crms_norm` in the packed layout: d lanes, the first d-1 live, and 1 in the spare lane of the result.

    Args:
      x: (..., d), floating; x[..., -1] is ignored and gets no gradient.
      scale, bias: (d,), or None; their last entries are ignored.
      eps, basis: as `crms_norm`.

    Returns: (..., d) in x's dtype; [..., :-1] is crms_norm(x[..., :-1]), [..., -1] is 1.
    Raises: as `crms_norm`.

    >>> crms_norm_packed(jnp.array([1.0, 7.0]), eps=0.0, basis="drop")
    Array([1., 1.], dtype=float32)
    """
    return norm(x, scale, bias, packed(x.shape[-1], eps, basis))


def layer(lanes: int, eps: float) -> Kind:
    """Which norm `layer_norm` is."""
    return Kind(eps, lanes, centred=True)


def rms(lanes: int, eps: float) -> Kind:
    """Which norm `rms_norm` is."""
    return Kind(eps, lanes)


def crms(lanes: int, eps: float, basis: str = "reflect") -> Kind:
    """Which norm `crms_norm` is."""
    return Kind(eps, lanes + 1, squared_sum=_is_drop(basis))


def packed(lanes: int, eps: float, basis: str = "reflect") -> Kind:
    """Which norm `crms_norm_packed` is."""
    return Kind(eps, lanes, squared_sum=_is_drop(basis), spare_lane=True)


def _is_drop(basis: str) -> bool:
    if basis not in BASES:
        raise ValueError(f"basis: got {basis!r}; allowed: {', '.join(BASES)}")
    return basis == "drop"


def norm(x: Array, scale: Array | None, bias: Array | None, kind: Kind) -> Array:
    """The norm of a kind. Args, returns, raises: as `layer_norm`."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"norm of a {x.dtype} array: expected a floating dtype; convert the input first")
    if kind.eps < 0:
        raise ValueError(f"eps: got {kind.eps}; allowed: 0 or larger")
    for name, leaf in (("scale", scale), ("bias", bias)):
        if leaf is not None and leaf.shape != x.shape[-1:]:
            raise ValueError(f"{name}: got shape {leaf.shape}; expected {x.shape[-1:]}, the last axis of the input")
    return _norm(x, scale, bias, kind)


def add_and_norm(
    x: Array, y: Array | None, written: Array | None, scale: Array | None, bias: Array | None, kind: Kind
) -> tuple[Array, Array]:
    """(x + y + written, its norm): the main branch behind a residual branch, and what the next one reads.

    Args:
      x, y: (..., lanes); None: nothing is added.
      written: (lanes,), the bias of the linear map that wrote y, or None.
      scale, bias: (lanes,) of the norm, or None.
      kind: which norm, as the four functions above make it (`layer`, `rms`, `crms`, `packed`).

    >>> x, n = add_and_norm(jnp.ones((1, 2)), jnp.array([[0.0, 2.0]]), jnp.zeros(2), None, None, layer(2, eps=0.0))
    >>> x, n
    (Array([[1., 3.]], dtype=float32), Array([[-1.,  1.]], dtype=float32))
    """
    return _add_and_norm(x, y, written, scale, bias, kind)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm(x: Array, scale: Array | None, bias: Array | None, kind: Kind) -> Array:
    return _forward(x, scale, bias, kind)


def _norm_and_kept(x: Array, scale: Array | None, bias: Array | None, kind: Kind) -> tuple[Array, Any]:
    return _forward(x, scale, bias, kind), (x, scale, _nothing_of(bias))


def _norm_backward(kind: Kind, kept: Any, dn: Array) -> tuple[Array, Array | None, Array | None]:
    x, scale, bias = kept
    dx, dscale, dbias, _ = _gradients(kind, x, dn, None, scale, bias, None)
    return dx, dscale, dbias


_norm.defvjp(_norm_and_kept, _norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _add_and_norm(
    x: Array, y: Array | None, written: Array | None, scale: Array | None, bias: Array | None, kind: Kind
) -> tuple[Array, Array]:
    if y is not None:
        x = x + (y if written is None else y + _row(written, y))
    return x, _forward(x, scale, bias, kind)


def _add_and_norm_and_kept(
    x: Array, y: Array | None, written: Array | None, scale: Array | None, bias: Array | None, kind: Kind
) -> tuple[tuple[Array, Array], Any]:
    x, n = _add_and_norm(x, y, written, scale, bias, kind)
    return (x, n), (x, _nothing_of(y), _nothing_of(written), scale, _nothing_of(bias))


def _add_and_norm_backward(kind: Kind, kept: Any, gradients: tuple[Array, Array]) -> tuple[Array | None, ...]:
    x, y, written, scale, bias = kept
    dx, dscale, dbias, dwritten = _gradients(kind, x, gradients[1], gradients[0], scale, bias, written)
    return dx, None if y is None else dx.astype(y.dtype), dwritten, dscale, dbias


_add_and_norm.defvjp(_add_and_norm_and_kept, _add_and_norm_backward)


def _forward(x: Array, scale: Array | None, bias: Array | None, kind: Kind) -> Array:
    xhat = _live(x, kind)
    y = xhat * _inverse_rms(xhat, kind)
    if scale is not None:
        y = y * _row(scale, y)
    if bias is not None:
        y = y + _row(bias, y)
    if kind.spare_lane:
        y = jnp.where(_spare(y), 1, y)
    return y.astype(x.dtype)


def _gradients(
    kind: Kind,
    x: Array,
    dn: Array,
    dbranch: Array | None,
    scale: Array | None,
    bias: Array | None,
    written: Array | None,
) -> tuple[Array, Array | None, Array | None, Array | None]:
    """The gradients of x, the norm's scale and bias, and of a bias that was added to x; of the biases, only their dtypes are asked."""
    like = {"dx": written, "dscale": scale, "dbias": bias}
    wanted = tuple(name for name, leaf in like.items() if leaf is not None)
    if norm_gradient.served(x):
        dx, *found = _gradients_by_kernel(kind, x, dn, dbranch, scale, wanted)
    else:
        dx, *found = _gradients_by_xla(kind, x, dn, dbranch, scale, wanted)
    sums = {name: sum.astype(like[name].dtype) for name, sum in zip(wanted, found, strict=True)}  # type: ignore[union-attr]
    return dx, sums.get("dscale"), sums.get("dbias"), sums.get("dx")


def _gradients_by_kernel(
    kind: Kind, x: Array, dn: Array, dbranch: Array | None, scale: Array | None, column_sums: tuple[str, ...]
) -> tuple[Array, ...]:
    """`norm_gradient`, on each device of the mesh in force with the rows that it has."""
    rows, whole = placement.EXAMPLES, placement.WHOLE
    given = {"x": (x, rows), "dn": (dn, rows), "dbranch": (dbranch, rows), "scale": (scale, whole)}
    there = {name: pair for name, pair in given.items() if pair[0] is not None}

    def gradients(*own: Array) -> tuple[Array, ...]:
        arguments = {**dict.fromkeys(given), **dict(zip(there, own, strict=True))}
        return norm_gradient.norm_gradient(**arguments, column_sums=column_sums, **dataclasses.asdict(kind))

    arrays, splits = zip(*there.values(), strict=True)
    return placement.on_each_device(gradients, arrays, splits, (rows, *[placement.SUMMED] * len(column_sums)))


def _gradients_by_xla(
    kind: Kind, x: Array, dn: Array, dbranch: Array | None, scale: Array | None, column_sums: tuple[str, ...]
) -> tuple[Array, ...]:
    """`norm_gradient`, for every shape and device."""
    rows = tuple(range(x.ndim - 1))
    xhat = _live(jax.lax.optimization_barrier(x), kind)
    r = _inverse_rms(xhat, kind)
    wide = dn.astype(xhat.dtype)
    if kind.spare_lane:
        wide = jnp.where(_spare(wide), 0, wide)
    g = wide if scale is None else wide * _row(scale, wide)
    direction = xhat + jnp.sum(xhat, axis=-1, keepdims=True) if kind.squared_sum else xhat
    along = jnp.sum(g * xhat, axis=-1, keepdims=True)
    if kind.centred:
        g = g - jnp.mean(g, axis=-1, keepdims=True)
    dx = r * g - (r**3 / kind.divisor) * along * direction
    if kind.spare_lane:
        dx = jnp.where(_spare(dx), 0, dx)
    if dbranch is not None:
        dx = dx + dbranch.astype(dx.dtype)
    sums = {"dx": dx.sum(axis=rows)} if "dx" in column_sums else {}
    if "dscale" in column_sums or "dbias" in column_sums:
        # From inputs behind a barrier: in one kernel with the sums over lanes, XLA's stores the summands first, in float32.
        x, r, dn = jax.lax.optimization_barrier((x, r, dn))
        wide = dn.astype(xhat.dtype)
        if kind.spare_lane:
            wide = jnp.where(_spare(wide), 0, wide)
        sums |= {"dscale": jnp.sum(wide * _live(x, kind) * r, axis=rows), "dbias": jnp.sum(wide, axis=rows)}
    return dx.astype(x.dtype), *(sums[name] for name in column_sums)


def _wide(x: Array) -> Array:
    """x in the dtype of the statistics."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _live(x: Array, kind: Kind) -> Array:
    """The part of x that the norm sees, in the dtype of the statistics."""
    x = _wide(x)
    if kind.spare_lane:
        x = jnp.where(_spare(x), 0, x)
    return x - jnp.mean(x, axis=-1, keepdims=True) if kind.centred else x


def _inverse_rms(xhat: Array, kind: Kind) -> Array:
    """r (..., 1)"""
    power = jnp.sum(xhat * xhat, axis=-1, keepdims=True)
    if kind.squared_sum:
        power += jnp.square(jnp.sum(xhat, axis=-1, keepdims=True))
    return jax.lax.rsqrt(power / kind.divisor + kind.eps)


def _nothing_of(leaf: Array | None) -> Array | None:
    """An empty array that keeps a leaf's dtype."""
    return None if leaf is None else leaf[:0]


def _spare(x: Array) -> Array:
    """True in the last lane, shape of x."""
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) == x.shape[-1] - 1


def _row(leaf: Array, like: Array) -> Array:
    """A (d,) parameter as a row that broadcasts against `like`."""
    return leaf.astype(like.dtype).reshape((1,) * (like.ndim - 1) + leaf.shape)
