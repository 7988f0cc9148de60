"""Our models as checkpoints of another library: the key maps of `importing`, read in the other direction."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from prenorm_jax import models
from prenorm_jax.interop.importing import Imported, rows_of, without_padding
from prenorm_jax.interop.key_maps import RESHAPES
from prenorm_jax.models import ViTConfig
from prenorm_jax.paths import leaves


def exported(imported: Imported) -> dict[str, np.ndarray]:
    """The tensors as their family writes them, by their whole name: those that were imported, bit for bit, where nothing was changed."""
    names, config = imported.names, without_padding(imported.config)
    shapes, flat = leaves(models.abstract(config)), leaves(imported.params)
    flat = {path: np.asarray(leaf)[tuple(map(slice, shapes[path].shape))] for path, leaf in flat.items()}
    found = dict(imported.kept)
    for row in rows_of(names, config):
        value = RESHAPES[row.reshape][1]([flat[leaf] for leaf in row.ours], config.heads)
        found[names(row.theirs)] = np.ascontiguousarray(value)
    for copy in names.tied:
        found[names(copy)] = found[names(names.family.tied[copy])]
    return _stacked(found, names.prefix, config.depth) if names.stacked else found


def _stacked(tensors: Mapping[str, np.ndarray], prefix: str, depth: int) -> dict[str, np.ndarray]:
    first = f"{prefix}Transformer/encoderblock_0/"
    layers = {name.removeprefix(first) for name in tensors if name.startswith(first)}
    found = {name: value for name, value in tensors.items() if "/encoderblock_" not in name}
    for name in layers:
        each = [tensors[f"{prefix}Transformer/encoderblock_{layer}/{name}"] for layer in range(depth)]
        found[f"{prefix}Transformer/encoderblock/{name}"] = np.stack(each)
    return found


def config_of(imported: Imported, config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """config.json for what is exported: the one that was read, with another image size or number of classes where these changed."""
    ours = imported.config
    if config is None or not isinstance(ours, ViTConfig):
        return None if config is None else dict(config)
    changed = dict(config)
    if "image_size" in changed and changed["image_size"] not in (ours.image_size, [ours.image_size] * 2):
        changed["image_size"] = ours.image_size
    if ours.head and len(changed.get("id2label", {})) not in (0, ours.classes):
        labels = {str(index): f"LABEL_{index}" for index in range(ours.classes)}
        changed["id2label"] = labels
        changed["label2id"] = {label: int(index) for index, label in labels.items()}
    return changed
