"""The check behind the proof: original and converted program, in float64, on the given inputs.

It is run for the given parameters and for random ones with a mean of their own along every axis: zero-initialized writers and
unit scales hide mistakes that trained parameters show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from prenorm_jax.tracing.decision import ConversionError
from prenorm_jax.tracing.float64 import evaluate64
from prenorm_jax.tracing.jaxprs import Program

TOLERANCE = 1e-6
"""Largest relative difference that passes. Exact conversions measure 1e-12 or less; a mean taken with a rounded float32 1/d leaves
up to 1e-7; a wrong conversion, 1e-3 and more."""

SMALLEST = 1e-4
"""Outputs smaller than this, or than this part of the largest output, are held against it instead: the mean of a normalized value is
zero but for rounding, and rounding is not reproduced."""

MOST_COMPILED = 1500
"""Programs of up to so many equations are compiled for the check; larger ones, mostly one layer many times, are run one by one."""

MOST_AT_ONCE = 1 << 20
"""Parameters of up to so many entries are converted within the compiled check; more are one leaf at a time, so that they are held once."""

Leaves = list[Any]


def difference(
    before: Program, after: Program, arrays: Leaves, n_params: int, prepare: Callable[[Leaves], Leaves], seed: int = 0
) -> tuple[float, int]:
    """(largest relative difference of the two programs' outputs, which output), over both sets of parameters.

    Args:
      before, after: the programs; `after` is run on `prepare(arrays)`.
      arrays: arguments, parameters first.
      n_params: how many of them are parameters.
      prepare: the conversion of the parameters, on float64 arrays.
      seed: of the random parameters.
    """
    worst = (0.0, 0)

    def run_before(wide: Leaves) -> Leaves:
        return evaluate64(before, wide)

    def run_after(wide: Leaves) -> Leaves:
        return evaluate64(after, wide)

    def widened(randomized: bool) -> Leaves:
        rng = np.random.default_rng(seed)
        return [_wide(a, rng if randomized and k < n_params else None) for k, a in enumerate(arrays)]

    prepare_alone = prepare
    if len(before.jaxpr.eqns) <= MOST_COMPILED:
        if sum(map(np.size, arrays[:n_params])) <= MOST_AT_ONCE:
            run_after, prepare_alone = (lambda wide: evaluate64(after, prepare(wide))), (lambda wide: wide)
        run_before, run_after = jax.jit(run_before), jax.jit(run_after)
    with jax.enable_x64(True):
        for randomized in (False, True):
            # Made anew for each of the two, and named by nobody, so that one set of parameters is held at a time.
            expected = run_before(widened(randomized))
            found = run_after(prepare_alone(widened(randomized)))
            if not randomized and not _tells(expected):
                raise ConversionError(
                    "no output is finite for these inputs and parameters, so there is nothing to verify; verify=False skips it"
                )
            floor = SMALLEST * max([1.0, *map(_largest, expected)])
            for k, (a, b) in enumerate(zip(expected, found, strict=True)):
                worst = max(worst, (_distance(a, b, floor), k))
    return worst


def _wide(array: Any, rng: np.random.Generator | None) -> Any:
    if not jax.dtypes.issubdtype(jax.numpy.result_type(array), np.floating):
        return array
    wide = np.asarray(array).astype(np.float64)
    if rng is None:
        return jax.numpy.asarray(wide)
    finite = np.isfinite(wide)  # what is not, in a mask, stays
    scale = float(np.sqrt(np.mean(wide[finite] ** 2))) if finite.any() else 0.0
    moved = wide + (scale or 0.05) * (0.4 * rng.standard_normal(wide.shape) + 0.2)
    return jax.numpy.asarray(np.where(finite, moved, wide))


def _tells(outputs: Leaves) -> bool:
    """Whether there is anything to compare."""
    floats = [a for a in outputs if jax.numpy.issubdtype(a.dtype, np.inexact) and a.size]
    return not floats or any(bool(np.isfinite(np.asarray(a)).any()) for a in floats)


def _largest(output: Any) -> float:
    if not jax.numpy.issubdtype(output.dtype, np.inexact):
        return 0.0
    array = np.asarray(output)
    return float(np.max(np.abs(array[np.isfinite(array)]), initial=0.0))


def _distance(expected: Any, found: Any, floor: float) -> float:
    if jax.dtypes.issubdtype(expected.dtype, jax.dtypes.extended) or not expected.size:
        return 0.0
    a, b = np.asarray(expected), np.asarray(found)
    if not np.issubdtype(a.dtype, np.inexact):
        return float(np.mean(a != b))
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return float("inf")
    return float(np.max(np.abs(a[finite] - b[finite]), initial=0.0)) / max(_largest(expected), floor)
