"""Which checkpoints stay on disk: the newest, and the best by the evaluation at their step."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers


@dataclasses.dataclass
class Kept(checkpoint_managers.PreservationPolicy):
    """Keeps the `latest` newest and, of those that were evaluated, the `best` best by the held-out `by`: "loss" or "accuracy"."""

    latest: int
    best: int
    by: str
    scores: dict[int, float] = dataclasses.field(default_factory=dict)

    def judged(self, step: int, held_out: Mapping[str, float] | None) -> None:
        """Takes down the evaluation at a checkpoint's step, if there was one."""
        if held_out:
            self.scores[step] = score(held_out, self.by)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """As Orbax asks: a bool for each checkpoint, oldest first."""
        return self.stay([checkpoint.step for checkpoint in checkpoints])

    def stay(self, steps: Sequence[int]) -> list[bool]:
        """Whether the checkpoint of each step stays.

        >>> Kept(1, 1, "loss", {10: -0.3, 20: -0.1, 30: -0.2}).stay([10, 20, 30, 40])
        [False, True, False, True]
        """
        judged = best_first(self.scores, steps)
        kept = {*steps[-self.latest :], *judged[: self.best]}
        return [step in kept for step in steps]


def score(held_out: Mapping[str, float], by: str) -> float:
    """Held-out values as a number of which more is better, and NaN the worst."""
    value = held_out[by] if by == "accuracy" else -held_out[by]
    return -math.inf if math.isnan(value) else value


def best_first(scores: Mapping[int, float], steps: Iterable[int]) -> list[int]:
    """Those of the steps that have a score, the best first; of equals the newest."""
    return sorted((step for step in steps if step in scores), key=lambda step: (scores[step], step), reverse=True)
