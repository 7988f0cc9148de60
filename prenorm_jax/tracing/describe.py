"""`trace`: the main branch of a program, found and proven, in the words of `main_branch`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, overload

import numpy as np

from prenorm_jax.bases import stacks
from prenorm_jax.main_branch import MainBranch, Norm, Reader, Writer, side_by_side
from prenorm_jax.tracing.decision import ConversionError, Decision, decide
from prenorm_jax.tracing.jaxprs import where
from prenorm_jax.tracing.leaf_views import LeafView
from prenorm_jax.tracing.norms import NormFound, norms_of
from prenorm_jax.tracing.report import report_of
from prenorm_jax.tracing.signature import Arguments, trace_program


@overload
def trace(
    fn: Callable[..., Any], params: Any, *inputs: Any, activations: str = "pays", width: int | None = None
) -> MainBranch: ...


@overload
def trace(
    fn: Callable[..., Any], params: Any, *inputs: Any, activations: str = "pays", width: Literal["each"]
) -> tuple[MainBranch, ...]: ...


def trace(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    activations: str = "pays",
    width: int | Literal["each"] | None = None,
) -> MainBranch | tuple[MainBranch, ...]:
    """Find the main branch of a program: which leaves write to it, and which read it behind which norm.

    The result describes `params` leaf by leaf, for `fold_affine`, `recenter`, `to_pre_rmsnorm` and the others. Where `convert`
    recenters activations (a tied table, for example), the transformed parameters belong to the function that it returns, or to a
    model that recenters these activations itself.

    Args:
      fn, params, *inputs: as for `convert`; shapes are all that is looked at.
      activations: as for `convert`.
      width: which main branch, by its width, where a program has several; "each" for a tuple of all of them, narrowest first, side by
        side: the transforms are then applied with one after the other.

    A LayerScale that has to move into its writer before that is recentered is the writer's `scale`. A norm whose affine can't move into its
    readers is kept, with the reason (`Norm.keep`); one that has none is told by its line in the program (`Norm.module`). A bias of a
    kept norm that writes to the main branch is a writer, and not the norm's. Behind a kept norm a compressed model computes in the Pre-LN
    coordinates.

    Raises: ConversionError where nothing can be converted, where there are main branches of several widths and none is chosen, or where a
      LayerScale is of a shape that a description can't say (`convert` moves it all the same).

    >>> import jax, jax.numpy as jnp
    >>> def fn(params, x):
    ...     h = x @ params["write"]
    ...     h = h - h.mean(-1, keepdims=True)
    ...     return params["scale"][None] * h / jnp.sqrt((h * h).mean(-1, keepdims=True) + 1e-6) @ params["read"]
    >>> params = {"write": jnp.ones((4, 8)), "scale": jnp.ones(8), "read": jnp.ones((8, 2))}
    >>> trace(fn, params, jnp.ones((5, 4))).norms[0].scale
    'scale'
    """
    arguments = Arguments.of(params, inputs)
    floats = [k for k in range(arguments.n_params) if arguments.is_float(k)]
    decision, plan, program = decide(
        trace_program(fn, arguments).program, arguments.paths, floats, activations, fold=False
    )
    found = [n for n in norms_of(plan) if plan.converted[n.site] and width in (None, "each", n.site.width)]
    if not found:
        raise ConversionError(f"no main branch was found\n{report_of(plan, program, decision)}")
    widths = sorted({n.site.width for n in found})
    if len(widths) > 1 and width != "each":
        raise ConversionError(
            f'main branches of widths {", ".join(map(str, widths))}: choose one with width=..., or width="each" for all of them'
        )
    shapes = [a.shape for a in arguments.arrays]
    branches = [_branch(d, [n for n in found if n.site.width == d], decision, arguments.paths, shapes) for d in widths]
    covered = {path for branch in branches for path in _touched(branch)}
    others = tuple(path for path in arguments.paths if path not in covered)
    described = side_by_side(*(dataclasses.replace(branch, others=others) for branch in branches))
    return described if width == "each" else described[0]


def _branch(
    width: int, found: list[NormFound], decision: Decision, paths: list[str], shapes: list[tuple[int, ...]]
) -> MainBranch:
    """The main branch of one width, without its `others`."""
    scales = {k: absorbed.scale for absorbed in decision.absorbed for k, _ in absorbed.targets}
    writers = []
    for k, axes in decision.leaves:
        if len(axes) == 1 and shapes[k][axes[0]] == width:
            axis, scale = axes[0] - len(shapes[k]), scales.get(k)
            if scale is not None and not _lines_up(shapes[scale], shapes[k], axis):
                raise ConversionError(
                    f"{paths[scale]} {shapes[scale]}: has to move into {paths[k]} {shapes[k]} before that is recentered, and a "
                    "description knows vectors (layers..., width) only; use convert, which does it"
                )
            writers.append(Writer(paths[k], axis, scale=None if scale is None else paths[scale]))
    written = frozenset(w.leaf for w in writers)
    return MainBranch(tuple(writers), tuple(_norm(n, paths, shapes, written) for n in found), (), width)


def _lines_up(vector: tuple[int, ...], kernel: tuple[int, ...], axis: int) -> bool:
    """Whether a (layers..., width) vector can multiply the kernel along its axis as the transforms have it."""
    return stacks(np.empty(vector), np.empty(kernel), axis) and vector[-1] == kernel[axis]


def _norm(found: NormFound, paths: list[str], shapes: list[tuple[int, ...]], written: frozenset[str]) -> Norm:
    scale = None if found.scale is None else paths[found.scale.position]
    bias = None if found.bias is None else paths[found.bias.position]
    keep = found.keep or next((_stacked_behind(v, paths, shapes) for v in (found.scale, found.bias) if v), None)
    readers = []
    for r in found.readers:
        k = r.kernel.position
        plain = r.bias is not None and list(r.bias_order) == sorted(r.bias_order)
        bias_path = None if r.bias is None or not plain else paths[r.bias]
        readers.append(Reader(paths[k], r.kernel.axis - len(shapes[k]), bias_path))
        if bias is not None and not plain:
            keep = keep or f"{paths[k]} can take no bias"
    if keep is not None:
        bias = None if bias in written else bias  # a norm at the end of a branch: what it adds is the main branch's
        line = where(found.site.sums[0]) if scale is None and bias is None else None
        return Norm((), scale, bias, found.eps, keep, module=line)
    return Norm(tuple(readers), scale, bias, found.eps)


def _stacked_behind(vector: LeafView, paths: list[str], shapes: list[tuple[int, ...]]) -> str | None:
    """Why a norm's vector is no (layers..., width) one, as transforms have it."""
    if vector.axis == len(shapes[vector.position]) - 1:
        return None
    return f"{paths[vector.position]} {shapes[vector.position]} has its layers behind its features; MainBranch(stacked=...) can say so"


def _touched(branch: MainBranch) -> set[str]:
    """The leaves that a description without patterns names."""
    own = {p for w in branch.writers for p in (w.leaf, w.scale)} | {p for n in branch.norms for p in (n.scale, n.bias)}
    read = {p for n in branch.norms for r in n.readers for p in (r.kernel, r.bias)}
    return {p for p in own | read if p is not None}
