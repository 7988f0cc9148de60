"""What a device would hold and do in a training step, before there is one: by model and mesh, up to hundreds of devices, on a laptop.

The step is compiled for as many CPU devices as the mesh has, in a process of its own, from shapes: no array is ever made. XLA's
partitioner says what each device gets:

    state      the arguments of the compiled step: parameters, the optimizer's state, the batch. Exact.
    kept       what the forward half leaves for the backward half, the results of a compiled forward half: activations, and weights that
               were gathered or cast. A kernel that keeps no scores stands in for attention. XLA's compilers for accelerators recompute a
               few per cent of it, and find room for a few per cent of scratch.
    memory     state + the greater of kept and the gradients, which replace it; with accumulated micro-batches, state + both.
    TFLOP      XLA's count for a device and a step, and the two products of attention, that of all pairs of tokens.
    exchanged  the results of all collective operations on a device, in a step, at 4 bytes a number; half as much where a program for
               an accelerator exchanges bfloat16.

Layers are alike, so all of these are a constant and a share for each layer: a model of many layers is measured with two and with four.

    python -m prenorm_jax.training.estimate {gpt,vit} SIZE [...] --devices 8 256 --per-device 1 [--json FILE]
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from prenorm_jax import models
from prenorm_jax.models.config import ConfigError, GPTConfig, ViTConfig, require
from prenorm_jax.training.experiment import Experiment, Mesh, Train, as_tree, read_experiment
from prenorm_jax.training.results import save_beside

DEPTHS = (2, 4)
MOST_DEVICES = 4096  # more is a slip of the hand, and compiling for a million devices comes to no end
KEPT = ("JAX_ENABLE_X64",)  # of the environment's settings of JAX, in the process that compiles
TITLES = ("model", "data x fsdp x tensor", "batch", "state", "kept", "memory", "TFLOP", "exchanged", "whole")


def of(experiment: Experiment) -> str:
    """The table for an experiment: its mesh, and other meshes of as many devices. Raises ConfigError where the mesh can't be."""
    import jax

    from prenorm_jax.training import sharding

    asked = experiment.mesh
    others = asked.fsdp * asked.tensor
    devices = asked.data * others or max(jax.device_count(), others)
    require(devices <= MOST_DEVICES, "config.mesh", f"{devices} devices", f"{MOST_DEVICES} at most in an estimate")
    require(devices % others == 0, "config.mesh", f"fsdp x tensor = {others}", f"a divisor of the {devices} devices")
    first = dataclasses.replace(asked, data=devices // others)
    # An estimate evaluates nothing, so its batch needn't come out even.
    whole = dataclasses.replace(experiment.train, eval_batch_size=first.data * first.fsdp)
    sharding.require_splits(dataclasses.replace(experiment, train=whole), dataclasses.asdict(first))
    meshes = [first, *(mesh for mesh in candidates(experiment, devices) if mesh != first)]
    return table([row for mesh in meshes for row in rows(dataclasses.replace(experiment, mesh=mesh))])


def candidates(experiment: Experiment, devices: int) -> list[Mesh]:
    """The usual meshes of so many devices that the experiment's heads and batch allow."""
    node = min(8, devices)
    found = [Mesh(data=devices), Mesh(data=1, fsdp=devices), Mesh(data=devices // node, fsdp=node)]
    found.append(Mesh(data=1, fsdp=devices // node, tensor=node))
    settings, heads = experiment.train, experiment.model.heads
    return [
        mesh
        for mesh in dict.fromkeys(found)
        if mesh.data * mesh.fsdp * mesh.tensor == devices
        and heads % mesh.tensor == 0
        and settings.batch_size // settings.accumulate % (mesh.data * mesh.fsdp) == 0
    ]


def rows(experiment: Experiment) -> list[dict[str, Any]]:
    """One row, measured in a process of its own that has as many CPU devices as the mesh. Raises ConfigError where it fails."""
    mesh = experiment.mesh
    count = mesh.data * mesh.fsdp * mesh.tensor
    flags = f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=0"
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "JAX_")) or key in KEPT},
        "XLA_FLAGS": f"{flags} --xla_llvm_disable_expensive_passes=true",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(pathlib.Path(__file__).parents[2]), *sys.path])),
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__ if __name__ != "__main__" else "prenorm_jax.training.estimate", "--measure"],
        input=json.dumps(as_tree(dataclasses.replace(experiment, estimate=False))),
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        # JAX has lines of its own behind the error's.
        lines = (line.strip() for line in done.stderr.splitlines())
        said = [line for line in lines if line and not line.startswith(("-----", "For simplicity, JAX"))]
        raise ConfigError(
            f"config.estimate: {name_of(experiment)} on {count} devices: {said[-1] if said else 'no message'}"
        )
    return [json.loads(done.stdout)]


def measure(experiment: Experiment) -> dict[str, Any]:
    """A row of the table, in a process that has the devices."""
    depth = experiment.model.depth
    if depth <= DEPTHS[1]:
        found = _at_depth(experiment, depth)
    else:
        low, high = (_at_depth(experiment, shallow) for shallow in DEPTHS)
        share = (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
        found = {key: low[key] + share * (high[key] - low[key]) for key in low}
    kept, gradients = found["kept"], found["gradients"]
    accumulated = experiment.train.accumulate > 1
    mesh = experiment.mesh
    return {
        "model": name_of(experiment),
        "mesh": [mesh.data, mesh.fsdp, mesh.tensor],
        "batch": experiment.train.batch_size,
        **found,
        "memory": found["state"] + (kept + gradients if accumulated else max(kept, gradients)),
        "whole": _wholes(experiment),
    }


def _at_depth(experiment: Experiment, depth: int) -> dict[str, float]:
    """The figures of a model of so many layers, looped: XLA counts the body of a loop once."""
    import jax

    from prenorm_jax import placement
    from prenorm_jax.training import sharding
    from prenorm_jax.training.optimizer import make_optimizer
    from prenorm_jax.training.step import abstract_state, make_train_step
    from prenorm_jax.training.tasks import task_of

    model = dataclasses.replace(experiment.model, depth=depth, scan_layers=False, unroll=False)
    settings, task, mesh = experiment.train, task_of(experiment), sharding.make_mesh(experiment.mesh)
    tx = make_optimizer(experiment.optimizer, settings.steps)
    state, batch = abstract_state(model, tx, settings.coordinates), _batch(model, settings.batch_size)
    step = make_train_step(model, task, tx, coordinates=settings.coordinates, accumulate=settings.accumulate, mesh=mesh)
    with _stand_ins(experiment.model):
        compiled = step.lower(state, batch).compile()  # type: ignore[attr-defined]

    def forward_half(running: Any, batch: Any) -> Any:
        def loss(running: Any) -> jax.Array:
            logits, _ = models.apply(model, running, batch["inputs"], only_read=True)
            return task.judge(logits, batch["targets"])["loss"].mean()

        with placement.within(mesh):
            kept = jax.tree.leaves(jax.vjp(loss, running)[1])
        given = {id(leaf) for leaf in jax.tree.leaves((running, batch))}
        return [leaf for leaf in kept if id(leaf) not in given]

    running = models.abstract(model)
    places = sharding.param_shardings(running, model, mesh)
    micro = _batch(model, settings.batch_size // settings.accumulate)
    with _stand_ins(experiment.model):
        half = (
            jax.jit(forward_half, in_shardings=(places, sharding.batch_sharding(mesh))).lower(running, micro).compile()
        )
    analysis: Any = half.memory_analysis()
    gradients = sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(
            jax.tree.leaves(state.params),
            jax.tree.leaves(sharding.param_shardings(state.params, model, mesh)),
            strict=True,
        )
    )
    length = model.context if isinstance(model, GPTConfig) else model.tokens
    read = None if _looped(experiment.model) or isinstance(model, GPTConfig) else model.read_tokens
    queries = (depth - 1) * length + (read or length)
    attention = 12.0 * model.width * settings.batch_size * queries * length / math.prod(mesh.shape.values())
    return {
        "state": float(compiled.memory_analysis().argument_size_in_bytes),
        "kept": float(analysis.output_size_in_bytes),
        "gradients": float(gradients),
        "flop": float(compiled.cost_analysis()["flops"]) + attention,
        "exchanged": float(_exchanged(compiled.as_text())),
    }


def _looped(model: ViTConfig | GPTConfig) -> bool:
    """Whether the blocks run in one loop, the last of them for all tokens too."""
    return model.scan_layers and not model.unroll


@contextlib.contextmanager
def _stand_ins(model: ViTConfig | GPTConfig) -> Iterator[None]:
    """Models that are traced in here attend by `_attend_without_scores`, keep what several products read once, and compute of their last
    block what `model` does."""
    from prenorm_jax.models import attention, blocks

    attend, few = attention.attend, blocks.FEW
    shared: Any = attention.shared
    attention.attend = _attend_without_scores
    attention.shared = lambda x, readers: (x,) * readers  # type: ignore[assignment]
    blocks.FEW = sys.maxsize if _looped(model) else few
    try:
        yield
    finally:
        attention.attend, attention.shared, blocks.FEW = attend, shared, few


def _attend_without_scores(q: Any, k: Any, v: Any, **_: Any) -> Any:
    """What a fused kernel keeps: queries, keys, values, and a number a row; the result is what the product behind keeps. The arithmetic
    means nothing."""
    import jax

    @jax.custom_vjp
    def attend(q: Any, k: Any, v: Any) -> Any:
        return q + k[:, : q.shape[1]] + v[:, : q.shape[1]]

    def forward(q: Any, k: Any, v: Any) -> Any:
        out = q + k[:, : q.shape[1]] + v[:, : q.shape[1]]
        return out, (q, k, v, out.astype("float32").sum(-1))

    def backward(kept: Any, gradient: Any) -> Any:
        q, k, v, sums = kept
        shared = gradient + sums[..., None].astype(gradient.dtype)
        seen = shared.sum(1, keepdims=True) if q.shape != k.shape else shared  # a few queries see all keys
        return q * shared, k * seen, v * seen

    attend.defvjp(forward, backward)
    return attend(q, k, v)


def _batch(model: ViTConfig | GPTConfig, size: int) -> dict[str, Any]:
    import jax

    def shape(*sizes: int, dtype: str = "int32") -> Any:
        return jax.ShapeDtypeStruct((size, *sizes), dtype)

    weights = shape(dtype="float32")
    if isinstance(model, GPTConfig):
        return {"inputs": shape(model.context), "targets": shape(model.context), "weights": weights}
    pixels = shape(model.image_size, model.image_size, model.channels, dtype="float32")
    return {"inputs": pixels, "targets": shape(), "weights": weights}


_COLLECTIVE = re.compile(r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def _exchanged(program: str) -> int:
    """Bytes that the collective operations of a compiled program result in, at 4 bytes a number.

    >>> _exchanged("  %x = (f32[2,3]{1,0}, bf16[5]{0}) all-reduce(%a, %b), channel_id=1")
    44
    """
    shapes = (shape for found in _COLLECTIVE.findall(program) for shape in re.findall(r"\w+\[([\d,]*)\]", found))
    return sum(4 * math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)


def _wholes(experiment: Experiment) -> list[str]:
    import jax

    from prenorm_jax.training import sharding

    coordinates = experiment.train.coordinates
    params = jax.eval_shape(lambda: models.init(experiment.model, 0, coordinates))
    found = sharding.wholes(params, experiment.model, sharding.make_mesh(experiment.mesh))
    return sorted({re.sub(r"blocks/\d+/", "blocks/*/", path) for path in found})


def name_of(experiment: Experiment) -> str:
    """As the table calls a model: its paper size where it has one, its variant and its coordinates."""
    model = experiment.model
    family, table = ("ViT", models.VIT_SIZES) if isinstance(model, ViTConfig) else ("GPT", models.GPT_SIZES)
    shape = {"width": model.width, "depth": model.depth, "heads": model.heads, "mlp_width": model.mlp_width}
    size = next((name for name, found in table.items() if found == shape), f"{model.width} x {model.depth}")
    patch = f"/{model.patch_size}" if isinstance(model, ViTConfig) else ""
    remat = f", remat ({model.remat_saves})" if model.remat else ""
    return f"{family} {size}{patch}, {model.norm}, {experiment.train.coordinates}{remat}"


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a row a model and mesh. GiB and TFLOP of one device."""
    lines = [f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|"]
    for row in found:
        sizes = [f"{row[key] / 2**30:.2f} GiB" for key in ("state", "kept", "memory")]
        whole = ", ".join(row["whole"]) or "none"
        lines.append(
            f"| {row['model']} | {' x '.join(map(str, row['mesh']))} | {row['batch']} | {' | '.join(sizes)} "
            f"| {row['flop'] / 1e12:.2f} | {row['exchanged'] / 2**30:.2f} GiB | {whole} |"
        )
    return "\n".join(lines)


def against_compiled(found: list[dict[str, Any]], folder: pathlib.Path) -> str:
    """Markdown: rows of one device beside what XLA's program for an accelerator needs, where a study in `folder` has measured it."""
    lines = ["| model | batch | estimated | compiled | ratio |", "|---" * 5 + "|"]
    studies = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    entries = [entry for study in studies for entry in study.get("entries", [])]
    for row in found:
        for entry in entries:
            name = row["model"].partition(",")[0]
            same = entry["name"].replace("-", " ").lower() == name.lower() and entry["batch"] == row["batch"]
            if same and row["mesh"] == [1, 1, 1] and (entry["kind"], entry["coordinates"]) == ("training", "native"):
                peak = entry["rows"]["pre_ln"]["peak_bytes"]
                sizes = [f"{size / 2**30:.2f} GiB" for size in (row["memory"], peak)]
                lines.append(f"| {name} | {row['batch']} | {' | '.join(sizes)} | {row['memory'] / peak:.2f} |")
    return "\n".join(lines)


def experiment_of(family: str, size: str, devices: int, per_device: int, **fields: Any) -> Experiment:
    """A paper size, computing in bfloat16, with a batch of `per_device` for each device; further fields go to the model's config."""
    make = models.gpt_config if family == "gpt" else models.vit_config
    batch = devices * per_device
    return Experiment(
        task="language_modelling" if family == "gpt" else "image_classification",
        model=make(size, **{"dtype": "bfloat16", **fields}),
        train=Train(batch_size=batch, eval_batch_size=batch),
    )


def save(new: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Writes rows, beside those of other models, meshes and batches that the file holds."""
    save_beside(path, "estimates", new, lambda row: (row["model"], tuple(row["mesh"]), row["batch"]))


def main(arguments: list[str]) -> int:
    """Measures one experiment from standard input, or prints the table of named sizes. Exit status 2 for what can't be."""
    flags = argparse.ArgumentParser(prog="prenorm_jax.training.estimate", description=__doc__.partition("\n")[0])
    flags.add_argument("family", choices=("gpt", "vit"), nargs="?")
    flags.add_argument("sizes", nargs="*", metavar="SIZE")
    flags.add_argument("--devices", type=int, nargs="+", default=[8])
    flags.add_argument("--per-device", type=int, default=1, help="examples of a step for each device")
    flags.add_argument("--norm", default="pre_ln")
    flags.add_argument("--remat", choices=("nothing", "products", "activations"), help="what blocks save; default: all")
    flags.add_argument("--json", type=pathlib.Path, help="rows are added to those that it holds")
    flags.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = flags.parse_args(arguments)
    try:
        if given.measure:
            print(json.dumps(measure(read_experiment(json.load(sys.stdin)))))
            return 0
        fields: dict[str, Any] = {"norm": given.norm}
        if given.remat:
            fields |= {"remat": True, "remat_saves": given.remat}
        for size in given.sizes:
            for devices in given.devices:
                experiment = experiment_of(given.family, size, devices, given.per_device, **fields)
                for mesh in candidates(experiment, devices):
                    new = rows(dataclasses.replace(experiment, mesh=mesh))
                    print(table(new).splitlines()[-1], flush=True)
                    if given.json:
                        save(new, given.json)
    except ConfigError as error:
        print(f"prenorm_jax.training.estimate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
