"""Where every value of a program comes from and goes to, across the bodies of its loops, branches and calls."""

from __future__ import annotations

import dataclasses
from typing import Any

from prenorm_jax.tracing.jaxprs import Axes, Program, bodies_of, is_var, scan_counts, shape_of


@dataclasses.dataclass(eq=False)
class Body:
    """One jaxpr of a program: the whole, or the body of an equation of `parent`."""

    jaxpr: Any
    parent: Body | None = None
    eqn: Any = None
    role: str = "main"  # main, scan, while, while_cond, cond, region, shard, custom
    trips: int = 1

    def in_custom(self) -> bool:
        return self.custom_eqn() is not None

    def custom_eqn(self) -> Any:
        """The outermost custom derivative call that it is in, or None."""
        outer = self.parent.custom_eqn() if self.parent is not None else None
        return outer if outer is not None or self.role != "custom" else self.eqn

    def takes_recenterings(self) -> bool:
        """Whether values in it may be recentered: not in a custom rule's function, nor where `shard_map` checks what varies between
        devices, which a new equation would have to say, too."""
        closed = self.role == "custom" or (self.role == "shard" and self.eqn.params["check_vma"])
        return not closed and (self.parent is None or self.parent.takes_recenterings())


@dataclasses.dataclass
class Links:
    """How values cross the boundary of a structured equation; `delta` is what an axis loses on its way in (1 for what a scan
    iterates over, whose first axis is gone inside).

    Attributes:
      enters: (operand, body, argument of the body, delta).
      leaves: (body, result of the body, result of the equation, delta).
      again: (body, result of it, body, argument that it becomes at the next iteration).
      skips: (operand, result of the equation) that are equal when a loop makes no trip.
    """

    enters: list[tuple[int, Body, int, int]]
    leaves: list[tuple[Body, int, int, int]]
    again: list[tuple[Body, int, Body, int]] = dataclasses.field(default_factory=list)
    skips: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, eqn: Any, bodies: list[Body]) -> Links:
        operands, results = range(len(eqn.invars)), range(len(eqn.outvars))
        role, body = bodies[0].role, bodies[0]
        if role == "scan":
            consts, carry = scan_counts(eqn)
            return cls(
                [(i, body, i, int(i >= consts + carry)) for i in operands],
                [(body, j, j, int(j >= carry)) for j in results],
                [(body, j, body, consts + j) for j in range(carry)],
                [(consts + j, j) for j in range(carry)],
            )
        if role == "while_cond":
            loop, nc, nb = bodies[1], eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            return cls(
                [(i, body, i if i < nc else i - nb, 0) for i in operands if not nc <= i < nc + nb]
                + [(i, loop, i - nc, 0) for i in operands if i >= nc],
                [(loop, j, j, 0) for j in results],
                [(loop, j, b, n + j) for j in results for b, n in ((body, nc), (loop, nb))],
                [(nc + nb + j, j) for j in results],
            )
        first = 1 if role == "cond" else 0  # operand 0 of a cond steers
        return cls(
            [(i, b, i - first, 0) for i in operands[first:] for b in bodies],
            [(b, j, j, 0) for b in bodies for j in results],
        )


class Flow:
    """Where every variable of a program is defined and used, across body boundaries.

    An axis of an operand and the same axis inside the body differ by `delta` (0, or 1 for what a scan iterates over). Inside a
    `shard_map` an axis that is sharded is shorter: see `carried`.
    """

    def __init__(self, program: Program):
        self.program = program
        self.body_of: dict[Any, Body] = {}
        self.definer: dict[Any, tuple[Any, int]] = {}
        self.uses: dict[Any, list[tuple[Any, int]]] = {}
        self.order: dict[int, int] = {}
        self.bodies: list[Body] = []
        self.bodies_of: dict[int, list[Body]] = {}
        self.body_of_eqn: dict[int, Body] = {}
        self._inputs: dict[tuple[int, int], list[tuple[Any, int]]] = {}
        self._exits: dict[tuple[int, int], list[tuple[Any, int]]] = {}
        self._sources: dict[Any, list[tuple[Any, Any, int, int]]] = {}
        self._skips: dict[tuple[int, int], list[Any]] = {}
        self._add(Body(program.jaxpr))

    def _add(self, body: Body) -> None:
        self.bodies.append(body)
        for var in body.jaxpr.invars:
            self.body_of[var] = body
        for eqn in body.jaxpr.eqns:
            self.order[id(eqn)] = len(self.order)
            self.body_of_eqn[id(eqn)] = body
            for i, atom in enumerate(eqn.invars):
                if is_var(atom):
                    self.uses.setdefault(atom, []).append((eqn, i))
            for j, var in enumerate(eqn.outvars):
                self.body_of[var] = body
                self.definer[var] = (eqn, j)
            children = [Body(jaxpr, body, eqn, role, body.trips * trips) for jaxpr, role, trips in bodies_of(eqn)]
            if children:
                self.bodies_of[id(eqn)] = children
                self._link(eqn, Links.of(eqn, children))
                for child in children:
                    self._add(child)

    def _link(self, eqn: Any, links: Links) -> None:
        """Record the boundary of an equation in both directions."""
        for i, b, k, delta in links.enters:
            self._inputs.setdefault((id(eqn), i), []).append((b.jaxpr.invars[k], delta))
            self._sources.setdefault(b.jaxpr.invars[k], []).append((eqn.invars[i], eqn, i, -delta))
        for b, p, c, k in links.again:
            self._exits.setdefault((id(b), p), []).append((c.jaxpr.invars[k], 0))
            self._sources.setdefault(c.jaxpr.invars[k], []).append((b.jaxpr.outvars[p], None, -1, 0))
        for b, p, j, delta in links.leaves:
            self._exits.setdefault((id(b), p), []).append((eqn.outvars[j], -delta))
            self._sources.setdefault(eqn.outvars[j], []).append((b.jaxpr.outvars[p], None, -1, delta))
        for i, j in links.skips:
            self._skips.setdefault((id(eqn), i), []).append(eqn.outvars[j])
            self._sources.setdefault(eqn.outvars[j], []).append((eqn.invars[i], eqn, i, 0))

    @property
    def main(self) -> Body:
        return self.bodies[0]

    @staticmethod
    def carried(atom: Any, axes: Axes, other: Any, delta: int) -> Axes | None:
        """The axes of `other` that `axes` of `atom` are on the other side of a body's boundary; None where one of them is what a scan
        iterates over, or is not whole on both sides because devices share it."""
        moved = tuple(a - delta for a in axes)
        if any(a < 0 for a in moved):
            return None
        here, there = shape_of(atom), shape_of(other)
        return moved if all(here[a] == there[b] for a, b in zip(axes, moved, strict=True)) else None

    def inputs(self, eqn: Any, i: int) -> list[tuple[Any, int]] | None:
        """Body variables fed by operand i of a structured equation, with delta; [] if it only steers (a cond's index), None if
        equation `eqn` has no bodies."""
        return self._inputs.get((id(eqn), i), []) if id(eqn) in self.bodies_of else None

    def passed_through(self, eqn: Any, i: int) -> list[Any]:
        """Results that equal operand i when a loop makes no trip."""
        return self._skips.get((id(eqn), i), [])

    def exits(self, body: Body, position: int) -> list[tuple[Any, int]] | None:
        """Variables that output `position` of a body becomes, with delta; None where it is a result of the program, decides about a
        loop or leaves a custom derivative rule's function."""
        return None if body.role in ("main", "while_cond", "custom") else self._exits.get((id(body), position), [])

    def sources(self, var: Any) -> list[tuple[Any, Any, int, int]] | None:
        """Every atom whose value `var` can hold, for a body's argument or a structured equation's result, as
        (atom, equation and operand index it is taken from or None, -1, delta). None for any other variable."""
        return self._sources.get(var)
