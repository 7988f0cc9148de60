"""Which LayerNorms to convert, and which values to recenter for it.

A site can be converted if its input may be shifted unseen and can be made zero-mean. Leaves and constants are recentered for
free. Where that is not enough, values are recentered as the program runs, each at the cost of one reduction; sites that rest on
common values form a stream, and a stream is converted only as far as it removes more reductions than it adds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from prenorm_jax.tracing.custom_rules import refusal
from prenorm_jax.tracing.flow import Flow
from prenorm_jax.tracing.jaxprs import Program, custom_name
from prenorm_jax.tracing.rules import ConstantAlong
from prenorm_jax.tracing.shift import Node, Shifts
from prenorm_jax.tracing.sites import Site, find_sites
from prenorm_jax.tracing.zero_mean import Need, Recentering, ZeroMean

POLICIES = ("pays", "always", "never")


@dataclasses.dataclass
class Plan:
    """What to do with a program: `zeros` are the equations whose result is zero once `made` is carried out."""

    flow: Flow
    shifts: Shifts
    zero_mean: ZeroMean
    sites: list[Site]
    converted: dict[Site, bool]
    reasons: dict[Site, str]
    made: list[Recentering]

    @property
    def zeros(self) -> list[Any]:
        return [eqn for site in self.sites if self.converted[site] for eqn in site.sums]

    def roots(self, sites: Iterable[Site] | None = None) -> list[Need]:
        """What has to be zero-mean for these sites (all of them)."""
        return [Need(e.invars[0], tuple(e.params["axes"])) for s in (sites or self.sites) for e in s.sums]

    @property
    def balance(self) -> tuple[int, int]:
        """(sites converted, minus the reductions added): what a better plan has more of."""
        return sum(self.converted.values()), -sum(m.trips for m in self.made)

    def leaves(self) -> list[Recentering]:
        return [m for m in self.made if m.kind == "leaf"]


def make_plan(
    program: Program,
    leaves: Iterable[int],
    given: Iterable[tuple[int, tuple[int, ...]]] = (),
    activations: str = "pays",
) -> Plan:
    """Decide about every site of a program.

    Args:
      program: in normal form.
      leaves: positions of the arguments that may be recentered.
      given: (position, axes) of arguments that have zero mean already.
      activations: recenter activations where it "pays", "always" where it is possible, or "never".
    """
    flow = Flow(program)
    shifts = Shifts(flow, ConstantAlong(flow))
    sites = find_sites(flow, shifts)
    invars = program.args
    centered = [node for site in sites for node in site.centered]
    zero_mean = ZeroMean(flow, shifts, [invars[k] for k in leaves], [(invars[k], axes) for k, axes in given], centered)
    plan = Plan(flow, shifts, zero_mean, sites, dict.fromkeys(sites, False), {}, [])
    candidates = [site for site in sites if _may(plan, site)]
    roots = {site: plan.roots([site]) for site in candidates}
    allowed = (lambda r: r.trips == 0) if activations == "never" else (lambda r: True)
    wanted: dict[Site, list[Recentering]] = {}
    for site, recenterings in zip(candidates, zero_mean.spend([roots[s] for s in candidates], allowed), strict=True):
        if recenterings is None:
            plan.reasons[site] = f"its input is not zero-mean: {zero_mean.obstacle(roots[site][0])}{_if_checked(site)}"
        else:
            wanted[site] = recenterings
    made: dict[Recentering, None] = {}
    for stream in _streams(wanted, roots, zero_mean):
        for site in _worthwhile(plan, stream, wanted, roots, activations):
            plan.converted[site] = True
            made.update(dict.fromkeys(wanted[site]))
    plan.made = list(made)
    _prove(plan, roots)
    return plan


def _may(plan: Plan, site: Site) -> bool:
    if site.body.in_custom():
        custom = site.body.custom_eqn()
        plan.reasons[site] = (
            f"it is inside {custom_name(custom)}, which has a custom derivative rule, and {refusal(custom)}"
        )
    elif not plan.shifts.may_shift(site.x, site.axes):
        plan.reasons[site] = f"the mean of its input is wanted: {plan.shifts.why_not(site.x, site.axes)}"
    else:
        return True
    return False


def _if_checked(site: Site) -> str:
    if site.body.takes_recenterings():
        return ""
    return "; shard_map(check_vma=True) lets no activation be recentered in it, check_vma=False would"


def _streams(wanted: dict, roots: dict, zero_mean: ZeroMean) -> list[list[Site]]:
    """Sites grouped by the values that their zero mean rests on."""
    group: dict[Site, Site] = {site: site for site in wanted}

    def head(site: Site) -> Site:
        while group[site] is not site:
            site = group[site]
        return site

    owner: dict[Node, Site] = {}
    for site, recenterings in wanted.items():
        nodes = {(r.atom, r.axes) for r in recenterings if r.kind != "use"}
        for node in zero_mean.closure(roots[site], lambda n: n.node in nodes):  # noqa: B023
            if node in owner:
                group[head(site)] = head(owner[node])
            owner[node] = site
    streams: dict[Site, list[Site]] = {}
    for site in wanted:
        streams.setdefault(head(site), []).append(site)
    return list(streams.values())


def _worthwhile(plan: Plan, stream: list[Site], wanted: dict, roots: dict, activations: str) -> list[Site]:
    """The sites of a stream to convert: from its start as far as the balance of reductions is best and positive."""
    best, balance, added, removed = 0, 0, {}, 0
    for k, site in enumerate(stream, start=1):
        added.update(dict.fromkeys(wanted[site]))
        removed += site.removes
        net = removed - sum(r.trips for r in added)
        if net > 0 and net >= balance:
            best, balance = k, net
    if activations == "always":
        best = len(stream)
    every = {r: None for site in stream for r in wanted[site]}
    in_all = (
        f"; for its stream of {len(stream)} in all, {_cost(every)} added and {sum(s.removes for s in stream)} removed"
    )
    for site in stream[best:]:
        cost = _cost(wanted[site])
        obstacle = plan.zero_mean.obstacle(roots[site][0])
        plan.reasons[site] = (
            f"it does not pay: recentering activations would add {cost} reduction{'s' * (cost != 1)} "
            f"and remove {site.removes} here ({obstacle}){in_all * (len(stream) > 1)}"
        )
    return stream[:best]


def _cost(made: Iterable[Recentering]) -> int:
    """Reductions that recenterings add."""
    return sum(r.trips for r in made)


def _prove(plan: Plan, roots: dict) -> None:
    """Keep only what is proven for exactly the recenterings that are made."""
    needs = {site: roots[site] for site in plan.sites if plan.converted[site]}
    proven = plan.zero_mean.prove([n for parts in needs.values() for n in parts], plan.made)
    for site, parts in needs.items():
        if not all(proven(n) for n in parts):
            plan.converted[site] = False
            plan.reasons[site] = "its input could not be proven zero-mean"
