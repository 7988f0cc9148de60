"""A checkpoint's parameters in the coordinates of another experiment on the same model: what can be carried over, and what can't.

Parameters go from chart to chart exactly, up to rounding (prenorm_jax.models). What becomes of the optimizer depends on what was trained:

- Trained in Pre-LN coordinates, theta is trained whatever the variant, and the loss is the same function of theta. So another norm, basis
  or layout changes neither parameters nor moments: nothing is mapped, and the trajectory goes on, up to rounding.
- Between theta and a variant's own phi = h(theta), gradients are related by dL/dtheta = (dh/dtheta)^T dL/dphi. Adam's second moment is a
  mean of squares of single coordinates over the past, with a Jacobian of its own at each step; from the mean alone there is no way to the
  other coordinates' one. The moments have no map, so the optimizer has to begin anew, and that is never done unasked.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from prenorm_jax import models
from prenorm_jax.main_branch import LayoutError
from prenorm_jax.models.config import ConfigError, Transformer
from prenorm_jax.training.experiment import Experiment, differences

# How the model is computed, not which function of its parameters it is: a resumed run may change these.
COMPUTE_FIELDS = ("dtype", "attention", "unroll", "remat", "remat_saves", "layout")
# Which coordinates its parameters are in: a resumed run may change these too, by the rules above.
CHART_FIELDS = ("norm", "basis")


def chart(experiment: Experiment) -> tuple[str, ...]:
    """What the trained parameters are parameters of: ("pre_ln",), ("pre_rmsnorm",) or ("pre_crmsnorm", basis)."""
    model = experiment.model
    if experiment.train.coordinates == "pre_ln" or model.norm == "pre_ln":
        return ("pre_ln",)
    return (model.norm, model.basis) if model.norm == "pre_crmsnorm" else (model.norm,)


def mapped(params: Any, then: Experiment, now: Experiment) -> Any:
    """Parameters in the chart of `then`, in that of `now`: the same function. Themselves where it is the same chart.

    Raises: ConfigError for a pre_rmsnorm model that was trained in its own coordinates, away from zero mean: no other chart has it.
    """
    if chart(then) == chart(now):
        return params

    def change(params: Any) -> Any:
        params = params if chart(then) == ("pre_ln",) else models.pre_ln(params, then.model)
        return params if chart(now) == ("pre_ln",) else models.native(params, now.model)

    try:
        return change(params)
    except LayoutError as error:
        raise ConfigError(
            f"config.train.coordinates: the checkpoint's parameters are {then.model.norm}'s own, and can't become those of "
            f"{' '.join(chart(now))}: {error}"
        ) from None


def restarted(fresh: optax.OptState, params: Any, updates: int) -> optax.OptState:
    """A fresh optimizer state whose learning rate goes on as behind `updates` updates, and whose average, if it keeps one, is `params`."""

    def is_schedule(path: Any, value: Any) -> bool:
        return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"

    state = optax.tree_utils.tree_set(fresh, is_schedule, count=jnp.int32(updates))
    keeps_average = optax.tree.get(state, "average", None) is not None
    return optax.tree.set(state, average=jax.tree.map(jnp.copy, params)) if keeps_average else state


def differ(then: Experiment, now: Experiment) -> str | None:
    """Why the optimizer's state can't be carried over, or None where it can."""
    if chart(then) == chart(now):
        was, is_now = map(_optimizer, (then, now))
        return None if was == is_now else f"{was}, and now would be {is_now}"
    return f"trained are the parameters of {' '.join(chart(then))}, and now would be those of {' '.join(chart(now))}"


def _optimizer(experiment: Experiment) -> str:
    """Which state the optimizer keeps."""
    return experiment.optimizer.name + (" with a moving average" if experiment.optimizer.average else "")


def refuse(workdir: pathlib.Path, then: Experiment, now: Experiment) -> None:
    """Raises ConfigError, with the difference, where a checkpoint of `then` can't be continued as `now`."""
    try:
        if then.task != now.task or then.data.name != now.data.name:
            was, is_now = ({"task": e.task, "data": {"name": e.data.name}} for e in (then, now))
            raise ConfigError("; ".join(differences(was, is_now)))
        refuse_other_model(then.model, now.model)
    except ConfigError as error:
        raise ConfigError(
            f"workdir: {workdir} holds a checkpoint of another model ({error}); allowed: the same model, or another --workdir"
        ) from None
    others = differ(then, now)
    if others and not now.train.restart_optimizer:
        same = chart(then) == chart(now)
        holds = "the state of another optimizer" if same else "a checkpoint in other coordinates"
        raise ConfigError(
            f"workdir: {workdir} holds {holds} ({others}); allowed: the same, another --workdir, or "
            "config.train.restart_optimizer=True: parameters are mapped, Adam's moments have no map and begin anew"
        )


def refuse_other_model(then: Transformer, now: Transformer) -> None:
    """Raises ConfigError, with the difference, for two models of which one's parameters are not the other's, whatever the coordinates."""
    if type(then) is not type(now):
        raise ConfigError(f"{type(then).__name__} -> {type(now).__name__}")
    was, is_now = (
        {key: value for key, value in dataclasses.asdict(model).items() if key not in COMPUTE_FIELDS + CHART_FIELDS}
        for model in (then, now)
    )
    if was != is_now:
        raise ConfigError("; ".join(differences(was, is_now, "config.model")))


def placed(tree: Any, like: Any) -> Any:
    """Arrays, each where that of `like` is."""
    return jax.tree.map(lambda leaf, other: jax.device_put(leaf, other.sharding), tree, like)
