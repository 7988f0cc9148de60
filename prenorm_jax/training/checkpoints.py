"""Checkpoints: {parameters, optimizer, position, stamp, fingerprints}, written by Orbax, asynchronously and atomically.

A checkpoint appears under its final name (workdir/checkpoints/<step>) only when all of it is on disk; what a killed
run leaves half written is ignored and swept away by the next run. The stamp says which experiment, coordinates and
chart the parameters belong to; the fingerprints show whether what is read is what was written. A checkpoint that can't
be read, or not as it was written, is passed over for the one before, and set aside. Here they are read; a run writes
them by saving.py.
"""

import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp

import prenorm_jax
from prenorm_jax.models.config import ConfigError
from prenorm_jax.training import charts, items, keeping
from prenorm_jax.training.experiment import Experiment, as_tree, differences, read_experiment
from prenorm_jax.training.optimizer import make_optimizer
from prenorm_jax.training.platforms import require_float64
from prenorm_jax.training.step import Params, State, abstract_state, judged_params

Result = TypeVar("Result")


class Loaded(NamedTuple):
    """A checkpoint as evaluation needs it: `params` are in `coordinates` of `experiment.model`."""

    experiment: Experiment
    coordinates: str
    params: Params
    step: int


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
        "format": items.FORMAT,
        "prenorm_jax": prenorm_jax.__version__,
        "coordinates": coordinates,
        "chart": chart,
        "experiment": as_tree(experiment),
    }


def latest(workdir: pathlib.Path) -> tuple[int, dict[str, Any]] | None:
    """Step and stamp of the newest checkpoint whose stamp can be read, or None where there is none. Writes nothing."""
    # Quietly: a run tells of damage when it restores.
    with warnings.catch_warnings(action="ignore"):
        return _read(workdir, lambda manager, step: (step, items.read_stamp(manager, step)))


def best(workdir: pathlib.Path) -> int | None:
    """Step of the best checkpoint on disk, by its run's train.best_by, or None where none was evaluated. Writes nothing."""

    def read(manager: ocp.CheckpointManager, step: int) -> int | None:
        by = read_experiment(items.read_stamp(manager, step)["experiment"]).train.best_by
        found = {step: held_out for step in manager.all_steps() if (held_out := items.held_out(manager, step))}
        order = keeping.best_first({step: keeping.score(values, by) for step, values in found.items()}, found)
        return order[0] if order else None

    return _read(workdir, read)


def refuse_other_model(workdir: pathlib.Path, experiment: Experiment) -> list[str]:
    """Raises ConfigError if the workdir holds another model's checkpoint; returns what else has changed since."""
    found = latest(workdir)
    if found is None:
        return []
    # Read and written once more, a checkpoint of an earlier version has today's fields at their defaults.
    then = _experiment(found[1], workdir, found[0])
    charts.refuse(workdir, then, experiment)
    before, now = as_tree(then), as_tree(experiment)
    sections = [name for name in now if name not in ("task", "compare", "estimate")]
    return differences({name: before[name] for name in sections}, {name: now[name] for name in sections})


def load(workdir: pathlib.Path, into: Experiment | None = None, step: int | None = None) -> Loaded:
    """A checkpoint's parameters, or their moving average where one was kept: of `step`, or the newest that is whole.

    Args:
      into: the experiment in whose coordinates they are wanted; None: in their own.

    Raises: FileNotFoundError where there is none; ConfigError for a stamp of another format, or coordinates that they have no map to.
    """

    def read(manager: ocp.CheckpointManager, step: int) -> Loaded:
        found = items.read_stamp(manager, step)
        experiment = _experiment(found, workdir, step)
        require_float64(experiment.model)
        coordinates, settings = experiment.train.coordinates, experiment.optimizer
        expected = abstract_state(experiment.model, make_optimizer(settings, experiment.train.steps), coordinates)
        wanted = {"parameters": expected.params, **({"optimizer": expected.opt_state} if settings.average else {})}
        trees = arrays_of(manager, step, jax.tree.map(_like, wanted))
        items.require_as_written(manager, step, found, trees)
        params = judged_params(State(trees["parameters"], trees.get("optimizer"), expected.step))
        if into is None:
            return Loaded(experiment, coordinates, params, step)
        return Loaded(into, into.train.coordinates, charts.mapped(params, experiment, into), step)

    loaded = _read(workdir, read, step)
    if loaded is None:
        raise FileNotFoundError(f"no checkpoint {'' if step is None else f'{step} '}in {folder(workdir)}")
    return loaded


def _experiment(stamp: Mapping[str, Any], workdir: pathlib.Path, step: int) -> Experiment:
    """The experiment of a stamp. Raises ConfigError where this version can't read it."""
    try:
        return read_experiment(stamp["experiment"])
    except ConfigError as error:
        raise ConfigError(
            f"checkpoint {step} of {workdir}: written by prenorm_jax {stamp.get('prenorm_jax')}, this is {prenorm_jax.__version__}: {error}"
        ) from None


def _read(
    workdir: pathlib.Path, read: Callable[[ocp.CheckpointManager, int], Result], wanted: int | None = None
) -> Result | None:
    """`read(manager, step)` of the newest step that it does not fail for, without creating or sweeping anything."""
    if not folder(workdir).is_dir():
        return None
    options = ocp.CheckpointManagerOptions(create=False, save_root_metadata=False)
    damaged: dict[int, str] = {}
    while True:
        with ocp.CheckpointManager(folder(workdir), options=options) as manager:
            # A run that goes on removes old checkpoints: what could not be read may be gone, and a newer one be there.
            steps = [step for step in sorted(manager.all_steps(), reverse=True) if wanted in (None, step)]
            untried = [step for step in steps if step not in damaged]
            for step in untried:
                try:
                    result = read(manager, step)
                except items.NOT_DAMAGE:
                    raise
                except Exception as error:
                    damaged[step] = items.in_a_line(error)
                    continue
                for bad, why in damaged.items():
                    if bad in manager.all_steps(read=True):
                        warnings.warn(f"{workdir}: checkpoint {bad} is damaged ({why}); read is {step}", stacklevel=3)
                return result
        if not untried:
            break
    if damaged:
        raise ConfigError(none_readable(workdir, damaged))
    return None


def arrays_of(manager: ocp.CheckpointManager, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
    """Items of arrays, shaped and placed as `like` says."""
    args = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in like.items()})
    found = manager.restore(step, args=args)
    return {name: found[name] for name in like}


def none_readable(workdir: pathlib.Path, damaged: Mapping[int, str]) -> str:
    """What to say where every checkpoint is damaged, and how."""
    told = "; ".join(f"{step}: {error}" for step, error in damaged.items())
    return (
        f"workdir: none of the checkpoints of {workdir} can be read ({told}); left as they are; "
        "allowed: another --workdir, or files that can be read"
    )


def _like(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
