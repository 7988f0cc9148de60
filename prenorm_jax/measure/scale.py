"""What converting a large tree costs the host in time and memory: python -m prenorm_jax.measure.scale [--dtype bfloat16] [--scanned]

A GPT of 1.3 billion parameters (24 layers of width 2048) is filled with random numbers and converted in a process of its own. Peak
memory is the process's high-water mark above what it held before the tree was there, over the tree's size: 2 is the tree and its copy.
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax import layouts, models, transforms
from prenorm_jax.models.config import GPT_SIZES

CONVERSIONS = {
    "to_pre_rmsnorm": lambda params: transforms.to_pre_rmsnorm(params, layouts.GPT),
    "compress, pack": lambda params: transforms.pack(
        transforms.strip_affine(transforms.compress(params, layouts.GPT), layouts.GPT), layouts.GPT
    ),
}
DTYPES = ("float32", "bfloat16", "float16")


def measure(size: str, conversion: str, dtype: str, scanned: bool) -> dict[str, Any]:
    """Converts one tree in this process, which has to be fresh: high-water marks never fall."""
    config = dataclasses.replace(models.gpt_config(size), tied=False, scan_layers=scanned)
    shapes = jax.eval_shape(lambda: models.init(config, 0))
    jax.block_until_ready(jnp.zeros(()))  # the backend belongs to the process, not to the tree
    before = _peak()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda shape: _filled(shape.shape, dtype, rng), shapes)
    bytes_ = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    with_tree = _peak() - before
    begun = time.perf_counter()
    converted = jax.block_until_ready(CONVERSIONS[conversion](params))
    seconds = time.perf_counter() - begun
    return {
        "size": size,
        "conversion": conversion,
        "dtype": dtype,
        "layers": "scanned" if scanned else "looped",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "tree_gib": bytes_ / 2**30,
        "with_tree_over_tree": with_tree / bytes_,
        "peak_over_tree": (_peak() - before) / bytes_,
        "seconds": seconds,
        "converted_leaves": len(jax.tree.leaves(converted)),
    }


def in_a_process(size: str, conversion: str, dtype: str, scanned: bool) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "prenorm_jax.measure.scale", "--size", size, "--conversion", conversion]
    command += ["--dtype", dtype, *(["--scanned"] if scanned else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _filled(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> jax.Array:
    """Random numbers in memory of their own, drawn row by row."""
    leaf = np.empty(shape, jnp.dtype(dtype))
    rows = leaf.reshape(-1, shape[-1])
    step = max(2**20 // shape[-1], 1)
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        part[...] = rng.standard_normal(part.shape, np.float32)
    return jnp.asarray(leaf)


def _peak() -> int:
    """The most memory that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: list[str]) -> int:
    """Measures one conversion and prints it as JSON."""
    parser = argparse.ArgumentParser(prog="prenorm_jax.measure.scale", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=list(GPT_SIZES), default="xl")
    parser.add_argument("--conversion", choices=list(CONVERSIONS), default="to_pre_rmsnorm")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--scanned", action="store_true", help="layers stacked: the largest leaves hold 400 million numbers"
    )
    given = parser.parse_args(arguments)
    print(json.dumps(measure(given.size, given.conversion, given.dtype, given.scanned), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
