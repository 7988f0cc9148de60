"""AdamW or LAMB behind clipping, with the learning-rate schedule, the mask of the leaves that decay, and a moving average of the weights.

Accumulation of micro-batches is not the optimizer's: the step adds their gradients up (step.py), so that clipping and
AdamW see the gradient of the whole batch and the optimizer's state is the same whatever `accumulate` is.
optax.MultiSteps would instead count micro-steps, keep a second copy of the gradients in the state that a checkpoint
holds, and map Pre-LN parameters to the variant's once a micro-batch.
"""

import re
from typing import Any, NamedTuple

import jax
import optax

from prenorm_jax.models.config import ConfigError
from prenorm_jax.training.experiment import Optimizer

# Ordered: the first pattern that matches a leaf's path decides whether the leaf decays.
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"(^|/)norm[^/]*/", False),
    (r"(^|/)(bias|scale|token)$", False),
    (r"(^|/)(kernel|table)$", True),
)


def make_optimizer(optimizer: Optimizer, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW or LAMB with decoupled decay on the leaves that `decay_mask` marks; its state holds the average."""
    # Both branches keep an empty state, so that a checkpoint can be resumed with another clip_norm.
    clip = optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm > 0 else optax.identity()
    schedule = learning_rate_schedule(optimizer, steps)
    adam = {"b1": optimizer.b1, "b2": optimizer.b2, "eps": optimizer.eps}
    if optimizer.name == "adamw":
        steps_of = [optax.adamw(schedule, **adam, weight_decay=optimizer.weight_decay, mask=decay_mask)]
    else:
        # Adam's step, made as long as the leaf. Leaves without decay keep Adam's, as in Apex's FusedLAMB and not as in optax.lamb.
        steps_of = [
            optax.scale_by_adam(**adam),
            optax.add_decayed_weights(optimizer.weight_decay, decay_mask),
            optax.masked(optax.scale_by_trust_ratio(), decay_mask),
            optax.scale_by_learning_rate(schedule),
        ]
    return optax.chain(
        clip,
        *steps_of,
        *([_averaging(optimizer.average)] if optimizer.average else []),
    )


class Average(NamedTuple):
    """The optimizer's state that holds the moving average of the parameters, shaped like them."""

    average: Any


def _averaging(decay: float) -> optax.GradientTransformation:
    """Leaves updates as they are, and averages what the parameters become with them. It has to be the last of a chain."""

    def update(updates: Any, state: Average, params: Any = None) -> tuple[Any, Average]:
        new = optax.apply_updates(params, updates)
        return updates, Average(jax.tree.map(lambda mean, x: mean + (1 - decay) * (x - mean), state.average, new))

    # A copy: the state must not hold the very arrays that are donated as parameters.
    return optax.GradientTransformation(lambda params: Average(jax.tree.map(lambda x: x.copy(), params)), update)


def learning_rate_schedule(optimizer: Optimizer, steps: int) -> optax.Schedule:
    """step -> learning rate: linear from peak / warmup_steps to the peak at `warmup_steps`, then a cosine to `steps`."""
    peak = optimizer.learning_rate
    return optax.warmup_cosine_decay_schedule(
        # Starting at 0 would make the first step a step that does nothing.
        init_value=peak / max(1, optimizer.warmup_steps),
        peak_value=peak,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=steps,
        end_value=peak * optimizer.final_fraction,
    )


def decay_mask(params: Any) -> Any:
    """A tree of bools shaped like `params`: True on kernels and tables, False on biases, norms and class tokens.

    Raises ConfigError for a leaf that no rule covers.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: decays(jax.tree_util.keystr(path, simple=True, separator="/")), params
    )


def decays(path: str) -> bool:
    """Whether the leaf "a/b/c" decays. Raises ConfigError where no rule covers it.

    >>> decays("blocks/0/attention/query/kernel"), decays("blocks/0/norm_1/scale")
    (True, False)
    """
    for pattern, decay in DECAY_RULES:
        if re.search(pattern, path):
            return decay
    raise ConfigError(
        f"parameter {path}: no rule of DECAY_RULES says whether it decays; add one to training/optimizer.py"
    )
