"""How the values of a program depend on a shift of one of them.

The uses of a value x are followed forward. While a derived value is a polynomial of x and its row moments (`polynomials`), its
dependence on the shift is computed, and vanishes behind a LayerNorm of any form. A value that is itself x plus a row shift (an add
of another stream, a reshape, a product with a kernel, a loop's carry, ...) is cut there: what becomes of its own shift is a
question of its own. Whatever else still depends on the shift is a failure: an unknown primitive, a contraction over A, a result.
"""

from __future__ import annotations

import dataclasses
import heapq
from typing import Any

from prenorm_jax.tracing import linear_rules  # noqa: F401  (it registers its rules)
from prenorm_jax.tracing import polynomials as P
from prenorm_jax.tracing.algebra import MOVES, Algebra, Dims, Tracked
from prenorm_jax.tracing.flow import Flow
from prenorm_jax.tracing.jaxprs import (
    Axes,
    custom_name,
    has_side_effect,
    is_float,
    is_var,
    name_of,
    names,
    shape_of,
    where,
)
from prenorm_jax.tracing.rules import ConstantAlong, has_rule, rule_for

Node = tuple[Any, Axes]


@dataclasses.dataclass
class Exploration:
    """What following one value's uses found: what its Inv needs, or why it fails; and the means taken of it."""

    needs: list[Node] = dataclasses.field(default_factory=list)
    failure: str | None = None
    cuts: int = 0
    sums: list[Any] = dataclasses.field(default_factory=list)  # equations that sum x over A
    centered: list[Node] = dataclasses.field(default_factory=list)  # values equal to x - mean(x), up to a number
    cancelled: list[Any] = dataclasses.field(default_factory=list)  # values with x in them that a shift does not change
    across: list[Any] = dataclasses.field(
        default_factory=list
    )  # values from which a mean over several devices was subtracted

    def fail(self, reason: str) -> None:
        self.failure = self.failure or reason


class Explorer:
    """Follows one value within its body. `cut` says where a value that is merely shifted is left to a question of its own: 2, where it is
    added to or put into another shape; 1, where it is added to; 0, in neither case."""

    def __init__(self, flow: Flow, facts: ConstantAlong, var: Any, axes: Axes, cut: int):
        self.flow, self.facts, self.axes, self.cut = flow, facts, axes, cut
        self.shape = shape_of(var)
        self.body = flow.body_of[var]
        self.algebra = Algebra(flow, facts, self.shape, axes)
        self.tracked = self.algebra.tracked
        self.queue: list[tuple[int, Any]] = []
        self.queued: set[int] = set()
        self.shared: set[int] = set()  # symbols of means over several devices
        self.found = Exploration()
        all_dims = tuple(range(len(self.shape)))
        self.track(var, Tracked(P.symbol(P.X), all_dims, P.symbol(P.S)))

    def run(self) -> Exploration:
        while self.queue:
            _, eqn = heapq.heappop(self.queue)
            self.visit(eqn)
        return self.found

    def track(self, var: Any, value: Tracked) -> None:
        self.tracked[var] = value
        if P.is_centered(value.poly, self.algebra.n):
            axes = self.algebra.axes_in(var, value.dims)
            self.found.centered += [(var, axes)] if axes is not None else []
        if not value.live():
            if any(P.X in m for m in value.poly):
                self.found.cancelled.append(var)
            if self.shared.intersection(*value.poly) if len(value.poly) == 1 else False:
                self.push(var)
            return
        self.leave(var, value)
        self.push(var)

    def push(self, var: Any) -> None:
        """Visit the uses of a value."""
        for eqn, _ in self.flow.uses.get(var, ()):
            if id(eqn) not in self.queued:
                self.queued.add(id(eqn))
                heapq.heappush(self.queue, (self.flow.order[id(eqn)], eqn))

    def leave(self, var: Any, value: Tracked) -> None:
        """Account for a value that is a result of its body."""
        for position, out in enumerate(self.body.jaxpr.outvars):
            if out is not var:
                continue
            targets = self.flow.exits(self.body, position)
            axes = self.shifted_axes(var, value)
            if targets is None:
                kind = {
                    "while_cond": "it decides when a loop ends",
                    "custom": "it leaves a custom derivative rule's function",
                }
                self.found.fail(kind.get(self.body.role, f"it is output {position} of the program"))
            elif axes is None:
                self.found.fail("a sub-program returns what was derived from it")
            else:
                self.need_all(var, targets, axes)

    def need_all(self, var: Any, targets: list[tuple[Any, int]], axes: Axes) -> None:
        for target, delta in targets:
            moved = self.flow.carried(var, axes, target, delta)
            if moved is None:
                split = (
                    "is the one a scan iterates over"
                    if delta
                    else "is sharded over devices, so its mean is taken across them"
                )
                self.found.fail(f"the axis {split}")
            else:
                self.found.needs.append((target, moved))

    def shifted_axes(self, var: Any, value: Tracked) -> Axes | None:
        """The axes along which this value is merely shifted, or None."""
        merely = P.is_row_shift(value.change, self.algebra.varies)
        return self.algebra.axes_in(var, value.dims) if merely else None

    # -- one equation --

    def visit(self, eqn: Any) -> None:
        live = [i for i, a in enumerate(eqn.invars) if is_var(a) and a in self.tracked and self.tracked[a].live()]
        result = None
        if len(eqn.outvars) == 1 and is_float(eqn.outvars[0]) and not eqn.effects and not self.is_moved_stream(eqn):
            result = self.algebra.polynomial(eqn)
        if result is not None:
            self.follow(eqn, result)
            return
        for i in live:
            self.carry_over(eqn, i)

    def is_moved_stream(self, eqn: Any) -> bool:
        """A stream in another shape is a stream of its own."""
        atom = eqn.invars[0] if eqn.invars else None
        if self.cut < 2 or name_of(eqn) not in MOVES - {"transpose"} or not is_var(atom):
            return False
        moved = atom in self.tracked and self.shifted_axes(atom, self.tracked[atom]) is not None
        self.found.cuts += moved
        return moved

    def follow(self, eqn: Any, result: tuple[P.Poly, Dims]) -> None:
        poly, dims = result
        change = P.change(poly, self.algebra.n)
        out = eqn.outvars[0]
        if change is None:
            self.found.fail(f"its use grows too large to follow at {where(eqn)}")
            return
        value = Tracked(poly, dims, change)
        if self.shared and (P.X,) in poly and any(self.shared.intersection(m) for m in poly):
            self.found.across.append(out)
        if self.cut and name_of(eqn) in ("add", "sub", "add_any") and self.is_stream(value):
            axes = self.shifted_axes(out, value)
            if axes is not None:
                self.found.cuts += 1
                self.found.needs.append((out, axes))
                return
        if name_of(eqn) == "reduce_sum" and set(poly) == {(P.M1,)}:
            self.found.sums.append(eqn)
        self.track(out, value)

    def is_stream(self, value: Tracked) -> bool:
        """x plus something of its own that varies along A: another branch was added."""
        others = any(P.X not in m and any(k >= P.FIRST and self.algebra.varies(k) for k in m) for m in value.poly)
        return others and any(P.X in m for m in value.poly)

    def carry_over(self, eqn: Any, i: int) -> None:
        """A live operand reaches something that is not polynomial: its result may be a shifted value itself."""
        atom = eqn.invars[i]
        axes = self.shifted_axes(atom, self.tracked[atom])
        inside = self.flow.inputs(eqn, i)
        name = name_of(eqn)
        if axes is None and name in SUMS_OVER_DEVICES:
            self.summed_over_devices(eqn, i)
        elif axes is None:
            self.found.fail(f"{self.derived(self.tracked[atom])} is used in {name} at {where(eqn)}")
        elif has_side_effect(eqn) and inside is None:
            self.found.fail(f"it has a side effect in {name} at {where(eqn)}")
        elif inside is not None:
            children = self.flow.bodies_of[id(eqn)]
            if children[0].role == "custom":
                self.found.fail(
                    f"it enters a custom derivative rule ({custom_name(eqn)}), which may see its mean, at {where(eqn)}"
                )
            elif not inside:
                self.found.fail(f"it steers {name} at {where(eqn)}")
            else:
                self.need_all(atom, inside, axes)
                self.found.needs += [(v, axes) for v in self.flow.passed_through(eqn, i)]
        else:
            moved = rule_for(name).shift(eqn, i, axes, self.facts)
            if moved is None:
                self.found.fail(f"{reading(eqn, axes)} at {where(eqn)}")
            else:
                self.found.needs += [(eqn.outvars[j], tuple(axes_j)) for j, axes_j in moved.items()]

    def derived(self, value: Tracked) -> str:
        """A value that depends on the shift without being merely shifted, in words."""
        varying = any(m >= P.FIRST and self.algebra.varies(m) for monomial in value.change for m in monomial)
        return "a product of it with what varies over its features" if varying else "a mean of it"

    def summed_over_devices(self, eqn: Any, i: int) -> None:
        """A sum of it goes on to be summed over devices: a mean over features that they share, which no device can drop."""
        self.found.fail(f"its features are sharded over devices, and its mean is taken across them at {where(eqn)}")
        value = self.tracked[eqn.invars[i]]
        if value.poly and all(m == (P.M1,) for m in value.poly):
            name = self.algebra.name_sum(("devices", id(eqn), i))
            self.tracked[eqn.outvars[i]] = Tracked(P.symbol(name), value.dims, {})
            self.shared.add(name)
            self.push(eqn.outvars[i])


def reading(eqn: Any, axes: Axes) -> str:
    """How a shift along these axes of an operand is seen in an equation's result, in words."""
    name = name_of(eqn)
    if name == "concatenate" and eqn.params["dimension"] in axes:
        return "its features are joined with others by concatenate, whose result is read with its mean"
    return f"{name} reads its mean" if has_rule(name) or name in KNOWN_READERS else f"{name} has no rule"


SUMS_OVER_DEVICES = names("psum psum_invariant")
KNOWN_READERS = names(
    "exp log tanh logistic erf max min abs sign rsqrt sqrt pow sin cos argmax argmin sort top_k reduce_max "
    "reduce_min eq lt gt le ge is_finite cumprod cumlogsumexp"
)
