"""Reads a checkpoint into our ViT or GPT, to train and evaluate it in every variant.

prenorm import SRC WORKDIR [--image-size 384] [--classes 10] [--set heads=6 --set dtype=bfloat16]

SRC is a folder or file of transformers (GPT-2, ViT, DeiT, DINOv2), nanoGPT, timm, big_vision or vision_transformer. WORKDIR then serves
`train.py --config=configs/pretrained.py:WORKDIR`, `eval.py --config=configs/pretrained.py:WORKDIR` and `prenorm export`.
"""

import argparse
import json
import pathlib
from typing import Any

from prenorm_jax import models
from prenorm_jax.interop import stored
from prenorm_jax.interop.destination import lies_in
from prenorm_jax.interop.families import FAMILIES
from prenorm_jax.interop.formats import open_checkpoint
from prenorm_jax.interop.importing import import_checkpoint
from prenorm_jax.interop.source import ImportRefused


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("source", type=pathlib.Path, metavar="SRC", help="a checkpoint's file or folder")
    parser.add_argument("workdir", type=pathlib.Path, metavar="WORKDIR", help="a folder that does not exist yet")
    parser.add_argument("--family", default="", help=", ".join(family.name for family in FAMILIES))
    parser.add_argument("--image-size", type=int, default=0, help="resize the position table for images of this size")
    parser.add_argument("--classes", type=int, default=0, help="a new head for so many classes")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of our config")


def run(chosen: argparse.Namespace) -> int:
    """Imports, and says what it is now. Raises: ImportRefused for a workdir in the source."""
    if chosen.source.is_dir() and lies_in(chosen.workdir, chosen.source):
        raise ImportRefused(f"{chosen.workdir}: lies in the source, which is left as it is; name another folder")
    imported = import_checkpoint(
        chosen.source,
        family=chosen.family,
        image_size=chosen.image_size,
        classes=chosen.classes,
        **dict(map(field, chosen.set)),
    )
    stored.save(imported, open_checkpoint(chosen.source), chosen.workdir)
    config = imported.config
    print(
        f"{chosen.workdir}: {imported.names.family.name}, width {config.width}, depth {config.depth}, {config.heads} heads, "
        f"{models.count(config):,} parameters in {config.param_dtype}, eps {config.eps:g}, GELU {config.gelu}"
        + (f"; carried along: {', '.join(imported.kept)}" if imported.kept else "")
    )
    return 0


def field(text: str) -> tuple[str, Any]:
    """FIELD=VALUE as a name and a number, a truth value or a word. Raises: ImportRefused.

    >>> field("heads=3"), field("gelu=tanh"), field("tied=false")
    (('heads', 3), ('gelu', 'tanh'), ('tied', False))
    """
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise ImportRefused(f"--set: got {text!r}; allowed: FIELD=VALUE, such as heads=12")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
