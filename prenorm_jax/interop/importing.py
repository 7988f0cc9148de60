"""Checkpoints into our models: a ViT's or GPT's config and parameters from the files of another library.

Both sides are accounted for: a tensor that no row of the family's key map uses, and a leaf that no tensor fills, are errors that list
them. Tensors that are no part of the function (masks, mask tokens) and tied copies are carried along, so that `exporting` writes what
was read, bit for bit.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax import models
from prenorm_jax.interop.families import Family, recognise
from prenorm_jax.interop.formats import Checkpoint, open_checkpoint
from prenorm_jax.interop.key_maps import RESHAPES, Row
from prenorm_jax.interop.positions import resized
from prenorm_jax.interop.source import ImportRefused, Source
from prenorm_jax.interop.tensors import Tensor, is_float
from prenorm_jax.models import GPTConfig, ViTConfig
from prenorm_jax.models.config import ConfigError
from prenorm_jax.paths import Tree, leaves

PREFIXES = ("_orig_mod.", "module.", "params/", "opt/target/")
"""What may stand before names: a compiled or a data-parallel module, the root of the parameters in a training state."""


@dataclasses.dataclass(frozen=True)
class Names:
    """How a checkpoint writes its names.

    Args:
      family: its key map.
      prefix: before every name.
      base: before all names of the key map but those that begin with "/"; empty in a bare model's file.
      stacked: whether all layers are one tensor, layers first (big_vision's scan).
      tied: the tied copies that the file holds.
    """

    family: Family
    prefix: str
    base: str
    stacked: bool
    tied: tuple[str, ...] = ()

    def __call__(self, name: str) -> str:
        """A name of the key map as the file writes it."""
        return self.prefix + (name[1:] if name.startswith("/") else self.base + name)


@dataclasses.dataclass(frozen=True)
class Imported:
    """A checkpoint as our model.

    Args:
      config: of our model, in the variant pre_ln.
      params: its Pre-LN tree, of numpy arrays in the dtypes of the file.
      names: how the checkpoint wrote its names.
      kept: tensors that are no part of the function, by their whole name.
    """

    config: ViTConfig | GPTConfig
    params: Tree
    names: Names
    kept: Mapping[str, np.ndarray]


def import_checkpoint(
    path: str | pathlib.Path,
    *,
    family: str = "",
    image_size: int = 0,
    classes: int = 0,
    **fields: Any,
) -> Imported:
    """Reads a checkpoint into our ViT or GPT.

    Args:
      path: a file or folder that `open_checkpoint` reads.
      family: one of `families.FAMILIES` by name; found out where it is not given.
      image_size: resizes the position table for images of this size.
      classes: a new head for so many classes, of zeros, in the place of what the checkpoint has.
      fields: of our config, over what the checkpoint says: what it does not say (`heads`), or how to compute (`dtype`).

    Raises: ImportRefused for what is no model of ours, contradicts itself, or is not finite; FormatError for files that can't be read.
    """
    checkpoint = open_checkpoint(path)
    source = _source(checkpoint, {**fields, **({"image_size": image_size} if image_size else {})})
    kind = recognise(source, family)
    names = _names(kind, source)
    tensors = _unstacked(source.tensors) if names.stacked else dict(source.tensors)
    source = dataclasses.replace(source, tensors=tensors)
    try:
        said = {**kind.fields(source), "param_dtype": _widest(source)}
        if kind.model is GPTConfig:
            said["vocab_multiple"] = 1
        if said.get("positions") == "sincos":
            said["image_size"] = image_size
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(kind.model)})
        if unknown:
            raise ImportRefused(f"{unknown[0]}: no such field of {kind.model.__name__}")
        config = kind.model(**{**said, **fields})
    except ConfigError as error:
        raise ImportRefused(f"{path}: can't run as our model: {error}") from None
    exact = without_padding(config)
    names, kept_names = _accounted(names, source, exact)
    flat = {leaf: value for row in rows_of(names, exact) for leaf, value in _read(row, names, source, exact)}
    flat = _padded(flat, config) if isinstance(config, GPTConfig) else flat
    config, flat = _with_requests(config, flat, kind, image_size, classes)
    kept = {source.prefix + name: tensors[name].read() for name in kept_names}
    kept.update({name: tensor.read() for name, tensor in source.beside.items()})
    return Imported(config, nested(flat), names, kept)


def _source(checkpoint: Checkpoint, given: Mapping[str, Any]) -> Source:
    """The tensors without what stands before all their names."""
    prefix, tensors = "", dict(checkpoint.tensors)
    while found := next((start for start in PREFIXES if any(name.startswith(start) for name in tensors)), None):
        inside = {name.removeprefix(found): tensor for name, tensor in tensors.items() if name.startswith(found)}
        outside = [name for name in tensors if not name.startswith(found)]
        if outside and found.endswith("."):
            raise ImportRefused(
                f"{checkpoint.path}: {outside[0]} lacks the prefix {found} of other names ({len(outside)} such)"
            )
        prefix, tensors = prefix + found, inside
    beside = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith(prefix)}
    return Source(checkpoint, prefix, tensors, beside, given)


def _names(family: Family, source: Source) -> Names:
    based = bool(family.base) and any(name.startswith(family.base) for name in source.tensors)
    stacked = any(name.startswith("Transformer/encoderblock/") for name in source.tensors)
    return Names(family, source.prefix, family.base if based else "", stacked)


def _unstacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers one by one, of a file that has them in one tensor, layers first."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith("Transformer/encoderblock/"):
            found[name] = tensor
            continue
        for layer in range(tensor.shape[0] if tensor.shape else 0):
            own = name.replace("encoderblock/", f"encoderblock_{layer}/")
            found[own] = Tensor(
                own,
                tensor.dtype,
                tensor.shape[1:],
                tensor.file,
                functools.partial(_layer_of, tensor, layer),
            )
    return found


def _layer_of(tensor: Tensor, layer: int) -> np.ndarray:
    return tensor.read()[layer].copy()


def _widest(source: Source) -> str:
    """The dtype that holds all floating tensors exactly."""
    dtypes = {tensor.dtype for tensor in source.tensors.values() if is_float(tensor.dtype)}
    if not dtypes:
        raise ImportRefused(
            f"{source.checkpoint.path}: no tensor of floating point in it; quantised weights can't be read"
        )
    widest = next(iter(dtypes))
    for dtype in dtypes:
        widest = jnp.promote_types(widest, dtype)
    return jnp.dtype(widest).name


def without_padding(config: ViTConfig | GPTConfig) -> ViTConfig | GPTConfig:
    """The config whose vocabulary is as long as others write it."""
    return dataclasses.replace(config, vocab_multiple=1) if isinstance(config, GPTConfig) else config


def _padded(flat: dict[str, np.ndarray], config: GPTConfig) -> dict[str, np.ndarray]:
    """Rows of zeros up to the padded vocabulary, where one was asked for; no token is there."""
    more = config.padded_vocab - config.vocab_size
    widths = {"embed/table": [(0, more), (0, 0)], "head/kernel": [(0, 0), (0, more)]}
    return {path: np.pad(value, widths[path]) if path in widths else value for path, value in flat.items()}


def rows_of(names: Names, config: ViTConfig | GPTConfig) -> Iterator[Row]:
    """The rows of this config's model, layer by layer."""
    ours = leaves(models.abstract(config))
    for row in names.family.rows:
        for layer in range(config.depth) if "{i}" in row.theirs else (None,):
            filled = Row(
                tuple(name.replace("{i}", str(layer)) for name in row.ours),
                row.theirs.replace("{i}", str(layer)),
                row.reshape,
            )
            if all(name in ours for name in filled.ours):
                yield filled


def _accounted(names: Names, source: Source, config: ViTConfig | GPTConfig) -> tuple[Names, list[str]]:
    """Holds the file against the model: (names with the tied copies it has, names of the tensors to carry along).

    Raises: ImportRefused with what is missing, unused or of another shape.
    """
    ours = leaves(models.abstract(config))
    said = names.family.name + (", as config.json says" if source.checkpoint.config else "")
    own = dataclasses.replace(names, prefix="")
    unused, wrong, missing, filled = set(source.tensors), [], [], set()
    for row in rows_of(names, config):
        name = own(row.theirs)
        filled |= set(row.ours)
        if name not in source.tensors:
            missing.append(name)
            continue
        unused.discard(name)
        zeros = [np.broadcast_to(np.int8(0), ours[leaf].shape) for leaf in row.ours]
        expected, tensor = RESHAPES[row.reshape][1](zeros, config.heads).shape, source.tensors[name]
        if tensor.shape != expected:
            wrong.append(f"{name} is {tensor.shape}, expected {expected}")
        elif not is_float(tensor.dtype):
            wrong.append(f"{name} is of {tensor.dtype}, expected floating point")
    tied = tuple(copy for copy in names.family.tied if getattr(config, "tied", False) and own(copy) in unused)
    unused -= {own(copy) for copy in tied}
    kept = [
        name
        for name in sorted(unused)
        for pattern in names.family.kept
        if re.fullmatch(re.escape(own("")) + pattern, name)
    ]
    homeless = sorted(set(ours) - filled)
    faults = {
        "missing": missing,
        "unused": sorted(unused - set(kept)),
        "of another shape": wrong,
        "our leaves that this family has no tensor for": homeless,
    }
    lines = [f"{what} ({len(found)}): {_some(found)}" for what, found in faults.items() if found]
    if lines:
        raise ImportRefused(f"{source.checkpoint.path}: contradicts {said}: " + "; ".join(lines))
    for copy in tied:
        original = own(names.family.tied[copy])
        if not np.array_equal(source.tensors[own(copy)].read(), source.tensors[original].read()):
            raise ImportRefused(
                f"{source.checkpoint.path}: {own(copy)} differs from {original}, and {said} they are tied; "
                "give tied=False (tie_word_embeddings: false) if they are not"
            )
    return dataclasses.replace(names, tied=tied), kept


def _read(row: Row, names: Names, source: Source, config: ViTConfig | GPTConfig) -> Iterable[tuple[str, np.ndarray]]:
    name = dataclasses.replace(names, prefix="")(row.theirs)
    value = source.tensors[name].read()
    if not np.all(np.isfinite(value)):
        broken = int(np.size(value) - np.count_nonzero(np.isfinite(value)))
        raise ImportRefused(
            f"{source.checkpoint.path}: {name} has {broken} values that are NaN or infinite; no model computes with them"
        )
    return zip(row.ours, map(np.ascontiguousarray, RESHAPES[row.reshape][0](value, config.heads)), strict=True)


def _with_requests(
    config: ViTConfig | GPTConfig, flat: dict[str, np.ndarray], family: Family, image_size: int, classes: int
) -> tuple[ViTConfig | GPTConfig, dict[str, np.ndarray]]:
    """Another image size, another head."""
    if not (image_size or classes):
        return config, flat
    if not isinstance(config, ViTConfig):
        raise ImportRefused("image_size and classes: got a GPT; allowed: a ViT")
    try:
        if image_size and image_size != config.image_size:
            config = dataclasses.replace(config, image_size=image_size)
            prefix, side = config.position_rows - config.patches, image_size // config.patch_size
            table = flat["position/table"]
            flat = {**flat, "position/table": resized(table, side, prefix=prefix, antialias=family.antialias)}
        if classes:
            config = dataclasses.replace(config, classes=classes, head=True)
    except ConfigError as error:
        raise ImportRefused(f"can't be: {error}") from None
    if classes:
        dtype = flat["patch/kernel"].dtype
        new = {path: leaf for path, leaf in leaves(models.abstract(config)).items() if path.startswith("head")}
        flat = {path: value for path, value in flat.items() if not path.startswith("head")}
        flat |= {path: np.zeros(leaf.shape, dtype) for path, leaf in new.items()}
    return config, flat


def nested(flat: Mapping[str, Any]) -> Tree:
    """Nested dicts with string keys, sorted as jax sorts them, from paths."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return jax.tree.map(lambda leaf: leaf, tree)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
