"""Which leaf a value of the program is a view of: looking back through reshapes, transposes, conversions and scans.

Moving a diagonal between leaves (a LayerScale into its writer, a norm's scale into its readers) needs to know which axis of the
leaf an axis of the value is, also where the leaf is a stack that a scan takes apart.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from prenorm_jax.tracing.flow import Flow
from prenorm_jax.tracing.jaxprs import is_float, is_var, name_of, names, scalar_value, shape_of
from prenorm_jax.tracing.rules import ConstantAlong, rule_for

STRUCTURAL = names(
    "convert_element_type reshape transpose squeeze broadcast_in_dim copy copy_p name sharding_constraint optimization_barrier pvary"
)


@dataclasses.dataclass(frozen=True)
class LeafView:
    """Argument `position` of the program, seen with its axis `axis` as the axis asked for; `scans` are (scan's id, leaf axis) of
    the scans that iterate over it."""

    position: int
    axis: int
    scans: tuple[tuple[int, int], ...]

    def axes(self) -> dict[int | None, int]:
        return {None: self.axis, **dict(self.scans)}


class Views:
    """Leaf views in one program; with `scaled`, also of leaves that are multiplied by a number on the way."""

    def __init__(self, flow: Flow, facts: ConstantAlong, scaled: bool = False):
        self.flow, self.facts, self.scaled = flow, facts, scaled
        self.positions = {var: k for k, var in enumerate(flow.program.args)}

    def times_used(self, var: Any) -> int:
        """Uses in the variable's own body, as an operand or a result."""
        results = self.flow.body_of[var].jaxpr.outvars
        return len(self.flow.uses.get(var, ())) + sum(out is var for out in results)

    def view(self, var: Any, axis: int, once: bool = True) -> LeafView | None:
        """The leaf that `var` is a view of; with `once`, only if nothing else looks at it on the way."""
        axes: dict[int | None, int] = {None: axis}
        while True:
            if not is_var(var) or (once and self.times_used(var) != 1) or not is_float(var):
                return None
            if var in self.positions:
                scans = tuple(sorted((k, a) for k, a in axes.items() if k is not None))
                return LeafView(self.positions[var], axes[None], scans)
            if var in self.flow.definer:
                eqn, j = self.flow.definer[var]
                if self.scaled and (i := scaled_operand(eqn)) is not None:
                    var = eqn.invars[i]
                    continue
                moved = self._back(eqn, j, axes)
                if moved is None:
                    return None
                var, axes = eqn.invars[0], moved
                continue
            step = self._outside(var, axes)
            if step is None:
                return None
            var, axes = step

    def _back(self, eqn: Any, j: int, axes: dict[int | None, int]) -> dict[int | None, int] | None:
        if (
            name_of(eqn) not in STRUCTURAL
            or len(eqn.invars) != 1
            or math.prod(shape_of(eqn.invars[0])) != math.prod(shape_of(eqn.outvars[0]))
        ):
            return None
        moved = {}
        for key, axis in axes.items():
            found = rule_for(name_of(eqn)).zero(eqn, j, (axis,), self.facts)
            if not found or len(found[0][1]) != 1:
                return None
            moved[key] = found[0][1][0]
        return moved

    def _outside(self, var: Any, axes: dict[int | None, int]) -> tuple[Any, dict[int | None, int]] | None:
        body = self.flow.body_of[var]
        sources = self.flow.sources(var)
        if body.role not in ("scan", "region", "shard") or sources is None or len(sources) != 1:
            return None
        atom, _, _, delta = sources[0]
        if self.flow.carried(var, tuple(axes.values()), atom, delta) is None:
            return None
        if delta:
            axes = {key: a + 1 for key, a in axes.items()} | {id(body.eqn): 0}
        return atom, axes

    def forward(self, position: int) -> tuple[Any, int] | None:
        """The one equation that uses an argument, after conversions and reshapes, and as which operand."""
        var = self.flow.main.jaxpr.invars[position]
        while self.times_used(var) == 1 and self.flow.uses.get(var):
            eqn, i = self.flow.uses[var][0]
            inside = self.flow.inputs(eqn, i)
            if inside is not None:
                if len(inside) != 1 or self.flow.bodies_of[id(eqn)][0].role not in ("scan", "region"):
                    return None
                if self.flow.passed_through(eqn, i):
                    return None
                var = inside[0][0]
            elif (name_of(eqn) in STRUCTURAL and len(eqn.outvars) == 1) or (self.scaled and scaled_operand(eqn) == i):
                var = eqn.outvars[0]
            else:
                return eqn, i
        return None

    def vector_axis(self, atom: Any, like: Any) -> int | None:
        """The one axis along which an operand varies, if it lines up with `like` there."""
        shape, out = shape_of(atom), shape_of(like)
        wide = [a for a, n in enumerate(shape) if n != 1]
        if len(shape) != len(out) or len(wide) != 1 or shape[wide[0]] != out[wide[0]]:
            return None
        return wide[0]


def scaled_operand(eqn: Any) -> int | None:
    """Which operand of an equation is multiplied or divided by a number, if that is what it does."""
    name = name_of(eqn)
    numbers = [scalar_value(a) is not None for a in eqn.invars]
    if name == "mul" and any(numbers) and not all(numbers):
        return numbers.index(False)
    return 0 if name == "div" and numbers == [False, True] else None


Alignment = tuple[tuple[int, int], ...]
"""Pairs (axis of a vector's leaf, axis of a matrix's leaf)."""


def alignment(vector: LeafView, matrix: LeafView) -> Alignment | None:
    """How a stack of vectors lines up with a stack of matrices; None if it is a stack over something the matrices are not."""
    ours, theirs = vector.axes(), matrix.axes()
    if not set(ours) <= set(theirs):
        return None
    return tuple(sorted((ours[key], theirs[key]) for key in ours))


def lined_up(vector: Any, rank: int, pairs: Alignment) -> Any:
    """The vector's leaf, transposed and reshaped so that it broadcasts against a leaf of this rank."""
    order = [a for a, _ in sorted(pairs, key=lambda pair: pair[1])]
    sizes = {b: vector.shape[a] for a, b in pairs}
    rest = [a for a in range(vector.ndim) if a not in order]
    moved = jnp.transpose(vector, [*order, *rest])
    return moved.reshape([sizes.get(b, 1) for b in range(rank)])
