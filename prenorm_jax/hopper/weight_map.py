"""A stored matrix on its way to a variant's coordinates and its half precision in one pass; of the way back, the sums.

With W (d, n) a reader's kernel, gamma and beta (d,) its norm's, b (n,) its bias and the map along d as `bases.Sums` describes it
(share and pull; w_d, the last slice, only where it is subtracted):

    y = gamma W - gamma_d w_d        y <- y - share sum(y)        b <- b + sum(beta W)        packed: y_d = b

and from the gradient g of y, with g_d = 0 and h = g_d in a packed one, h = db otherwise,

    t = sum(g)     dy = g - share t, dy_d + pull t     dgamma = sum_n W dy     dbeta = sum_n W h     dW = gamma dy + beta h     db = h.

XLA reads W once for its sums and once more to map it, and on the way back g twice. Here a thread block has a strip of columns in shared
memory for both. dW is left to XLA, which computes it where the optimizer reads it.

A writer's kernel (..., d) is mapped along its rows, which are in a warp's registers.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from prenorm_jax import hopper, placement
from prenorm_jax.bases import Map, Sums, as_sums, clear_last, set_last

Array = jax.Array

STRIP = 32  # columns that a thread block maps, 128 bytes a row
ROWS = 64  # of a strip that it adds up in registers
WIDEST = 1152  # rows of a strip that shared memory holds with those of its gradient
COLUMNS = 4  # neighbouring ones that a thread holds
HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
ENTRIES = 2**20  # of a matrix; fewer are not worth a kernel of their own


@dataclasses.dataclass(frozen=True)
class Form:
    """What is made. sums: the map along d. packed: whether the last slice is spare: a reader's takes its bias, a writer's is 0. dtype: of
    the result. interpret: False, or the parameters of Pallas's interpreter, which runs without a GPU."""

    sums: Sums
    packed: bool
    dtype: Any
    interpret: Any = False


def reader_form(
    kernel: Array, affine: Sequence[Array | None], axis: int, maps: Sequence[Map], spare: str | None, dtype: Any
) -> Form | None:
    """The form of `mapped` that serves a reader's kernel, or None.

    Args:
      kernel: traced, (layers..., d, n) for axis -2.
      affine: its norm's scale and bias, (layers..., d, 1); None where it has none.
      maps: along d.
      spare: "set" for a reader whose bias becomes its last row, None for one that keeps it.
      dtype: that is wanted.
    """
    if axis != -2 or spare == "clear" or not _served(kernel, dtype) or not _reader_fits(kernel):
        return None
    if any(row is None or row.size * kernel.shape[-1] != kernel.size for row in affine):
        return None
    return _form(maps, kernel.shape[-2], spare == "set", dtype)


def writer_form(kernel: Array, row: Array | None, axis: int, maps: Sequence[Map], dtype: Any) -> Form | None:
    """The form of `written` that serves a writer's kernel (..., d), traced, or None; row: of a LayerScale behind it."""
    if axis != -1 or row is not None or not _served(kernel, dtype) or not _writer_fits(kernel):
        return None
    packed = maps[-1:] == [clear_last]
    return _form(maps[:-1] if packed else maps, kernel.shape[-1], packed, dtype)


def _form(maps: Sequence[Map], width: int, packed: bool, dtype: Any) -> Form | None:
    if len(maps) > 1:
        return None
    sums = as_sums(maps[0] if maps else None, width)
    return None if sums is None else Form(sums, packed, jnp.dtype(dtype))


def _served(matrix: Array, dtype: Any) -> bool:
    """Whether the kernels take this matrix, whole on one device, to half precision."""
    if not isinstance(matrix, jax.core.Tracer) or matrix.dtype != jnp.float32 or matrix.size < ENTRIES:
        return False
    return jnp.dtype(dtype) in HALF and not placement.sizes() and hopper.available()


def _reader_fits(kernel: Array) -> bool:
    width, columns = kernel.shape[-2:]
    return width % ROWS == 0 and width <= WIDEST and columns % STRIP == 0


def _writer_fits(kernel: Array) -> bool:
    rows, width = kernel.size // kernel.shape[-1], kernel.shape[-1]
    return (
        rows % hopper.WARPS == 0 and width % (2 * hopper.LANES) == 0 and hopper.WIDTHS[0] <= width <= hopper.WIDTHS[1]
    )


def mapped(form: Form, kernel: Array, bias: Array | None, gamma: Any, beta: Any) -> tuple[Array, Array | None]:
    """`read` for arrays of the shapes that transforms have: kernel (layers..., d, n), gamma and beta (layers..., d, 1), bias
    (layers..., 1, n) or None. Returns the kernel, and the bias (layers..., n) unless it is in it."""
    *layers, width, columns = kernel.shape
    flat = kernel.reshape(-1, width, columns)
    count = flat.shape[0]
    bias = jnp.zeros((count, columns), jnp.float32) if bias is None else bias.reshape(count, columns)
    rows = (row.astype(jnp.float32).reshape(count, width) for row in (gamma, beta))
    new, new_bias = read(form, flat, bias.astype(jnp.float32), *rows)
    return new.reshape(kernel.shape), None if form.packed else new_bias.reshape(*layers, columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def read(form: Form, kernel: Array, bias: Array, gamma: Array, beta: Array) -> tuple[Array, Array]:
    """A reader's kernel (layers, d, n) and bias (layers, n), mapped; gamma, beta: (layers, d). All in float32 but the kernel made."""
    return _read(form, kernel, bias, gamma, beta)


def _read_forward(form: Form, *arrays: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    return _read(form, *arrays), arrays


def _read_backward(form: Form, arrays: tuple[Array, ...], gradients: tuple[Array, Array]) -> tuple[Array, ...]:
    kernel, _, gamma, beta = arrays
    dkernel, dbias = gradients
    h = dkernel[:, -1].astype(jnp.float32) if form.packed else dbias
    t, dgamma, dbeta = _read_sums(form, kernel, dkernel, h)
    dy = _pulled_back(form, dkernel, -2, t[:, None])
    return gamma[..., None] * dy + beta[..., None] * h[:, None], h, dgamma, dbeta


read.defvjp(_read_forward, _read_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def written(form: Form, kernel: Array) -> Array:
    """A writer's kernel (..., d), mapped along d; packed: with zeros for the last slice."""
    return _written(form, kernel)


def _written_forward(form: Form, kernel: Array) -> tuple[Array, None]:
    return _written(form, kernel), None


def _written_backward(form: Form, residuals: None, gradient: Array) -> tuple[Array]:
    return (_pulled_back(form, gradient, -1),)


written.defvjp(_written_forward, _written_backward)


def _pulled_back(form: Form, gradient: Array, axis: int, total: Array | None = None) -> Array:
    """The pull-back of the map along an axis. total: of the gradient along it, as far as the map depends on it."""
    g = gradient.astype(jnp.float32)
    g = clear_last(g, axis) if form.packed else g
    total = g.sum(axis=axis, keepdims=True) if total is None else total
    rows = [size if k - g.ndim == axis else 1 for k, size in enumerate(g.shape)]
    return g + total * set_last(jnp.full(rows, -form.sums.share), form.sums.pull - form.sums.share, axis)


# Under jit, so that matrices of one shape lower a kernel once.
@functools.partial(jax.jit, static_argnames=("form",))
def _read(form: Form, kernel: Array, bias: Array, gamma: Array, beta: Array) -> tuple[Array, Array]:
    pallas, gpu = hopper.pallas()
    layers, width, columns = kernel.shape
    layout, copies = _layout(), _copies(width)

    def map_strip(kernel_ref, bias_ref, gamma_ref, beta_ref, out_ref, out_bias_ref, strip, affine, loaded):  # type: ignore[no-untyped-def]
        layer, place = lax.axis_index("layers"), pallas.ds(lax.axis_index("strips") * STRIP, STRIP)
        for rows in copies:
            gpu.copy_gmem_to_smem(kernel_ref.at[layer, rows, place], strip.at[rows], loaded)
            for index, ref in enumerate((gamma_ref, beta_ref)):
                gpu.copy_gmem_to_smem(ref.at[layer, rows], affine.at[index, rows], loaded)
        load = functools.partial(gpu.load, optimized=False)
        bias = load(bias_ref.at[layer, place], layout=layout.reduce(0))
        gpu.barrier_wait(loaded)

        def factor(index, at, like):  # type: ignore[no-untyped-def]
            return hopper.each_row(load(affine.at[index, at], layout=layout.reduce(1)), like)

        last = None
        if form.sums.from_last:
            last = load(strip.at[width - 1], layout=layout.reduce(0)) * affine[0, width - 1]

        def add(number, sums):  # type: ignore[no-untyped-def]
            at = pallas.ds(number * ROWS, ROWS)
            part = load(strip.at[at], layout=layout)
            y = part * factor(0, at, part)
            return sums[0] + (y if last is None else y - _along(last, y)), sums[1] + part * factor(1, at, part)

        zeros = gpu.layout_cast(jnp.zeros((ROWS, STRIP), jnp.float32), layout)
        of_gamma, of_beta = (total.sum(axis=0) for total in lax.fori_loop(0, width // ROWS, add, (zeros, zeros)))
        off = form.sums.share * of_gamma if last is None else form.sums.share * of_gamma + last
        new_bias = of_beta + bias
        if not form.packed:
            hopper.store(out_bias_ref.at[layer, place], new_bias)

        def store(number, _):  # type: ignore[no-untyped-def]
            at = pallas.ds(number * ROWS, ROWS)
            part = load(strip.at[at], layout=layout)
            new = part * factor(0, at, part) - _along(off, part)
            if form.packed:
                new = jnp.where(_row(at, part, layout) == width - 1, _along(new_bias, part), new)
            hopper.store(out_ref.at[layer, at, place], new.astype(form.dtype))
            return ()

        lax.fori_loop(0, width // ROWS, store, ())

    return gpu.kernel(
        map_strip,
        out_type=(jax.ShapeDtypeStruct(kernel.shape, form.dtype), jax.ShapeDtypeStruct(bias.shape, jnp.float32)),
        scratch_types=[
            gpu.SMEM((width, STRIP), jnp.float32),
            gpu.SMEM((2, width), jnp.float32),
            gpu.Barrier(num_arrivals=3 * len(copies)),
        ],
        **_launch(layers, columns // STRIP, form.interpret),
    )(kernel, bias, gamma, beta)


@functools.partial(jax.jit, static_argnames=("form",))
def _read_sums(form: Form, kernel: Array, dkernel: Array, h: Array) -> tuple[Array, Array, Array]:
    """(t (layers, n), dgamma (layers, d), dbeta (layers, d))."""
    pallas, gpu = hopper.pallas()
    layers, width, columns = kernel.shape
    layout, copies, strips = _layout(), _copies(width), columns // STRIP

    def sum_strip(kernel_ref, dkernel_ref, h_ref, t_ref, dgamma_ref, dbeta_ref, strip, dstrip, loaded, dloaded):  # type: ignore[no-untyped-def]
        layer, number = lax.axis_index("layers"), lax.axis_index("strips")
        place = pallas.ds(number * STRIP, STRIP)
        for ref, smem, barrier in ((dkernel_ref, dstrip, dloaded), (kernel_ref, strip, loaded)):
            for rows in copies:
                gpu.copy_gmem_to_smem(ref.at[layer, rows, place], smem.at[rows], barrier)
        load = functools.partial(gpu.load, optimized=False)
        h = load(h_ref.at[layer, place], layout=layout.reduce(0))
        gpu.barrier_wait(dloaded)

        def gradient(step):  # type: ignore[no-untyped-def]
            at = pallas.ds(step * ROWS, ROWS)
            g = load(dstrip.at[at], layout=layout).astype(jnp.float32)
            is_last = _row(at, g, layout) == width - 1
            return at, jnp.where(is_last, 0, g) if form.packed else g, is_last

        zeros = gpu.layout_cast(jnp.zeros((ROWS, STRIP), jnp.float32), layout)
        t = lax.fori_loop(0, width // ROWS, lambda step, total: total + gradient(step)[1], zeros).sum(axis=0)
        hopper.store(t_ref.at[layer, place], t)
        gpu.barrier_wait(loaded)

        def multiply(step, _):  # type: ignore[no-untyped-def]
            at, g, is_last = gradient(step)
            w = load(strip.at[at], layout=layout)
            dy = g - _along(form.sums.share * t, g)
            if form.sums.pull:
                dy = dy + jnp.where(is_last, _along(form.sums.pull * t, g), 0)
            hopper.store(dgamma_ref.at[layer, number, at], (w * dy).sum(axis=1))
            hopper.store(dbeta_ref.at[layer, number, at], (w * _along(h, w)).sum(axis=1))
            return ()

        lax.fori_loop(0, width // ROWS, multiply, ())

    of_strips = jax.ShapeDtypeStruct((layers, strips, width), jnp.float32)
    t, dgamma, dbeta = gpu.kernel(
        sum_strip,
        out_type=(jax.ShapeDtypeStruct((layers, columns), jnp.float32), of_strips, of_strips),
        scratch_types=[
            gpu.SMEM((width, STRIP), jnp.float32),
            gpu.SMEM((width, STRIP), dkernel.dtype),
            *[gpu.Barrier(num_arrivals=len(copies))] * 2,
        ],
        **_launch(layers, strips, form.interpret),
    )(kernel, dkernel, h)
    return t, dgamma.sum(axis=1), dbeta.sum(axis=1)


@functools.partial(jax.jit, static_argnames=("form",))
def _written(form: Form, kernel: Array) -> Array:
    pallas, gpu = hopper.pallas()
    width = kernel.shape[-1]
    rows = kernel.reshape(-1, width)
    layout, share = hopper.row_layout(width), form.sums.share
    tiles = rows.shape[0] // hopper.WARPS
    blocks = min(hopper.MULTIPROCESSORS * 6, tiles)

    def map_rows(rows_ref, out_ref):  # type: ignore[no-untyped-def]
        block = lax.axis_index("blocks")

        def take_rows(turn, _):  # type: ignore[no-untyped-def]
            at = pallas.ds((block + turn * blocks) * hopper.WARPS, hopper.WARPS)
            w = gpu.load(rows_ref.at[at], layout=layout, optimized=False)
            is_last = gpu.broadcasted_iota(jnp.int32, w.shape, 1, layout=layout) == width - 1
            if form.sums.from_last:
                w = w - hopper.each_row(jnp.where(is_last, w, 0).sum(axis=1), w)
            new = w - hopper.each_row(share * w.sum(axis=1), w)
            out_ref[at] = (jnp.where(is_last, 0, new) if form.packed else new).astype(form.dtype)
            return ()

        lax.fori_loop(0, (tiles - block + blocks - 1) // blocks, take_rows, ())

    out = jax.ShapeDtypeStruct(rows.shape, form.dtype)
    launch = hopper.row_blocks(blocks, form.interpret, barriers=False)
    return gpu.kernel(map_rows, out_type=out, **launch)(rows).reshape(kernel.shape)


def _along(row: Array, like: Array) -> Array:
    """A row, for each row."""
    return lax.broadcast_in_dim(row, like.shape, [1])


def _row(at: Any, like: Array, layout: Any) -> Array:
    """The number of each entry's row, in rows from `at` on."""
    _, gpu = hopper.pallas()
    return gpu.broadcasted_iota(jnp.int32, like.shape, 0, layout=layout) + at.start


def _copies(width: int) -> list[Any]:
    """The rows of a strip in pieces that one copy takes."""
    pallas, _ = hopper.pallas()
    count = next(count for count in range(256, 0, -8) if width % count == 0)
    return [pallas.ds(start, count) for start in range(0, width, count)]


def _layout() -> Any:
    """Registers that hold rows of a strip: a warp takes whole rows, side by side, COLUMNS columns to a thread."""
    from jax.experimental.mosaic.gpu.fragmented_array import Tiling

    _, gpu = hopper.pallas()
    rows = hopper.LANES * COLUMNS // STRIP  # of a warp
    tiling = Tiling(((hopper.WARPS * rows, STRIP), (rows, COLUMNS)))
    return gpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2, -3), vector_dim=-1)


def _launch(layers: int, strips: int, interpret: Any) -> dict[str, Any]:
    """A thread block for each strip of each layer."""
    launch = hopper.row_blocks(1, interpret, barriers=False)
    return launch | {"grid": (strips, layers), "grid_names": ("strips", "layers")}
