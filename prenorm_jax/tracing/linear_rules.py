"""Rules for the primitives that sum, multiply and look up: reductions, products, convolutions, gather and scatter.

A product's free axis belongs to one operand: shifting a kernel along its output axis shifts the product there, and the
product has zero mean there exactly when the kernel does (PAPER.md's "recentering a writer's output axis").
"""

from __future__ import annotations

import math
from typing import Any

from prenorm_jax.tracing.jaxprs import (
    Axes,
    is_float,
    name_of,
    open_program,
    shape_of,
)
from prenorm_jax.tracing.rules import Facts, register_rule


def _kept(eqn: Any) -> list[int]:
    return [a for a in range(len(shape_of(eqn.invars[0]))) if a not in eqn.params["axes"]]


def _sum_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    kept = _kept(eqn)
    left = tuple(kept.index(a) for a in axes if a in kept)
    return {0: left} if left else None


def _sum_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    kept = _kept(eqn)
    return [(0, tuple(kept[a] for a in axes))] if is_float(eqn.invars[0]) else None


register_rule("reduce_sum", shift=_sum_shift, zero=_sum_zero)


def _cumsum_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    return None if eqn.params["axis"] in axes else {0: axes}


def _cumsum_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    return None if eqn.params["axis"] in axes else [(0, axes)]


register_rule("cumsum", shift=_cumsum_shift, zero=_cumsum_zero)


def _window_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    plain = all(eqn.params[name][a] == 1 for name in names for a in axes)
    return {0: axes} if plain and all(tuple(eqn.params["padding"][a]) == (0, 0) for a in axes) else None


def _window_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    return [(0, axes)] if _window_shift(eqn, 0, axes, facts) else None


register_rule("reduce_window_sum", shift=_window_shift, zero=_window_zero)


def product_axes(eqn: Any) -> tuple[list[int], list[int], list[int]]:
    """(batch axes of the left operand, free axes of the left, free axes of the right), in the order of the result."""
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    left, right = (range(len(shape_of(a))) for a in eqn.invars)
    return (
        list(left_batch),
        [a for a in left if a not in left_sum and a not in left_batch],
        [a for a in right if a not in right_sum and a not in right_batch],
    )


def _dot_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    batch, left, right = product_axes(eqn)
    free, start = (left, len(batch)) if i == 0 else (right, len(batch) + len(left))
    return {0: tuple(sorted(start + free.index(a) for a in axes))} if set(axes) <= set(free) else None


def _dot_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    batch, left, right = product_axes(eqn)
    for i, free, start in ((0, left, len(batch)), (1, right, len(batch) + len(left))):
        if all(start <= a < start + len(free) for a in axes):
            return [(i, tuple(sorted(free[a - start] for a in axes)))]
    return None


register_rule("dot_general", shift=_dot_shift, zero=_dot_zero)


def _ragged_axes(eqn: Any) -> list[int | None]:
    """For each axis of a grouped product's result, the axis of the second operand that it is; None for the first operand's.

    Rows that belong to no group are zero: shifted by nothing, and zero-mean."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (left_sum, right_sum), (left_batch, right_batch) = numbers.dot_dimension_numbers
    left, right = (range(len(shape_of(a))) for a in eqn.invars[:2])
    rows = [a for a in left if a not in left_sum and a not in left_batch]
    grouped = set(numbers.rhs_group_dimensions)
    if len(grouped) != 1 or any(a not in rows for a in numbers.lhs_ragged_dimensions):
        return []
    free = [a for a in right if a not in right_sum and a not in right_batch and a not in grouped]
    return [*(None for _ in left_batch), *(None for _ in rows), *free]


def _ragged_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    found = _ragged_axes(eqn)
    return {0: tuple(found.index(a) for a in axes)} if i == 1 and set(axes) <= set(found) else None


def _ragged_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    found = _ragged_axes(eqn)
    inner = [found[a] for a in axes] if found else [None]
    return None if None in inner else [(1, tuple(a for a in inner if a is not None))]


register_rule("ragged_dot_general", shift=_ragged_shift, zero=_ragged_zero)


def _conv_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    numbers, plain = eqn.params["dimension_numbers"], _ungrouped(eqn)
    if i != 1 or not plain or axes != (numbers.rhs_spec[0],):
        return None
    return {0: (numbers.out_spec[1],)}


def _conv_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    numbers = eqn.params["dimension_numbers"]
    if not _ungrouped(eqn) or axes != (numbers.out_spec[1],):
        return None
    return [(1, (numbers.rhs_spec[0],))]


def _ungrouped(eqn: Any) -> bool:
    return eqn.params["feature_group_count"] == 1 and eqn.params["batch_group_count"] == 1


register_rule("conv_general_dilated", shift=_conv_shift, zero=_conv_zero)


def _gather_windows(eqn: Any) -> dict[int, int]:
    """Operand axis -> result axis, for the axes that a gather takes whole. Where indices steer such an axis, too, the window starts
    at 0 (clipped) or is left out as a whole (filled)."""
    numbers, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], shape_of(eqn.invars[0])
    gone = set(numbers.collapsed_slice_dims) | set(getattr(numbers, "operand_batching_dims", ()))
    windows = [a for a in range(len(shape)) if a not in gone]
    pairs = zip(windows, numbers.offset_dims, strict=True)
    return {a: out for a, out in pairs if sizes[a] == shape[a]}


def _gather_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    windows = _gather_windows(eqn)
    return {0: tuple(sorted(windows[a] for a in axes))} if i == 0 and set(axes) <= set(windows) else None


def _gather_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    back = {out: a for a, out in _gather_windows(eqn).items()}
    fill = eqn.params.get("fill_value")
    drops = "FILL" in str(eqn.params.get("mode")).upper()
    if drops and fill is not None and not (fill == 0 or math.isnan(fill)):
        return None
    return [(0, tuple(sorted(back[a] for a in axes)))] if set(axes) <= set(back) else None


register_rule("gather", shift=_gather_shift, zero=_gather_zero)


def _scatter_windows(eqn: Any) -> dict[int, int]:
    """Operand axis -> update axis, for the axes along which every update covers the operand whole."""
    if name_of(eqn) == "scatter" and not _overwrites(eqn.params.get("update_jaxpr")):
        return {}
    numbers, shape, update = eqn.params["dimension_numbers"], shape_of(eqn.invars[0]), shape_of(eqn.invars[2])
    gone = set(numbers.inserted_window_dims) | set(getattr(numbers, "operand_batching_dims", ()))
    windows = [a for a in range(len(shape)) if a not in gone]
    pairs = zip(windows, numbers.update_window_dims, strict=True)
    return {a: up for a, up in pairs if update[up] == shape[a]}


def _overwrites(update: Any) -> bool:
    """Whether a scatter's update takes the old value's place; `x.at[i].apply(f)` puts f(old) there."""
    if update is None:
        return True
    jaxpr, _ = open_program(update)
    return not jaxpr.eqns and jaxpr.outvars[0] is jaxpr.invars[1]


def _scatter_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    windows = _scatter_windows(eqn)
    if i == 0:
        return {0: axes} if set(axes) <= set(windows) else None
    back = {up: a for a, up in windows.items()}
    return {0: tuple(sorted(back[a] for a in axes))} if i == 2 and set(axes) <= set(back) else None


def _scatter_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    windows = _scatter_windows(eqn)
    if not set(axes) <= set(windows):
        return None
    return [(0, axes), (2, tuple(sorted(windows[a] for a in axes)))]


for _name in ("scatter", "scatter-add", "scatter_add", "scatter-sub"):
    register_rule(_name, shift=_scatter_shift, zero=_scatter_zero)


# --- across devices: sums and moves of what each device holds, along other axes than those of the array -----------------------


def _each_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    return None if eqn.params.get("axis_index_groups") is not None else {i: axes}


def _each_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    return [(j, axes)]


for _name in ("psum", "psum_invariant", "ppermute", "pbroadcast", "preduced"):
    register_rule(_name, shift=_each_shift, zero=_each_zero)


def _gathered(eqn: Any, axes: Axes, back: bool) -> Axes | None:
    """Axes of an all-gather's result (operand) for those of its operand (result)."""
    at, tiled = eqn.params["all_gather_dimension"], eqn.params["tiled"]
    if at in axes and (tiled or back):
        return None
    if tiled:
        return axes
    return tuple(a - (a > at) if back else a + (a >= at) for a in axes)


def _all_gather_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    found = _gathered(eqn, axes, back=False)
    return None if found is None else {0: found}


def _all_gather_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    found = _gathered(eqn, axes, back=True)
    return None if found is None else [(0, found)]


for _name in ("all_gather", "all_gather_invariant"):
    register_rule(_name, shift=_all_gather_shift, zero=_all_gather_zero)


def _scattered(eqn: Any, axes: Axes) -> bool:
    moved = {eqn.params.get(k) for k in ("scatter_dimension", "split_axis", "concat_axis")} - {None}
    return bool(eqn.params["tiled"]) and moved.isdisjoint(axes)


def _scattered_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    return {0: axes} if _scattered(eqn, axes) else None


def _scattered_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    return [(0, axes)] if _scattered(eqn, axes) else None


for _name in ("reduce_scatter", "all_to_all"):
    register_rule(_name, shift=_scattered_shift, zero=_scattered_zero)
