"""Ahead of time: the train step and the eval step of every shipped model, lowered for a platform that is not there (jax.export).

    python -m prenorm_jax.training.export [--platform tpu] [--only WORD,...]

Lowering runs each operation's rules for the platform, with the shapes of the model: what has no such rule, or none for these shapes, is
an error here, not on the first day with the machine. Nothing is compiled, and no array is made.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.export

from prenorm_jax import models
from prenorm_jax.models.config import BASES, LAYOUTS, ConfigError, GPTConfig, ViTConfig, require
from prenorm_jax.training import sharding
from prenorm_jax.training.experiment import COORDINATES, Mesh, Optimizer
from prenorm_jax.training.optimizer import make_optimizer
from prenorm_jax.training.step import abstract_state, make_eval_step, make_train_step
from prenorm_jax.training.tasks import ImageClassification, LanguageModelling, Task

Config = ViTConfig | GPTConfig
VIT_SIZES = ("Ti/16", "S/16", "B/16", "L/16", "H/14", "G/14")
FORMS: tuple[dict[str, str], ...] = (
    {"norm": "pre_ln"},
    {"norm": "pre_rmsnorm"},
    *({"norm": "pre_crmsnorm", "basis": basis, "layout": layout} for basis in BASES for layout in LAYOUTS),
)


def shipped(sizes: tuple[str, ...] = (*VIT_SIZES, *models.GPT_SIZES), **fields: Any) -> Iterator[tuple[str, Config]]:
    """(name, config) of every size in every form, computing in bfloat16; further fields go to the configs.

    >>> [name for name, _ in shipped(("S/16",))][:3]
    ['ViT-S/16, pre_ln', 'ViT-S/16, pre_rmsnorm', 'ViT-S/16, pre_crmsnorm reflect packed']
    """
    for size in sizes:
        family, make = ("ViT-", models.vit_config) if "/" in size else ("GPT ", models.gpt_config)
        for form in FORMS:
            config: Config = make(size, **{"dtype": "bfloat16", **form, **fields})
            yield f"{family}{size}, {' '.join(form.values())}", config


def lower(config: Config, coordinates: str, platform: str = "tpu", batch: int = 8) -> dict[str, jax.export.Exported]:
    """{"train": ..., "eval": ...}: both steps on a batch, for one device of a platform.

    Raises: what JAX raises where an operation can't be lowered.
    """
    # "auto" asks which platform this process runs on.
    config = dataclasses.replace(config, attention="xla")
    task: Task = LanguageModelling(config.vocab_size) if isinstance(config, GPTConfig) else ImageClassification(0.1)
    tx, mesh = make_optimizer(Optimizer(), 1000), sharding.make_mesh(Mesh(data=1))
    inputs = abstract_batch(config, batch)
    train: Any = make_train_step(config, task, tx, coordinates=coordinates, mesh=mesh)
    judge: Any = make_eval_step(config, task, mesh)
    return {
        "train": jax.export.export(train, platforms=(platform,))(abstract_state(config, tx, coordinates), inputs),
        "eval": jax.export.export(judge, platforms=(platform,))(models.abstract(config), inputs),
    }


def abstract_batch(config: Config, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch: {"inputs", "targets", "weights"}."""
    weights = jax.ShapeDtypeStruct((size,), "float32")
    if isinstance(config, GPTConfig):
        tokens = jax.ShapeDtypeStruct((size, config.context), "int32")
        return {"inputs": tokens, "targets": tokens, "weights": weights}
    pixels = jax.ShapeDtypeStruct((size, config.image_size, config.image_size, config.channels), "float32")
    return {"inputs": pixels, "targets": jax.ShapeDtypeStruct((size,), "int32"), "weights": weights}


def main(arguments: list[str]) -> int:
    """Lowers all that `--only` leaves; exit status 1 where something can't be, 2 where nothing is left."""
    flags = argparse.ArgumentParser(prog="prenorm_jax.training.export", description=(__doc__ or "").partition("\n")[0])
    flags.add_argument("--platform", default="tpu")
    flags.add_argument("--batch", type=int, default=8)
    flags.add_argument("--only", default="", metavar="WORD,...", help="models whose lines hold all words, as in S/16")
    flags.add_argument("--scan-layers", action="store_true", help="layers stacked: faster, and another program")
    given = flags.parse_args(arguments)
    failed, seen = 0, 0
    for name, config in shipped(scan_layers=given.scan_layers):
        for coordinates in COORDINATES:
            line = f"{name}, {coordinates}"
            if not all(word in line for word in given.only.split(",")):
                continue
            seen, begun = seen + 1, time.monotonic()
            try:
                done = lower(config, coordinates, given.platform, given.batch)
                sizes = ", ".join(
                    f"{step} {len(each.mlir_module_serialized) / 2**20:.1f} MiB" for step, each in done.items()
                )
            except Exception as error:  # whatever a lowering rule raises: the next model may do
                failed, sizes = failed + 1, f"FAILED: {str(error).splitlines()[0]}"
            print(f"{line}: {sizes}, {time.monotonic() - begun:.0f} s", flush=True)
    try:
        require(seen > 0, "--only", given.only, "words of a line, such as S/16 or pre_rmsnorm or native")
    except ConfigError as error:
        print(f"prenorm_jax.training.export: {error}", file=sys.stderr)
        return 2
    print(f"{seen - failed} of {seen} lowered for {given.platform}, jax {jax.__version__}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
