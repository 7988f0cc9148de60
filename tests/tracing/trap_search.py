"""The long search for a counterexample: JSON, and its line in docs/tracing.md.

    PYTHONPATH=. JAX_PLATFORMS=cpu python tests/tracing/trap_search.py --programs 2000 --out results/tracing/traps.json

Every program is converted, and then original and converted program are held against each other in float64: their results on given and on
random parameters, and the gradients with respect to all parameters and float inputs. Three controls prove that this can fail: the converted
program on parameters that were not recentered, and analyses that lie (every shift allowed; every value zero-mean). The exit status is 1 if
any program differs.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import pathlib
import re
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import trap_programs as programs
from hypothesis import HealthCheck, Phase, given, seed, settings

from prenorm_jax.tracing import verify
from prenorm_jax.tracing.decision import decide
from prenorm_jax.tracing.report import report_of
from prenorm_jax.tracing.shift import Shifts
from prenorm_jax.tracing.signature import Arguments, trace_program
from prenorm_jax.tracing.zero_mean import ZeroMean

TOLERANCE = 1e-10
"""Of results, in float64, by verification's measure; gradients, which are not as well conditioned, get a hundred times as much."""

NOT_DIFFERENTIABLE = {"function applied in place"}
"""Parts that JAX has no derivative of: such programs are held against themselves without."""

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "tracing.md"
START, END = "<!-- trap search: made by tests/tracing/trap_search.py -->", "<!-- end of trap search -->"
REASONS = ("the mean of its input is wanted", "it does not pay", "it is inside", "its input is not zero-mean")


@dataclasses.dataclass
class Finding:
    """One program, converted and held against itself."""

    report: object
    error: float
    gradient_error: float
    control: float | None  # on parameters that were not recentered; None if no leaf was
    changed: bool  # whether the two programs differ in any equation

    @property
    def differs(self):
        return not (self.error <= TOLERANCE and self.gradient_error <= 100 * TOLERANCE)


def examine(program, activations, fold, gradients=True, control=True):
    """Convert one program, and measure how far the result is from it. Where all equations and all leaves stay, there is nothing to run."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"), mock.patch.object(verify, "MOST_COMPILED", 0):
        params, rest = programs.parameters(), programs.inputs()
        arguments = Arguments.of(params, rest)
        before = trace_program(programs.build(program), arguments).program
        floats = range(arguments.n_params)
        decision, plan, after = decide(before, arguments.paths, floats, activations, fold)
        arrays, n = arguments.arrays, arguments.n_params
        report = report_of(plan, after, decision)
        if not decision.leaves and str(before.jaxpr) == str(after.jaxpr):
            return Finding(report, 0.0, 0.0, None, changed=False)
        error = verify.difference(before, after, arrays, n, decision.prepared)[0]
        gradients = gradients and NOT_DIFFERENTIABLE.isdisjoint(programs.parts(program))
        gradient = gradient_difference(before, after, decision, arrays) if gradients else 0.0
        looked = control and decision.leaves
        seen = verify.difference(before, after, arrays, n, list)[0] if looked else None
        return Finding(report, error, gradient, seen, changed=True)


def gradient_difference(before, after, decision, arrays):
    """The largest difference of the two programs' gradients, of each leaf's largest entry (or of one)."""
    floats = [k for k, a in enumerate(arrays) if jnp.issubdtype(a.dtype, jnp.floating)]

    def loss(run, values):
        given = list(arrays)
        for k, value in zip(floats, values, strict=True):
            given[k] = value
        return sum(jnp.sum(jnp.sin(y)) for y in run(given))

    values = [arrays[k] for k in floats]
    wanted = jax.grad(lambda v: loss(lambda a: before(*a), v))(values)
    found = jax.grad(lambda v: loss(lambda a: after(*decision.prepared(a)), v))(values)
    gaps = [np.max(np.abs(a - b)) / max(1.0, np.max(np.abs(a))) for a, b in zip(wanted, found, strict=True)]
    return float(np.max(gaps))  # not a number where a gradient is none


@contextlib.contextmanager
def every_shift_is_believed():
    with mock.patch.object(Shifts, "may_shift", return_value=True):
        yield


@contextlib.contextmanager
def every_zero_mean_is_believed():
    honest = ZeroMean.needs
    with (
        mock.patch.object(ZeroMean, "prove", return_value=lambda need: True),
        mock.patch.object(ZeroMean, "needs", lambda self, need: honest(self, need) or []),
    ):
        yield


LIES = {
    "every shift believed": (every_shift_is_believed, "always"),
    "every zero mean believed": (every_zero_mean_is_believed, "never"),
}


def caught(lie, program):
    """Whether verification catches an analysis that lies about a program; None if it decides as an honest one does."""
    lying, activations = LIES[lie]
    honest = examine(program, activations, False, gradients=False, control=False)
    with lying():
        finding = examine(program, activations, False, gradients=False, control=False)
    same = done(finding.report) == done(honest.report)
    return None if same else not finding.error <= TOLERANCE


def done(report):
    """What was done to a program."""
    return [s.converted for s in report.sites], report.leaves, report.activations, report.absorbed


class Search:
    """Counts of what was tried and found."""

    def __init__(self):
        self.tried, self.mismatches = {}, []
        self.sites, self.reasons, self.traps = collections.Counter(), collections.Counter(), collections.Counter()
        self.controls = {name: collections.Counter() for name in ("parameters as they were", *LIES)}
        self.changed = self.differentiated = 0
        self.worst = self.worst_gradient = 0.0
        self.started = time.perf_counter()

    def look(self, program, activations, fold, control=True, lies=False):
        key = (program, activations, fold)
        if key in self.tried:
            return
        finding = examine(program, activations, fold, control=control)
        report = finding.report
        self.tried[key] = report.converted
        self.changed += finding.changed
        self.differentiated += finding.changed and NOT_DIFFERENTIABLE.isdisjoint(programs.parts(program))
        self.sites.update(found=len(report.sites), converted=report.converted, programs=bool(report.converted))
        self.reasons.update(reason_of(s.reason) for s in report.sites if not s.converted)
        self.traps.update(programs.traps(program))
        if finding.differs:
            found = {"program": repr(key), "difference": finding.error, "gradients": finding.gradient_error}
            self.mismatches.append(found)
            print("MISMATCH", found, flush=True)
        self.worst = max(self.worst, finding.error)
        self.worst_gradient = max(self.worst_gradient, finding.gradient_error)
        if finding.control is not None:
            self.controls["parameters as they were"].update(tried=1, caught=int(not finding.control <= TOLERANCE))
        if lies:
            for name in LIES:
                if (seen := caught(name, program)) is not None:
                    self.controls[name].update(tried=1, caught=int(seen))
        if len(self.tried) % 100 == 0:
            print(f"{len(self.tried)} programs, {time.perf_counter() - self.started:.0f} s", flush=True)

    def summary(self):
        return {
            "command": "python tests/tracing/trap_search.py",
            "jax": jax.__version__,
            "programs": len(self.tried),
            "programs_changed": self.changed,
            "programs_with_gradients": self.differentiated,
            "programs_converted": self.sites["programs"],
            "sites": self.sites["found"],
            "sites_converted": self.sites["converted"],
            "sites_refused": dict(self.reasons.most_common()),
            "traps": dict(sorted(self.traps.items())),
            "tolerance": {"results": TOLERANCE, "gradients": 100 * TOLERANCE},
            "largest_difference": {"results": self.worst, "gradients": self.worst_gradient},
            "mismatches": self.mismatches,
            "controls": {name: {k: count[k] for k in ("tried", "caught")} for name, count in self.controls.items()},
            "seconds": round(time.perf_counter() - self.started),
        }


def reason_of(text):
    """The kind of a reason."""
    return next((reason for reason in REASONS if text.startswith(reason)), text)


def search(n, control_every=4, lies_every=10):
    """Look at n different programs; the same ones each time."""
    found, batch = Search(), 0
    while len(found.tried) < n:
        look_at(found, n, batch, control_every, lies_every)
        batch += 1
    return found.summary()


def look_at(found, n, batch, control_every, lies_every):
    """One batch of programs, of which some may be known already."""

    @seed(batch)
    @settings(max_examples=min(n, 500), deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(programs.programs, programs.policies, programs.folds)
    def look(program, activations, fold):
        k = len(found.tried)
        if k < n:
            found.look(program, activations, fold, control=k % control_every == 0, lies=k % lies_every == 0)

    look()


def line(summary):
    """The sentence of the docs."""
    refused = ", ".join(f"{count} because {reason}" for reason, count in summary["sites_refused"].items())
    controls = "; ".join(f"{name}: {c['caught']} of {c['tried']}" for name, c in summary["controls"].items())
    worst = summary["largest_difference"]
    return (
        f"Last run: {summary['programs']} programs, {len(summary['mismatches'])} mismatches. {summary['programs_changed']} programs were "
        f"changed, and {summary['programs_with_gradients']} of these have gradients; {summary['sites_converted']} of {summary['sites']} "
        f"mean subtractions were converted, and of the others {refused}. Largest difference in float64: {worst['results']:.0e}, "
        f"of gradients {worst['gradients']:.0e}. Controls caught: {controls}. ({summary['seconds']} s, jax {summary['jax']}; "
        "`results/tracing/traps.json`.)"
    )


def write(summary, path=DOCS):
    """Put the sentence into the docs."""
    text = re.sub(f"{START}.*?{END}", lambda _: f"{START}\n{line(summary)}\n{END}", path.read_text(), flags=re.S)
    path.write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=2000)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/tracing/traps.json"))
    parser.add_argument(
        "--docs-only", action="store_true", help="write the line in the docs from the JSON that is there"
    )
    options = parser.parse_args()
    if not options.docs_only:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(search(options.programs), indent=2) + "\n")
    result = json.loads(options.out.read_text())
    write(result)
    print(line(result))
    raise SystemExit(bool(result["mismatches"]))
