"""The product in front of a GELU's gradient, with that gradient in its epilogue, for GPUs of compute capability 9 (Pallas, Mosaic GPU).

Behind y = gelu(z) W, the gradient of z is dz = (dy W^T) gelu'(z): a product, and a pass that reads it and z and writes dz. Here the
product never leaves the registers. Two warpgroups take tiles of dz in turn: while one multiplies by the slope, the other has the tensor
cores; a third one loads what they need, in the order in which they need it.

Shapes: N rows, F width of the MLP, D what it writes to.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from prenorm_jax import hopper, placement

Array = jax.Array

TILE = 128  # rows and columns of dz that a warpgroup has at a time
STEP = 64  # of the sum over D: a row of shared memory, 128 bytes
STAGES = 5  # steps on their way at a time
ENTRIES = 2**23  # of z; with fewer there are not tiles enough to take turns
CUBIC, ROOT = 0.044715, math.sqrt(2 / math.pi)  # of the tanh form


def served(z: Array, matrix: Array) -> bool:
    """Whether the kernel can take the gradient of z (N, F), behind which a matrix (F, D) stands, with each device's own part of both."""
    if z.ndim != 2 or not z.dtype == matrix.dtype == jnp.bfloat16:
        return False
    own = placement.own(z.shape[0]), placement.own(z.shape[1], (placement.TENSOR,))
    return fits(*own, matrix.shape[1]) and hopper.available()


def fits(rows: int, width: int, outputs: int) -> bool:
    """Whether the kernel is made for z of (rows, width), behind which `outputs` numbers are written."""
    return rows % TILE == 0 and width % TILE == 0 and outputs % STEP == 0 and rows * width >= ENTRIES


# Under jit, so that a model of many layers lowers the kernel once.
@functools.partial(jax.jit, static_argnames=("interpret",))
def gelu_gradient(dy: Array, matrix: Array, z: Array, *, interpret: Any = False) -> Array:
    """(dy matrix^T) gelu'(z), of the GELU's tanh form: (N, F) in z's dtype. The product is float32, the slope too but for its tanh, which
    is one instruction (2^-11 at most); what comes of both is rounded once.

    Args:
      dy: (N, D); matrix: (F, D); z: (N, F): bfloat16, N and F multiples of 128, D of 64.
      interpret: False, or the parameters of Pallas's interpreter, which runs without a GPU.
    """
    (rows, outputs), (width, _) = dy.shape, matrix.shape
    pallas, gpu = hopper.pallas()
    across, steps = width // TILE, outputs // STEP
    tiles = rows // TILE * across
    blocks = min(hopper.MULTIPROCESSORS, tiles)

    def kernel(  # type: ignore[no-untyped-def]
        dy_ref, matrix_ref, z_ref, dz_ref, dy_smem, matrix_smem, z_smem, loaded, consumed, z_loaded, z_consumed
    ):
        me, block = lax.axis_index("warpgroup"), lax.axis_index("blocks")
        turns = (tiles - block + blocks - 1) // blocks  # even ones are the first warpgroup's, odd ones the second's

        def place(turn):  # type: ignore[no-untyped-def]
            tile = block + turn * blocks
            return pallas.ds(tile // across * TILE, TILE), pallas.ds(tile % across * TILE, TILE)

        @pallas.when(me == 2)
        def _load():  # type: ignore[no-untyped-def]
            gpu.set_max_registers(40, action="decrease")

            def wait_until_consumed(step):  # type: ignore[no-untyped-def]
                @pallas.when(step >= 0)
                def _():  # type: ignore[no-untyped-def]
                    reader = step // steps % 2
                    gpu.barrier_wait(consumed.at[reader * STAGES + step % STAGES])

            def wait_until_z_consumed(turn):  # type: ignore[no-untyped-def]
                @pallas.when(turn >= 0)
                def _():  # type: ignore[no-untyped-def]
                    gpu.barrier_wait(z_consumed.at[turn % 2])

            def load_tile(turn, _):  # type: ignore[no-untyped-def]
                (row, column), reader = place(turn), turn % 2

                def load_step(k, _):  # type: ignore[no-untyped-def]
                    step = turn * steps + k
                    slot = step % STAGES
                    wait_until_consumed(step - STAGES)
                    terms, barrier = pallas.ds(k * STEP, STEP), loaded.at[reader * STAGES + slot]
                    gpu.copy_gmem_to_smem(dy_ref.at[row, terms], dy_smem.at[slot], barrier)
                    gpu.copy_gmem_to_smem(matrix_ref.at[column, terms], matrix_smem.at[slot], barrier)

                    # Late in the product: its warpgroup has the epilogue of its last tile behind it by then.
                    @pallas.when(k == min(steps - 1, STAGES + 1))
                    def _load_z():  # type: ignore[no-untyped-def]
                        wait_until_z_consumed(turn - 2)
                        gpu.copy_gmem_to_smem(z_ref.at[row, column], z_smem.at[reader], z_loaded.at[reader])

                    return ()

                return lax.fori_loop(0, steps, load_step, ())

            lax.fori_loop(0, turns, load_tile, ())
            for back in range(STAGES, 0, -1):
                wait_until_consumed(turns * steps - back)
            for back in (2, 1):
                wait_until_z_consumed(turns - back)

        @pallas.when(me < 2)
        def _multiply():  # type: ignore[no-untyped-def]
            gpu.set_max_registers(232, action="increase")

            def tile(mine, _):  # type: ignore[no-untyped-def]
                turn = 2 * mine + me

                def product(total):  # type: ignore[no-untyped-def]
                    def multiply_step(k, _):  # type: ignore[no-untyped-def]
                        step = turn * steps + k
                        slot = step % STAGES
                        gpu.barrier_wait(loaded.at[me * STAGES + slot])
                        gpu.wgmma(total, dy_smem.at[slot], matrix_smem.at[slot].transpose((1, 0)))
                        gpu.wgmma_wait(1)

                        @pallas.when(k > 0)
                        def _before_is_through():  # type: ignore[no-untyped-def]
                            gpu.barrier_arrive(consumed.at[me * STAGES + (step - 1) % STAGES])

                        return ()

                    lax.fori_loop(0, steps, multiply_step, ())
                    return total[...]

                dh = pallas.run_scoped(product, gpu.ACC((TILE, TILE), jnp.float32))
                gpu.barrier_arrive(consumed.at[me * STAGES + (turn * steps + steps - 1) % STAGES])
                gpu.barrier_wait(z_loaded.at[me])
                for start in range(0, TILE, STEP):  # dz takes the place of z
                    part = z_smem.at[me, :, pallas.ds(start, STEP)]
                    part[...] = (dh[:, start : start + STEP] * _slope(part[...].astype(jnp.float32))).astype(z.dtype)
                gpu.commit_smem()
                row, column = place(turn)
                gpu.copy_smem_to_gmem(z_smem.at[me], dz_ref.at[row, column])
                gpu.wait_smem_to_gmem(0, wait_read_only=True)
                gpu.barrier_arrive(z_consumed.at[me])
                return ()

            lax.fori_loop(0, (turns - me + 1) // 2, tile, ())
            gpu.wait_smem_to_gmem(0)

    def tables(count: int, columns: int) -> Any:
        tiling = gpu.TilingTransform((8, STEP)), gpu.SwizzleTransform(128)
        return gpu.SMEM((count, TILE, columns), z.dtype, transforms=tiling)

    return gpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(z.shape, z.dtype),
        grid=(blocks,),
        grid_names=("blocks",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            tables(STAGES, STEP),
            tables(STAGES, STEP),
            tables(2, TILE),
            gpu.Barrier(num_arrivals=2, num_barriers=2 * STAGES),
            gpu.Barrier(num_barriers=2 * STAGES),
            gpu.Barrier(num_barriers=2),
            gpu.Barrier(num_barriers=2),
        ],
        compiler_params=gpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(dy, matrix, z)


def _slope(z: Array) -> Array:
    """gelu'(z), float32. With u = sqrt(2/pi) (z + 0.044715 z^3): (1 + tanh u) / 2 + z (1 - tanh^2 u) u' / 2."""
    square = z * z
    tanh = jnp.tanh(z * (ROOT + ROOT * CUBIC * square))
    return (0.5 + 0.5 * tanh) + (z * (0.5 * ROOT + 1.5 * ROOT * CUBIC * square)) * (1 - tanh * tanh)
