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
from prenorm_jax.paths import Tree
from prenorm_jax.training.step import init_state, make_train_step
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


Case = tuple[
    Callable[[Any], Any], Any
]  # a compiled step carry -> carry that may take the carry's memory, and the first carry


def interleaved(cases: Mapping[str, Case], *, warmup_steps: int, window_steps: int, windows: int) -> dict[str, Times]:
    """Times of each case, windows interleaved.

    Args:
      cases: name -> (step, carry): step(carry) -> carry.
      warmup_steps: before the first window, for each case.
      window_steps, windows: steps of a window; windows of a case.
    """
    carries = {name: _steps(step, carry, warmup_steps) for name, (step, carry) in cases.items()}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(windows):
        for name, (step, _) in cases.items():
            start = time.perf_counter()
            carries[name] = _steps(step, carries[name], window_steps)
            seconds[name].append((time.perf_counter() - start) / window_steps)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def _steps(step: Callable[[Any], Any], carry: Any, count: int) -> Any:
    for _ in range(count):
        carry = step(carry)
    return jax.block_until_ready(carry)


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
    """The step that trains, from Pre-LN `params`, in the given coordinates, on one batch."""
    own = jax.jit(lambda params: models.native(params, config))(params) if coordinates == "native" else params
    # A copy, since the step takes its state's memory and the next case begins from the same parameters.
    state = init_state(jax.tree.map(jnp.copy, own), tx)
    batch = jax.tree.map(jnp.asarray, dict(batch))
    step = make_train_step(config, task, tx, coordinates=coordinates, accumulate=accumulate)
    compiled = step.lower(state, batch).compile()  # type: ignore[attr-defined]
    return lambda state: compiled(state, batch)[0], state


def inference_case(config: Config, params: Tree, inputs: Any) -> Case:
    """Logits of one batch, from Pre-LN `params` mapped once; the carry only makes one call wait for the one before."""
    running = jax.jit(lambda params: models.running(params, config))(params)
    inputs = jnp.asarray(inputs)

    def infer(carry: jax.Array, running: Tree, inputs: jax.Array) -> jax.Array:
        logits, _ = models.apply(config, running, inputs + (carry * 0).astype(inputs.dtype))
        # A reduction over all logits, so that the whole of them is computed.
        return logits.max().astype(jnp.float32)

    carry = jnp.zeros((), jnp.float32)
    compiled = jax.jit(infer).lower(carry, running, inputs).compile()
    return lambda carry: compiled(carry, running, inputs), carry
