"""A profiler's trace of chosen steps, for TensorBoard or Perfetto."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax


class Profile:
    """Traces the steps that `train.profile` names, "FIRST:END", into workdir/profile."""

    def __init__(self, workdir: pathlib.Path, steps: str) -> None:
        self._folder = workdir / "profile"
        self._first, self._end = map(int, steps.split(":")) if steps else (0, 0)
        self._tracing = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the dispatch of a step."""
        if self._first <= step < self._end and not self._tracing:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step) if self._tracing else contextlib.nullcontext():
            yield

    def dispatched(self, step: int, values: Any) -> str | None:
        """After it; `values` are the step's results. A line to print when a trace is complete."""
        if not self._tracing or step + 1 < self._end:
            return None
        jax.block_until_ready(values)
        self.close()
        return f"steps {self._first} to {step} are traced in {self._folder}"

    def close(self) -> None:
        """Ends a trace under way."""
        if self._tracing:
            jax.profiler.stop_trace()
        self._tracing = False
