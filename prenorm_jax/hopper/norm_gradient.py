"""The backward pass of a norm on the main branch in one kernel: every array is read once and written once.

For the norms of `prenorm_jax.norms` with d the divisor, xhat the live (and, for LayerNorm, centred) part of x, r = 1 / sqrt(s / d + eps)
and g = dn * scale, a row's gradient is

    dx = dbranch + r g - (r^3 / d) (sum g xhat) (xhat + [drop] sum xhat),      [centred] with g - mean g for g

and what is summed over rows on the way is: dx (the gradient of a bias that was added to the main branch), dn xhat r (of the scale) and
dn (of the norm's bias). r is computed anew: two sums over lanes that are in registers anyway, where keeping it would cost the forward
pass a second kernel.

A warp takes a row, its 32 lanes hold it in registers, and sums over rows stay there until the thread block's last row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from prenorm_jax import hopper, placement
from prenorm_jax.hopper import LANES, WARPS, WIDTHS

Array = jax.Array

ENTRIES = 2**20  # of x; fewer are not worth a kernel of their own


def served(x: Array) -> bool:
    """Whether the kernel can take the gradient of a norm of x (rows, width), with the rows that each device has."""
    half = x.dtype in (jnp.bfloat16, jnp.float16)
    rows = placement.own(x.shape[0])
    return x.ndim == 2 and half and rows * x.shape[1] >= ENTRIES and fits(rows, x.shape[1]) and hopper.available()


def fits(rows: int, width: int) -> bool:
    """Whether the kernel is made for arrays of this shape."""
    return rows % WARPS == 0 and width % (2 * LANES) == 0 and WIDTHS[0] <= width <= WIDTHS[1]


# Under jit, so that a model of many layers lowers the kernel once.
@functools.partial(
    jax.jit, static_argnames=("divisor", "eps", "centred", "squared_sum", "spare_lane", "column_sums", "interpret")
)
def norm_gradient(
    x: Array,
    dn: Array,
    dbranch: Array | None,
    scale: Array | None,
    *,
    divisor: int,
    eps: float,
    centred: bool,
    squared_sum: bool,
    spare_lane: bool,
    column_sums: tuple[str, ...],
    interpret: Any = False,
) -> tuple[Array, ...]:
    """(dx, one sum over rows for each name in `column_sums`).

    Args:
      x, dn, dbranch: (rows, width): the main branch, the gradients of the normalised value and of the main branch (None: zero).
      scale: (width,), or None for 1.
      divisor, eps, centred, squared_sum, spare_lane: as in `norms.Kind`.
      column_sums: of "dx", "dscale" and "dbias".

    Returns: dx in x's dtype, sums (width,) float32.
    """
    rows, width = x.shape
    pallas, gpu = hopper.pallas()
    layout = hopper.row_layout(width)
    tiles = rows // WARPS
    blocks = min(hopper.MULTIPROCESSORS * (4 if width >= 512 else 6), tiles)
    arguments = [array for array in (x, dn, dbranch, scale) if array is not None]

    def kernel(*refs):  # type: ignore[no-untyped-def]
        given, (dx_ref, *sum_refs) = iter(refs[: len(arguments)]), refs[len(arguments) :]
        x_ref, dn_ref = next(given), next(given)
        dbranch_ref = None if dbranch is None else next(given)
        gamma = None
        if scale is not None:
            gamma = gpu.load(next(given), layout=layout.reduce(0), optimized=False).astype(jnp.float32)
        block = lax.axis_index("blocks")

        def take_rows(turn, sums):  # type: ignore[no-untyped-def]
            at = pallas.ds((block + turn * blocks) * WARPS, WARPS)

            def load(ref):  # type: ignore[no-untyped-def]
                return gpu.load(ref.at[at], layout=layout, optimized=False).astype(jnp.float32)

            xhat, dn = load(x_ref), load(dn_ref)
            if spare_lane:
                spare = gpu.broadcasted_iota(jnp.int32, xhat.shape, 1, layout=layout) == width - 1
                xhat, dn = jnp.where(spare, 0, xhat), jnp.where(spare, 0, dn)
            if centred:
                xhat = xhat - hopper.each_row(xhat.sum(axis=1) / width, xhat)
            total = xhat.sum(axis=1) if squared_sum else None
            power = (xhat * xhat).sum(axis=1)
            r = lax.rsqrt((power if total is None else power + total * total) / divisor + eps)
            g = dn if gamma is None else dn * lax.broadcast_in_dim(gamma, dn.shape, [1])
            along = (g * xhat).sum(axis=1)
            if centred:
                g = g - hopper.each_row(g.sum(axis=1) / width, g)
            direction = xhat if total is None else xhat + hopper.each_row(total, xhat)
            dx = hopper.each_row(r, g) * g - hopper.each_row(r * r * r * along / divisor, direction) * direction
            if spare_lane:
                dx = jnp.where(spare, 0, dx)
            if dbranch_ref is not None:
                dx = dx + load(dbranch_ref)
            dx_ref[at] = dx.astype(x.dtype)
            terms = {"dx": lambda: dx, "dscale": lambda: dn * xhat * hopper.each_row(r, xhat), "dbias": lambda: dn}
            return tuple(sum + terms[name]() for sum, name in zip(sums, column_sums, strict=True))

        zeros = tuple(gpu.layout_cast(jnp.zeros((WARPS, width), jnp.float32), layout) for _ in column_sums)
        sums = lax.fori_loop(0, (tiles - block + blocks - 1) // blocks, take_rows, zeros)
        for ref, sum in zip(sum_refs, sums, strict=True):
            ref[pallas.ds(block * WARPS, WARPS)] = sum

    partial_sum = jax.ShapeDtypeStruct((blocks * WARPS, width), jnp.float32)
    dx, *sums = gpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype), *[partial_sum] * len(column_sums)),
        **hopper.row_blocks(blocks, interpret, barriers=False),
    )(*arguments)
    return dx, *(sum.sum(axis=0) for sum in sums)
