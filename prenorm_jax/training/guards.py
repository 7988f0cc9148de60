"""What a run does about a loss or a gradient that is not finite: the step leaves parameters and optimizer as they were, and the loop
stops, or goes on for as many such steps as the experiment allows.

The choice is made on the device, inside the step, so that nobody waits for it, and so that no parameter that a checkpoint could hold has
ever seen such a gradient.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp


def keep_where(finite: jax.Array, new: Any, old: Any) -> Any:
    """The tree `new` where `finite` () holds, else `old`. The selection is fused into what computes `new`; both are in memory anyway.

    >>> keep_where(jnp.isfinite(jnp.nan), {"w": jnp.ones(2)}, {"w": jnp.zeros(2)})["w"].tolist()
    [0.0, 0.0]
    """
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)


class NotFinite(FloatingPointError):
    """A step whose loss or gradient is not finite, in a run that may not (or no longer) skip it. step: which."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class Guard:
    """Counts the steps that were skipped, and says when to stop. skipped: how many so far, of a run and what it resumed from."""

    def __init__(self, allowed: int, skipped: int = 0) -> None:
        self.allowed, self.skipped = allowed, skipped

    def check(self, step: int, values: dict[str, float]) -> str | None:
        """None for a step whose "loss" and "grad_norm" are finite, a line to print for one that was skipped.

        Raises: NotFinite where more steps than `allowed` would have been skipped.
        """
        if values["finite"]:
            return None
        what, value = (
            ("gradient norm", values["grad_norm"]) if math.isfinite(values["loss"]) else ("loss", values["loss"])
        )
        if self.skipped >= self.allowed:
            others = f", after {self.skipped} skipped steps (config.train.skip_nonfinite)" if self.allowed else ""
            raise NotFinite(
                step, f"the {what} of step {step} is {value}{others}; parameters of before it, and no others, are kept"
            )
        self.skipped += 1
        return f"step {step}: the {what} is {value}; skipped ({self.skipped} of at most {self.allowed})"
