"""Checkpoints: {parameters, optimizer, position, stamp}, written by Orbax, asynchronously and atomically.

A checkpoint appears under its final name (workdir/checkpoints/<step>) only when all of it is on disk; what a killed
run leaves half written is ignored and swept away by the next run. The stamp says which experiment, coordinates and
chart the parameters belong to.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import grain
import jax
import orbax.checkpoint as ocp

import prenorm_jax
from prenorm_jax import models
from prenorm_jax.models.config import ConfigError
from prenorm_jax.training.experiment import Experiment, as_tree, differences, read_experiment
from prenorm_jax.training.step import Params, State

Result = TypeVar("Result")

FORMAT = 1
# How the model is computed, not which function of its parameters it is: a resumed run may change these.
COMPUTE_FIELDS = ("dtype", "attention", "unroll", "remat", "remat_saves", "layout")


class Loaded(NamedTuple):
    """A checkpoint as evaluation needs it: `params` are in `coordinates` of `experiment.model`."""

    experiment: Experiment
    coordinates: str
    params: Params
    step: int


class Checkpoints:
    """The checkpoints of a run that writes them; a context manager that waits, on leaving, for a save under way."""

    def __init__(self, workdir: pathlib.Path, experiment: Experiment) -> None:
        """Makes the folder. Call `refuse_other_model` first."""
        self._stamp = stamp(experiment)
        self._manager = ocp.CheckpointManager(
            folder(workdir),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=experiment.train.keep, cleanup_tmp_directories=True, save_root_metadata=False
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def save(self, state: State, data: grain.DatasetIterator) -> None:
        """Starts to save; the arrays are copied before this returns, so that the next step may take their memory."""
        step = int(state.step)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                parameters=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(state.opt_state),
                position=ocp.args.JsonSave({"step": step, "data": data.get_state()}),
                stamp=ocp.args.JsonSave(self._stamp),
            ),
        )

    def restore(self, initial: State, data: grain.DatasetIterator) -> State:
        """The newest state, shaped and placed like `initial`, or `initial` itself; moves `data` to where it stopped."""
        step = self._manager.latest_step()
        if step is None:
            return initial
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                parameters=ocp.args.StandardRestore(jax.tree.map(_like, initial.params)),
                optimizer=ocp.args.StandardRestore(jax.tree.map(_like, initial.opt_state)),
                position=ocp.args.JsonRestore(),
            ),
        )
        data.set_state(found["position"]["data"])
        taken = jax.device_put(jax.numpy.int32(found["position"]["step"]), initial.step.sharding)
        return State(found["parameters"], found["optimizer"], taken)


def folder(workdir: pathlib.Path) -> pathlib.Path:
    """Where a workdir's checkpoints are; absolute, as Orbax asks."""
    return workdir.absolute() / "checkpoints"


def stamp(experiment: Experiment) -> dict[str, Any]:
    """What a checkpoint says about itself: format, version, the chart of its parameters, and the whole experiment."""
    model, coordinates = experiment.model, experiment.train.coordinates
    chart = "pre_ln" if coordinates == "pre_ln" else model.norm
    if chart == "pre_crmsnorm":
        chart = f"{chart}, {model.basis}, compact"
    return {
        "format": FORMAT,
        "prenorm_jax": prenorm_jax.__version__,
        "coordinates": coordinates,
        "chart": chart,
        "experiment": as_tree(experiment),
    }


def latest(workdir: pathlib.Path) -> tuple[int, dict[str, Any]] | None:
    """Step and stamp of the newest checkpoint, or None where there is none. Writes nothing."""
    return _read(workdir, lambda manager, step: (step, _stamp(manager, step)))


def refuse_other_model(workdir: pathlib.Path, experiment: Experiment) -> list[str]:
    """Raises ConfigError if the workdir holds another model's checkpoint; returns what else has changed since."""
    found = latest(workdir)
    if found is None:
        return []
    # Read and written once more, a checkpoint of an earlier version has today's fields at their defaults.
    before, now = as_tree(read_experiment(found[1]["experiment"])), as_tree(experiment)
    changed = differences(_identity(before), _identity(now))
    if changed:
        raise ConfigError(
            f"workdir: {workdir} holds a checkpoint of another model ({'; '.join(changed)}); "
            "allowed: the same model, or another --workdir"
        )
    sections = ("model", "data", "optimizer", "train")
    return differences({name: before[name] for name in sections}, {name: now[name] for name in sections})


def load(workdir: pathlib.Path) -> Loaded:
    """The newest checkpoint. Raises FileNotFoundError where there is none, ConfigError for a stamp of another
    format."""

    def read(manager: ocp.CheckpointManager, step: int) -> Loaded:
        experiment = read_experiment(_stamp(manager, step)["experiment"])
        coordinates = experiment.train.coordinates
        expected = jax.eval_shape(lambda: models.init(experiment.model, 0, coordinates))
        args = ocp.args.Composite(parameters=ocp.args.StandardRestore(jax.tree.map(_like, expected)))
        return Loaded(experiment, coordinates, manager.restore(step, args=args)["parameters"], step)

    loaded = _read(workdir, read)
    if loaded is None:
        raise FileNotFoundError(f"no checkpoint in {folder(workdir)}")
    return loaded


def _read(workdir: pathlib.Path, read: Callable[[ocp.CheckpointManager, int], Result]) -> Result | None:
    """`read(manager, newest step)` without creating or sweeping anything."""
    if not folder(workdir).is_dir():
        return None
    options = ocp.CheckpointManagerOptions(create=False, save_root_metadata=False)
    with ocp.CheckpointManager(folder(workdir), options=options) as manager:
        step = manager.latest_step()
        return None if step is None else read(manager, step)


def _stamp(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    found: dict[str, Any] = manager.restore(step, args=ocp.args.Composite(stamp=ocp.args.JsonRestore()))["stamp"]
    if found.get("format") != FORMAT:
        raise ConfigError(f"checkpoint {step}: got format {found.get('format')!r}; allowed: {FORMAT}")
    return found


def _identity(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an experiment that says which function of which parameters is trained on what."""
    model = {key: value for key, value in tree["model"].items() if key not in COMPUTE_FIELDS}
    coordinates = {"coordinates": tree["train"]["coordinates"]}
    return {"task": tree["task"], "model": model, "data": {"name": tree["data"]["name"]}, "train": coordinates}


def _like(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
