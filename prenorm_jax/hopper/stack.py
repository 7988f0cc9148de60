"""Arrays of one shape put together in one, as `jnp.stack` does, at the speed of a copy.

XLA's kernel for a concatenation moves one number at a time, and takes two to four times what the bytes of a model's stacked layers need.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from prenorm_jax import hopper

Array = jax.Array

PIECE = 1024  # numbers that a thread block loads at once, 8 by each of 128 threads
TOGETHER = (8, 4, 2, 1)  # pieces on their way at a time, the first that comes out even
ENTRIES = 2**20  # of all arrays; fewer are not worth a kernel of their own


def served(arrays: Sequence[Array]) -> bool:
    """Whether the kernel can put these together, whole on each device: in half precision, of whole pieces, and enough to be worth it."""
    first = arrays[0]
    half = first.dtype in (jnp.bfloat16, jnp.float16)
    return half and len(arrays) * first.size >= ENTRIES and first.size % PIECE == 0 and hopper.available()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def stack(arrays: Sequence[Array], interpret: Any = False) -> Array:
    """(count, *shape) of `count` arrays of one shape and half precision, whose size is a multiple of PIECE.

    Args:
      interpret: False, or the parameters of Pallas's interpreter, which runs without a GPU.

    Raises: ValueError for other arrays.
    """
    first = arrays[0]
    if first.size % PIECE or any((each.shape, each.dtype) != (first.shape, first.dtype) for each in arrays):
        raise ValueError(
            f"hopper stack: got {', '.join(f'{each.dtype}{list(each.shape)}' for each in arrays)}; expected one shape and dtype, of a "
            f"multiple of {PIECE} numbers; jnp.stack takes all"
        )
    return _stack([array.reshape(-1) for array in arrays], interpret).reshape(len(arrays), *first.shape)


def _forward(arrays: Sequence[Array], interpret: Any) -> tuple[Array, None]:
    return stack(arrays, interpret), None


def _backward(interpret: Any, residuals: None, gradient: Array) -> tuple[list[Array]]:
    return (list(gradient),)


stack.defvjp(_forward, _backward)


# Under jit, so that kinds of weights of one size lower the kernel once.
@functools.partial(jax.jit, static_argnames=("interpret",))
def _stack(arrays: Sequence[Array], interpret: Any) -> Array:
    pallas, gpu = hopper.pallas()
    dtype, size = arrays[0].dtype, arrays[0].size
    entries = next(count * PIECE for count in TOGETHER if size % (count * PIECE) == 0)
    layout = gpu.Layout.WG_STRIDED((entries,), vec_size=8)

    def kernel(*refs):  # type: ignore[no-untyped-def]
        *given, out_ref = refs
        part, number = lax.axis_index("parts"), lax.axis_index("arrays")
        place = pallas.ds(part * entries, entries)
        for index, ref in enumerate(given):

            @pallas.when(number == index)
            def _(ref=ref, index=index):  # type: ignore[no-untyped-def]
                # In one operation: what Pallas takes to lower a kernel grows with the square of their number.
                out_ref.at[index][place] = gpu.load(ref.at[place], layout=layout)
                # Behind it LLVM can't put the branches' accesses together, of whose alignment it would know nothing: two bytes each.
                gpu.wait_smem_to_gmem(0)

    launch = hopper.row_blocks(1, interpret, barriers=False)
    launch |= {"grid": (size // entries, len(arrays)), "grid_names": ("parts", "arrays")}
    out = jax.ShapeDtypeStruct((len(arrays), size), dtype)
    return gpu.kernel(kernel, out_type=out, **launch)(*arrays)
