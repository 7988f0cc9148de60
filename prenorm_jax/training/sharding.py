"""The mesh of devices, and where each leaf of the training state lies on it.

A leaf's place is decided by the first rule that matches its path; a leaf without one is an error. The rules are about the last axes of a
leaf, so that looped and stacked layers obey the same ones, and about no axis of the main branch, so that they hold in every variant and
in both coordinates. Where a mesh axis does not divide its dimension, the leaf is whole along that mesh axis (`wholes` lists such leaves).

Vectors are whole along "fsdp": all of them are a thousandth of the weights, and each gathered one would cost a message of its own.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prenorm_jax.models.config import ConfigError, GPTConfig, ViTConfig, require
from prenorm_jax.paths import Tree
from prenorm_jax.placement import (
    AXES,
    BATCH,
    COLUMNS,
    DATA,
    FSDP,
    PATCHES,
    POSITIONS,
    ROWS,
    TABLE,
    TENSOR,
    Place,
    fitted,
    parts,
)
from prenorm_jax.training.experiment import Experiment, Mesh

Config = ViTConfig | GPTConfig
Rules = tuple[tuple[str, Place], ...]

_WHOLE: Place = (PartitionSpec(),)
_SPLIT: Place = (PartitionSpec(TENSOR),)

# In a stacked model "blocks/" is followed by no number.
_BLOCKS: Rules = (
    (r"blocks/(\d+/)?(attn/(query|key|value)|mlp/up)/kernel", COLUMNS),
    (r"blocks/(\d+/)?(attn/(query|key|value)|mlp/up)/bias", _SPLIT),
    (r"blocks/(\d+/)?(attn/out|mlp/down)/kernel", ROWS),
    (r"blocks/(\d+/)?(attn/out|mlp/down)/bias", _WHOLE),
    (r"blocks/(\d+/)?(norm1|norm2|scale1|scale2)/(scale|bias)", _WHOLE),
    (r"norm/(scale|bias)", _WHOLE),
    (r"position/table", POSITIONS),
)
RULES: dict[type, Rules] = {
    ViTConfig: (
        *_BLOCKS,
        (r"patch/kernel", PATCHES),
        (r"patch/bias|(class|distilled)/token|registers/table", _WHOLE),
        (r"(head|head_mean|head_distilled|pre_logits)/kernel", COLUMNS),
        (r"(head|head_mean|head_distilled|pre_logits)/bias", _SPLIT),
    ),
    GPTConfig: (
        *_BLOCKS,
        (r"embed/table", TABLE),
        (r"head/kernel", COLUMNS),
        (r"head/bias", _SPLIT),
    ),
}
"""Model -> (pattern of a leaf's whole path, how its last axes are split), the first match first."""


def make_mesh(settings: Mesh, devices: list[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of an experiment, of all devices of all processes, or of the first of this process's where fewer are asked for.

    Raises: ConfigError where the axes do not come out at the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count, others = len(devices), settings.fsdp * settings.tensor
    require(
        count % others == 0 or settings.data > 0,
        "config.mesh",
        f"fsdp x tensor = {settings.fsdp} x {settings.tensor}",
        f"a divisor of the {count} devices",
    )
    data = settings.data or count // others
    needed = data * others
    spare = "" if jax.process_count() > 1 else " or fewer"
    require(
        needed == count or (needed < count and jax.process_count() == 1),
        "config.mesh",
        f"data x fsdp x tensor = {data} x {settings.fsdp} x {settings.tensor}",
        f"a product of {count}{spare}, the devices there are; data = 0 takes what the others leave",
    )
    shape = (data, settings.fsdp, settings.tensor)
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices[:needed])


def mesh_of(experiment: Experiment) -> jax.sharding.Mesh:
    """The mesh that an experiment asks for. Raises ConfigError where its model or its batches can't be split so."""
    mesh = make_mesh(experiment.mesh)
    require_splits(experiment, dict(mesh.shape))
    return mesh


def require_splits(experiment: Experiment, sizes: Mapping[str, int]) -> None:
    """Raises ConfigError where an experiment's model or its batches can't be split over a mesh of these axis sizes."""
    heads, tensor = experiment.model.heads, sizes[TENSOR]
    require(heads % tensor == 0, "config.mesh.tensor", tensor, f"a divisor of config.model.heads = {heads}")
    parts, settings = sizes[DATA] * sizes[FSDP], experiment.train
    for field, rows, of in (
        ("batch_size", settings.batch_size // settings.accumulate, " / train.accumulate"),
        ("eval_batch_size", settings.eval_batch_size, ""),
    ):
        require(
            rows % parts == 0,
            f"config.train.{field}{of if settings.accumulate > 1 else ''}",
            rows,
            f"a multiple of mesh.data x mesh.fsdp = {parts}; or fewer devices, with config.mesh.data=N",
        )


def spec_of(path: str, shape: tuple[int, ...], model: Config, sizes: Any) -> PartitionSpec:
    """How the leaf at "a/b/c" is split over a mesh of these axis sizes. Raises ConfigError where no rule matches.

    >>> from prenorm_jax import models
    >>> sizes = {"data": 1, "fsdp": 4, "tensor": 2}
    >>> tuple(spec_of("blocks/0/mlp/up/kernel", (191, 768), models.vit_config("Ti/16"), sizes))
    (None, ('tensor', 'fsdp'))
    """
    for pattern, place in RULES[type(model)]:
        if re.fullmatch(pattern, path):
            return fitted(place, shape, sizes)
    raise ConfigError(f"parameter {path}: no rule says how it is split over devices; add one to training/sharding.py")


def param_shardings(params: Tree, model: Config, mesh: jax.sharding.Mesh) -> Tree:
    """A tree like `params`, which may be of any variant and any coordinates, of each leaf's place on the mesh.

    Args:
      params: arrays or shapes.

    Raises: ConfigError for a leaf without a rule.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(_name(path), leaf.shape, model, mesh.shape)), params
    )


def state_shardings(state: Any, model: Config, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> Any:
    """The same for a `step.State`: what the optimizer keeps for a parameter lies where the parameter does, the rest is everywhere."""
    whole = everywhere(mesh)
    params = param_shardings(state.params, model, mesh)
    # Weight decay's mask and the like are no state; whatever is not like a parameter counts something.
    opt_state = optax.tree.map_params(
        tx, lambda _, place: place, state.opt_state, params, transform_non_params=lambda _: whole
    )
    return dataclasses.replace(state, params=params, opt_state=opt_state, step=whole)


def everywhere(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The place of what every device holds as a whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Where a batch lies: its examples split along the mesh's "data" and "fsdp"."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def share(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """(index, count): a batch is cut into `count` equal shares, of which this process feeds its devices the one of this index.

    Processes whose devices differ along "tensor" alone have the same index: they feed the same examples.
    """
    held: dict[int, set[int]] = {}
    parts = mesh.shape[DATA] * mesh.shape[FSDP]
    places: Any = batch_sharding(mesh).devices_indices_map((parts,))
    for device, (rows,) in places.items():
        held.setdefault(device.process_index, set()).add(rows.indices(parts)[0])
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def whole_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """A batch on the mesh, from each process's `share` of it."""
    place, (_, count) = batch_sharding(mesh), share(mesh)
    return {
        key: jax.make_array_from_process_local_data(place, x, (x.shape[0] * count, *x.shape[1:]))
        for key, x in batch.items()
    }


def wholes(params: Tree, model: Config, mesh: jax.sharding.Mesh) -> list[str]:
    """The paths of the leaves that a rule splits, and that are whole along a mesh axis because it does not divide them."""
    many = math.prod(mesh.shape.values())
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = _name(path)
        got, wanted = (spec_of(name, shape, model, mesh.shape) for shape in (leaf.shape, (many,) * leaf.ndim))
        if parts(got, mesh.shape) < parts(wanted, mesh.shape):
            found.append(name)
    return found


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
