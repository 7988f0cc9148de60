"""Rows of training steps: what a step returned, and how fast the steps are."""

import time
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from prenorm_jax.training import counts, metrics
from prenorm_jax.training.experiment import Experiment
from prenorm_jax.training.guards import Guard


class Log:
    """A step's values are fetched once the next step is dispatched, so that the device never waits."""

    def __init__(
        self,
        experiment: Experiment,
        learning_rates: np.ndarray,
        guard: Guard,
        written: metrics.Metrics,
        progress: metrics.Progress,
        devices: Iterable[jax.Device],
    ) -> None:
        """learning_rates: of each update; a skipped step is none. devices: what a step runs on."""
        self._experiment, self._learning_rates, self._guard = experiment, learning_rates, guard
        self._written, self._progress = written, progress
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        peak = counts.peak_flops(list(devices))
        flops = counts.flops_per_step(experiment.model, experiment.train.batch_size)
        self._seconds_at_peak = flops / peak if peak else None
        self.restart_clock()

    def restart_clock(self) -> None:
        """What was done since the last row was no training."""
        self._since, self._counted = time.perf_counter(), 0

    def dispatched(self, step: int, values: Mapping[str, jax.Array]) -> None:
        """Takes a step's values, and fetches those of the step before. Raises NotFinite as `Guard` does."""
        pending, self._pending = self._pending, (step, values)
        if pending:
            self._fetch(*pending)

    def drain(self) -> None:
        """Fetches what is left. Raises NotFinite."""
        if self._pending:
            self._fetch(*self._pending)
        self._pending = None

    def evaluated(self, step: int, held_out: Mapping[str, float]) -> None:
        """A row and a line of an evaluation."""
        self._written.write("eval", step, held_out)
        text = "  ".join(f"{name} {value:.4g}" for name, value in held_out.items())
        self.say(f"step {step}/{self._experiment.train.steps}  held out: {text}")

    def say(self, text: str | None) -> None:
        """A line, if there is something to say."""
        if text is not None:
            self._progress.say(text)

    def _fetch(self, step: int, values: Mapping[str, jax.Array]) -> None:
        settings = self._experiment.train
        fetched = {name: float(value) for name, value in jax.device_get(dict(values)).items()}
        self._counted += 1
        updates = step - self._guard.skipped
        skipped = self._guard.check(step, fetched)
        if skipped:
            self._written.write("skipped", step, {"so_far": self._guard.skipped})
            self.say(skipped)
            return
        if not settings.due(step, settings.log_every):
            return
        seconds = (time.perf_counter() - self._since) / self._counted
        row = {
            **{name: value for name, value in fetched.items() if name != "finite"},
            "learning_rate": float(self._learning_rates[updates - 1]),
            "step_seconds": seconds,
            **_throughput(self._experiment, seconds),
            **({"mfu": self._seconds_at_peak / seconds} if self._seconds_at_peak else {}),
        }
        self._written.write("train", step, row)
        self._progress.train(step, row)
        self.restart_clock()


def _throughput(experiment: Experiment, seconds: float) -> dict[str, float]:
    examples = experiment.train.batch_size / seconds
    if experiment.task == "language_modelling":
        return {"tokens_per_second": examples * experiment.model.context}  # type: ignore[union-attr]
    return {"images_per_second": examples}
