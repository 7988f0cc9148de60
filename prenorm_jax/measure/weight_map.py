"""What mapping all weights costs a training step: python -m prenorm_jax.measure.weight_map vit B/16 --batch 256 [--json PATH]

A step in Pre-LN coordinates maps the trained weights to the variant's, and pulls the gradient back through the map; a native step has
neither. Two tables, taken in one process with interleaved windows (`step_time`):

    steps   each variant's step in native coordinates, again (the noise floor), and in Pre-LN coordinates; ratio to its native step.
    maps    the map alone, and with its pull-back, of our tree and, for a ViT, of one that is laid out as
            google-research/vision_transformer's. Seconds, and the share of the native Pre-LN step. A step that holds a map can hide
            some of it behind other work.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import pathlib
import platform
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax import layouts, models, transforms
from prenorm_jax.measure.equivalence import PRE_LN, Config, Form
from prenorm_jax.measure.step_time import TIMED, Case, interleaved
from prenorm_jax.measure.works import FAMILIES, Work, work
from prenorm_jax.models import ViTConfig
from prenorm_jax.models.config import ConfigError
from prenorm_jax.paths import Tree
from prenorm_jax.training.results import write_whole

VARIANTS = {"pre_rmsnorm": TIMED["pre_rmsnorm"], "pre_crmsnorm": TIMED["pre_crmsnorm-reflect"]}
BASELINE = "pre_ln, native"
Map = Callable[[Tree], Tree]


def measure_steps(timed: Work, *, threads: int = 4, **windows: int) -> dict[str, Any]:
    """Times steps. Returns what `table` prints, but for the maps.

    Args:
      timed: a training step, in any coordinates.
      threads: steps compiled at a time.
      windows: warmup_steps, window_steps and windows of `interleaved`.
    """
    native, mapped = (dataclasses.replace(timed, coordinates=which) for which in ("native", "pre_ln"))
    wanted = {BASELINE: (native, PRE_LN)}
    for norm, form in VARIANTS.items():
        # Each case owns its state, since a step takes its state's memory.
        wanted |= {f"{norm}, native": (native, form), f"{norm}, native again": (native, form)}
        wanted[f"{norm}, pre_ln coordinates"] = (mapped, form)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        cases = [pool.submit(step.case, form) for step, form in wanted.values()]
        steps = {name: case.result() for name, case in zip(wanted, cases, strict=True)}
    times = interleaved(steps, **windows)
    device = jax.devices()[0]
    return {
        "work": f"{timed.name}, batch {timed.batch}",
        "device": f"{device.device_kind} ({device.platform}, {platform.machine()}), jax {jax.__version__}",
        "model": dataclasses.asdict(timed.model),
        "batch_size": timed.batch,
        "parameters": models.count(PRE_LN.of(timed.model)),
        "steps": {
            name: {
                "ms": 1e3 * found.median,
                "windows_s": list(found.windows),
                "ratio": found.against(times[_native(name)]),
            }
            for name, found in times.items()
        },
    }


def measure_maps(config: Config, baseline_ms: float, *, threads: int = 4, **windows: int) -> dict[str, Any]:
    """Times the maps alone, by name.

    Args:
      config, threads, windows: as for `measure_steps`.
      baseline_ms: milliseconds of the step that their shares are of.
    """
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        wanted = {}
        for name, change, tree in maps_of(config):
            values = drawn(tree)
            wanted[name] = pool.submit(map_case, change, values)
            wanted[f"{name}, and back"] = pool.submit(map_and_pull_back_case, change, values)
        maps = {name: case.result() for name, case in wanted.items()}
    return {
        name: {"ms": 1e3 * found.median, "windows_s": list(found.windows), "share": 1e3 * found.median / baseline_ms}
        for name, found in interleaved(maps, **windows).items()
    }


def maps_of(config: Config) -> list[tuple[str, Map, Tree]]:
    """(name, map, abstract tree) of every map that is timed by itself."""
    own = models.abstract(PRE_LN.of(config))

    def ours(norm: str, form: Form) -> tuple[str, Map, Tree]:
        return f"ours, {norm}", lambda params: models.running(params, form.of(config)), own

    maps = [ours(norm, form) for norm, form in VARIANTS.items()]
    if not isinstance(config, ViTConfig):
        return maps
    foreign, spec = foreign_tree(config), layouts.vision_transformer()
    return [
        ("foreign, recenter", lambda params: transforms.recenter(params, spec), foreign),
        ("foreign, to_pre_rmsnorm", lambda params: transforms.to_pre_rmsnorm(params, spec), foreign),
        ("foreign, to_pre_crmsnorm", lambda params: transforms.to_pre_crmsnorm(params, spec), foreign),
        *maps,
    ]


def foreign_tree(config: ViTConfig) -> Tree:
    """Shapes of the tree of google-research/vision_transformer's ViT of a config's sizes."""

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(config.param_dtype))

    def dense(rows: tuple[int, ...], columns: tuple[int, ...]) -> Tree:
        return {"kernel": leaf(*rows, *columns), "bias": leaf(*columns)}

    d, mlp = (config.width,), (config.mlp_width,)
    heads = (config.heads, config.head_width)
    norm = {"scale": leaf(*d), "bias": leaf(*d)}
    block = {
        "LayerNorm_0": norm,
        "MultiHeadDotProductAttention_0": {
            **{name: dense(d, heads) for name in ("query", "key", "value")},
            "out": dense(heads, d),
        },
        "LayerNorm_1": norm,
        "MlpBlock_0": {"Dense_0": dense(d, mlp), "Dense_1": dense(mlp, d)},
    }
    return {
        "embedding": dense((config.patch_size, config.patch_size, config.channels), d),
        "cls": leaf(1, 1, *d),
        "Transformer": {
            "posembed_input": {"pos_embedding": leaf(1, config.patches + 1, *d)},
            **{f"encoderblock_{i}": block for i in range(config.depth)},
            "encoder_norm": norm,
        },
        "head": dense(d, (config.classes,)),
    }


def drawn(tree: Tree) -> Tree:
    """Random parameters of a tree's shapes: scales about 1, the rest small. No program is compiled for them."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        middle = float(path[-1].key == "scale")
        return jnp.asarray(middle + 0.02 * rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


def map_case(change: Map, params: Tree) -> Case:
    """The map alone. Its calls share their argument, and a device runs them one after the other."""
    compiled = jax.jit(change).lower(params).compile()
    return Case(lambda carry: compiled(params), None, compiled)


def map_and_pull_back_case(change: Map, params: Tree) -> Case:
    """The map and its pull-back, of the mapped weights themselves as a gradient."""

    def there_and_back(params: Tree) -> tuple[Tree, Tree]:
        mapped, pull_back = jax.vjp(change, params)
        # Without the barrier the two passes could become one, which a step never can: its model lies between them.
        return mapped, pull_back(jax.lax.optimization_barrier(mapped))

    compiled = jax.jit(there_and_back).lower(params).compile()
    return Case(lambda carry: compiled(params), None, compiled)


def table(result: dict[str, Any]) -> str:
    """Markdown of the tables that there are."""
    lines = [
        f"{result['work']}, {result['parameters']:,} parameters, {result['device']}.",
        "",
        "| training step | ms | against its native step |",
        "|---|---|---|",
    ]
    for name, row in result["steps"].items():
        median, least, greatest = row["ratio"]
        lines.append(f"| {name} | {row['ms']:.2f} | {median:.4f} ({least:.4f} to {greatest:.4f}) |")
    if "maps" in result:
        lines += ["", f"| map | ms | of the step `{BASELINE}` |", "|---|---|---|"]
        lines += [f"| {name} | {row['ms']:.3f} | {row['share']:.2%} |" for name, row in result["maps"].items()]
    return "\n".join(lines)


def _native(name: str) -> str:
    return f"{name.partition(',')[0]}, native"


def main(arguments: list[str]) -> int:
    """Measures, prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="prenorm_jax.measure.weight_map", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("family", choices=tuple(FAMILIES), help="the model")
    parser.add_argument("size", help="B/16, small, ...")
    parser.add_argument("--batch", type=int, required=True, help="examples of a step")
    parser.add_argument("--depth", type=int, help="layers, if not those of the size")
    parser.add_argument("--warmup-steps", type=int, default=10)
    parser.add_argument("--window-steps", type=int, default=20)
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--threads", type=int, default=4, help="steps compiled at a time; default %(default)s")
    parser.add_argument("--json", type=pathlib.Path, help="where the result goes")
    given = parser.parse_args(arguments)
    fields: dict[str, Any] = {"depth": given.depth} if given.depth else {}
    try:
        timed = work(given.family, given.size, given.batch, "training", **fields)
    except ConfigError as error:
        print(f"prenorm_jax.measure.weight_map: {error}", file=sys.stderr)
        return 2
    windows = {"warmup_steps": given.warmup_steps, "window_steps": given.window_steps, "windows": given.windows}
    result = measure_steps(timed, threads=given.threads, **windows)
    if given.json:  # before the maps, each of which has to be compiled
        save(result, given.json)
    baseline_ms = result["steps"][BASELINE]["ms"]
    result["maps"] = measure_maps(timed.model, baseline_ms, threads=given.threads, **windows)
    print(table(result))
    if given.json:
        save(result, given.json)
        print(f"written: {given.json}")
    return 0


def save(result: dict[str, Any], path: pathlib.Path) -> None:
    """Writes a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
