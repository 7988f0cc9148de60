"""The two passes of a softmax cross entropy over rows of half-precision logits: one that reads them, one that reads and writes.

A thread block takes a row, PIECE logits at a time. Each of its threads keeps a maximum and a sum of exponentials of its own, which are
put together at the row's end, so that the row is read once and no thread waits for another on the way.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from prenorm_jax import hopper, placement

Array = jax.Array

PIECE = 1024  # logits of a load by all threads of a block
TOGETHER = 7  # pieces on their way at a time
BLOCKS = 8 * hopper.MULTIPROCESSORS
LOWEST = -1e30  # below every logit; its exponential is zero, and it takes part in differences, as -inf could not
LOG2_E = math.log2(math.e)


def served(shape: Sequence[int], dtype: Any, classes: int) -> bool:
    """Whether the kernels can take logits (..., columns) of which the first `classes` count, with the rows that each device has."""
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    if placement.sizes().get(placement.TENSOR, 1) > 1:
        return False  # the columns are split
    return (
        half
        and placement.own(shape[0]) * math.prod(shape[1:]) >= 2**24
        and fits(shape[-1], classes)
        and hopper.available()
    )


def fits(columns: int, classes: int) -> bool:
    """Whether the kernels are made for rows of this length: all but the last PIECE of their columns count."""
    return columns % 8 == 0 and columns >= PIECE and columns - classes <= PIECE


@functools.partial(jax.jit, static_argnames=("classes", "interpret"))
def log_sum_exp(logits: Array, *, classes: int, interpret: Any = False) -> Array:
    """log sum_c exp(logits)_c over the first `classes` columns: (rows, columns) half precision -> (rows,) float32."""
    rows, columns = logits.shape
    _, gpu = hopper.pallas()
    blocks = min(BLOCKS, rows)
    turns, rest, tail = _pieces(columns, classes)

    def kernel(logits_ref, out_ref):  # type: ignore[no-untyped-def]
        block = lax.axis_index("blocks")

        def take_row(turn, _):  # type: ignore[no-untyped-def]
            row = block + turn * blocks
            load = functools.partial(_load, logits_ref.at[row])

            def take(sums, pieces):  # type: ignore[no-untyped-def]
                top, total = sums
                new = functools.reduce(jnp.maximum, pieces, top)
                total = total * jnp.exp2(top - new)
                return new, functools.reduce(jnp.add, [jnp.exp2(piece - new) for piece in pieces], total)

            def take_pieces(number, sums):  # type: ignore[no-untyped-def]
                return take(sums, [load((number * TOGETHER + k) * PIECE) * LOG2_E for k in range(TOGETHER)])

            sums = tuple(_constant(value) for value in (LOWEST, 0.0))
            sums = lax.fori_loop(0, turns, take_pieces, sums)
            pieces = [load(start) * LOG2_E for start in rest]
            if tail is not None:
                column = _columns(tail.start)
                last = load(tail.start) * LOG2_E
                pieces.append(jnp.where(jnp.logical_and(column >= tail.unseen, column < classes), last, -jnp.inf))
            top, total = take(sums, pieces) if pieces else sums
            highest = top.max()
            total = (total * jnp.exp2(top - _splat(highest))).sum()
            out_ref[row] = (highest + jnp.log2(total)) / LOG2_E
            return ()

        lax.fori_loop(0, (rows - block + blocks - 1) // blocks, take_row, ())

    out = jax.ShapeDtypeStruct((rows,), jnp.float32)
    # The scratch memory of the sums over threads is used again for the next row.
    return gpu.kernel(kernel, out_type=out, **hopper.row_blocks(blocks, interpret, barriers=True))(logits)


@functools.partial(jax.jit, static_argnames=("classes", "interpret"))
def gradient(
    logits: Array, log_sums: Array, targets: Array, dloss: Array, *, classes: int, interpret: Any = False
) -> Array:
    """(softmax(logits) - onehot(targets)) dloss, zero from column `classes` on.

    Args:
      logits: (rows, columns) half precision.
      log_sums: (rows,) float32, of `log_sum_exp`.
      targets: (rows,) int32.
      dloss: (rows,) float32.

    Returns: (rows, columns) in the logits' dtype.
    """
    rows, columns = logits.shape
    pallas, gpu = hopper.pallas()
    blocks = min(BLOCKS, rows)
    turns, rest, tail = _pieces(columns, classes)

    def kernel(logits_ref, log_sums_ref, targets_ref, dloss_ref, out_ref):  # type: ignore[no-untyped-def]
        block = lax.axis_index("blocks")

        def take_row(turn, _):  # type: ignore[no-untyped-def]
            row = block + turn * blocks
            log_sum, target, share = _splat(log_sums_ref[row] * LOG2_E), targets_ref[row], _splat(dloss_ref[row])

            def write(starts):  # type: ignore[no-untyped-def]
                pieces = [_load(logits_ref.at[row], start) for start in starts]
                for start, piece in zip(starts, pieces, strict=True):
                    column = _columns(start)
                    slope = jnp.exp2(piece * LOG2_E - log_sum) * share
                    slope = jnp.where(column == _splat(target), slope - share, slope)
                    if isinstance(start, int) and start + PIECE > classes:
                        slope = jnp.where(column < classes, slope, 0)
                    out_ref.at[row][pallas.ds(start, PIECE)] = slope.astype(logits.dtype)

            def write_pieces(number, _):  # type: ignore[no-untyped-def]
                write([(number * TOGETHER + k) * PIECE for k in range(TOGETHER)])
                return ()

            lax.fori_loop(0, turns, write_pieces, ())
            # The last piece begins inside the one before it, and says the same there.
            write([*rest, *([] if tail is None else [tail.start])])
            return ()

        lax.fori_loop(0, (rows - block + blocks - 1) // blocks, take_row, ())

    out = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
    launch = hopper.row_blocks(blocks, interpret, barriers=False)
    return gpu.kernel(kernel, out_type=out, **launch)(logits, log_sums, targets, dloss)


class _Tail:
    """The last piece of a row: it begins at `start`, and its columns before `unseen` belong to earlier pieces as well."""

    def __init__(self, start: int, unseen: int) -> None:
        self.start, self.unseen = start, unseen


def _pieces(columns: int, classes: int) -> tuple[int, list[int], _Tail | None]:
    """Turns of TOGETHER whole pieces; the first columns of the other whole ones; what is left, unless that is nothing."""
    whole = classes // PIECE
    turns = whole // TOGETHER
    rest = [number * PIECE for number in range(turns * TOGETHER, whole)]
    return turns, rest, _Tail(columns - PIECE, whole * PIECE) if columns > whole * PIECE else None


def _layout() -> Any:
    _, gpu = hopper.pallas()
    return gpu.Layout.WG_STRIDED((PIECE,), vec_size=8)


def _load(row: Any, start: Any) -> Array:
    pallas, gpu = hopper.pallas()
    return gpu.load(row.at[pallas.ds(start, PIECE)], layout=_layout()).astype(jnp.float32)


def _columns(start: Any) -> Array:
    _, gpu = hopper.pallas()
    return gpu.broadcasted_iota(jnp.int32, (PIECE,), 0, layout=_layout()) + start


def _constant(value: float) -> Array:
    _, gpu = hopper.pallas()
    return gpu.layout_cast(jnp.full((PIECE,), value, jnp.float32), _layout())


def _splat(value: Array) -> Array:
    return lax.broadcast_in_dim(value, (PIECE,), [])
