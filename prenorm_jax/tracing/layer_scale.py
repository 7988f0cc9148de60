"""LayerScale into its writer: diag(lambda) (W x + b) = (diag(lambda) W) x + diag(lambda) b.

A branch's output multiplied by a vector of the parameters is zero-mean only if that vector is in the writer before the writer is
recentered. It can be, if the vector has no other use and everything between it and the writers' leaves is linear and used once.
Numbers that multiply the vector on its way stay where they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from prenorm_jax.tracing.jaxprs import (
    is_var,
    name_of,
    names,
    scalar_value,
    shape_of,
)
from prenorm_jax.tracing.leaf_views import Alignment, LeafView, Views, alignment, lined_up
from prenorm_jax.tracing.plan import Plan
from prenorm_jax.tracing.rules import rule_for

_CARRIES = names(
    "add sub add_any neg convert_element_type reshape transpose squeeze broadcast_in_dim slice dynamic_slice "
    "concatenate pad select_n mul div reduce_sum dot_general conv_general_dilated gather name "
    "sharding_constraint copy copy_p reduce_precision pvary"
)


@dataclasses.dataclass(frozen=True)
class Absorption:
    """The vector at `scale` moves into the leaves of `targets` (position, how the vector lines up with it) and becomes ones."""

    scale: int
    targets: tuple[tuple[int, Alignment], ...]

    def moved(self, at: Mapping[int, int]) -> Absorption:
        """The same for arguments at other positions."""
        return Absorption(at[self.scale], tuple(sorted((at[k], pairs) for k, pairs in self.targets)))

    def applied(self, arrays: list[Any]) -> list[Any]:
        """The arguments with the vector moved."""
        arrays = list(arrays)
        scale = arrays[self.scale]
        for position, pairs in self.targets:
            leaf = arrays[position]
            arrays[position] = (leaf * lined_up(scale, leaf.ndim, pairs).astype(leaf.dtype)).astype(leaf.dtype)
        arrays[self.scale] = scale * 0 + 1
        return arrays


def absorption(views: Views, position: int) -> Absorption | None:
    """How the vector at an argument can move into its writers, or None."""
    end = views.forward(position)
    if end is None or name_of(end[0]) != "mul":
        return None
    eqn, i = end
    axis = views.vector_axis(eqn.invars[i], eqn.outvars[0])
    if axis is None:
        return None
    vector = views.view(eqn.invars[i], axis)
    if vector is None or not _is_only_that(views, vector):
        return None
    leaves = _writers(views, eqn.invars[1 - i], axis)
    if leaves is None:
        return None
    pairs = [(leaf.position, found) for leaf in leaves if (found := alignment(vector, leaf)) is not None]
    if len(pairs) != len(leaves) or len({k for k, _ in pairs} | {position}) != len(pairs) + 1:
        return None
    return Absorption(position, tuple(sorted(pairs)))


def candidates(plan: Plan, views: Views) -> list[int]:
    """Vectors whose product stands between a site and its zero mean."""
    found: dict[int, None] = {}
    roots = plan.roots()
    for need in plan.zero_mean.closure(roots).values():
        if plan.zero_mean.needs(need) is None and is_var(need.atom) and need.atom in views.flow.definer:
            eqn, _ = views.flow.definer[need.atom]
            if name_of(eqn) == "mul" and len(need.axes) == 1:
                for atom in eqn.invars:
                    view = views.view(atom, need.axes[0]) if len(shape_of(atom)) > need.axes[0] else None
                    if view is not None:
                        found[view.position] = None
    return list(found)


def _is_only_that(views: Views, vector: LeafView) -> bool:
    shape = shape_of(views.flow.main.jaxpr.invars[vector.position])
    return math.prod(shape) == math.prod(shape[a] for a in vector.axes().values())


def _writers(views: Views, atom: Any, axis: int) -> list[LeafView] | None:
    """The leaves that a value is linear in, all of them, with the axis that becomes `axis`; None if it is not."""
    found: list[LeafView] = []
    stack = [(atom, axis)]
    while stack:
        atom, axis = stack.pop()
        if _is_zero(views, atom):
            continue
        if not is_var(atom) or len(shape_of(atom)) <= axis or shape_of(atom)[axis] == 1 or views.times_used(atom) != 1:
            return None
        leaf = views.view(atom, axis)
        if leaf is not None:
            found.append(leaf)
            continue
        needs = _linear_in(views, atom, axis)
        if needs is None:
            return None
        stack += needs
    return found


def _is_zero(views: Views, atom: Any) -> bool:
    while is_var(atom) and atom in views.flow.definer:
        eqn, _ = views.flow.definer[atom]
        if name_of(eqn) != "broadcast_in_dim":
            return False
        atom = eqn.invars[0]
    return scalar_value(atom) == 0.0


def _linear_in(views: Views, var: Any, axis: int) -> list[tuple[Any, int]] | None:
    if var not in views.flow.definer:
        return None
    eqn, j = views.flow.definer[var]
    children = views.flow.bodies_of.get(id(eqn))
    if children is not None:
        return [(children[0].jaxpr.outvars[j], axis)] if children[0].role == "region" else None
    if name_of(eqn) not in _CARRIES:
        return None
    needs = rule_for(name_of(eqn)).zero(eqn, j, (axis,), views.facts)
    if needs is None or any(len(axes) != 1 for _, axes in needs):
        return None
    if any(
        scalar_value(eqn.invars[i]) is None and shape_of(eqn.invars[i])[a[0]] != shape_of(var)[axis] for i, a in needs
    ):
        return None
    return [(eqn.invars[i], axes[0]) for i, axes in needs]
