"""How long a step takes, form against form, in one process.

Every case is compiled ahead of time and warmed up; then windows of steps are taken in turn, A B C A B C, each window chained through
its own state with one wait at the end. A ratio is taken between windows of the same round, so that what the machine does besides
meets both sides; the table gives the median over rounds, and the range. Two controls belong to every table: Pre-LN once more (the noise
floor) and no norm (the most that could be won).
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prenorm_jax import models
from prenorm_jax.measure.equivalence import EQUIVALENT, PRE_LN, Config, Form
from prenorm_jax.models import generate
from prenorm_jax.paths import Tree
from prenorm_jax.training.step import compiler_options, init_state, make_train_step
from prenorm_jax.training.tasks import Task

BASELINE = "pre_ln"
TIMED: dict[str, Form] = {
    BASELINE: PRE_LN,
    "pre_ln again": PRE_LN,
    **{form.name: form for form in EQUIVALENT},
    "no_norm": Form("no_norm"),
}
"""Row of a table -> the form that is timed there."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step, a value for each window."""

    windows: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over windows, seconds."""
        return float(np.median(self.windows))

    def against(self, baseline: "Times") -> tuple[float, float, float]:
        """Median, least and greatest ratio to the baseline's window of the same round."""
        ratios = np.array(self.windows) / np.array(baseline.windows)
        return float(np.median(ratios)), float(ratios.min()), float(ratios.max())


@dataclasses.dataclass
class Case:
    """Something to time, and how far it has come: step(carry) -> carry, which may take the carry's memory.

    Attributes:
      compiled: the program behind `step`, where there is one.
      compile_seconds: of tracing, lowering and compiling it.
    """

    step: Callable[[Any], Any]
    carry: Any
    compiled: Any = None
    compile_seconds: float = 0.0

    def run(self, steps: int) -> float:
        """Takes steps, waits for the last of them, and returns the seconds of one."""
        start = time.perf_counter()
        for _ in range(steps):
            self.carry = self.step(self.carry)
        jax.block_until_ready(self.carry)
        return (time.perf_counter() - start) / steps

    @property
    def peak_bytes(self) -> int | None:
        """The device memory that a step needs at once: what goes in, what comes out in memory of its own, and what lies between."""
        found = self.compiled.memory_analysis() if self.compiled is not None else None
        if found is None:
            return None
        outside = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        return int(outside + found.temp_size_in_bytes)


def interleaved(cases: Mapping[str, Case], *, warmup_steps: int, window_steps: int, windows: int) -> dict[str, Times]:
    """Times of each case, windows interleaved.

    Args:
      cases: by name; each goes on from where it is.
      warmup_steps: before the first window, for each case.
      window_steps, windows: steps of a window; windows of a case.
    """
    return _in_turn(cases, warmup_steps, windows, lambda case: [case.run(window_steps)])


def latencies(cases: Mapping[str, Case], *, rounds: int, calls: int) -> dict[str, Times]:
    """Seconds of single calls of each case, with a wait after each: `rounds` turns of `calls` calls in a row."""
    return _in_turn(cases, 1, rounds, lambda case: [case.run(1) for _ in range(calls)])


def _in_turn(
    cases: Mapping[str, Case], warmup_steps: int, rounds: int, timed: Callable[[Case], list[float]]
) -> dict[str, Times]:
    for case in cases.values():
        case.run(warmup_steps)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            seconds[name] += timed(case)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def training_case(
    config: Config,
    params: Tree,
    task: Task,
    tx: optax.GradientTransformation,
    batch: Mapping[str, Any],
    *,
    coordinates: str,
    accumulate: int = 1,
) -> Case:
    """The step that trains `params`, which are in the given coordinates, on one batch."""
    # A copy, since the step takes its state's memory and the next case begins from the same parameters.
    state = init_state(jax.tree.map(jnp.array, params), tx)
    batch = jax.tree.map(jnp.asarray, dict(batch))
    step = make_train_step(config, task, tx, coordinates=coordinates, accumulate=accumulate)
    program, seconds = compiled(step, state, batch)
    return Case(lambda state: program(state, batch)[0], state, program, seconds)


def inference_case(config: Config, running: Tree, inputs: Any) -> Case:
    """Logits of one batch from running parameters; the carry only makes one call wait for the one before."""
    inputs = jnp.asarray(inputs)

    def infer(carry: jax.Array, running: Tree, inputs: jax.Array) -> jax.Array:
        logits, _ = models.apply(config, running, inputs + (carry * 0).astype(inputs.dtype), only_read=True)
        # A reduction over all logits, so that the whole of them is computed.
        return logits.max().astype(jnp.float32)

    carry = jnp.zeros((), jnp.float32)
    program, seconds = compiled(jax.jit(infer, compiler_options=compiler_options()), carry, running, inputs)
    return Case(lambda carry: program(carry, running, inputs), carry, program, seconds)


def decoding_case(config: Any, running: Tree, batch: int) -> Case:
    """The likeliest next token of `batch` sequences whose caches are full but for one place; the carry is tokens and cache."""
    tokens, position = jnp.zeros(batch, jnp.int32), config.context - 1

    def step(running: Tree, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        logits, cache = generate.decode(config, running, carry[0], position, carry[1])
        return logits.argmax(-1).astype(jnp.int32), cache

    carry = tokens, models.empty_cache(config, batch)
    program, seconds = compiled(jax.jit(step, donate_argnums=1, compiler_options=compiler_options()), running, carry)
    return Case(lambda carry: program(running, carry), carry, program, seconds)


def compiled(function: Any, *arguments: Any) -> tuple[Any, float]:
    """A jitted function compiled for these arguments, and the seconds that took."""
    start = time.perf_counter()
    program = function.lower(*arguments).compile()
    return program, time.perf_counter() - start
