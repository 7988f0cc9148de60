"""Writes an imported checkpoint, or one that was trained from it, as its library writes it.

prenorm export WORKDIR DST

WORKDIR is what `prenorm import` wrote, or the workdir of a run of train.py that began with it. What was imported and not trained comes
out bit for bit; config.json, tokenizer and preprocessing are carried over.
"""

import argparse
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax import models
from prenorm_jax.interop import safetensors, stored
from prenorm_jax.interop.destination import destination
from prenorm_jax.interop.exporting import config_of, exported
from prenorm_jax.interop.formats import _library, open_checkpoint
from prenorm_jax.interop.importing import Imported, nested
from prenorm_jax.interop.tensors import FormatError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("workdir", type=pathlib.Path, metavar="WORKDIR", help="of `prenorm import` or of train.py")
    parser.add_argument("destination", type=pathlib.Path, metavar="DST", help="a folder that does not exist yet")


def run(chosen: argparse.Namespace) -> int:
    """Exports."""
    found = stored.load(chosen.workdir) if stored.is_stored(chosen.workdir) else trained(chosen.workdir)
    write(found, chosen.destination)
    print(f"{chosen.destination}: {found.imported.names.family.name}, as {found.source['file']}")
    return 0


def trained(workdir: pathlib.Path) -> stored.Stored:
    """What a run of train.py made of an import: its parameters, under the names of the checkpoint that it began with.

    Raises: FormatError where the workdir's run began with something else; LayoutError for a model that has no Pre-LN equal.
    """
    checkpoint = open_checkpoint(workdir)
    experiment = checkpoint.metadata.get("experiment", {})
    origin = experiment.get("train", {}).get("init_from", "")
    if not origin:
        raise FormatError(
            f"{workdir}: not trained from an import (train.init_from is empty), so it has no names elsewhere"
        )
    found = stored.load(pathlib.Path(origin))
    kind = {"image_classification": "vit", "language_modelling": "gpt"}[experiment["task"]]
    config = stored.read_config({"kind": kind, **experiment["model"]}, workdir)
    params = nested(checkpoint.read())
    if experiment["train"]["coordinates"] == "native":
        params = models.pre_ln(jax.tree.map(jnp.asarray, params), config)
    if config.scan_layers:
        params = models.unstack_layers(params)
    config = dataclasses.replace(config, norm="pre_ln", scan_layers=False)
    params = jax.tree.map(np.asarray, params)
    return found._replace(imported=dataclasses.replace(found.imported, config=config, params=params))


def write(found: stored.Stored, folder: pathlib.Path) -> None:
    """Writes the folder of a checkpoint; it appears under its name when all of it is there. Raises: FileExistsError."""
    with destination(folder, stored.total_bytes(found.imported)) as partial:
        shutil.copytree(found.folder / "source", partial, dirs_exist_ok=True)
        _rewrite_config(partial / "config.json", found.imported)
        WRITERS[found.source["format"]](exported(found.imported), partial, found.source)


def _rewrite_config(file: pathlib.Path, imported: Imported) -> None:
    if file.is_file():
        before = safetensors.json_object(file.read_bytes(), file)
        after = config_of(imported, before)
        if after != before:
            file.write_text(json.dumps(after, indent=2) + "\n")


Tensors = Mapping[str, np.ndarray]


def _safetensors(tensors: Tensors, folder: pathlib.Path, source: Mapping[str, Any]) -> None:
    announced = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    with safetensors.Writer(folder / source["file"], announced, {"format": "pt"}) as file:
        for name, value in tensors.items():
            file.write(name, value)


def _npz(tensors: Tensors, folder: pathlib.Path, source: Mapping[str, Any]) -> None:
    np.savez(folder / source["file"], **tensors)  # type: ignore[arg-type]


def _torch(tensors: Tensors, folder: pathlib.Path, source: Mapping[str, Any]) -> None:
    torch = _library("torch", folder, "torch files")

    def tensor(value: np.ndarray) -> Any:
        if value.dtype == jnp.bfloat16:
            return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(np.array(value))

    state = {name: tensor(value) for name, value in tensors.items()}
    args = source.get("model_args")
    name = "pytorch_model.bin" if source["file"] == "model.safetensors" else source["file"]
    torch.save(state if args is None else {"model": state, "model_args": args}, folder / name)


WRITERS = {"safetensors": _safetensors, "npz": _npz, "torch": _torch}
