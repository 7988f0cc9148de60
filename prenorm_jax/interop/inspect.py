"""Says what is in a checkpoint: its format and dtypes, its chart, its main branches, and which LayerNorms can go.

Nothing is written. What a conversion would say about the checkpoint, this says without converting it.
"""

import argparse
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from prenorm_jax.interop import safetensors
from prenorm_jax.interop.convert import MANIFEST
from prenorm_jax.interop.formats import Checkpoint, open_checkpoint
from prenorm_jax.interop.plan import Plan, RefusedError, make_plan
from prenorm_jax.main_branch import LayoutError

Rows = Iterator[tuple[str, str]]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("path", type=pathlib.Path, help="a checkpoint's file or folder")
    parser.add_argument("--tensors", action="store_true", help="list every tensor, and what it is to the main branch")


def run(chosen: argparse.Namespace) -> int:
    """Prints the description."""
    from prenorm_jax.interop import report

    checkpoint = open_checkpoint(chosen.path)
    written = checkpoint.folder / MANIFEST
    manifest = safetensors.json_object(written.read_bytes(), written) if written.is_file() else None
    plan, refused = _plan(checkpoint)
    rows = [*_contents(checkpoint), *_chart(checkpoint, manifest, refused)]
    if plan:
        rows += _branches(plan)
    report.show(str(chosen.path), rows)
    if chosen.tensors:
        report.show("tensors", _tensors(checkpoint, plan))
    return 0


def _plan(checkpoint: Checkpoint) -> tuple[Plan | None, str]:
    """What a conversion would do, or why there is none."""
    if checkpoint.config is None:
        return None, "no config.json beside it"
    try:
        return make_plan(checkpoint), ""
    except (RefusedError, LayoutError) as error:
        return None, str(error)


def _contents(checkpoint: Checkpoint) -> Rows:
    tensors = checkpoint.tensors.values()
    yield "format", f"{checkpoint.format}, {len(checkpoint.files)} file{'s' * (len(checkpoint.files) > 1)}"
    yield (
        "tensors",
        f"{len(tensors)}, {sum(t.size for t in tensors):,} parameters, {sum(t.nbytes for t in tensors) / 1e9:.3f} GB",
    )
    yield "dtypes", ", ".join(f"{dtype} ({count})" for dtype, count in Counter(str(t.dtype) for t in tensors).items())


def _chart(checkpoint: Checkpoint, manifest: dict[str, Any] | None, refused: str) -> Rows:
    said = manifest or checkpoint.metadata
    known = said.get("chart")
    yield "chart", str(known) if known else "not said; as released, so pre_ln where it can be converted"
    if refused and not manifest:
        yield "convertible", f"no: {refused}"


def _branches(plan: Plan) -> Rows:
    """The main branches, and what becomes of the norms."""
    yield "architecture", plan.model_type
    for name, branch in plan.branches.items():
        readers = sum(len(norm.readers) for norm in branch.norms)
        lanes = plan.tensors[branch.writers[0].leaf].shape[branch.writers[0].axis]
        yield (
            f"main branch {name}",
            f"width {lanes}; {len(branch.writers)} writers, {len(branch.norms)} norms, {readers} readers",
        )
    yield from norm_rows(plan.norms)
    for module, reason in plan.recentered.items():
        yield f"input of {module}", f"to be recentered with RMSNorm: {reason}"
    if plan.untied:
        yield plan.untied[0], f"tied to {plan.untied[1]}; a conversion unties it"


def norm_rows(norms: Any) -> Rows:
    """How many LayerNorms can be RMSNorms, with which eps, and why the others can't."""
    converted = [norm for norm in norms.values() if norm["converted"]]
    eps = ", ".join(str(value) for value in sorted({norm["eps"] for norm in norms.values()}))
    yield "LayerNorms", f"{len(converted)} of {len(norms)} can be RMSNorms; eps {eps}"
    for module, norm in norms.items():
        if not norm["converted"]:
            yield f"  {module} stays", norm["reason"]


def _tensors(checkpoint: Checkpoint, plan: Plan | None) -> Rows:
    roles: dict[str, list[str]] = {}
    for name, branch in plan.branches.items() if plan else ():
        for writer in branch.writers:
            roles.setdefault(writer.leaf, []).append(f"writes to {name}")
        for norm in branch.norms:
            for reader in norm.readers:
                roles.setdefault(reader.kernel, []).append(f"reads {name} behind {str(norm.scale).rpartition('.')[0]}")
    named = plan.tensors if plan else checkpoint.tensors
    for name, tensor in named.items():
        yield name, " ".join([str(tensor.dtype), str(tensor.shape), *roles.get(name, [])])
