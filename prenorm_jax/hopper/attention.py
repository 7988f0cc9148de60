"""Attention over a short sequence, forward and backward, for GPUs of compute capability 9 (Pallas, Mosaic GPU).

The queries, keys and values of one head are a few hundred rows of 64 numbers. One thread block takes a head of one example, loads all
of it into shared memory once, and keeps whole rows of the softmax in registers: nothing is rescaled, nothing is summed over blocks,
and two thread blocks share a multiprocessor, one computing while the other loads. In the backward pass each block of 64 queries makes
its own gradient, then each block of 64 keys makes theirs, the probabilities being written from scores and log-sum-exp in both.

Shapes: B batch, L rows of a sequence, of which the first `length` are seen; H heads, K = 64 head width. Tables of an example's head lie
one below the other in shared memory, L rows each; a product over more rows than L runs on into the next one, whose numbers are finite
and meet probabilities of zero.

Queries, keys and values come in three arrays, or in one in which those of a head lie side by side, as one product makes them. The
kernels read and write either, so that nothing is cut or put together for them.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from prenorm_jax import hopper

Array = jax.Array

HEAD_WIDTH = 64
LENGTHS = (64, 200)  # shortest and longest sequence; up to 200, two heads fit into a multiprocessor's shared memory
ROWS = 8  # L is a multiple of them
BLOCK = 64  # rows of a product


def served(dtype: Any, head_width: int, queries: int, keys: int) -> bool:
    """Whether these kernels can attend, on the devices of the mesh in force, or on this process's one."""
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    short = queries == keys and LENGTHS[0] <= keys <= LENGTHS[1]
    return half and head_width == HEAD_WIDTH and short and hopper.available()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def attend(qkv: tuple[Array, ...], length: int, interpret: Any = False) -> Array:
    """softmax(q k^T / sqrt(K)) v over the first `length` keys.

    Args:
      qkv: queries, keys and values, (B, L, H, 64) each, or one array (B, L, H, 3 * 64) of all: bfloat16 or float16, L a multiple of 8
        from 64 to 200.
      interpret: False, or the parameters of Pallas's interpreter, which runs without a GPU.

    Returns: (B, L, H, 64); rows from `length` on attend as well.
    Raises: ValueError for other shapes.
    """
    batch, rows, heads = qkv[0].shape[:3] if qkv else (0, 0, 0)
    expected = {1: [(batch, rows, heads, 3 * HEAD_WIDTH)], 3: 3 * [(batch, rows, heads, HEAD_WIDTH)]}.get(len(qkv))
    if [each.shape for each in qkv] != expected or rows % ROWS or not LENGTHS[0] <= rows <= LENGTHS[1]:
        raise ValueError(
            f"hopper attention: got queries, keys and values {', '.join(str(each.shape) for each in qkv)}; expected three of one shape "
            f"(batch, rows, heads, {HEAD_WIDTH}), or one array (batch, rows, heads, {3 * HEAD_WIDTH}), with {LENGTHS[0]} to {LENGTHS[1]} "
            f"rows, a multiple of {ROWS}; model.attention=auto chooses what serves"
        )
    return _forward(qkv, length, interpret)[0]


def _attend_forward(qkv: tuple[Array, ...], length: int, interpret: Any) -> tuple[Array, Any]:
    out, log_sums = _forward(qkv, length, interpret)
    return out, (qkv, out, log_sums)


def _attend_backward(length: int, interpret: Any, residuals: Any, dout: Array) -> tuple[tuple[Array, ...]]:
    return (_backward(*residuals, dout, length, interpret),)


attend.defvjp(_attend_forward, _attend_backward)


def _parts(refs: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Where queries, keys and values are: a reference and columns of it, for each of the three."""
    pallas, _ = hopper.pallas()
    if len(refs) == 3:
        return [(ref, pallas.ds(0, HEAD_WIDTH)) for ref in refs]
    return [(refs[0], pallas.ds(part * HEAD_WIDTH, HEAD_WIDTH)) for part in range(3)]


# Under jit, so that a model of many layers lowers each kernel once.
@functools.partial(jax.jit, static_argnames=("length", "interpret"))
def _forward(qkv: tuple[Array, ...], length: int, interpret: Any) -> tuple[Array, Array]:
    """Attention, and the base-2 logarithms (B, H, L) of the sums of exponentials, float32."""
    (batch, rows, heads, _), dtype, width = qkv[0].shape, qkv[0].dtype, HEAD_WIDTH
    scale = math.log2(math.e) / math.sqrt(width)
    pallas, gpu = hopper.pallas()
    # V comes first: what follows it are numbers as well.
    v_at, q_at, k_at, out_at = (rows * table for table in range(4))
    chunks = list(_chunks(rows, 64))

    def kernel(*refs):  # type: ignore[no-untyped-def]
        qkv_refs, (out_ref, log_sums_ref, smem, log_sums_smem, qk_loaded, v_loaded) = refs[: len(qkv)], refs[len(qkv) :]
        example, head = lax.axis_index("batch"), lax.axis_index("heads")
        places = ((q_at, qk_loaded), (k_at, qk_loaded), (v_at, v_loaded))
        for (ref, columns), (at, loaded) in zip(_parts(qkv_refs), places, strict=True):
            gpu.copy_gmem_to_smem(ref.at[example, :, head, columns], smem.at[pallas.ds(at, rows)], loaded)
        outgoing = smem.at[pallas.ds(out_at, BLOCK)]
        gpu.barrier_wait(qk_loaded)

        def block(number, _):  # type: ignore[no-untyped-def]
            start = _start(number, rows)

            def scores(*sums):  # type: ignore[no-untyped-def]
                for total, (first, count) in zip(sums, chunks, strict=True):
                    keys = smem.at[pallas.ds(k_at + first, count)]
                    gpu.wgmma(total, smem.at[pallas.ds(q_at + start, BLOCK)], keys.transpose((1, 0)))
                return [total[...] for total in sums]

            s = pallas.run_scoped(scores, *[gpu.ACC((BLOCK, count), jnp.float32) for _, count in chunks])
            s = [_where_seen(part, chunk, length, -jnp.inf) for part, chunk in zip(s, chunks, strict=True)]
            top = functools.reduce(jnp.maximum, [part.max(axis=1) for part in s]) * scale
            p = [jnp.exp2(part * scale - _columns(top, part)) for part in s]
            norm = functools.reduce(jnp.add, [part.sum(axis=1) for part in p])
            pallas.when(number == 0)(lambda: gpu.barrier_wait(v_loaded))

            def mix(total, p=p):  # type: ignore[no-untyped-def]
                for part, (first, count) in zip(p, chunks, strict=True):
                    gpu.wgmma(total, part.astype(dtype), smem.at[pallas.ds(v_at + first, count)])
                return total[...]

            out = pallas.run_scoped(mix, gpu.ACC((BLOCK, width), jnp.float32))
            gpu.wait_smem_to_gmem(0, wait_read_only=True)
            outgoing[...] = (out / _columns(norm, out)).astype(dtype)
            log_sums_smem[pallas.ds(start, BLOCK)] = top + jnp.log(norm) * math.log2(math.e)
            gpu.commit_smem()
            gpu.copy_smem_to_gmem(outgoing, out_ref.at[example, pallas.ds(start, BLOCK), head])
            return ()

        lax.fori_loop(0, _blocks(rows), block, ())
        gpu.copy_smem_to_gmem(log_sums_smem, log_sums_ref.at[example, head])
        gpu.wait_smem_to_gmem(0)

    return gpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((batch, rows, heads, width), dtype),
            jax.ShapeDtypeStruct((batch, heads, rows), jnp.float32),
        ),
        scratch_types=[
            _tables(3 * rows + BLOCK, width, dtype, swizzle=128),
            gpu.SMEM((rows,), jnp.float32),
            gpu.Barrier(num_arrivals=2),
            gpu.Barrier(),
        ],
        **_launch(batch, heads, interpret),
    )(*qkv)


@functools.partial(jax.jit, static_argnames=("length", "interpret"))
def _backward(
    qkv: tuple[Array, ...], out: Array, log_sums: Array, dout: Array, length: int, interpret: Any
) -> tuple[Array, ...]:
    """The gradients of q, k and v, as these come. With P the probabilities, dP = dO V^T and delta = rowsum(dO * O): dS = P * (dP - delta),
    dQ = dS K / sqrt(K), dK = dS^T Q / sqrt(K), dV = P^T dO."""
    (batch, rows, heads, width), dtype, arrays = out.shape, out.dtype, len(qkv)
    scale = math.log2(math.e) / math.sqrt(width)
    pallas, gpu = hopper.pallas()
    delta = jnp.einsum("blhk,blhk->bhl", out.astype(jnp.float32), dout.astype(jnp.float32))
    # V comes last: no product sums over its rows.
    k_at, q_at, dout_at, v_at, gradient_at = (rows * table for table in range(5))
    chunks = list(_chunks(rows, 32))
    padded = max(first + count for first, count in chunks)

    def kernel(*refs):  # type: ignore[no-untyped-def]
        given, (dout_ref, log_sums_ref, delta_ref), rest = refs[:arrays], refs[arrays : arrays + 3], refs[arrays + 3 :]
        made, (smem, log_sums_smem, delta_smem, loaded) = rest[:arrays], rest[arrays:]
        example, head = lax.axis_index("batch"), lax.axis_index("heads")
        tables = [
            (ref.at[example, :, head, columns], at)
            for (ref, columns), at in zip(_parts(given), (q_at, k_at, v_at), strict=True)
        ]
        for ref, at in (*tables, (dout_ref.at[example, :, head], dout_at)):
            gpu.copy_gmem_to_smem(ref, smem.at[pallas.ds(at, rows)], loaded)
        for ref, vector in ((log_sums_ref, log_sums_smem), (delta_ref, delta_smem)):
            gpu.copy_gmem_to_smem(ref.at[example, head], vector.at[pallas.ds(0, rows)], loaded)
        gpu.barrier_wait(loaded)
        outgoing = smem.at[pallas.ds(gradient_at, BLOCK)]

        dq_part, dk_part, dv_part = _parts(made)

        def store(value, part, start):  # type: ignore[no-untyped-def]
            ref, columns = part
            gpu.wait_smem_to_gmem(0, wait_read_only=True)
            outgoing[...] = value.astype(dtype)
            gpu.commit_smem()
            gpu.copy_smem_to_gmem(outgoing, ref.at[example, pallas.ds(start, BLOCK), head, columns])

        def scores_and_dp(s_at, dp_at, s_by, dp_by, count):  # type: ignore[no-untyped-def]
            def products(s, dp):  # type: ignore[no-untyped-def]
                for total, left, right in ((s, s_at, s_by), (dp, dp_at, dp_by)):
                    by = smem.at[pallas.ds(right, count)]
                    gpu.wgmma(total, smem.at[pallas.ds(left, BLOCK)], by.transpose((1, 0)))
                return s[...], dp[...]

            return pallas.run_scoped(products, *[gpu.ACC((BLOCK, count), jnp.float32)] * 2)

        def queries(number, _):  # type: ignore[no-untyped-def]
            start = _start(number, rows)
            log_sum = gpu.load(log_sums_smem.at[pallas.ds(start, BLOCK)], layout=gpu.Layout.WGMMA.reduce(1))
            row_delta = gpu.load(delta_smem.at[pallas.ds(start, BLOCK)], layout=gpu.Layout.WGMMA.reduce(1))
            dq = _zeros(width)
            for first, count in chunks:
                s, dp = scores_and_dp(q_at + start, dout_at + start, k_at + first, v_at + first, count)
                ds = jnp.exp2(s * scale - _columns(log_sum, s)) * (dp - _columns(row_delta, dp))
                ds = _where_seen(ds, (first, count), length, 0)

                def add_dq(total, ds=ds, first=first, count=count):  # type: ignore[no-untyped-def]
                    gpu.wgmma(total, ds.astype(dtype), smem.at[pallas.ds(k_at + first, count)])

                dq = pallas.run_state(add_dq)(gpu.ACC.init(dq))
            store(dq / math.sqrt(width), dq_part, start)
            return ()

        def keys(number, _):  # type: ignore[no-untyped-def]
            start = _start(number, rows)
            dk, dv = _zeros(width), _zeros(width)
            for first, count in chunks:
                s, dp = scores_and_dp(k_at + start, v_at + start, q_at + first, dout_at + first, count)
                log_sum = gpu.load(log_sums_smem.at[pallas.ds(first, count)], layout=gpu.Layout.WGMMA.reduce(0))
                row_delta = gpu.load(delta_smem.at[pallas.ds(first, count)], layout=gpu.Layout.WGMMA.reduce(0))
                p = jnp.exp2(s * scale - _rows(log_sum, s))
                ds = p * (dp - _rows(row_delta, dp))
                # Queries behind the last row of all; those between `length` and it have gradients of their own.
                p, ds = (_where_seen(part, (first, count), rows, 0) for part in (p, ds))

                def add_dv_dk(totals, p=p, ds=ds, first=first, count=count):  # type: ignore[no-untyped-def]
                    gpu.wgmma(totals[0], p.astype(dtype), smem.at[pallas.ds(dout_at + first, count)])
                    gpu.wgmma(totals[1], ds.astype(dtype), smem.at[pallas.ds(q_at + first, count)])

                dv, dk = pallas.run_state(add_dv_dk)((gpu.ACC.init(dv), gpu.ACC.init(dk)))
            dv, dk = (_where_row_seen(part, start, length) for part in (dv, dk))
            store(dv, dv_part, start)
            store(dk / math.sqrt(width), dk_part, start)
            return ()

        count = _blocks(rows)
        lax.fori_loop(0, count, queries, ())
        lax.fori_loop(0, count, keys, ())
        gpu.wait_smem_to_gmem(0)

    return gpu.kernel(
        kernel,
        out_type=tuple(jax.ShapeDtypeStruct(each.shape, dtype) for each in qkv),
        scratch_types=[
            _tables(4 * rows + BLOCK, width, dtype, swizzle=64),
            gpu.SMEM((padded,), jnp.float32),
            gpu.SMEM((padded,), jnp.float32),
            gpu.Barrier(num_arrivals=6),
        ],
        **_launch(batch, heads, interpret),
    )(*qkv, dout, log_sums, delta)


def _launch(batch: int, heads: int, interpret: Any) -> dict[str, Any]:
    """One warpgroup for every head of every example."""
    _, gpu = hopper.pallas()
    return {
        "grid": (heads, batch),
        "grid_names": ("heads", "batch"),
        "num_threads": 1,
        "thread_name": "warpgroup",
        "compiler_params": gpu.CompilerParams(approx_math=True),
        "interpret": interpret,
    }


def _tables(rows: int, width: int, dtype: Any, swizzle: int) -> Any:
    """Shared memory that products read: tiles of 8 rows of `swizzle` bytes."""
    _, gpu = hopper.pallas()
    tiles = gpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return gpu.SMEM((rows, width), dtype, transforms=(tiles, gpu.SwizzleTransform(swizzle)))


def _blocks(rows: int) -> int:
    """How many blocks cover `rows`."""
    return -(-rows // BLOCK)


def _start(number: Any, rows: int) -> Any:
    """The first row of a block; the last one ends with the last row, overlaps the one before, and says the same there."""
    pallas, _ = hopper.pallas()
    return pallas.multiple_of(jnp.minimum(number * BLOCK, rows - BLOCK), ROWS)


def _chunks(rows: int, multiple: int) -> Iterator[tuple[int, int]]:
    """(first row, count) of parts of at most 128 rows, each a multiple of `multiple`, the last of which may end behind `rows`."""
    total = -(-rows // multiple) * multiple
    first = 0
    while first < total:
        count = (total - first) % 128 or 128
        yield first, count
        first += count


def _zeros(width: int) -> Array:
    _, gpu = hopper.pallas()
    return gpu.layout_cast(jnp.zeros((BLOCK, width), jnp.float32), gpu.Layout.WGMMA)


def _columns(vector: Array, like: Array) -> Array:
    """A number for each row."""
    return lax.broadcast_in_dim(vector, like.shape, [0])


def _rows(vector: Array, like: Array) -> Array:
    """A number for each column."""
    return lax.broadcast_in_dim(vector, like.shape, [1])


def _where_seen(values: Array, chunk: tuple[int, int], length: int, otherwise: float) -> Array:
    """Columns of a chunk, with `otherwise` in those from `length` on."""
    first, count = chunk
    return values if first + count <= length else jnp.where(_indices(values, 1) + first < length, values, otherwise)


def _where_row_seen(values: Array, start: Any, length: int) -> Array:
    """Rows of a block, with zeros in those from `length` on."""
    return jnp.where(_indices(values, 0) + start < length, values, 0)


def _indices(values: Array, axis: int) -> Array:
    _, gpu = hopper.pallas()
    return gpu.broadcasted_iota(jnp.int32, values.shape, axis, layout=gpu.Layout.WGMMA)
