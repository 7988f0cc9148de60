"""Kernels for GPUs of compute capability 9 (Pallas, Mosaic GPU), where XLA's own leave a part of the step on the table.

Each has a plain form beside it that computes the same and that every other backend takes; each says itself what it serves. Pallas is
imported where a kernel is made: other backends, and versions of jax before 0.11, never see it.
"""

from typing import Any

import jax

from prenorm_jax import placement

WARPS = 4  # of a thread block
LANES = 32  # of a warp
WIDTHS = (64, 1280)  # of rows that a warp takes: wider ones, and sums of them, do not fit into its registers
MULTIPROCESSORS = 132  # of an H100 or H200; on a card with fewer, the last thread blocks run behind the others


def available() -> bool:
    """Whether the devices are GPUs of compute capability 9.0: those of the mesh in force (`prenorm_jax.placement`), or this process's one.
    Over several without a mesh, nothing would tell a kernel how its arguments are split."""
    if jax.default_backend() != "gpu" or jax.__version_info__ < (0, 11):
        return False
    if jax.device_count() > 1 and not placement.sizes():
        return False
    return getattr(jax.devices()[0], "compute_capability", "") == "9.0"


def pallas() -> tuple[Any, Any]:
    """Pallas and its Mosaic GPU half."""
    from jax.experimental import pallas
    from jax.experimental.pallas import mosaic_gpu

    return pallas, mosaic_gpu


def store(ref: Any, value: Any) -> None:
    """Writes to a reference in global memory where threads cover no whole cache lines, which jax 0.12 refuses unless it is told."""
    _, gpu = pallas()
    if hasattr(gpu, "store"):
        gpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def row_blocks(count: int, interpret: Any, *, barriers: bool) -> dict[str, Any]:
    """How a kernel is launched whose thread blocks, of one warpgroup each, take rows in turn.

    Args:
      count: of thread blocks.
      interpret: False, or the parameters of Pallas's interpreter, which runs without a GPU.
      barriers: whether stores wait for the whole warpgroup, as what is read again has to.
    """
    _, gpu = pallas()
    return {
        "grid": (count,),
        "grid_names": ("blocks",),
        "num_threads": 1,
        "thread_name": "warpgroup",
        "compiler_params": gpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=not barriers),
        "interpret": interpret,
    }


def row_layout(width: int) -> Any:
    """Registers that hold WARPS rows: a warp a row, and as many neighbouring entries to a lane as one load takes."""
    from jax.experimental.mosaic.gpu.fragmented_array import Tiling

    _, gpu = pallas()
    entries = next(count for count in (4, 2) if width % (LANES * count) == 0)
    tiling = Tiling(((WARPS, LANES * entries), (entries,)))
    return gpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def each_row(values: jax.Array, like: jax.Array) -> jax.Array:
    """A number for each row, along it."""
    return jax.lax.broadcast_in_dim(values, like.shape, [0])
