"""Softmax cross entropy with a gradient of its own, so that no array of the logits' shape is kept but themselves."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from prenorm_jax import placement
from prenorm_jax.hopper import cross_entropy as hopper

Array = jax.Array
ROWS = placement.EXAMPLES


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def cross_entropy(
    logits: Array, targets: Array, classes: int, smoothing: float = 0.0, rounded: str = "float32"
) -> Array:
    """-sum_c q_c log softmax(logits)_c with q = (1 - smoothing) onehot(targets) + smoothing / classes.

    The gradient, softmax(logits) - q, is written from the logits and their log-sum-exp in one pass.

    Args:
      logits: (..., C) float with C >= classes, of which the columns from `classes` on count for nothing.
      targets: (...) int.
      rounded: a dtype that the logits were rounded to before they were widened: they are not stored wide, and where that is a half
        precision, the kernels of `prenorm_jax.hopper` serve on the GPUs that they are for.

    Returns: (...) in the logits' dtype.

    >>> cross_entropy(jnp.array([[0.0, 0.0, 9.0]]), jnp.array([1]), classes=2)
    Array([0.6931472], dtype=float32)
    """
    return _loss(logits, targets, classes, smoothing, rounded)[0]


def _loss(
    logits: Array, targets: Array, classes: int, smoothing: float, rounded: str
) -> tuple[Array, tuple[Array, Array, Array]]:
    # A mask fuses into the reductions; a slice would copy the logits to a width that the matrix units dislike.
    real = _columns(logits) < classes
    if _by_kernel(logits, classes, smoothing, rounded):
        log_sum_exp = functools.partial(hopper.log_sum_exp, classes=classes)
        normaliser = placement.on_each_device(log_sum_exp, (_as_rows(logits, rounded),), (ROWS,), ROWS)
        normaliser = normaliser.reshape(targets.shape)
    else:
        normaliser = jax.nn.logsumexp(jnp.where(real, logits, -jnp.inf), axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    loss = normaliser - (1 - smoothing) * target_logits
    if smoothing:
        loss -= smoothing * jnp.where(real, logits, 0).sum(-1) / classes
    return loss, (logits, targets, normaliser)


def _gradient(
    classes: int, smoothing: float, rounded: str, kept: tuple[Array, Array, Array], dloss: Array
) -> tuple[Array, None]:
    logits, targets, normaliser = kept
    if _by_kernel(logits, classes, smoothing, rounded):
        rows = [array.reshape(-1) for array in (normaliser, targets, dloss)]
        by_kernel = functools.partial(hopper.gradient, classes=classes)
        gradient = placement.on_each_device(by_kernel, (_as_rows(logits, rounded), *rows), (ROWS,) * 4, ROWS)
        return gradient.reshape(logits.shape).astype(logits.dtype), None
    columns = _columns(logits)
    wanted = jnp.where(columns == targets[..., None], 1 - smoothing, 0.0) + smoothing / classes
    gradient = jnp.exp(logits - normaliser[..., None]) - wanted.astype(logits.dtype)
    return jnp.where(columns < classes, gradient, 0) * dloss[..., None], None


cross_entropy.defvjp(_loss, _gradient)


def _by_kernel(logits: Array, classes: int, smoothing: float, rounded: str) -> bool:
    return not smoothing and logits.dtype == jnp.float32 and hopper.served(logits.shape, rounded, classes)


def _as_rows(logits: Array, rounded: Any) -> Array:
    """(rows, C) as they were before they were widened: rounding them again changes nothing."""
    return logits.astype(rounded).reshape(-1, logits.shape[-1])


def _columns(logits: Array) -> Array:
    """The index of each logit's column, shape of the logits."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
