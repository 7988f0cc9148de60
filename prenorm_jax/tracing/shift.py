"""May a value be shifted unseen?  Inv(v, A): adding any c (x) 1_A to v changes no result of the program.

The uses of v are followed forward. While a derived value is a polynomial of v and its row moments (`polynomials`), its
dependence on the shift is computed, and vanishes behind a LayerNorm of either form. A value that is itself v plus a row shift
(an add of another stream, a reshape, a product with a kernel, a loop's carry, ...) is cut there: Inv(v) then needs Inv of that
value. Whatever else still depends on the shift refuses: an unknown primitive, a contraction over A, a result of the program.

So Inv is the largest set of (value, axes) in which every member's needs are members. The largest is right for loops: a shift at
one iteration's carry is unseen if it is unseen at the next, and there are finitely many iterations.
Shifts compose: each proof holds whatever the values upstream are, so shifts made at several places are undone one by one, the
most downstream first.
"""

from __future__ import annotations

from typing import Any

from prenorm_jax.tracing.dependence import Exploration, Explorer, Node
from prenorm_jax.tracing.flow import Flow
from prenorm_jax.tracing.jaxprs import Axes
from prenorm_jax.tracing.rules import ConstantAlong


class Shifts:
    """Inv for all values of a program, computed on demand."""

    def __init__(self, flow: Flow, facts: ConstantAlong | None = None):
        self.flow = flow
        self.facts = facts or ConstantAlong(flow)
        self._explored: dict[Node, Exploration] = {}
        self._cut: dict[Node, int] = {}  # of what was explored again
        self._known: dict[Node, bool] = {}
        self._blamed: dict[Node, Node] = {}

    def explore(self, var: Any, axes: Axes, cut: int = 2) -> Exploration:
        """Follow one value; `cut=1` goes on through other shapes, `cut=0` through adds of other values as well."""
        return Explorer(self.flow, self.facts, var, axes, cut).run()

    def may_shift(self, var: Any, axes: Axes) -> bool:
        """Inv(var, axes)."""
        node = (var, tuple(axes))
        if node not in self._known:
            self._solve(node)
        return self._known[node]

    def why_not(self, var: Any, axes: Axes) -> str:
        """For a value that may not be shifted: the use that sees its mean."""
        node, seen = (var, tuple(axes)), set()
        while node in self._blamed and node not in seen:
            seen.add(node)
            node = self._blamed[node]
        found = self._explored.get(node, Exploration())
        return found.failure or "a value derived from it may not be shifted"

    def _solve(self, root: Node) -> None:
        users: dict[Node, set[Node]] = {}
        open_nodes, reached = [root], {root}
        dead: list[Node] = []
        while open_nodes or dead:
            while open_nodes:
                node = open_nodes.pop()
                if self._expand(node, users, open_nodes, reached):
                    continue
                dead.append(node)
            while dead and not open_nodes:
                node = dead.pop()
                if node in self._known:
                    continue
                if self._retry(node):
                    open_nodes.append(node)
                    continue
                self._known[node] = False
                for user in users.get(node, ()):
                    if user not in self._known and node in self._explored[user].needs:
                        self._blamed[user] = node
                        dead.append(user)
        for node in reached:
            self._known.setdefault(node, True)

    def _expand(self, node: Node, users: dict, open_nodes: list, reached: set) -> bool:
        """Add a node's needs to the graph; False if it already fails."""
        if node not in self._explored:
            self._explored[node] = self.explore(*node)
        found = self._explored[node]
        if found.failure:
            return False
        fine = True
        for need in found.needs:
            users.setdefault(need, set()).add(node)
            if self._known.get(need) is False:
                self._blamed[node] = need
                fine = False
            elif need not in reached and need not in self._known:
                reached.add(need)
                open_nodes.append(need)
        return fine

    def _retry(self, node: Node) -> bool:
        """Follow a value again, with fewer cuts."""
        while self._explored[node].cuts and self._cut.get(node, 2):
            self._cut[node] = self._cut.get(node, 2) - 1
            again = self.explore(*node, cut=self._cut[node])
            if not again.failure:
                self._explored[node] = again
                self._blamed.pop(node, None)
                return True
        return False
