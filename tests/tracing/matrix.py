"""Every architecture in every library, converted: one cell each, the table in docs/tracing.md and its JSON.

    PYTHONPATH=. JAX_PLATFORMS=cpu python tests/tracing/matrix.py

A cell is measured in float64, whatever the model's width: original against converted program on given and on random parameters (that is
`convert`'s own verification), then gradients with respect to all parameters, and, as the control, the converted program on parameters that
were not recentered.
"""

import argparse
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from architectures import ARCHITECTURES, D
from libraries import LIBRARIES

from prenorm_jax.tracing import convert
from prenorm_jax.tracing.float64 import evaluate64
from prenorm_jax.tracing.signature import Arguments, trace_program

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "tracing.md"
START, END = "<!-- matrix: made by tests/tracing/matrix.py -->", "<!-- end of matrix -->"


def varied(tree):
    """The same tree in float64, with entries that hide nothing: no zero biases, no unit scales, a mean along every axis."""
    rng = np.random.default_rng(0)

    def vary(a):
        floats = jnp.issubdtype(a.dtype, jnp.floating)
        return jnp.asarray(np.asarray(a, np.float64) + 0.3 * rng.standard_normal(a.shape) + 0.2) if floats else a

    return jax.tree.map(vary, tree)


def measured(library, name):
    """One cell: what was converted, at which cost, and how exactly."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        architecture = ARCHITECTURES[name]
        fn, params = LIBRARIES[library](architecture)
        params = varied(params)
        inputs = architecture.inputs() + ((jax.random.key(3),) if architecture.random else ())
        out = convert(fn, params, *inputs)
        report = out.report
        gradients, control = differences(fn, out, params, inputs)
        return {
            "norms": sum(s.trips for s in report.sites),
            "converted": sum(s.trips for s in report.sites if s.converted),
            "activations": len(report.activations),
            "reductions": [report.reductions_before, report.reductions_after],
            "in_the_jaxpr": [feature_sums(f, p, *inputs) for f, p in ((fn, params), (out.fn, out.params))],
            "difference": report.error,
            "gradients": gradients,
            "control": control,
        }


def differences(fn, out, params, inputs):
    """(of the gradients with respect to the parameters, of the results on parameters as they were), of the largest entry each."""
    before, after = (trace_program(f, Arguments.of(p, inputs)).program for f, p in ((fn, params), (out.fn, out.params)))

    def run(program, params):
        return evaluate64(program, Arguments.of(params, inputs).arrays)

    def loss(program, params):
        return sum(jnp.sum(jnp.sin(y) * jnp.linspace(0.5, 1.5, y.size).reshape(y.shape)) for y in run(program, params))

    @jax.jit
    def compared(params):
        wanted = jax.grad(lambda p: loss(before, p))(params)
        found = jax.grad(lambda p: loss(after, out.prepare(p)))(params)
        return distance(wanted, found), distance(run(before, params), run(after, params))

    return tuple(map(float, compared(params)))


def distance(wanted, found):
    gaps = [
        jnp.max(jnp.abs(a - b)) / jnp.maximum(1.0, jnp.max(jnp.abs(a)))
        for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True)
    ]
    return jnp.max(jnp.stack(gaps))


def feature_sums(fn, *args):
    """Sums over D entries in the jaxpr as it is, each as often as a scan runs it."""

    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "reduce_sum":
                total += np.prod([eqn.invars[0].aval.shape[a] for a in eqn.params["axes"]]) == D
            runs = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
                value = getattr(value, "jaxpr", value)
                total += runs * count(value) if hasattr(value, "eqns") else 0
        return int(total)

    return count(jax.make_jaxpr(fn)(*args).jaxpr)


def table(cells):
    """The table of the docs, and the largest differences below it."""
    lines = [f"| | {' | '.join(LIBRARIES)} |", "|---" * (1 + len(LIBRARIES)) + "|"]
    for name in ARCHITECTURES:
        row = [cells[library][name] for library in LIBRARIES]
        inside = [f"{c['converted']} of {c['norms']}, {c['reductions'][0]} -> {c['reductions'][1]}" for c in row]
        lines.append(f"| {name} | {' | '.join(inside)} |")
    every = [c for row in cells.values() for c in row.values()]
    worst = {key: max(c[key] for c in every) for key in ("difference", "gradients")}
    control = min(c["control"] for c in every if c["control"] > 0)
    return "\n".join(lines) + (
        f"\n\nLargest difference in float64: {worst['difference']:.0e} in results, {worst['gradients']:.0e} in gradients. With parameters "
        f"that were not recentered the smallest is {control:.0e}."
    )


def write(cells, path=DOCS):
    """Put the table into the docs."""
    path.write_text(
        re.sub(f"{START}.*?{END}", lambda _: f"{START}\n\n{table(cells)}\n\n{END}", path.read_text(), flags=re.S)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/tracing/matrix.json"))
    parser.add_argument(
        "--docs-only", action="store_true", help="write the table in the docs from the JSON that is there"
    )
    options = parser.parse_args()
    if not options.docs_only:
        jax.config.update("jax_disable_most_optimizations", True)
        found = {library: {name: measured(library, name) for name in ARCHITECTURES} for library in LIBRARIES}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        summary = {"command": "python tests/tracing/matrix.py", "jax": jax.__version__, "cells": found}
        options.out.write_text(json.dumps(summary, indent=1) + "\n")
    found = json.loads(options.out.read_text())["cells"]
    write(found)
    print(table(found))
