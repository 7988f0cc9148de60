"""Is a value zero-mean along A?  Z(v, A), and what it takes.

Every (value, axes) either has zero mean by itself (a zero, a constant, a value from which its mean was just subtracted), or has
it if some other values have it (`rules`), or is not known to. Z is the largest set of values in which every member's
needs are members: along a loop that is induction over its iterations, whose base is the need for the initial value.

What is not zero-mean by itself can be made so where a shift is unseen (`shift`): a leaf of the parameters, once, at conversion;
a constant, likewise; and any other value by subtracting its mean as the program runs, which costs a reduction.
`ZeroMean` knows what is possible, `prove` establishes Z for a chosen set of such recenterings, and nothing is rewritten that
`prove` has not established.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from prenorm_jax.tracing.flow import Flow
from prenorm_jax.tracing.jaxprs import (
    CUSTOM,
    DRAWS,
    Axes,
    custom_name,
    is_float,
    is_var,
    name_of,
    shape_of,
    where,
)
from prenorm_jax.tracing.rules import has_rule, rule_for
from prenorm_jax.tracing.shift import Node, Shifts

MOST_CONSTANT_ENTRIES = 1 << 26


@dataclasses.dataclass(frozen=True)
class Recentering:
    """One value whose mean is subtracted: kind "leaf", "constant" (both free), "value" (for all its uses) or "use" (of one).

    `atom` is the variable or literal; for a "use", `use` is (equation's id, operand index).
    """

    kind: str
    atom: Any
    axes: Axes
    use: tuple[int, int] | None = None
    trips: int = 0  # how often it is executed; 0 if it is free

    @property
    def price(self) -> float:
        """One for each time it runs; of two that run as often, the one on fewer entries."""
        return self.trips * (1.0 + 1e-12 * math.prod(shape_of(self.atom)))


@dataclasses.dataclass(frozen=True, eq=False)
class Need:
    """A value that must be zero-mean, and the operand it is taken through (None for a body's result)."""

    atom: Any
    axes: Axes
    eqn: Any = None
    operand: int = -1

    @property
    def node(self) -> Node:
        return (self.atom if is_var(self.atom) else id(self.atom), self.axes)


class ZeroMean:
    """Z for one program. `leaves` are the main program's arguments that may be recentered, `given` those (argument, axes) that
    have zero mean already."""

    def __init__(
        self, flow: Flow, shifts: Shifts, leaves: Iterable[Any], given: Iterable[Node], centered: Iterable[Node]
    ):
        self.flow, self.shifts = flow, shifts
        self.leaves, self.given, self.centered = set(leaves), set(given), set(centered)
        self.eqns = {id(e): e for b in flow.bodies for e in b.jaxpr.eqns}
        self._needs: dict[Node, list[Need] | None] = {}
        self._constant: dict[Any, bool] = {}
        known = flow.program.constants.items()
        self._values = {
            v: c for v, c in known if not isinstance(c, jax.core.Tracer)
        }  # under an outer trace some have no numbers

    # -- structure --

    def needs(self, need: Need) -> list[Need] | None:
        """What makes this value zero-mean; [] if it is by itself, None if nothing is known to."""
        if need.node not in self._needs:
            self._needs[need.node] = self._look(need.atom, need.axes)
        return self._needs[need.node]

    def _look(self, atom: Any, axes: Axes) -> list[Need] | None:
        shape = shape_of(atom)
        if not axes or any(a >= len(shape) for a in axes) or not is_float(atom):
            return [] if not is_var(atom) and not np.any(np.asarray(atom.val)) else None
        if not is_var(atom):
            return [] if _has_zero_mean(atom.val, axes) else None
        if (atom, axes) in self.given or (atom, axes) in self.centered:
            return []
        if atom in self._values:
            return [] if _has_zero_mean(self._values[atom], axes) else None
        if math.prod(shape[a] for a in axes) <= 1:
            return None
        eqn, j = self.flow.definer.get(atom, (None, 0))
        children = self.flow.bodies_of.get(id(eqn), ())
        if any(c.role == "custom" for c in children):
            return None  # its derivative rule need not know that the mean is zero
        sources = self.flow.sources(atom)
        if sources is not None:
            moved = [(a, self.flow.carried(atom, axes, a, delta), e, i) for a, e, i, delta in sources]
            whole = [Need(a, x, e, i) for a, x, e, i in moved if x is not None]
            return whole if len(whole) == len(moved) else None
        if eqn is None:
            return None
        found = rule_for(name_of(eqn)).zero(eqn, j, axes, self.shifts.facts)
        return None if found is None else [Need(eqn.invars[i], tuple(x), eqn, i) for i, x in found]

    # -- ways to make it so --

    def options(self, need: Need) -> Recentering | None:
        """How to recenter this value itself, for all its uses, unseen; None if that can't be done."""
        atom, axes = need.atom, need.axes
        shape = shape_of(atom)
        if not is_var(atom) or not is_float(atom) or not axes or max(axes) >= len(shape):
            return None
        if math.prod(shape[a] for a in axes) <= 1:
            return None
        if atom in self.leaves:
            return Recentering("leaf", atom, axes) if self.shifts.may_shift(atom, axes) else None
        if not self.shifts.may_shift(atom, axes):
            return None
        if self.is_constant(atom) and math.prod(shape) <= MOST_CONSTANT_ENTRIES:
            return Recentering("constant", atom, axes)
        body = self.flow.body_of[atom]
        return Recentering("value", atom, axes, trips=body.trips) if body.takes_recenterings() else None

    def use_option(self, need: Need) -> Recentering | None:
        """How to recenter this value for one use of it."""
        eqn, i = need.eqn, need.operand
        shape = shape_of(need.atom)
        if eqn is None or not is_float(need.atom) or not need.axes or max(need.axes) >= len(shape):
            return None
        body = self.flow.body_of_eqn[id(eqn)]
        if math.prod(shape[a] for a in need.axes) <= 1 or not body.takes_recenterings():
            return None
        inside = self.flow.inputs(eqn, i)
        if inside is not None:
            seen = [(v, self.flow.carried(need.atom, need.axes, v, d)) for v, d in inside]
            seen += [(v, need.axes) for v in self.flow.passed_through(eqn, i)]
            if self.flow.bodies_of[id(eqn)][0].role == "custom":
                return None
        else:
            moved = rule_for(name_of(eqn)).shift(eqn, i, need.axes, self.shifts.facts)
            if moved is None:
                return None
            seen = [(eqn.outvars[j], axes) for j, axes in moved.items()]
        if any(axes is None or not self.shifts.may_shift(v, axes) for v, axes in seen):
            return None
        return Recentering("use", need.atom, need.axes, (id(eqn), i), trips=body.trips if is_var(need.atom) else 0)

    def is_constant(self, var: Any) -> bool:
        """Whether a value of the main program depends on no argument of it."""
        stack = [var]
        while stack:
            v = stack[-1]
            if v in self._constant:
                stack.pop()
                continue
            if v in self._values:
                self._constant[v] = True
                continue
            if v not in self.flow.definer or self.flow.body_of[v] is not self.flow.main:
                self._constant[v] = False
                continue
            eqn, _ = self.flow.definer[v]
            inputs = [a for a in eqn.invars if is_var(a)]
            waiting = [a for a in inputs if a not in self._constant]
            if eqn.effects or name_of(eqn) in DRAWS or any(self._constant.get(a) is False for a in inputs):
                self._constant[v] = False
            elif waiting:
                stack += waiting
            else:
                self._constant[v] = True
        return self._constant[var]

    # -- proofs and costs --

    def closure(self, roots: Iterable[Need], stop: Callable[[Need], bool] = lambda need: False) -> dict[Node, Need]:
        """All values that the roots' zero mean rests on, dependencies first."""
        found: dict[Node, Need] = {}
        order: dict[Node, Need] = {}
        stack = [(need, False) for need in roots]
        while stack:
            need, done = stack.pop()
            if done:
                order[need.node] = need
                continue
            if need.node in found:
                continue
            found[need.node] = need
            stack.append((need, True))
            if not stop(need):
                stack += [(n, False) for n in self.needs(need) or ()]
        return order

    def prove(self, roots: Iterable[Need], made: Iterable[Recentering]) -> Callable[[Need], bool]:
        """Z, for these values and all they rest on, when the recenterings `made` are carried out."""
        made = set(made)
        nodes = {(m.atom if is_var(m.atom) else id(m.atom), m.axes) for m in made if m.kind != "use"}
        uses = {(m.use, m.axes) for m in made if m.kind == "use"}

        def by_itself(need: Need) -> bool:
            return need.node in nodes or self.needs(need) == []

        order = self.closure(roots, by_itself)
        users: dict[Node, list[Node]] = {}
        false: list[Node] = []
        for node, need in order.items():
            if by_itself(need):
                continue
            if self.needs(need) is None:
                false.append(node)
                continue
            for n in self.needs(need) or ():
                if n.eqn is None or ((id(n.eqn), n.operand), n.axes) not in uses:
                    users.setdefault(n.node, []).append(node)
        refuted: set[Node] = set()
        while false:
            node = false.pop()
            if node not in refuted:
                refuted.add(node)
                false += users.get(node, ())
        return lambda need: need.node in order and need.node not in refuted

    def spend(self, roots: list[list[Need]], allowed: Callable[[Recentering], bool]) -> list[list[Recentering] | None]:
        """For each group of roots, in the program's order, recenterings that should give it zero mean (`prove` then decides):
        the cheapest, where what an earlier group already pays for is free."""
        return _Spending(self, [n for group in roots for n in group], allowed).groups(roots)

    def obstacle(self, root: Need) -> str:
        """Why a value is not zero-mean by recentering leaves alone: the first thing it rests on that is not."""
        for need in self.closure([root]).values():
            if self.needs(need) is None:
                option = self.options(need)
                if option is None or option.trips:
                    return self.describe(need)
        return "it rests on values that may not be recentered"

    def describe(self, need: Need) -> str:
        """One value that is not zero-mean, in words."""
        atom = need.atom
        if not is_var(atom):
            return "a constant is added to it"
        if atom in self.flow.definer:
            eqn, _ = self.flow.definer[atom]
            if name_of(eqn) in CUSTOM:
                return f"the result of {custom_name(eqn)}, which has a custom derivative rule, at {where(eqn)}"
            known = "" if has_rule(name_of(eqn)) or id(eqn) in self.flow.bodies_of else ", which has no rule,"
            return f"the result of {name_of(eqn)}{known} at {where(eqn)}"
        if atom in self.leaves:
            if math.prod(shape_of(atom)[a] for a in need.axes if a < len(shape_of(atom))) == 1:
                return "a leaf that is one number for all features"
            return f"a leaf that may not be recentered ({self.shifts.why_not(atom, need.axes)})"
        if self.flow.body_of[atom].role == "shard":
            return "an argument of shard_map whose features are sharded over devices"
        return "an input of the program or of a sub-program"


Bill = frozenset[Recentering] | None
"""What is recentered for a value's zero mean; None if nothing gives it that."""


def _total(bill: Bill) -> float:
    return math.inf if bill is None else sum(r.price for r in bill)


def _together(bills: Iterable[Bill]) -> Bill:
    found: frozenset[Recentering] = frozenset()
    for bill in bills:
        if bill is None:
            return None
        found |= bill
    return found


class _Spending:
    """Chooses, for each value on the way, whether to recenter it or to rely on what it is made of."""

    def __init__(self, facts: ZeroMean, roots: list[Need], allowed: Callable[[Recentering], bool]):
        self.facts, self.allowed = facts, allowed
        self.choice: dict[Node, Recentering | None] = {}
        self.through: dict[tuple[int, int, Axes], Recentering | None] = {}
        self.taken: set[tuple[int, int, Axes]] = set()
        self.settled: set[Node] = set()
        self._options: dict[Node, Recentering | None] = {}
        order = facts.closure(roots)
        free_ones = [r for need in order.values() if (r := self.option(need)) is not None and r.trips == 0]
        self.free = facts.prove(roots, free_ones)

    def groups(self, roots: list[list[Need]]) -> list[list[Recentering] | None]:
        return [self.group(needs) for needs in roots]

    def group(self, roots: list[Need]) -> list[Recentering] | None:
        cost = self.costs(roots)
        if any(cost.get(r.node, 0.0) == math.inf for r in roots):
            return None
        return self.walk(roots, cost)

    def option(self, need: Need) -> Recentering | None:
        """How to recenter this value, if it has to be and that is allowed."""
        if need.node not in self._options:
            found = None if self.facts.needs(need) == [] else self.facts.options(need)
            self._options[need.node] = found if found is not None and self.allowed(found) else None
        return self._options[need.node]

    def use_option(self, need: Need) -> Recentering | None:
        key = (id(need.eqn), need.operand, need.axes)
        if key not in self.through:
            found = self.facts.use_option(need)
            self.through[key] = found if found is not None and self.allowed(found) else None
        return self.through[key]

    def costs(self, roots: list[Need]) -> dict[Node, float]:
        """The least price of each value's zero mean, found as sets of recenterings, so that what two terms share is paid for once and
        what a loop's carry rests on is not paid for again by its next iteration. Sets grow from nothing, or give way to one recentering
        of the value itself, once: that ends."""
        order = self.facts.closure(roots, lambda need: need.node in self.settled)
        bills: dict[Node, Bill] = dict.fromkeys(order, frozenset())
        changed = True
        while changed:
            changed = False
            for node, need in order.items():
                if node in self.settled or self.choice.get(node) is not None:
                    continue
                bill, how = self.best(need, bills)
                if bill != bills[node] or node not in self.choice:
                    bills[node], self.choice[node], changed = bill, how, True
        return {node: _total(bill) for node, bill in bills.items()}

    def best(self, need: Need, bills: dict[Node, Bill]) -> tuple[Bill, Recentering | None]:
        parts, option = self.facts.needs(need), self.option(need)
        if self.free(need):
            return frozenset(), option if option is not None and option.trips == 0 else None
        whole = None if parts is None else _together(self.bill(n, bills) for n in parts)
        return (frozenset({option}), option) if option is not None and option.price < _total(whole) else (whole, None)

    def bill(self, need: Need, bills: dict[Node, Bill]) -> Bill:
        direct = bills[need.node]
        if direct == frozenset() or self._taken(need):
            return frozenset()
        option = self.use_option(need) if need.eqn is not None else None
        return frozenset({option}) if option is not None and option.price < _total(direct) else direct

    def _taken(self, need: Need) -> bool:
        return (id(need.eqn), need.operand, need.axes) in self.taken

    def walk(self, roots: list[Need], cost: dict[Node, float]) -> list[Recentering]:
        """All recenterings that the roots rest on; what is visited is settled from now on."""
        found: dict[Recentering, None] = {}
        seen, stack = set(), list(roots)
        while stack:
            need = stack.pop()
            if need.node in seen:
                continue
            seen.add(need.node)
            how = self.choice[need.node]
            if how is not None:
                found[how] = None
                continue
            for n in self.facts.needs(need) or ():
                option = self.use_option(n) if n.eqn is not None and cost.get(n.node, 0.0) > 0 else None
                if self._taken(n) or (option is not None and option.price < cost.get(n.node, 0.0)):
                    made = self.through[id(n.eqn), n.operand, n.axes]
                    assert made is not None
                    found[made] = None
                    self.taken.add((id(n.eqn), n.operand, n.axes))
                else:
                    stack.append(n)
        self.settled |= seen
        return list(found)


def _has_zero_mean(value: Any, axes: Axes) -> bool:
    array = np.asarray(value)
    if array.ndim <= max(axes, default=0):
        return not np.any(array)
    wide = array.astype(np.float64)
    if not np.all(np.isfinite(wide)):
        return False
    return bool(
        np.all(np.abs(wide.mean(axes)) <= 1e-7 * np.max(np.abs(wide), axes, initial=0.0))
    )  # each row by its own size
