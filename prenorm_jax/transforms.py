"""Moves parameters between the charts of one function: Pre-LN, Pre-RMSNorm, Pre-CRMSNorm.

Every transform is a pure function params -> params: jittable, differentiable, the input left unchanged, the containers and
storage dtypes kept. Arithmetic is float64 on the host for concrete arrays, and at least float32 for traced ones, with one rounding at
the end (`precision`). Identities (source: arXiv 2305.14858; the basis "reflect" is this project's), for a writer W with output axis o, a
reader R with input axis i and d the width:

    fold_affine        R <- diag(gamma) R, b <- b + beta^T R with R as it was; gamma <- 1, beta <- 0. Never divides by gamma.
    recenter           W <- W - mean_o(W): what W writes has zero mean, and LayerNorm ignores the mean.
    compress, "drop"   W <- (W - mean_o(W)) without its last slice; R <- R_j - R_d for j < d: x_d = -sum of the others.
    compress, "reflect"  W <- (H W) without its last slice, R <- (H R) without its last row, where H is the Householder reflection
                       that maps 1/sqrt(d) (1, ..., 1) to the last unit vector: there the mean is the last coordinate.
    pack               one spare lane: W gets a slice of zeros, R gets its bias as that lane's row.

A writer behind a LayerScale is W <- diag(lambda) W, lambda <- 1 before any of these maps (fold_affine stops there): what is recentered
is what is written.
A norm with a reader that can take no bias, or with `keep`, keeps its affine: nothing is folded into its readers.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.bases import (
    Array,
    Map,
    along,
    append_zero,
    basis_maps,
    clear_last,
    drop_last,
    last,
    recenter_axis,
    repeat_last,
    set_last,
    stacks,
    xp,
)
from prenorm_jax.hopper import weight_map
from prenorm_jax.main_branch import LayoutError, MainBranch, NormLeaves, ReaderLeaf, Resolved
from prenorm_jax.paths import Tree, leaves, with_leaves
from prenorm_jax.precision import in_slices, narrow, placed, wide

Dtypes = Mapping[str, Any]
NO_DTYPES: Dtypes = MappingProxyType({})


def fold_affine(params: Tree, spec: MainBranch) -> Tree:
    """Moves each norm's scale and bias into its readers (identity 4); the norm's leaves become ones and zeros. Idempotent.

    A reader without a bias gains one where its description says so (`Reader.bias`).

    >>> params = {"norm": {"scale": jnp.array([2.0, 0.0])}, "up": {"kernel": jnp.ones((2, 1))}, "down": {"kernel": jnp.eye(2)}}
    >>> from prenorm_jax.main_branch import Norm, Reader, Writer
    >>> spec = MainBranch([Writer("down/kernel")], [Norm([Reader("up/kernel")], scale="norm/scale")])
    >>> fold_affine(params, spec)["up"]["kernel"].tolist()
    [[2.0], [0.0]]
    """
    return _transform(params, spec, fold=True)


def recenter(params: Tree, spec: MainBranch) -> Tree:
    """Makes every writer zero-mean along its output axis (identity 2): the main branch has zero mean, LayerNorm is RMSNorm. Idempotent.

    Raises: LayoutError for a tree that is compressed (where the description knows the width) or packed: its lanes have no mean to remove.
    """
    _require_full("recenter", params, spec)
    return _transform(params, spec, writer=[recenter_axis])


def zero_mean_gauge(params: Tree, spec: MainBranch) -> Tree:
    """Makes every folded reader zero-mean along its input axis (identity 5): blind to rounding drift of the mean. Idempotent.

    Exact on a zero-mean main branch, so after `fold_affine` and `recenter`. Raises: as `recenter`.
    """
    _require_full("zero_mean_gauge", params, spec)
    return _transform(params, spec, fold=True, reader=[recenter_axis])


def compress(
    params: Tree, spec: MainBranch, basis: str = "reflect", layout: str = "compact", *, dtypes: Dtypes = NO_DTYPES
) -> Tree:
    """Width d -> d - 1 (identity 3 and its reflection): parameters for CRMSNorm. Folds and recenters what is not yet so.

    Args:
      layout: "compact", or "packed" for `pack(compress(...))` in one pass, without the compact tree in between.
      dtypes: path -> dtype of writers and readers that are wanted in another than they are stored in: rounded to it, once.

    Raises: LayoutError for a tree that is compressed already (where the description knows the width), is packed, or whose main
      branch is narrower than 2, and for a leaf of `dtypes` that is not there; ValueError for an unknown basis or layout.
    """
    maps = basis_maps(basis)
    if layout not in ("compact", "packed"):
        raise ValueError(f"layout: got {layout!r}; allowed: compact, packed")
    found = spec.resolve(params)
    _refuse_packed(params, spec, found)
    if found.lanes < 2 or (found.width is not None and found.lanes != found.width):
        raise LayoutError(
            f"compress: the main branch has {found.lanes} lanes; expected the nominal width {found.width or '>= 2'}"
        )
    if layout == "packed":
        writer, reader = [maps["writer"], clear_last], [maps["reader"]]
        return _transform(params, spec, fold=True, writer=writer, reader=reader, spare="set", dtypes=dtypes)
    writer, reader = ([maps[role], drop_last] for role in ("writer", "reader"))
    return _transform(params, spec, fold=True, writer=writer, reader=reader, affine=[drop_last], dtypes=dtypes)


def decompress(params: Tree, spec: MainBranch, basis: str = "reflect") -> Tree:
    """Width d - 1 -> d (identity 5), the inverse of `compress`: parameters of a zero-mean Pre-RMSNorm. Folds what is not yet so: a
    scale or bias in the coordinates of d - 1 has no place in those of d.

    Raises: LayoutError for a tree that is not compressed (where the description knows the width); ValueError for an unknown basis.
    """
    maps = basis_maps(basis)
    found = spec.resolve(params)
    if found.width is not None and found.lanes != found.width - 1:
        raise LayoutError(
            f"decompress: the main branch has {found.lanes} lanes; expected {found.width - 1}, the nominal width less 1"
        )
    return _transform(
        params, spec, fold=True, writer=[maps["back_writer"]], reader=[maps["back_reader"]], affine=[repeat_last]
    )


def pack(params: Tree, spec: MainBranch) -> Tree:
    """Compact -> packed: d lanes of which d - 1 live; the reader's bias becomes the spare lane's row of its kernel.

    For `crms_norm_packed`, which writes 1 into that lane. Leaves of the readers' biases leave the tree.

    Raises: LayoutError for a tree that is not compact (where the description knows the width).
    """
    found = spec.resolve(params)
    if found.width is not None and found.lanes != found.width - 1:
        raise LayoutError(
            f"pack: the main branch has {found.lanes} lanes; expected {found.width - 1}, the nominal width less 1"
        )
    return _transform(params, spec, writer=[append_zero], reader=[append_zero], affine=[repeat_last], spare="set")


def unpack(params: Tree, spec: MainBranch) -> Tree:
    """Packed -> compact, the inverse of `pack`.

    Raises: LayoutError for a tree that is not packed (another width where the description knows it, or a reader with a bias), and
      for a reader whose description has no place for the bias.
    """
    found = spec.resolve(params)
    if found.width is not None and found.lanes != found.width:
        raise LayoutError(f"unpack: the main branch has {found.lanes} lanes; expected {found.width}, the nominal width")
    return _transform(params, spec, writer=[drop_last], affine=[drop_last], spare="clear")


def to_pre_rmsnorm(params: Tree, spec: MainBranch, *, dtypes: Dtypes = NO_DTYPES) -> Tree:
    """Pre-LN -> Pre-RMSNorm: recenter . fold_affine. Idempotent. Run it with `rms_norm` (or still with LayerNorm).

    Args:
      dtypes: as for `compress`.

    Raises: as `recenter`.
    """
    _require_full("to_pre_rmsnorm", params, spec)
    return _transform(params, spec, fold=True, writer=[recenter_axis], dtypes=dtypes)


def to_pre_crmsnorm(params: Tree, spec: MainBranch, basis: str = "reflect", layout: str = "compact") -> Tree:
    """Pre-LN or Pre-RMSNorm -> Pre-CRMSNorm: compress . recenter . fold_affine. Run it with `crms_norm`, or packed with
    `crms_norm_packed`."""
    return compress(params, spec, basis, layout)


def to_pre_ln(params: Tree, spec: MainBranch, basis: str = "reflect") -> Tree:
    """Back to Pre-LN of width d, from Pre-RMSNorm (the identity on weights) or compact Pre-CRMSNorm (decompress).

    Raises: LayoutError where the description does not tell the nominal width: the two can't be told apart then; and for a packed tree.
    """
    found = spec.resolve(params)
    _refuse_packed(params, spec, found)
    if found.width is None:
        raise LayoutError(
            "to_pre_ln: the description has no width, so compressed and full trees look alike; give MainBranch(width=...)"
        )
    return params if found.lanes == found.width else decompress(params, spec, basis)


def to_plain_rmsnorm(params: Tree, spec: MainBranch) -> Tree:
    """From `compress(..., basis="reflect")`: parameters of an ordinary RMSNorm Transformer of width d - 1.

    z / sqrt(sum z^2 / d + eps) = sqrt(d / (d-1)) RMSNorm_{d-1}(z; eps d / (d-1)), so every reader takes the constant sqrt(d / (d-1)),
    and its norm's affine first where that is not folded yet; run it with `rms_norm(z, eps=plain_eps(eps, d))`.

    Raises: LayoutError for a tree that is not compact (where the description knows the width).
    """
    found = spec.resolve(params)
    lanes = found.lanes
    if found.width not in (None, lanes + 1):
        raise LayoutError(
            f"to_plain_rmsnorm: the main branch has {lanes} lanes; expected {found.width - 1}, the nominal width less 1; compress first"
        )
    constant = math.sqrt((lanes + 1) / lanes)
    return _transform(params, spec, fold=True, reader=[lambda kernel, axis: kernel * constant], kept_scale=constant)


def plain_eps(eps: float, width: int) -> float:
    """The eps of the plain RMSNorm of width `width` - 1 that stands for a LayerNorm of width `width` with `eps`."""
    return eps * width / (width - 1)


def strip_affine(params: Tree, spec: MainBranch, *, layer_scales: bool = False) -> Tree:
    """Removes the norms' scale and bias leaves after `fold_affine`, for a model whose norms have none.

    Args:
      layer_scales: whether to remove the LayerScales as well, for a model that has none.

    Raises: LayoutError where a concrete leaf is not ones (scale) or zeros (bias), and for traced ones of a norm that can't be folded.
    """
    flat = leaves(params)
    found = spec.resolve(params)
    neutral = dict.fromkeys(found.layer_scales.values(), 1) if layer_scales else {}
    for norm in found.norms:
        own = {path: value for path, value in ((norm.scale, 1), (norm.bias, 0)) if path and norm.keep is None}
        if not norm.folds and any(isinstance(flat[path], jax.core.Tracer) for path in own):
            raise LayoutError(
                f"{next(iter(own))}: can't be folded, so it stays: a reader behind it has no place for a bias (give Reader.bias)"
            )
        neutral |= own
    for path, value in neutral.items():
        leaf = flat.pop(path)
        if not isinstance(leaf, jax.core.Tracer) and np.any(np.asarray(leaf) != value):
            raise LayoutError(
                f"{path}: is not {value} everywhere, so removing it would change the function; fold_affine first"
            )
    return with_leaves(params, flat)


def untie(params: Tree, table: str, head: str, *, scale: float = 1.0) -> Tree:
    """A head of its own for a model whose logits are read from the embedding table: head <- scale * table^T, the table stays.

    The result belongs to a model with an untied head, whose main branch has the table as a writer and the head as a reader.

    Args:
      table: path of the table (V, d).
      head: path of the kernel (d, V) to be made.
      scale: what multiplies the tied logits, such as 1 / sqrt(d), if the untied model doesn't.

    Raises: LayoutError where there is no such table, or a head already.

    >>> untie({"embed": {"table": jnp.ones((5, 2))}}, "embed/table", "head/kernel")["head"]["kernel"].shape
    (2, 5)
    """
    flat = leaves(params)
    if table not in flat:
        raise LayoutError(f"{table}: no such leaf; the paths are like {', '.join(list(flat)[:3])}")
    if head in flat:
        raise LayoutError(f"{head}: is in the tree already; name the place of a new head")
    (rows,) = in_slices(lambda rows: (rows * scale,), [flat[table]], [flat[table].dtype], -1)
    flat[head] = placed(rows.swapaxes(-1, -2), flat[table])
    return with_leaves(params, flat)


def require_recentered(params: Tree, spec: MainBranch, stored: Any = None) -> None:
    """Refuses concrete parameters of an RMSNorm model whose main branch has a mean: such a model is no Pre-LN model in disguise.

    Args:
      stored: a dtype in which they may have been stored since they were recentered: the means of what was rounded to it are let through.

    Raises: LayoutError naming the writer with the largest mean, where that is more than rounding.
    """
    flat = leaves(spec.with_layers_first(params))
    means = {}
    found = spec.resolve(params)
    for path, axis in found.writers:
        row = _layer_scale(found, flat, path, axis)
        mean, square = in_slices(functools.partial(_moments, axis), [flat[path], row], [np.float64] * 2, axis)
        rounding = float(jnp.finfo(flat[path].dtype).eps) * np.sqrt(square.mean())
        if stored is not None:  # d roundings that know nothing of each other
            rounding = max(rounding, float(jnp.finfo(stored).eps) * np.sqrt(square.mean() / found.lanes))
        means[path] = float(np.abs(mean).max() / max(rounding, np.finfo(np.float64).tiny))
    worst = max(means, key=lambda path: means[path], default=None)
    if worst is not None and means[worst] > 8:
        raise LayoutError(
            f"{worst}: its mean along the main branch is {means[worst]:.1e} x its rounding error, so RMSNorm sees it and LayerNorm "
            "would not; only a recentered model has a Pre-LN equal"
        )


def _moments(axis: int, kernel: Array, row: Array | None) -> tuple[Array, Array]:
    """Mean and mean square of what a writer writes, along its axis."""
    kernel = kernel if row is None else kernel * row
    return kernel.mean(axis=axis, keepdims=True), (kernel * kernel).mean(axis=axis, keepdims=True)


# The one pass over a tree: leaf by leaf, and large leaves slice by slice.


def _transform(
    params: Tree,
    spec: MainBranch,
    *,
    fold: bool = False,
    writer: Sequence[Map] = (),
    reader: Sequence[Map] = (),
    affine: Sequence[Map] = (),
    spare: str | None = None,
    kept_scale: float = 1.0,
    dtypes: Dtypes = NO_DTYPES,
) -> Tree:
    """Applies maps (array, axis) -> array to the writers, the folded readers and the folded norms' leaves of a tree, and a factor to
    the scales that stay."""
    if spec.stacked:
        maps: dict[str, Any] = {"fold": fold, "writer": writer, "reader": reader, "affine": affine, "spare": spare}
        maps["dtypes"] = dtypes
        first = _transform(spec.with_layers_first(params), spec.layers_first, **maps, kept_scale=kept_scale)
        return spec.with_layers_back(first)
    found = spec.resolve(params)
    old = leaves(params)
    new = dict(old)
    if unknown := [path for path in dtypes if path not in old]:
        raise LayoutError(f"dtypes: {unknown[0]}: no such leaf; the paths are like {', '.join(list(old)[:3])}")
    _require_floats(found, old)
    _check_kept(found, reader, spare)
    gained: dict[str, tuple[str, int]] = {}
    read = set()  # a kernel behind several norms (without affine) is one kernel
    for norm in found.norms:
        if not norm.folds:
            if kept_scale != 1.0:
                kept = _required_scale(norm)
                new[kept] = narrow(wide(old[kept]) * kept_scale, old[kept])
            continue
        for leaf in norm.readers:
            if leaf.kernel in read:
                continue
            read.add(leaf.kernel)
            kernel, bias = _read(leaf, norm, new[leaf.kernel], old, fold, reader, spare, dtypes.get(leaf.kernel))
            new[leaf.kernel] = placed(kernel, old[leaf.kernel])
            if leaf.bias and bias is not None:
                new[leaf.bias] = placed(bias, old.get(leaf.bias, old[leaf.kernel]))
                if leaf.new_bias:
                    gained[leaf.bias] = (leaf.kernel, leaf.axis)
            elif leaf.bias and spare == "set":
                new.pop(leaf.bias, None)
        for path, neutral in ((norm.scale, 1), (norm.bias, 0)):
            if path:
                new[path] = _vector(np.full(old[path].shape, neutral) if fold else wide(old[path]), old[path], affine)
    for path, axis in found.writers:
        # A path that is gone is a reader's bias, now a row of its kernel.
        if path in new and (writer or (fold and path in found.layer_scales)):
            row, dtype = _layer_scale(found, old, path, axis), dtypes.get(path, old[path].dtype)
            if (form := weight_map.writer_form(new[path], row, axis, writer, dtype)) is not None:
                new[path] = weight_map.written(form, new[path])
                continue
            (value,) = in_slices(functools.partial(_written, axis, writer), [new[path], row], [dtype], axis)
            new[path] = placed(value, old[path])
    for path in set(found.layer_scales.values()) if fold or writer else ():
        new[path] = _vector(np.ones(old[path].shape), old[path], affine)
    return with_leaves(params, new, gained)


def _vector(value: Array, like: Array, maps: Sequence[Map]) -> Array:
    for change in maps:
        value = change(value, -1)
    return narrow(value, like)


def _written(axis: int, maps: Sequence[Map], kernel: Array, row: Array | None) -> tuple[Array]:
    """A writer behind its LayerScale (the row), mapped."""
    kernel = kernel if row is None else kernel * row
    for change in maps:
        kernel = change(kernel, axis)
    return (kernel,)


def _required_scale(norm: NormLeaves) -> str:
    if norm.scale is None:
        raise LayoutError(
            f"norm {norm.name}: keeps its affine ({norm.keep}) but has no scale to take the constant; give it one of ones"
        )
    return norm.scale


def _require_full(name: str, params: Tree, spec: MainBranch) -> None:
    """Refuses a tree whose lanes are not those of the Pre-LN model."""
    found = spec.resolve(params)
    if found.width not in (None, found.lanes):
        raise LayoutError(
            f"{name}: the main branch has {found.lanes} lanes; expected {found.width}, the nominal width; decompress or unpack it"
        )
    _refuse_packed(params, spec, found)


def _refuse_packed(params: Tree, spec: MainBranch, found: Resolved) -> None:
    """A packed tree is as wide as a full one. What gives concrete ones away: no reader has a bias, and every writer's last slice is 0."""
    flat = leaves(spec.with_layers_first(params))
    readers = [reader for norm in found.norms for reader in norm.readers if norm.keep is None]
    writers = [(flat[path], axis) for path, axis in found.writers]
    if not readers or not all(reader.new_bias for reader in readers):
        return
    if any(isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct) for leaf, _ in writers):
        return
    if any(np.any(np.asarray(last(leaf, axis)) != 0) for leaf, axis in writers):
        return
    if any(np.any(np.asarray(leaf) != 0) for leaf, _ in writers):
        raise LayoutError(
            f"{found.writers[0][0]}: writes nothing to the last lane, nor does any writer: this tree is packed; unpack it"
        )


def _require_floats(found: Resolved, flat: dict[str, Array]) -> None:
    """Refuses leaves in which a mean can't be stored, and leaves without values."""
    paths = [*(path for path, _ in found.writers), *(r.kernel for n in found.norms if n.folds for r in n.readers)]
    for path in paths:
        if isinstance(flat[path], jax.ShapeDtypeStruct):
            raise LayoutError(
                f"{path}: is a shape without values; expected an array (for the shapes of the result: jax.eval_shape(transform, params))"
            )
        if not jnp.issubdtype(flat[path].dtype, jnp.floating):
            raise LayoutError(
                f"{path}: is {flat[path].dtype}; expected a floating dtype (of a quantised tree, convert the one it was made from)"
            )


def _check_kept(found: Resolved, reader: Sequence[Map], spare: str | None) -> None:
    for norm in found.norms:
        if (reader or spare) and norm.keep is None and not norm.folds:
            kernel = next(reader.kernel for reader in norm.readers if not reader.bias)
            raise LayoutError(
                f"{norm.bias}: can't be folded: its reader {kernel} has no place for a bias (give Reader.bias, or keep=... the norm)"
            )


def _read(
    leaf: ReaderLeaf,
    norm: NormLeaves,
    kernel: Array,
    old: dict[str, Array],
    fold: bool,
    maps: Sequence[Map],
    spare: str | None,
    kernel_dtype: Any = None,
) -> tuple[Array, Array | None]:
    """A reader's kernel and, where it changes, its bias: its norm's affine folded in where `fold`, mapped, packed or unpacked."""
    axis, dtype = leaf.axis, old[leaf.kernel].dtype
    kernel_dtype = kernel_dtype or dtype
    gamma, beta = (
        _along(old[path], kernel, axis, path, f"its reader {leaf.kernel}") if path and fold else None
        for path in (norm.scale, norm.bias)
    )
    bias = old[leaf.bias] if leaf.bias and not leaf.new_bias and (beta is not None or spare) else None
    if bias is not None:
        expected = tuple(n for k, n in enumerate(kernel.shape) if k != kernel.ndim + axis)
        if bias.shape != expected:
            raise LayoutError(
                f"{leaf.bias} {bias.shape}: expected {expected}, the shape of {leaf.kernel} without its axis {axis}"
            )
        dtype, bias = bias.dtype, xp(bias).expand_dims(bias, axis)
    if spare == "clear":
        _require_packed(leaf)
    if (form := weight_map.reader_form(kernel, (gamma, beta), axis, maps, spare, kernel_dtype)) is not None:
        return weight_map.mapped(form, kernel, bias, gamma, beta)

    def change(kernel: Array, bias: Array | None, gamma: Array | None, beta: Array | None) -> Any:
        if beta is not None:
            shift = (beta * kernel).sum(axis=axis, keepdims=True)
            bias = shift if bias is None else bias + shift
        if gamma is not None:
            kernel = kernel * gamma
        for step in maps:
            kernel = step(kernel, axis)
        if spare == "set":
            return set_last(kernel, 0 if bias is None else bias, axis), None
        if spare == "clear":
            return drop_last(kernel, axis), last(kernel, axis)
        return kernel, bias

    kernel, bias = in_slices(change, [kernel, bias, gamma, beta], [kernel_dtype, dtype], axis)
    return kernel, None if bias is None else bias.squeeze(axis)


def _along(row: Array, kernel: Array, axis: int, path: str, leaf: str) -> Array:
    """A (layers..., d) parameter, shaped to multiply a (layers..., ..., d, ...) kernel along its axis of the main branch."""
    if not stacks(row, kernel, axis):
        raise LayoutError(f"{path} {row.shape}: its leading (stacked) axes are not those of {leaf} {kernel.shape}")
    return along(row, kernel, axis)


def _layer_scale(found: Resolved, flat: dict[str, Array], path: str, axis: int) -> Array | None:
    """The LayerScale behind a writer, as a row that multiplies its kernel, or None."""
    if path not in found.layer_scales:
        return None
    scale = found.layer_scales[path]
    return _along(flat[scale], flat[path], axis, scale, f"its writer {path}")


def _require_packed(leaf: ReaderLeaf) -> None:
    if leaf.bias is None:
        raise LayoutError(
            f"{leaf.kernel}: its spare row is a bias and the description has no place for it; give Reader.bias"
        )
    if not leaf.new_bias:
        raise LayoutError(
            f"{leaf.bias}: a packed reader has its bias in its kernel's spare row; this tree is not packed"
        )
