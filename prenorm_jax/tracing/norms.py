"""What follows a mean subtraction: scaling by a row statistic, a scale, a bias, and the linear maps that read the result.

Walked forward from x - mean(x). Whatever the walk does not know is a reason to keep the norm's affine as it is.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from prenorm_jax.tracing.jaxprs import (
    is_var,
    name_of,
    names,
    scalar_value,
    shape_of,
    where,
)
from prenorm_jax.tracing.leaf_views import STRUCTURAL, Alignment, LeafView, Views, alignment
from prenorm_jax.tracing.linear_rules import product_axes
from prenorm_jax.tracing.plan import Plan
from prenorm_jax.tracing.rules import rule_for
from prenorm_jax.tracing.sites import Site

_MOVES = STRUCTURAL | {"slice", "dynamic_slice", "optimization_barrier"}


@dataclasses.dataclass(frozen=True)
class ReaderFound:
    """A leaf contracted with a norm's result; `bias` is the argument added to the product, if there is one that could take more."""

    kernel: LeafView
    bias: int | None
    bias_order: tuple[int, ...]

    def lined_up_with(self, vector: LeafView) -> Alignment | None:
        return alignment(vector, self.kernel)


@dataclasses.dataclass
class NormFound:
    """One affine of a site and its readers; `keep` says why the affine has to stay, if it has to. A mean subtraction that two norms
    share (parallel blocks) has one for each; what reads it without an affine is one of its own."""

    site: Site
    scale: LeafView | None = None
    bias: LeafView | None = None
    readers: list[ReaderFound] = dataclasses.field(default_factory=list)
    eps: float | None = None
    keep: str | None = None

    def stay(self, reason: str) -> None:
        self.keep = self.keep or reason

    @property
    def stage(self) -> str:
        """What its readers have to read."""
        return "biased" if self.bias else "scaled" if self.scale else "centered"


def norms_of(plan: Plan) -> list[NormFound]:
    """The norms of every single-axis site of a plan's program, with what follows them."""
    views = Views(plan.flow, plan.shifts.facts)
    return [norm for site in plan.sites if len(site.axes) == 1 for norm in _Walk(views, site).run()]


class _Walk:
    def __init__(self, views: Views, site: Site):
        self.views, self.flow = views, views.flow
        self.eps = _eps(self.flow, site)
        self.plain = NormFound(site, eps=self.eps)
        self.branches: dict[LeafView, NormFound] = {}
        self.stack = [(var, axes[0], "centered", self.plain) for var, axes in site.centered]
        if not self.stack:
            self.plain.stay("its mean is subtracted after scaling")

    def run(self) -> list[NormFound]:
        seen = set()
        while self.stack:
            var, axis, stage, self.found = self.stack.pop()
            if (var, axis, stage, id(self.found)) in seen:
                continue
            seen.add((var, axis, stage, id(self.found)))
            if any(out is var for out in self.flow.body_of[var].jaxpr.outvars):
                self.found.stay("its result leaves the program or a loop's body")
            for eqn, i in self.flow.uses.get(var, ()):
                self.use(eqn, i, axis, stage)
        alone = self.plain.readers or self.plain.keep or not self.branches  # what reads it without an affine
        found = [*self.branches.values(), *([self.plain] if alone else [])]
        for norm in found:
            if not norm.readers:
                norm.stay("no linear map of a parameter reads it")
        return found

    def go(self, var: Any, axis: int, stage: str, norm: NormFound | None = None) -> None:
        self.stack.append((var, axis, stage, norm or self.found))

    def use(self, eqn: Any, i: int, axis: int, stage: str) -> None:
        name = name_of(eqn)
        inside = self.flow.inputs(eqn, i)
        if inside is not None:
            self.enter(eqn, i, inside, axis, stage)
        elif stage == "centered" and name in ("square", "integer_pow"):
            return  # its variance
        elif name in ("mul", "div"):
            self.scaled(eqn, i, axis, stage)
        elif name == "add" and stage in ("centered", "scaled"):
            self.biased(eqn, i, axis, stage)
        elif name in _MOVES:
            moved = rule_for(name).shift(eqn, i, (axis,), self.views.facts)
            sizes = moved and [(j, a[0]) for j, a in moved.items() if len(a) == 1]
            if sizes and shape_of(eqn.outvars[sizes[0][0]])[sizes[0][1]] == shape_of(eqn.invars[i])[axis]:
                self.go(eqn.outvars[sizes[0][0]], sizes[0][1], stage)
            else:
                self.found.stay(f"its features are split by {name} at {where(eqn)}")
        elif name == "dot_general":
            self.read(eqn, i, axis, stage)
        else:
            self.found.stay(f"its result is used by {name} at {where(eqn)}")

    def enter(self, eqn: Any, i: int, inside: list, axis: int, stage: str) -> None:
        role = self.flow.bodies_of[id(eqn)][0].role
        if role not in ("region", "scan") or self.flow.passed_through(eqn, i) or any(d for _, d in inside):
            self.found.stay(f"its result enters {name_of(eqn)} at {where(eqn)}")
        else:
            for v, _ in inside:
                self.go(v, axis, stage)

    def scaled(self, eqn: Any, i: int, axis: int, stage: str) -> None:
        other, out = eqn.invars[1 - i], eqn.outvars[0]
        if name_of(eqn) == "mul" and stage == "centered" and other is eqn.invars[i]:
            return  # its variance
        if name_of(eqn) == "div" and i == 1:
            self.found.stay(f"it divides at {where(eqn)}")
        elif self.views.facts.constant_along(other, (axis,)):
            if stage == "biased" and scalar_value(other) != 1.0:
                self.found.stay(f"it is scaled by row behind its bias at {where(eqn)}")
            self.go(out, axis, stage)
        elif name_of(eqn) == "mul" and stage == "centered" and (view := self.by_row(other, out, axis)) is not None:
            branch = self.branches.setdefault(view, NormFound(self.plain.site, scale=view, eps=self.eps))
            self.go(out, axis, "scaled", branch)
        else:
            self.found.stay(f"it is multiplied by something that is no parameter of its own at {where(eqn)}")

    def vector(self, atom: Any, like: Any, axis: int) -> LeafView | None:
        """The vector leaf that an operand is."""
        view = self.views.view(atom, axis) if self.views.vector_axis(atom, like) == axis else None
        return view if view is not None and self.whole(view) else None

    def by_row(self, atom: Any, like: Any, axis: int) -> LeafView | None:
        """The vector leaf that an operand is, perhaps already multiplied by a row statistic."""
        view = self.vector(atom, like, axis)
        if view is None and is_var(atom) and atom in self.flow.definer and self.views.times_used(atom) == 1:
            eqn, _ = self.flow.definer[atom]
            for a, b in (eqn.invars, eqn.invars[::-1]) if name_of(eqn) == "mul" else ():
                if self.views.facts.constant_along(a, (axis,)):
                    return self.by_row(b, atom, axis)
        return view

    def whole(self, view: LeafView) -> bool:
        shape = shape_of(self.flow.main.jaxpr.invars[view.position])
        return math.prod(shape) == math.prod(shape[a] for a in view.axes().values())

    def biased(self, eqn: Any, i: int, axis: int, stage: str) -> None:
        if scalar_value(eqn.invars[1 - i]) == 0.0:
            self.go(eqn.outvars[0], axis, stage)
            return
        view = self.vector(eqn.invars[1 - i], eqn.outvars[0], axis)
        if view is None or (stage == "scaled" and self.found.bias not in (None, view)):
            self.found.stay(f"it is added to something that is no parameter of its own at {where(eqn)}")
            return
        norm = self.found
        if stage == "centered":
            norm = self.branches.setdefault(view, NormFound(self.plain.site, eps=self.eps))
        elif norm.readers:
            norm.stay("it is read both in front of and behind its affine")
        norm.bias = view
        self.go(eqn.outvars[0], axis, "biased", norm)

    def read(self, eqn: Any, i: int, axis: int, stage: str) -> None:
        if stage != self.found.stage:
            self.found.stay("it is read both in front of and behind its affine")
        (sums, batches), other = eqn.params["dimension_numbers"], 1 - i
        if len(sums[0]) != 1 or axis != sums[i][0] or batches[0]:
            self.found.stay(f"it is read over more than its features at {where(eqn)}")
            return
        kernel = eqn.invars[other]
        view = self.views.view(kernel, sums[other][0])
        if view is None:
            self.found.stay(f"it is read by what is no parameter of its own at {where(eqn)}")
            return
        bias, order = self.reader_bias(eqn, other, view) or (None, ())
        self.found.readers.append(ReaderFound(view, bias, order))

    def reader_bias(self, eqn: Any, other: int, kernel: LeafView) -> tuple[int, tuple[int, ...]] | None:
        """(argument, axes of the kernel's leaf in its order) of a bias that is added to the product and could take more."""
        batch, left, right = product_axes(eqn)
        start, free = (len(batch), left) if other == 0 else (len(batch) + len(left), right)
        axes = {}  # axis of the kernel's leaf -> axis of the value
        for k, a in enumerate(free):
            view = self.views.view(eqn.invars[other], a)
            if view is None or view.axis in axes:
                return None
            axes[view.axis] = start + k
        value = eqn.outvars[0]
        while self.views.times_used(value) == 1 and self.flow.uses.get(value):
            use, i = self.flow.uses[value][0]
            if name_of(use) == "add":
                return self.matched_bias(use, 1 - i, axes, kernel)
            if name_of(use) not in STRUCTURAL or len(use.outvars) != 1:
                return None
            moved = {}
            for leaf_axis, a in axes.items():
                found = rule_for(name_of(use)).shift(use, i, (a,), self.views.facts)
                if not found or len(found[0]) != 1:
                    return None
                moved[leaf_axis] = found[0][0]
            value, axes = use.outvars[0], moved
        return None

    def matched_bias(
        self, use: Any, i: int, axes: dict[int, int], kernel: LeafView
    ) -> tuple[int, tuple[int, ...]] | None:
        atom, rank = use.invars[i], len(shape_of(use.outvars[0]))
        if not is_var(atom) or len(shape_of(atom)) != rank:
            return None
        atom, axes = self.unwidened(atom, axes)
        order: dict[int, int] = {}  # axis of the bias's leaf -> axis of the kernel's leaf
        bias: LeafView | None = None
        for leaf_axis, a in axes.items():
            view = self.views.view(atom, a) if shape_of(atom)[a] != 1 else None
            if view is None or (bias is not None and view.position != bias.position):
                return None
            bias = view
            order[view.axis] = leaf_axis
        if bias is None:
            return None
        scans, kernel_scans = dict(bias.scans), dict(kernel.scans)
        if set(scans) != set(kernel_scans):
            return None
        order.update({scans[k]: kernel_scans[k] for k in scans})
        shape = shape_of(self.flow.main.jaxpr.invars[bias.position])
        if math.prod(shape) != math.prod(shape[a] for a in order):
            return None
        return bias.position, tuple(order[a] for a in sorted(order))

    def unwidened(self, atom: Any, axes: dict[int, int]) -> tuple[Any, dict[int, int]]:
        """What an operand is a broadcast of, and where that has these axes, if it repeats along none of them."""
        eqn, _ = self.flow.definer.get(atom, (None, 0))
        if eqn is None or name_of(eqn) != "broadcast_in_dim" or self.views.times_used(atom) != 1:
            return atom, axes
        places, shape, wide = eqn.params["broadcast_dimensions"], shape_of(eqn.invars[0]), shape_of(atom)
        inner = {k: places.index(a) for k, a in axes.items() if a in places}
        whole = len(inner) == len(axes) and all(shape[inner[k]] == wide[a] for k, a in axes.items())
        return (eqn.invars[0], inner) if whole else (atom, axes)


def _eps(flow: Any, site: Site) -> float | None:
    """The number added to the variance: the first one added behind a sum of squares, before a square root."""
    frontier, seen = [v for v, _ in site.centered] + [site.x], set()
    for _ in range(40):
        following = []
        for var in frontier:
            for eqn, _i in flow.uses.get(var, ()):
                name = name_of(eqn)
                if name == "add" and eqn.outvars[0] not in seen:
                    number = next((n for a in eqn.invars if (n := scalar_value(a)) is not None), None)
                    roots = [name_of(e) for e, _ in flow.uses.get(eqn.outvars[0], ())]
                    if number is not None and any(r in ("rsqrt", "sqrt") for r in roots):
                        return number
                if name in _TO_VARIANCE and eqn.outvars[0] not in seen:
                    seen.add(eqn.outvars[0])
                    following.append(eqn.outvars[0])
        frontier = following
    return None


_TO_VARIANCE = names(
    "square mul integer_pow reduce_sum div sub max broadcast_in_dim convert_element_type reshape squeeze select_n"
)
