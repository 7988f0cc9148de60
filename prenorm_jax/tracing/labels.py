"""What to call a LayerNorm in a report: the parameters it multiplies and adds, and the line of the caller's code that it stands in.

Names are for reading only, so the walk is generous where `norms` is strict: a parameter that is cast, stacked, shared or used as
1 + scale is named all the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from prenorm_jax.tracing.jaxprs import (
    is_var,
    line_of,
    name_of,
    names,
    where,
)
from prenorm_jax.tracing.leaf_views import Views
from prenorm_jax.tracing.rules import rule_for
from prenorm_jax.tracing.sites import Site

_THROUGH = names(
    "convert_element_type reshape transpose squeeze broadcast_in_dim copy copy_p name sharding_constraint slice dynamic_slice gather "
    "neg reduce_precision optimization_barrier pvary"
)
_MOST_STEPS = 200


@dataclasses.dataclass(frozen=True)
class Label:
    """One LayerNorm of a site: positions of its parameters among the arguments, scale first, and where it stands."""

    leaves: tuple[int, ...]
    line: str

    def text(self, paths: Sequence[str]) -> str:
        """For example "blocks/0/norm/{scale, bias} at model.py:12 (block)"."""
        own = [paths[k] for k in self.leaves if k < len(paths)]
        parents = {path.rpartition("/")[0] for path in own}
        if len(own) > 1 and len(parents) == 1 and parents != {""}:
            own = [f"{parents.pop()}/{{{', '.join(path.rpartition('/')[2] for path in own)}}}"]
        return " at ".join(s for s in (", ".join(own), self.line) if s)


def labels_of(views: Views, site: Site) -> list[Label]:
    """One label for each norm that shares this site's mean: as many as there are scales (one, if there is none)."""
    scales: dict[int, list[int]] = {}
    lines: dict[int, str] = {}
    first = views.flow.definer[site.cancelled[0]][0]
    stack: list[tuple[Any, int, int]] = [(var, axes[0], -1) for var, axes in site.centered if len(axes) == 1]
    seen: set[Any] = set()
    for _ in range(_MOST_STEPS):
        if not stack:
            break
        var, axis, scale = stack.pop()
        if (var, scale) in seen:
            continue
        seen.add((var, scale))
        for eqn, i in views.flow.uses.get(var, ()):
            name = name_of(eqn)
            if name in ("mul", "div", "add"):
                other = eqn.invars[1 - i]
                if name != "add" and views.facts.constant_along(other, (axis,)):
                    stack.append((eqn.outvars[0], axis, scale))
                    continue
                leaf = _leaf(views, other, axis)
                if leaf is None or (name == "add" and scale == -1 and scales):
                    continue
                if name == "mul" and scale == -1:
                    scales.setdefault(leaf, [leaf])
                    lines.setdefault(leaf, line_of(eqn))
                    stack.append((eqn.outvars[0], axis, leaf))
                elif name == "add":
                    own = scales.setdefault(leaf if scale == -1 else scale, [leaf])
                    own += [leaf] if leaf not in own else []
            elif name in _THROUGH:
                moved = rule_for(name).shift(eqn, i, (axis,), views.facts) or {}
                stack += [(eqn.outvars[j], axes[0], scale) for j, axes in moved.items() if len(axes) == 1]
            elif (inside := views.flow.inputs(eqn, i)) is not None and views.flow.bodies_of[id(eqn)][
                0
            ].role == "region":
                stack += [(v, axis, scale) for v, _ in inside]
    if not scales:
        return [Label((), where(first))]
    return [Label(tuple(own), lines.get(k, line_of(first))) for k, own in scales.items()]


def _leaf(views: Views, atom: Any, axis: int) -> int | None:
    """The one parameter that an operand's variation along `axis` comes from, if it is one."""
    stack: list[tuple[Any, int]] = [(atom, axis)]
    found: set[int] = set()
    seen: set[Any] = set()
    while stack and len(seen) < _MOST_STEPS:
        var, axis = stack.pop()
        if not is_var(var) or var in seen or views.facts.constant_along(var, (axis,)):
            continue
        seen.add(var)
        if var in views.positions:
            found.add(views.positions[var])
        elif var not in views.flow.definer or views.flow.definer[var][0] is None:
            stack += [(a, axis - delta) for a, _, _, delta in views.flow.sources(var) or ()]
        else:
            eqn, j = views.flow.definer[var]
            inner = views.flow.sources(var)
            if inner is not None:
                stack += [(a, axis - delta) for a, _, _, delta in inner]
            elif name_of(eqn) in ("add", "sub", "mul", "div"):
                stack += [(a, axis) for a in eqn.invars]
            elif name_of(eqn) in _THROUGH:
                needs = rule_for(name_of(eqn)).zero(eqn, j, (axis,), views.facts) or []
                stack += [(eqn.invars[i], axes[0]) for i, axes in needs if len(axes) == 1]
            else:
                return None
    return found.pop() if len(found) == 1 else None
