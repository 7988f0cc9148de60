"""What a conversion did, site by site."""

from __future__ import annotations

import dataclasses
from typing import Any

from prenorm_jax.tracing.decision import Decision
from prenorm_jax.tracing.flow import Flow
from prenorm_jax.tracing.jaxprs import (
    Program,
    is_var,
    name_of,
    shape_of,
    where,
)
from prenorm_jax.tracing.labels import labels_of
from prenorm_jax.tracing.leaf_views import Views
from prenorm_jax.tracing.plan import Plan
from prenorm_jax.tracing.rules import has_rule

NO_SITES = (
    "no LayerNorm was seen: what is looked for is x less 1/n of its sum over n features (jnp.mean, not one with a mask or weights, or "
    "jnp.nanmean)"
)


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One LayerNorm of the program (or a norm over other axes). Norms that share their mean, as in some parallel blocks, have one each.

    Attributes:
      where: the paths of its scale and bias, and the line of the caller's code, as far as they are known.
      converted: whether its mean is gone.
      reason: why, or why not.
      width: number of entries that its mean is taken over.
      axes: the axes it is taken over.
      trips: how often it runs in one call (a scan's length); 1 for unknown.
    """

    where: str
    converted: bool
    reason: str
    width: int
    axes: tuple[int, ...]
    trips: int = 1


@dataclasses.dataclass(frozen=True)
class Report:
    """What `convert` found and did; `print(report)` is a table.

    Attributes:
      sites: one entry a LayerNorm.
      leaves: (path, axis) of every leaf that was recentered; negative axes.
      activations: where activations are recentered as the program runs.
      reductions_before, reductions_after: sums over the axes of a site's width, each as often as it runs.
      absorbed: paths of the vectors (LayerScale) that were moved into the writers before these were recentered.
      folded: paths of the scales and biases that were folded into their readers.
      unknown: primitives without a rule that a decision met.
      error: largest relative difference in float64 that verification saw; None if it did not run.
    """

    sites: tuple[SiteReport, ...]
    leaves: tuple[tuple[str, tuple[int, ...]], ...]
    activations: tuple[str, ...]
    reductions_before: int
    reductions_after: int
    absorbed: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    error: float | None = None

    @property
    def converted(self) -> int:
        """Number of sites converted."""
        return sum(s.converted for s in self.sites)

    def __str__(self) -> str:
        rows = [
            ("converted" if s.converted else "kept", str(s.width), f"{s.trips}x", s.where, s.reason) for s in self.sites
        ]
        head = ("", "width", "runs", "where", "reason")
        widths = [max(len(r[k]) for r in [head, *rows]) for k in range(4)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(r[:4], widths, strict=True)), r[4]]).rstrip() for r in [head, *rows]
        ]
        if not self.sites:
            lines.append(NO_SITES)
        lines.append(f"{self.converted} of {len(self.sites)} LayerNorms converted")
        lines.append(f"feature reductions     {self.reductions_before} -> {self.reductions_after}")
        for path, axes in self.leaves:
            lines.append(f"recentered leaf        {path} along {axes[0] if len(axes) == 1 else axes}")
        lines += [f"recentered activation  {a}" for a in self.activations]
        lines += [f"moved into its writers {path}" for path in self.absorbed]
        lines += [f"folded                 {path}" for path in self.folded]
        lines += [f"no rule for            {name}" for name in self.unknown]
        if self.error is not None:
            lines.append(f"verified in float64: largest relative difference {self.error:.1e}")
        return "\n".join(lines)


def report_of(plan: Plan, program: Program, decision: Decision) -> Report:
    """The report of a plan that was carried out; `program` is the result."""
    invars, paths = plan.flow.main.jaxpr.invars, decision.paths
    widths = {site.width for site in plan.sites}
    views = Views(plan.flow, plan.shifts.facts)
    sites = tuple(
        SiteReport(
            label.text(paths),
            plan.converted[site],
            plan.reasons.get(site, "its input has zero mean"),
            site.width,
            site.axes,
            site.body.trips,
        )
        for site in plan.sites
        for label in labels_of(views, site)
    )
    return Report(
        sites,
        tuple((paths[k], tuple(a - len(shape_of(invars[k])) for a in axes)) for k, axes in decision.leaves),
        tuple(_activation(plan, made) for made in plan.made if made.trips),
        _feature_sums(plan.flow, widths),
        _feature_sums(Flow(program), widths),
        absorbed=tuple(paths[a.scale] for a in decision.absorbed),
        folded=tuple(paths[k] for f in decision.folds for k in (f.scale, f.bias) if k >= 0),
        unknown=_unknown(plan),
    )


def _feature_sums(flow: Flow, widths: set[int]) -> int:
    """Sums over a site's width, each as often as it runs."""
    total = 0
    for body in flow.bodies:
        for eqn in body.jaxpr.eqns:
            if name_of(eqn) == "reduce_sum":
                shape = shape_of(eqn.invars[0])
                size = 1
                for a in eqn.params["axes"]:
                    size *= shape[a]
                total += body.trips * (size in widths)
    return total


def _activation(plan: Plan, made: Any) -> str:
    var = made.atom
    if made.use is not None:
        eqn, i = plan.zero_mean.eqns[made.use[0]], made.use[1]
        return f"operand {i} of {name_of(eqn)} at {where(eqn)}"
    if is_var(var) and var in plan.flow.definer:
        eqn, _ = plan.flow.definer[var]
        return f"result of {name_of(eqn)} at {where(eqn)}"
    return "an input of the program or of a loop's body"


def _unknown(plan: Plan) -> tuple[str, ...]:
    """Primitives without a rule that stood in the way of a site."""
    text = " ".join(plan.reasons.values())
    names = {name_of(e) for e in plan.zero_mean.eqns.values() if not has_rule(name_of(e))}
    return tuple(sorted(n for n in names if f" {n} has no rule" in f" {text}" or f" {n}, which has no rule" in text))
