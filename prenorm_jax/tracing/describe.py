"""`trace`: the main branch of a program, found and proven, in the words of `main_branch`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prenorm_jax.main_branch import MainBranch, Norm, Reader, Writer
from prenorm_jax.tracing.decision import ConversionError, decide
from prenorm_jax.tracing.norms import NormFound, norms_of
from prenorm_jax.tracing.report import report_of
from prenorm_jax.tracing.signature import Arguments, trace_program


def trace(
    fn: Callable[..., Any], params: Any, *inputs: Any, activations: str = "pays", width: int | None = None
) -> MainBranch:
    """Find the main branch of a program: which leaves write to it, and which read it behind which norm.

    The result describes `params` leaf by leaf, for `fold_affine`, `recenter`, `to_pre_rmsnorm` and the others. Where `convert`
    recenters activations (a tied table, for example), the transformed parameters belong to the function that it returns, or to a
    model that recenters these activations itself.

    Args:
      fn, params, *inputs: as for `convert`; shapes are all that is looked at.
      activations: as for `convert`.
      width: which main branch, by its width, where a program has several.

    Raises: ConversionError where nothing can be converted, where there are main branches of several widths, or where a
      vector between writer and main branch (LayerScale) has to move first, which a description can't say (`convert` does it).

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
    found = [n for n in norms_of(plan) if plan.converted[n.site] and width in (None, n.site.width)]
    if not found:
        raise ConversionError(f"no main branch was found\n{report_of(plan, program, decision)}")
    widths = sorted({n.site.width for n in found})
    if len(widths) > 1:
        raise ConversionError(f"main branches of widths {', '.join(map(str, widths))}: choose one with width=...")
    paths = arguments.paths
    if decision.absorbed:
        names = ", ".join(paths[a.scale] for a in decision.absorbed)
        raise ConversionError(
            f"{names}: has to move into its writers before these are recentered; use convert, which does it"
        )
    shapes = [a.shape for a in arguments.arrays]
    writers = tuple(
        Writer(paths[k], axes[0] - len(shapes[k]))
        for k, axes in decision.leaves
        if len(axes) == 1 and shapes[k][axes[0]] == widths[0]
    )
    norms = tuple(norm for n in found if (norm := _norm(n, paths, shapes)) is not None)
    covered = {w.leaf for w in writers} | {p for n in norms for p in _leaves_of(n)}
    return MainBranch(writers, norms, tuple(p for p in paths if p not in covered), widths[0])


def _norm(found: NormFound, paths: list[str], shapes: list[tuple[int, ...]]) -> Norm | None:
    scale = None if found.scale is None else paths[found.scale.position]
    bias = None if found.bias is None else paths[found.bias.position]
    keep = found.keep
    readers = []
    for r in found.readers:
        k = r.kernel.position
        plain = r.bias is not None and list(r.bias_order) == sorted(r.bias_order)
        bias_path = None if r.bias is None or not plain else paths[r.bias]
        readers.append(Reader(paths[k], r.kernel.axis - len(shapes[k]), bias_path))
        if bias is not None and not plain:
            keep = keep or f"{paths[k]} can take no bias"
    if keep is not None:
        return None if scale is None and bias is None else Norm((), scale, bias, found.eps, keep)
    return Norm(tuple(readers), scale, bias, found.eps)


def _leaves_of(norm: Norm) -> set[str]:
    own = {p for p in (norm.scale, norm.bias) if p is not None}
    return own | {r.kernel for r in norm.readers} | {r.bias for r in norm.readers if r.bias is not None}
