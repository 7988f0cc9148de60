"""The GELU of Hendrycks and Gimpel (2016), in its two forms, with gradients that keep the input alone; and its product with a matrix.

With u = sqrt(2/pi) (x + 0.044715 x^3), the "tanh" form is written with one exponential, since (1 + tanh u) / 2 = 1 / (1 + exp(-2u)):

    tanh   y = x s,        y' = s + x s (1 - s) 2u'     s = 1 / (1 + exp(-2u)),  u' = sqrt(2/pi) (1 + 3 0.044715 x^2)
    erf    y = x Phi(x),   y' = Phi(x) + x phi(x)       Phi, phi: distribution and density of the standard normal

Arithmetic is float32 or wider, y has x's dtype. Differentiated as it is written, the GELU would store a second array of x's shape for
the backward pass: on a GPU that is a fifth of an MLP's traffic outside its matrix products.

Shapes: N rows, F width of an MLP, D what it writes to.
"""

import functools
import math

import jax
import jax.numpy as jnp

from prenorm_jax import placement
from prenorm_jax.hopper import gelu_gradient

Array = jax.Array
_CUBIC, _TWICE = gelu_gradient.CUBIC, 2 * gelu_gradient.ROOT


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu(x: Array, form: str = "tanh") -> Array:
    """GELU of x, any shape, in the "tanh" or the "erf" form.

    >>> gelu(jnp.array([-1.0, 0.0, 1.0]))
    Array([-0.158808,  0.      ,  0.841192], dtype=float32)
    """
    return _forward(x, form)[0]


def _forward(x: Array, form: str) -> tuple[Array, Array]:
    if form == "tanh" and x.dtype == jnp.bfloat16 and jax.default_backend() == "gpu":
        # As XLA knows it, it becomes the epilogue of the matrix product before it, in float32 there, and x a by-product of that.
        return jax.nn.gelu(x, approximate=True), x
    wide = _wide(x)
    return (wide * _share(wide, form)).astype(x.dtype), x


def _backward(form: str, x: Array, dy: Array) -> tuple[Array]:
    # Without a barrier XLA finds the exponential of the forward pass again, and stores it there, in float32, instead.
    wide = _wide(jax.lax.optimization_barrier(x))
    share = _share(wide, form)
    if form == "tanh":
        slope = share + wide * share * (1 - share) * (_TWICE * (1 + 3 * _CUBIC * wide * wide))
    else:
        slope = share + wide * jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    dx = (dy.astype(wide.dtype) * slope).astype(x.dtype)
    # The bias gradient in front sums dx over rows: in one kernel with this, XLA's takes longer than both apart (openxla/xla#46075).
    return (jax.lax.optimization_barrier(dx),)


gelu.defvjp(_forward, _backward)


def product(z: Array, matrix: Array, form: str = "tanh") -> Array:
    """gelu(z) @ matrix: (N, F), (F, D) -> (N, D), in the dtype of both.

    >>> product(jnp.array([[-1.0, 1.0]]), jnp.eye(2))
    Array([[-0.158808,  0.841192]], dtype=float32)
    """
    if form == "tanh" and gelu_gradient.served(z, matrix):
        return _product(z, matrix)
    return _scoped(z, form) @ matrix


_scoped = jax.named_scope("gelu")(gelu)


@jax.custom_vjp
def _product(z: Array, matrix: Array) -> Array:
    return _scoped(z) @ matrix


def _product_forward(z: Array, matrix: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    y = _scoped(z)
    return y @ matrix, (z, y, matrix)


def _product_backward(kept: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array]:
    z, y, matrix = kept
    rows, columns = (
        placement.PartitionSpec(placement.TENSOR),
        placement.PartitionSpec(placement.BATCH, placement.TENSOR),
    )
    dz = placement.on_each_device(
        gelu_gradient.gelu_gradient, (dy, matrix, z), (placement.EXAMPLES, rows, columns), columns
    )
    return dz, y.T @ dy


_product.defvjp(_product_forward, _product_backward)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _share(x: Array, form: str) -> Array:
    """y / x, between 0 and 1."""
    if form == "tanh":
        return 1 / (1 + jnp.exp(x * (-_TWICE - _TWICE * _CUBIC * (x * x))))
    return 0.5 * (1 + jax.lax.erf(x / math.sqrt(2)))
