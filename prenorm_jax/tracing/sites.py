"""Where a program subtracts a mean: its LayerNorms, whatever they are called and however they are written.

A site is a value x and axes A such that sum_A(x) is taken and then cancels x's mean somewhere, as in x - mean(x) or in
x * r - mean(x) * r: found by following x as a polynomial (`shift`), so both variance forms, `rsqrt` or `sqrt` and divide, scaled
sums and converted copies are one and the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from prenorm_jax.tracing.algebra import CONVERSIONS
from prenorm_jax.tracing.flow import Body, Flow
from prenorm_jax.tracing.jaxprs import (
    Axes,
    is_float,
    is_var,
    name_of,
    scalar_value,
    shape_of,
)
from prenorm_jax.tracing.rules import regroup
from prenorm_jax.tracing.shift import Node, Shifts


@dataclasses.dataclass(eq=False)
class Site:
    """One mean subtraction: x over `axes`, the equations that sum x, the values that equal x - mean(x) up to a number, and all values
    in which x's mean has cancelled (or a mean over several devices was subtracted)."""

    x: Any
    axes: Axes
    sums: list[Any]
    centered: list[Node]
    cancelled: list[Any]
    body: Body

    @property
    def width(self) -> int:
        size = 1
        for a in self.axes:
            size *= shape_of(self.x)[a]
        return size

    @property
    def removes(self) -> int:
        """Reductions that converting it removes, each as often as it runs."""
        return len(self.sums) * self.body.trips


def find_sites(flow: Flow, shifts: Shifts) -> list[Site]:
    """All mean subtractions of a program, in its order."""
    sites: dict[Node, Site] = {}
    for body in flow.bodies:
        for eqn in body.jaxpr.eqns:
            if name_of(eqn) != "reduce_sum" or not is_var(eqn.invars[0]) or not is_float(eqn.outvars[0]):
                continue
            x, axes = _unscaled(flow, eqn.invars[0], tuple(int(a) for a in eqn.params["axes"]))
            if (x, axes) in sites:
                continue
            site = _site(shifts, x, axes, body)
            if site is None or not shifts.may_shift(x, axes):
                source = _unshaped(flow, x, axes)
                if source != (x, axes) and shifts.may_shift(*source):
                    site = _site(shifts, *source, body, cut=1) or site
            if site is not None:
                sites[site.x, site.axes] = site
    return sorted(sites.values(), key=lambda s: flow.order[id(s.sums[0])])


def _site(shifts: Shifts, x: Any, axes: Axes, body: Body, cut: int = 2) -> Site | None:
    """The mean subtraction from x, if there is one."""
    if not axes or not is_float(x) or len(shape_of(x)) <= max(axes):
        return None
    found = shifts.explore(x, axes, cut)
    cancelled = found.cancelled or found.across
    return Site(x, axes, found.sums, found.centered, cancelled, body) if found.sums and cancelled else None


def _unshaped(flow: Flow, var: Any, axes: Axes) -> Node:
    """The value that `var` is a copy of in another shape, and where it has `axes`: statistics may be taken of a reshaped copy."""
    while var in flow.definer and name_of(flow.definer[var][0]) in ("reshape", "broadcast_in_dim", "squeeze"):
        source = flow.definer[var][0].invars[0]
        moved = regroup(shape_of(var), shape_of(source), axes) if is_var(source) else None
        if not moved:
            break
        var, axes = _unscaled(flow, source, moved)
    return var, axes


def _unscaled(flow: Flow, var: Any, axes: Axes) -> tuple[Any, Axes]:
    """The value that `var` is a converted, transposed or constantly scaled copy of, and where it has `axes`."""
    while var in flow.definer:
        eqn, _ = flow.definer[var]
        name, args = name_of(eqn), eqn.invars
        if (name in CONVERSIONS and is_float(args[0]) and is_var(args[0])) or (
            name in ("mul", "div") and scalar_value(args[1]) is not None and is_var(args[0])
        ):
            var = args[0]
        elif name == "mul" and scalar_value(args[0]) is not None and is_var(args[1]):
            var = args[1]
        elif name == "transpose" and is_var(args[0]):
            var, axes = args[0], tuple(sorted(eqn.params["permutation"][a] for a in axes))
        else:
            break
    return var, axes
