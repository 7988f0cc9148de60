"""An imported checkpoint on disk: our parameters, written by Orbax, beside what is needed to train, to evaluate and to go back.

parameters/          the Pre-LN tree
model.json           our config, the manifest, and how the checkpoint wrote its names
kept.safetensors     tensors that are no part of the function, where there are any
source/              config.json, tokenizer and preprocessing of the checkpoint
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

from prenorm_jax import models
from prenorm_jax.interop import safetensors
from prenorm_jax.interop.destination import destination
from prenorm_jax.interop.families import FAMILIES
from prenorm_jax.interop.formats import Checkpoint, _library, open_checkpoint
from prenorm_jax.interop.importing import Imported, Names, nested
from prenorm_jax.interop.preprocessing import preprocessing
from prenorm_jax.interop.tensors import FormatError
from prenorm_jax.manifest import check_manifest, manifest
from prenorm_jax.models import GPTConfig, ViTConfig
from prenorm_jax.models.config import ConfigError
from prenorm_jax.paths import leaves
from prenorm_jax.version import VERSION

FORMAT = 1
MODELS = {"vit": ViTConfig, "gpt": GPTConfig}
CARRIED = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
    ),
    *("README.md", "LICENSE", "LICENSE.txt"),
)
"""Files of a checkpoint's folder that go along."""


class Stored(NamedTuple):
    """An import on disk: the checkpoint, its folder, and what the source said about itself (file name, format, arguments)."""

    imported: Imported
    folder: pathlib.Path
    source: Mapping[str, Any]


def save(imported: Imported, checkpoint: Checkpoint, folder: pathlib.Path) -> None:
    """Writes an import; the folder appears under its name when all of it is there.

    Raises: FileExistsError where it exists; FormatError without Orbax.
    """
    ocp: Any = _library("orbax.checkpoint", folder, "imported checkpoints")
    config, names, metadata = imported.config, imported.names, checkpoint.metadata
    kept = {name: (value.dtype, value.shape) for name, value in imported.kept.items()}
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    size = getattr(config, "image_size", 0)
    prepared = preprocessing(root, checkpoint.config or {}, names.family, size) if size else None
    about = {
        "format": FORMAT,
        "prenorm_jax": VERSION,
        "model": {"kind": _kind(config), **dataclasses.asdict(config)},
        "coordinates": "pre_ln",
        "names": {
            **{name: getattr(names, name) for name in ("prefix", "base", "stacked", "tied")},
            "family": names.family.name,
        },
        "source": {
            "file": "model.safetensors" if checkpoint.path.is_dir() else checkpoint.path.name,
            "format": checkpoint.format,
            **({"model_args": metadata["model_args"]} if "model_args" in metadata else {}),
        },
        "manifest": manifest(imported.params, models.main_branch(config), "pre_ln", computation=config.dtype),
    }
    with destination(folder, total_bytes(imported)) as partial:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial / "parameters", imported.params)
        (partial / "source").mkdir()
        for name in CARRIED:
            if (root / name).is_file():
                shutil.copy(root / name, partial / "source" / name)
        if prepared is not None:
            (partial / "source" / "preprocessor_config.json").write_text(json.dumps(prepared, indent=2) + "\n")
        if kept:
            with safetensors.Writer(partial / "kept.safetensors", kept) as file:
                for name, value in imported.kept.items():
                    file.write(name, value)
        (partial / "model.json").write_text(json.dumps(about, indent=2) + "\n")


def total_bytes(imported: Imported) -> int:
    """What an import takes on disk, near enough."""
    return sum(leaf.nbytes for leaf in [*leaves(imported.params).values(), *imported.kept.values()])


def load(folder: pathlib.Path) -> Stored:
    """Reads what `save` wrote. Raises: FormatError where it is something else, LayoutError where the manifest is not the tree's."""
    about = _about(folder)
    said = about["names"]
    family = next((family for family in FAMILIES if family.name == said["family"]), None)
    if family is None:
        raise FormatError(
            f"{folder / 'model.json'}: family {said['family']!r} is not known to this version ({VERSION})"
        )
    names = Names(family, said["prefix"], said["base"], said["stacked"], tuple(said["tied"]))
    config = read_config(about["model"], folder)
    params = nested(open_checkpoint(folder / "parameters").read())
    check_manifest(about["manifest"], params, models.main_branch(config))
    kept = safetensors.read(folder / "kept.safetensors")[0] if (folder / "kept.safetensors").is_file() else {}
    imported = Imported(config, params, names, {name: tensor.read() for name, tensor in kept.items()})
    return Stored(imported, folder, about["source"])


def describe(folder: pathlib.Path) -> ViTConfig | GPTConfig:
    """The config of an import; reads no parameters. Raises: FormatError."""
    return read_config(_about(folder)["model"], folder)


def is_stored(folder: pathlib.Path) -> bool:
    """Whether a folder is one that `save` wrote."""
    return (folder / "model.json").is_file() and (folder / "parameters").is_dir()


def read_config(said: Mapping[str, Any], where: pathlib.Path) -> ViTConfig | GPTConfig:
    """A config from its fields and "kind": vit or gpt. Raises: FormatError for what is none."""
    fields = {key: value for key, value in said.items() if key != "kind"}
    try:
        return MODELS[said["kind"]](**fields)
    except (KeyError, TypeError, ConfigError) as error:
        raise FormatError(f"{where}: its model is none of this version's ({error})") from None


def _kind(config: ViTConfig | GPTConfig) -> str:
    return next(kind for kind, model in MODELS.items() if isinstance(config, model))


def _about(folder: pathlib.Path) -> dict[str, Any]:
    if not is_stored(folder):
        raise FormatError(f"{folder}: no model.json and parameters in it; expected what `prenorm import` writes")
    file = folder / "model.json"
    about = safetensors.json_object(file.read_bytes(), file)
    if about.get("format") != FORMAT:
        raise FormatError(f"{file}: format {about.get('format')!r}; this version ({VERSION}) reads {FORMAT}")
    expected = {"model": dict, "names": dict, "source": dict, "manifest": dict}
    wrong = [name for name, kind in expected.items() if not isinstance(about.get(name), kind)]
    if wrong:
        raise FormatError(f"{file}: {wrong[0]} is missing; expected what `prenorm import` writes")
    return about
