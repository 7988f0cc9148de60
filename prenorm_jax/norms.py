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

The backward pass needs x, its mean where it is centred, and r: those, and the scale, are all that the forward pass keeps.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
BASES = ("reflect", "drop")


@dataclasses.dataclass(frozen=True)
class _Kind:
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
    return _checked(x, scale, bias, _Kind(eps, x.shape[-1], centred=True))


def rms_norm(x: Array, scale: Array | None = None, bias: Array | None = None, *, eps: float) -> Array:
    """RMSNorm over the last axis; equals `layer_norm` wherever x has zero mean (identity 1 of the paper).

    Args, returns, raises: as `layer_norm`.

    >>> rms_norm(jnp.array([3.0, 3.0]), eps=0.0)
    Array([1., 1.], dtype=float32)
    """
    return _checked(x, scale, bias, _Kind(eps, x.shape[-1]))


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
    return _checked(z, scale, bias, _Kind(eps, z.shape[-1] + 1, squared_sum=_is_drop(basis)))


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
    return _checked(x, scale, bias, _Kind(eps, x.shape[-1], squared_sum=_is_drop(basis), spare_lane=True))


def _is_drop(basis: str) -> bool:
    if basis not in BASES:
        raise ValueError(f"basis: got {basis!r}; allowed: {', '.join(BASES)}")
    return basis == "drop"


def _checked(x: Array, scale: Array | None, bias: Array | None, kind: _Kind) -> Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"norm of a {x.dtype} array: expected a floating dtype; convert the input first")
    if kind.eps < 0:
        raise ValueError(f"eps: got {kind.eps}; allowed: 0 or larger")
    for name, leaf in (("scale", scale), ("bias", bias)):
        if leaf is not None and leaf.shape != x.shape[-1:]:
            raise ValueError(f"{name}: got shape {leaf.shape}; expected {x.shape[-1:]}, the last axis of the input")
    return _norm(x, scale, bias, kind)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm(x: Array, scale: Array | None, bias: Array | None, kind: _Kind) -> Array:
    return _forward(x, scale, bias, kind)[0]


def _forward(x: Array, scale: Array | None, bias: Array | None, kind: _Kind) -> tuple[Array, Any]:
    mean = jnp.mean(_wide(x), axis=-1, keepdims=True) if kind.centred else None
    xhat = _live(x, mean, kind)
    power = jnp.sum(xhat * xhat, axis=-1, keepdims=True)
    if kind.squared_sum:
        power += jnp.square(jnp.sum(xhat, axis=-1, keepdims=True))
    r = jax.lax.rsqrt(power / kind.divisor + kind.eps)
    y = xhat * r
    if scale is not None:
        y = y * _row(scale, y)
    if bias is not None:
        y = y + _row(bias, y)
    if kind.spare_lane:
        y = jnp.where(_spare(y), 1, y)
    # Of the bias, the backward pass needs the dtype alone.
    return y.astype(x.dtype), (x, mean, r, scale, None if bias is None else bias[:0])


def backward(kind: _Kind, residuals: Any, dy: Array) -> tuple[Array, Array | None, Array | None]:
    """The backward pass of all four norms: the true derivative. Public, so that a traced norm can be told by it."""
    x, mean, r, scale, _ = residuals
    dscale, dbias = _affine_gradients(kind, residuals, dy)
    xhat = _live(x, mean, kind)
    dy = dy.astype(xhat.dtype)
    g = dy if scale is None else dy * _row(scale, dy)
    if kind.spare_lane:
        g = jnp.where(_spare(g), 0, g)
    direction = xhat + jnp.sum(xhat, axis=-1, keepdims=True) if kind.squared_sum else xhat
    along = jnp.sum(g * xhat, axis=-1, keepdims=True)
    if kind.centred:
        g = g - jnp.mean(g, axis=-1, keepdims=True)
    dx = r * g - (r**3 / kind.divisor) * along * direction
    if kind.spare_lane:
        dx = jnp.where(_spare(dx), 0, dx)
    return dx.astype(x.dtype), dscale, dbias


_norm.defvjp(_forward, backward)


def _affine_gradients(kind: _Kind, residuals: Any, dy: Array) -> tuple[Array | None, Array | None]:
    """Sums over the rows for scale and bias. From inputs behind a barrier: in one kernel with the sums over lanes, XLA's stores the
    summands first, in float32."""
    x, mean, r, scale, no_bias = residuals
    if scale is None and no_bias is None:
        return None, None
    x, mean, r, dy = jax.lax.optimization_barrier((x, mean, r, dy))
    rows = tuple(range(x.ndim - 1))
    xhat, dy = _live(x, mean, kind), _wide(dy)
    if kind.spare_lane:
        dy = jnp.where(_spare(dy), 0, dy)
    return (
        None if scale is None else jnp.sum(dy * xhat * r, axis=rows).astype(scale.dtype),
        None if no_bias is None else jnp.sum(dy, axis=rows).astype(no_bias.dtype),
    )


def _wide(x: Array) -> Array:
    """x in the dtype of the statistics."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _live(x: Array, mean: Array | None, kind: _Kind) -> Array:
    """The part of x that the norm sees, in the dtype of the statistics."""
    x = _wide(x)
    if kind.spare_lane:
        x = jnp.where(_spare(x), 0, x)
    return x if mean is None else x - mean


def _spare(x: Array) -> Array:
    """True in the last lane, shape of x."""
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) == x.shape[-1] - 1


def _row(leaf: Array, like: Array) -> Array:
    """A (d,) parameter as a row that broadcasts against `like`."""
    return leaf.astype(like.dtype).reshape((1,) * (like.ndim - 1) + leaf.shape)
