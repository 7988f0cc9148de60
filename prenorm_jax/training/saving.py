"""The checkpoints of a run that writes them, and where such a run goes on."""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from prenorm_jax import models
from prenorm_jax.fingerprints import fingerprints, of_text
from prenorm_jax.models.config import ConfigError
from prenorm_jax.training import charts, disk, items, keeping
from prenorm_jax.training.checkpoints import arrays_of, folder, none_readable, stamp
from prenorm_jax.training.experiment import Experiment, read_experiment
from prenorm_jax.training.lost import ProcessLost
from prenorm_jax.training.step import State

Result = TypeVar("Result")


class Restored(NamedTuple):
    """Where a run goes on. skipped: how many of its steps changed nothing. evaluated: whether that was, at its step. notes: a line for
    each thing that its user should know."""

    state: State
    skipped: int
    evaluated: bool
    notes: tuple[str, ...]


class Checkpoints:
    """The checkpoints of a run that writes them; a context manager that waits, on leaving, for a save under way."""

    def __init__(self, workdir: pathlib.Path, experiment: Experiment) -> None:
        """Makes the folder. Call `refuse_other_model` first."""
        settings = experiment.train
        self._workdir, self._experiment, self._stamp = workdir, experiment, stamp(experiment)
        self._kept = keeping.Kept(settings.keep, settings.keep_best, settings.best_by)
        self._manager = ocp.CheckpointManager(
            folder(workdir),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._kept, cleanup_tmp_directories=True, save_root_metadata=False
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # A save of several processes ends at a barrier, and one that is gone does not come to it.
        if not isinstance(error, ProcessLost):
            self._manager.close()

    def save(
        self,
        state: State,
        data: grain.DatasetIterator,
        skipped: int = 0,
        held_out: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to save; the arrays are copied before this returns, so that the next step may take their memory.

        Args:
          skipped: how many of the steps so far changed nothing.
          held_out: values of the evaluation at this step, by which the best checkpoints are kept.

        Raises: FloatingPointError, and saves nothing, for parameters that are not finite; NoRoom, and saves nothing, where it would not fit
          on the disk.
        """
        step = int(state.step)
        self._manager.wait_until_finished()  # as saving would; what that writes counts below
        if jax.process_index() == 0:
            sizes = [disk.taken(path) for path in folder(self._workdir).iterdir()]
            sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            disk.require_room(folder(self._workdir), max(sizes) * 5 // 4)
        if not _all_finite(state.params):
            raise FloatingPointError(f"the parameters of step {step} are not finite; checkpoints before it are kept")
        position = {"step": step, "data": data.get_state(), "skipped": skipped, "held_out": dict(held_out or {})}
        self._kept.judged(step, held_out)
        prints = fingerprints(parameters=state.params, optimizer=state.opt_state)
        said = {"position": position, "stamp": self._stamp}
        prints |= {name: of_text(items.canonical(tree)) for name, tree in said.items()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                parameters=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(state.opt_state),
                position=ocp.args.JsonSave(position),
                stamp=ocp.args.JsonSave(self._stamp),
                fingerprints=ocp.args.JsonSave(prints),
            ),
        )

    def check(self) -> None:
        """Raises what a save under way has failed with so far; does not wait for it."""
        self._manager.check_for_errors()

    def restore(self, initial: State, data: grain.DatasetIterator) -> Restored:
        """The newest state that is whole, shaped and placed like `initial`, or `initial` itself; moves `data` to where it stopped.

        What `initial` lies on need not be what the checkpoint was written from: any mesh, any number of devices or processes.
        A checkpoint of other coordinates is mapped where experiment.train.restart_optimizer allows it (see `charts`).

        Raises: ConfigError for a checkpoint of another model or of other coordinates, and where none can be read.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            error, found = _agreed(functools.partial(self._read, step, initial))
            if found is None:
                damaged[step] = error
                continue
            then, arrays, position = found
            state, told = self._state(then, arrays, position, initial)
            data.set_state(position["data"])
            aside = [self._set_aside(bad, why, step) for bad, why in damaged.items()]
            for kept in self._manager.all_steps():
                self._kept.judged(kept, items.held_out(self._manager, kept))
            return Restored(state, position["skipped"], bool(position.get("held_out")), (*aside, *told))
        if damaged:
            raise ConfigError(none_readable(self._workdir, damaged))
        return Restored(initial, 0, True, ())

    def _read(self, step: int, initial: State) -> tuple[Experiment, dict[str, Any], dict[str, Any]]:
        """Whose it is, its arrays, and its position. The optimizer's state is left out where it has no use."""
        found = items.read_stamp(self._manager, step)
        then = read_experiment(found["experiment"])
        charts.refuse(self._workdir, then, self._experiment)
        params, wanted = initial.params, {}
        if charts.differ(then, self._experiment):
            params = jax.eval_shape(lambda: models.init(then.model, 0, then.train.coordinates))
        else:
            wanted["optimizer"] = initial.opt_state
        arrays = arrays_of(self._manager, step, jax.tree.map(_beside(initial), {"parameters": params, **wanted}))
        position = {"skipped": 0, **items.read_json(self._manager, step, "position")}
        items.require_as_written(self._manager, step, found, arrays, position)
        return then, arrays, position

    def _state(
        self, then: Experiment, arrays: dict[str, Any], position: dict[str, Any], initial: State
    ) -> tuple[State, list[str]]:
        step = jax.device_put(np.int32(position["step"]), initial.step.sharding)
        others = charts.differ(then, self._experiment)
        if not others:
            return State(arrays["parameters"], arrays["optimizer"], step), []
        params = charts.mapped(arrays["parameters"], then, self._experiment)
        opt_state = charts.restarted(initial.opt_state, params, position["step"] - position["skipped"])
        state = State(charts.placed(params, initial.params), charts.placed(opt_state, initial.opt_state), step)
        return state, [
            f"optimizer begins anew at step {position['step']}: {others}; parameters are mapped, moments have no map, the learning rate "
            "goes on"
        ]

    def _set_aside(self, step: int, error: str, instead: int) -> str:
        aside = folder(self._workdir).with_name("damaged") / str(step)
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-again")
        if jax.process_index() == 0:
            aside.parent.mkdir(exist_ok=True)
            os.replace(folder(self._workdir) / str(step), aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()
        return f"warning: checkpoint {step} is damaged ({error}); it is kept as {aside}, and the run goes on from {instead}"


def _agreed(read: Callable[[], Result]) -> tuple[str, Result | None]:
    """What `read` returns, or a line about why some process could not."""
    found, line = None, ""
    try:
        found = read()
    except items.NOT_DAMAGE:
        raise
    except Exception as error:
        line = items.in_a_line(error)
    if jax.process_count() > 1 and not np.all(multihost_utils.process_allgather(np.asarray(found is not None))):
        return line or "another process can't read it", None
    return line, found


@jax.jit
def _finite(tree: Any) -> jax.Array:
    return jax.numpy.stack([jax.numpy.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _all_finite(tree: Any) -> bool:
    return bool(_finite(tree))


def _beside(initial: State) -> Callable[[Any], jax.ShapeDtypeStruct]:
    """leaf -> its shape and dtype, where it lies, or else on all devices of `initial`."""
    sharding = jax.tree.leaves(initial.params)[0].sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())

    def like(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or sharding)

    return like
