"""Where every value of a program comes from and goes to, across the bodies of its loops, branches and calls."""

from __future__ import annotations

import dataclasses
from typing import Any

from prenorm_jax.tracing.jaxprs import Program, bodies_of, is_var, scan_counts


@dataclasses.dataclass(eq=False)
class Body:
    """One jaxpr of a program: the whole, or the body of an equation of `parent`."""

    jaxpr: Any
    parent: Body | None = None
    eqn: Any = None
    role: str = "main"  # main, scan, while, while_cond, cond, region, custom
    trips: int = 1

    def in_custom(self) -> bool:
        return self.role == "custom" or (self.parent is not None and self.parent.in_custom())


class Flow:
    """Where every variable of a program is defined and used, across body boundaries.

    An axis of an operand and the same axis inside the body differ by `delta` (0, or 1 for what a scan iterates over).
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
                for child in children:
                    self._add(child)

    @property
    def main(self) -> Body:
        return self.bodies[0]

    def inputs(self, eqn: Any, i: int) -> list[tuple[Any, int]] | None:
        """Body variables fed by operand i of a structured equation; [] if it only steers (a cond's index), None if
        equation `eqn` has no bodies."""
        children = self.bodies_of.get(id(eqn))
        if children is None:
            return None
        role = children[0].role
        if role == "scan":
            consts, carry = scan_counts(eqn)
            return [(children[0].jaxpr.invars[i], 0 if i < consts + carry else 1)]
        if role == "cond":
            return [] if i == 0 else [(c.jaxpr.invars[i - 1], 0) for c in children]
        if role in ("while", "while_cond"):
            cond, loop = (c.jaxpr for c in sorted(children, key=lambda c: c.role, reverse=True))
            nc, nb = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            if i < nc:
                return [(cond.invars[i], 0)]
            if i < nc + nb:
                return [(loop.invars[i - nc], 0)]
            return [(cond.invars[i - nb], 0), (loop.invars[i - nc], 0)]
        return [(children[0].jaxpr.invars[i], 0)]

    def passed_through(self, eqn: Any, i: int) -> list[Any]:
        """Results that equal operand i when a loop makes no trip."""
        children = self.bodies_of[id(eqn)]
        if children[0].role == "scan":
            consts, carry = scan_counts(eqn)
            return [eqn.outvars[i - consts]] if consts <= i < consts + carry else []
        if children[0].role in ("while", "while_cond"):
            skip = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
            return [eqn.outvars[i - skip]] if i >= skip else []
        return []

    def exits(self, body: Body, position: int) -> list[tuple[Any, int]] | None:
        """Variables that output `position` of a body becomes; None where it is a result of the program or decides
        about a loop."""
        eqn = body.eqn
        if body.role in ("main", "while_cond", "custom"):
            return None
        if body.role == "scan":
            consts, carry = scan_counts(eqn)
            if position < carry:
                return [(body.jaxpr.invars[consts + position], 0), (eqn.outvars[position], 0)]
            return [(eqn.outvars[position], -1)]
        if body.role == "while":
            cond = next(c for c in self.bodies_of[id(eqn)] if c.role == "while_cond")
            nc, nb = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            return [
                (body.jaxpr.invars[nb + position], 0),
                (cond.jaxpr.invars[nc + position], 0),
                (eqn.outvars[position], 0),
            ]
        return [(eqn.outvars[position], 0)]

    def sources(self, var: Any) -> list[tuple[Any, Any, int, int]] | None:
        """Every atom whose value `var` can hold, for a body's argument or a structured equation's result, as
        (atom, equation and operand index it is taken from or None, -1, delta). None for any other variable."""
        if var in self.definer:
            return self._result_sources(*self.definer[var])
        body = self.body_of[var]
        if body.eqn is None:
            return None
        eqn, position = body.eqn, body.jaxpr.invars.index(var)
        if body.role == "scan":
            consts, carry = scan_counts(eqn)
            found = [(eqn.invars[position], eqn, position, -1 if position >= consts + carry else 0)]
            if consts <= position < consts + carry:
                found.append((body.jaxpr.outvars[position - consts], None, -1, 0))
            return found
        if body.role == "cond":
            return [(eqn.invars[position + 1], eqn, position + 1, 0)]
        if body.role in ("while", "while_cond"):
            nc, nb = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            own = nc if body.role == "while_cond" else nb
            operand = position + nb if body.role == "while_cond" else position + nc
            if position < own:
                operand = position if body.role == "while_cond" else position + nc
                return [(eqn.invars[operand], eqn, operand, 0)]
            loop = next(c for c in self.bodies_of[id(eqn)] if c.role == "while")
            return [(eqn.invars[operand], eqn, operand, 0), (loop.jaxpr.outvars[position - own], None, -1, 0)]
        return [(eqn.invars[position], eqn, position, 0)]

    def _result_sources(self, eqn: Any, j: int) -> list[tuple[Any, Any, int, int]] | None:
        children = self.bodies_of.get(id(eqn))
        if children is None:
            return None
        role = children[0].role
        if role == "scan":
            consts, carry = scan_counts(eqn)
            inside = children[0].jaxpr.outvars[j]
            if j >= carry:
                return [(inside, None, -1, 1)]
            return [(inside, None, -1, 0), (eqn.invars[consts + j], eqn, consts + j, 0)]
        if role in ("while", "while_cond"):
            loop = next(c for c in children if c.role == "while")
            i = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"] + j
            return [(loop.jaxpr.outvars[j], None, -1, 0), (eqn.invars[i], eqn, i, 0)]
        return [(c.jaxpr.outvars[j], None, -1, 0) for c in children]
