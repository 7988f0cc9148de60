"""Converts a checkpoint of HF transformers in place of names: recentered weights for LayerNorm or RMSNorm.

The destination is a checkpoint that the stock code loads, the same function with LayerNorm as it is, and the same function with
RMSNorm in place of the LayerNorms that its prenorm.json lists. Tokenizer and other files come along; tensors are read, converted
and written one by one.
"""

import argparse
import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_dtypes
import numpy as np

from prenorm_jax.interop import safetensors
from prenorm_jax.interop.card import card
from prenorm_jax.interop.destination import destination, lies_in
from prenorm_jax.interop.formats import Checkpoint, open_checkpoint
from prenorm_jax.interop.plan import Plan, RefusedError, make_plan
from prenorm_jax.interop.streaming import converted, target_dtype
from prenorm_jax.manifest import manifest
from prenorm_jax.version import VERSION

MANIFEST = "prenorm.json"
FORMAT = 1
DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# Weights in whatever format: what is converted is written anew, and the rest would be of another chart.
WEIGHTS = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".npz",
    ".onnx",
    ".onnx_data",
    ".pkl",
    ".ot",
    ".gguf",
    ".tflite",
}

Progress = Callable[[str, int], None]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("source", type=pathlib.Path, help="a checkpoint's folder, with its config.json")
    parser.add_argument("destination", type=pathlib.Path, help="the folder to write; must not exist")
    parser.add_argument("--to", choices=["pre_rmsnorm"], required=True, help="the chart of the destination")
    parser.add_argument("--fold", action="store_true", help="fold the norms' weights and biases into what reads them")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the destination's weights (default: the source's)")
    parser.add_argument(
        "--keep-tied",
        action="store_true",
        help="leave a tied embedding table as it is: the model has to recenter what it looks up",
    )


def run(chosen: argparse.Namespace) -> int:
    """Converts and says what was done."""
    from prenorm_jax.interop import report

    checkpoint = open_checkpoint(chosen.source)
    plan = make_plan(checkpoint, fold=chosen.fold, keep_tied=chosen.keep_tied)
    dtype = DTYPES[chosen.dtype] if chosen.dtype else None
    with report.progress(total_bytes(plan, dtype)) as advance:
        write(checkpoint, plan, chosen.destination, fold=chosen.fold, dtype=dtype, advance=advance)
    report.print_conversion(chosen.destination, plan)
    return 0


def total_bytes(plan: Plan, dtype: np.dtype | None = None) -> int:
    """Size of the destination's tensors."""
    return sum(tensor.size * target_dtype(tensor, dtype).itemsize for tensor in plan.tensors.values())


def write(
    checkpoint: Checkpoint,
    plan: Plan,
    path: pathlib.Path,
    *,
    fold: bool = False,
    dtype: np.dtype | None = None,
    advance: Progress = lambda name, size: None,
    threads: int = 2,
) -> None:
    """Carries out a plan.

    Args:
      path: the folder to make; appears when all of it is on disk.
      fold, dtype: as `make_plan` and `streaming.converted` have them.
      advance: is told each tensor that is done, and its bytes.

    Raises: RefusedError for a checkpoint that is converted already or holds NaN or infinity; OSError, as `destination` says.
    """
    source = checkpoint.folder
    if (source / MANIFEST).exists():
        raise RefusedError(
            f"{source}: has a {MANIFEST}, so it is converted already; convert the checkpoint that it was made from"
        )
    if lies_in(path, source):
        raise RefusedError(f"{path}: lies in the source, which is left as it is; name another destination")
    with destination(path, total_bytes(plan, dtype)) as folder, ThreadPoolExecutor(threads) as pool:
        with contextlib.ExitStack() as open_files:
            shards = _open_shards(checkpoint, plan, folder, dtype, open_files)
            for name, value in converted(plan, dtype, pool):
                shards[name].write(name, value)
                advance(name, value.nbytes)
        _carry_over(source, folder)
        config = dict(plan.config)
        if dtype is not None:
            config["dtype" if "dtype" in config or "torch_dtype" not in config else "torch_dtype"] = dtype.name
        _write_json(folder / "config.json", config)
        _write_json(folder / MANIFEST, describe(plan, dtype))
        readme = folder / "README.md"
        before = readme.read_bytes() + b"\n" if readme.exists() else b""  # in whatever encoding
        readme.write_bytes(before + card(plan, fold).encode())


def describe(plan: Plan, dtype: np.dtype | None = None) -> dict[str, Any]:
    """What prenorm.json says: for whoever runs the model with RMSNorm, and each main branch's manifest."""
    streams = {}
    for name, branch in plan.branches.items():
        leaves = {path: plan.tensors[path] for path in _leaves(plan, name)}
        shapes = {path: jax.ShapeDtypeStruct(leaf.shape, target_dtype(leaf, dtype)) for path, leaf in leaves.items()}
        streams[name] = manifest(shapes, branch, "pre_rmsnorm")
    return {
        "format": FORMAT,
        "prenorm_jax": VERSION,
        "architecture": plan.model_type,
        "chart": "pre_rmsnorm",
        "norms": plan.norms,
        "recenter": [{"module": module, "reason": reason} for module, reason in plan.recentered.items()],
        "untied": dict([plan.untied]) if plan.untied else {},
        "streams": streams,
    }


def _leaves(plan: Plan, stream: str) -> Iterator[str]:
    """The leaves of one main branch."""
    branch = plan.branches[stream]
    seen = {}
    for writer in branch.writers:
        seen.update(dict.fromkeys((writer.leaf, writer.scale)))
    for norm in branch.norms:
        seen.update(dict.fromkeys((norm.scale, norm.bias)))
        for reader in norm.readers:
            seen.update(dict.fromkeys((reader.kernel, reader.bias)))
    return (name for name in seen if name is not None)


def _open_shards(
    checkpoint: Checkpoint, plan: Plan, folder: pathlib.Path, dtype: np.dtype | None, open_files: contextlib.ExitStack
) -> dict[str, safetensors.Writer]:
    """Tensor -> the file that it goes to: the source's shards, as safetensors; with their index, where they are several."""
    files: dict[str, dict[str, Any]] = {}
    for name, tensor in plan.tensors.items():
        shard = tensor.file.name.replace("pytorch_model", "model").removesuffix(tensor.file.suffix) + ".safetensors"
        files.setdefault(shard, {})[name] = (target_dtype(tensor, dtype), tensor.shape)
    if len(files) == 1:
        files = {"model.safetensors": next(iter(files.values()))}
    else:
        index = {
            "metadata": {"total_size": total_bytes(plan, dtype)},
            "weight_map": {name: shard for shard, held in files.items() for name in held},
        }
        _write_json(folder / "model.safetensors.index.json", index)
    shards = {}
    for shard, held in files.items():
        file = open_files.enter_context(safetensors.Writer(folder / shard, held, {"format": "pt"}))
        shards.update(dict.fromkeys(held, file))
    return shards


def _carry_over(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Everything beside the weights, with permissions of its own: a cache's files may not be written to."""
    for file in sorted(source.rglob("*")):
        within = file.relative_to(source)
        hidden = any(part.startswith(".") for part in within.parts)
        if file.is_file() and not (hidden or file.suffix.lower() in WEIGHTS or file.name.endswith(".index.json")):
            target = folder / within
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
