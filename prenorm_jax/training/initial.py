"""What training and evaluation begin with: random parameters, those of an imported checkpoint, or those of another run."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp

from prenorm_jax import models
from prenorm_jax.interop import stored
from prenorm_jax.interop.tensors import FormatError
from prenorm_jax.main_branch import LayoutError
from prenorm_jax.models.config import ConfigError
from prenorm_jax.training import charts, checkpoints
from prenorm_jax.training.experiment import Experiment, differences
from prenorm_jax.training.step import Params

# What an experiment may choose for a model that is imported: how it is computed and stored, and in which variant.
FREE = (
    "norm",
    "basis",
    "layout",
    "dtype",
    "param_dtype",
    "attention",
    "scan_layers",
    "unroll",
    "remat",
    "remat_saves",
    "vocab_multiple",
)


def initial_params(experiment: Experiment) -> Params:
    """The parameters that a run begins with, in experiment.train.coordinates and model.param_dtype.

    Raises: ConfigError where train.init_from is neither an import nor a run's workdir, or of another model, or has no equal in these
      coordinates.
    """
    model, settings = experiment.model, experiment.train
    if not settings.init_from:
        return models.init(model, settings.seed, settings.coordinates)
    workdir = pathlib.Path(settings.init_from)
    if checkpoints.folder(workdir).is_dir():
        return _of_run(experiment, workdir)
    try:
        imported = stored.load(workdir).imported
    except (FormatError, LayoutError, OSError) as error:
        raise ConfigError(f"config.train.init_from: {error}") from None
    there, here = (
        {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}
        for config in (imported.config, model)
    )
    other = differences(there, here, "config.model")
    if type(imported.config) is not type(model) or other:
        raise ConfigError(
            f"config.train.init_from: {settings.init_from} is another model ({'; '.join(other) or type(imported.config).__name__}); "
            "allowed: the model of the import (configs/pretrained.py reads it)"
        )
    if getattr(imported.config, "padded_vocab", 0) != getattr(model, "padded_vocab", 0):
        raise ConfigError(
            "config.model.vocab_multiple: not that of the import; allowed: prenorm import --set vocab_multiple=N"
        )
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, model.param_dtype), imported.params)
    params = models.stack_layers(params) if model.scan_layers else params
    return models.native(params, model) if settings.coordinates == "native" else params


def _of_run(experiment: Experiment, workdir: pathlib.Path) -> Params:
    """Those of a run's newest checkpoint, mapped. Its data and the rest of its experiment are its own affair."""
    try:
        then = checkpoints.load(workdir).experiment
        charts.refuse_other_model(then.model, experiment.model)
        params = checkpoints.load(workdir, into=experiment).params
    except (ConfigError, FileNotFoundError) as error:
        raise ConfigError(f"config.train.init_from: {error}") from None
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, experiment.model.param_dtype), params)
