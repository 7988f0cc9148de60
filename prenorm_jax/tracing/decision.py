"""What a conversion does to the parameters, and to every program that is traced for them afterwards.

A decision is taken once, for the example inputs. At other shapes the function is traced and proven anew, with the decision's
leaves as they are now; where the decision would be wrong there, that is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from prenorm_jax.tracing.emit import assume
from prenorm_jax.tracing.flow import Flow
from prenorm_jax.tracing.fold import Fold, folds_of
from prenorm_jax.tracing.jaxprs import Axes, Program
from prenorm_jax.tracing.layer_scale import Absorption, absorption, candidates
from prenorm_jax.tracing.leaf_views import Views
from prenorm_jax.tracing.plan import Plan, make_plan
from prenorm_jax.tracing.rewrite import recentered, rewrite
from prenorm_jax.tracing.rules import ConstantAlong


class ConversionError(ValueError):
    """Nothing could be converted, or the result differs from the original; the message says what and where."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was decided about the arguments, by their position among the arrays.

    Attributes:
      paths: of the parameters, which come first.
      absorbed: vectors that move into their writers; they come first.
      leaves: (position, axes) of the leaves that have zero mean from then on.
      folds: norm scales and biases that move into their readers.
      activations: the policy for activations.
    """

    paths: tuple[str, ...]
    absorbed: tuple[Absorption, ...]
    leaves: tuple[tuple[int, Axes], ...]
    folds: tuple[Fold, ...]
    activations: str

    def among(self, paths: Sequence[str]) -> Decision:
        """The decision for parameters in another structure, such as without a cache: its leaves by name, where they are now. One that
        is recentered may be missing; the program is proven anew.

        Raises: ConversionError where all of these are missing, or one of a vector and the leaves that it was moved into.
        """
        if tuple(paths) == self.paths:
            return self
        now = {path: k for k, path in enumerate(paths)}
        at = {k: now[path] for k, path in enumerate(self.paths) if path in now} | {-1: -1}
        moved = {k for a in self.absorbed for k in (a.scale, *(t for t, _ in a.targets))}
        moved |= {k for f in self.folds for k in f.positions()}
        leaves = tuple((at[k], axes) for k, axes in self.leaves if k in at)
        missing = moved - set(at) or ({self.leaves[0][0]} if self.leaves and not leaves else set())
        if missing:
            raise ConversionError(
                f"{self.paths[min(missing)]}: was converted, but these parameters have no such leaf (they have "
                f"{', '.join(paths[:5])}, ...); pass parameters in the structure that was converted, or convert again"
            )
        return dataclasses.replace(
            self,
            paths=tuple(paths),
            absorbed=tuple(a.moved(at) for a in self.absorbed),
            leaves=leaves,
            folds=tuple(f.moved(at) for f in self.folds),
        )

    def prepared(self, arrays: Sequence[Any]) -> list[Any]:
        """The arguments with the parameters converted; jittable, differentiable, and the same for any dtype."""
        arrays = list(arrays)
        if any(isinstance(a, jax.ShapeDtypeStruct) for a in arrays):
            return arrays
        for absorbed in self.absorbed:
            arrays = absorbed.applied(arrays)
        for position, axes in self.leaves:
            # twice, since rounding leaves a mean of its own the first time
            arrays[position] = recentered(recentered(arrays[position], axes), axes)
        for fold in self.folds:
            arrays = fold.applied(arrays)
        return arrays

    def rewritten(self, program: Program) -> Program:
        """The program for parameters so converted.

        Raises: ConversionError where what was decided is not right for this program.
        """
        if self.absorbed:
            views = _views(program)
            for absorbed in self.absorbed:
                if absorption(views, absorbed.scale) != absorbed:
                    raise ConversionError(
                        f"{self.paths[absorbed.scale]}: moved into its writers, but is used otherwise for these inputs"
                    )
            program = assume(program, (), [a.scale for a in self.absorbed])
        plan = make_plan(program, (), self.leaves, self.activations)
        invars = plan.flow.main.jaxpr.invars
        for position, axes in self.leaves:
            if not plan.shifts.may_shift(invars[position], axes):
                reason = plan.shifts.why_not(invars[position], axes)
                raise ConversionError(
                    f"{self.paths[position]}: recentered, but its mean matters for these inputs: {reason}"
                )
        if self.folds:
            missing = set(self.folds) - set(folds_of(plan))
            if missing:
                path = self.paths[min(k for f in missing for k in f.own)]
                raise ConversionError(f"{path}: folded into its readers, but is used otherwise for these inputs")
        return _without(rewrite(plan), self.folds)


def decide(
    program: Program, paths: Sequence[str], floats: Sequence[int], activations: str, fold: bool
) -> tuple[Decision, Plan, Program]:
    """(decision, its plan, the converted program) for a program whose arguments at `floats` may be changed."""
    absorbed: list[Absorption] = []
    plan = make_plan(program, floats, activations=activations)
    if any(m.trips for m in plan.made) or not all(plan.converted.values()):
        views = _views(program)
        found = [absorption(views, k) for k in candidates(plan, views) if k in set(floats)]
        kept = [a for a in found if a is not None and {k for k, _ in a.targets} <= set(floats)]
        if kept:
            better = make_plan(assume(program, (), [a.scale for a in kept]), floats, activations=activations)
            if better.balance > plan.balance:
                plan, absorbed = better, kept
    positions = {var: k for k, var in enumerate(plan.flow.main.jaxpr.invars)}
    leaves = tuple(sorted((positions[m.atom], m.axes) for m in plan.leaves()))
    allowed = set(floats)
    folds = tuple(f for f in folds_of(plan) if f.positions() <= allowed) if fold else ()
    decision = Decision(tuple(paths), tuple(absorbed), leaves, folds, activations)
    return decision, plan, _without(rewrite(plan), folds)


def _views(program: Program) -> Views:
    flow = Flow(program)
    return Views(flow, ConstantAlong(flow), scaled=True)


def _without(program: Program, folds: Sequence[Fold]) -> Program:
    if not folds:
        return program
    return assume(program, [f.bias for f in folds if f.bias >= 0], [f.scale for f in folds if f.scale >= 0])
