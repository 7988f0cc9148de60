"""Time and memory of `prenorm convert` on a large checkpoint: a GPT-NeoX of random weights, as large as asked for, in two shards.

python -m prenorm_jax.measure.conversion --gigabytes=6 --workdir=large --json=results/interop/conversion_cpu.json
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import ml_dtypes
import numpy as np

from prenorm_jax.interop.safetensors import Writer

WIDTH, VOCABULARY = 2560, 50304  # those of Pythia 2.8B
# The command, and then what the kernel says that it held at most (what getrusage says counts this process, too).
RUN = """import sys
from prenorm_jax.interop.__main__ import main
status = main(sys.argv[1:])
print(*(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(status)
"""
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
Shapes = dict[str, tuple[int, ...]]


def layer(index: int) -> Shapes:
    """The tensors of one layer."""
    linear = {
        "attention.query_key_value": (3 * WIDTH, WIDTH),
        "attention.dense": (WIDTH, WIDTH),
        "mlp.dense_h_to_4h": (4 * WIDTH, WIDTH),
        "mlp.dense_4h_to_h": (WIDTH, 4 * WIDTH),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }
    prefix = f"gpt_neox.layers.{index}"
    weights = {f"{prefix}.{name}.weight": shape for name, shape in linear.items()}
    return weights | {f"{prefix}.{name}.bias": shape[:1] for name, shape in linear.items()}


def make_checkpoint(folder: pathlib.Path, gigabytes: float) -> int:
    """Writes one; returns the bytes of its tensors."""
    ends: Shapes = {"gpt_neox.embed_in.weight": (VOCABULARY, WIDTH), "embed_out.weight": (VOCABULARY, WIDTH)}
    ends |= {f"gpt_neox.final_layer_norm.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
    depth = max(1, round((gigabytes * 1e9 - _bytes(ends)) / _bytes(layer(0))))
    shards: list[Shapes] = [dict(ends), {}]
    for index in range(depth):
        shards[index % 2].update(layer(index))
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map.update(dict.fromkeys(shapes, file))
        with Writer(
            folder / file, {name: (BFLOAT16, shape) for name, shape in shapes.items()}, {"format": "pt"}
        ) as out:
            for name, shape in shapes.items():
                out.write(name, (rng.standard_normal(shape, np.float32) * 0.02 + 0.01).astype(BFLOAT16))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "gpt_neox", "hidden_size": WIDTH, "num_hidden_layers": depth, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["GPTNeoXForCausalLM"]}))
    return sum(_bytes(shapes) for shapes in shards)


def _bytes(shapes: Shapes) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values()) * BFLOAT16.itemsize


def measure(workdir: pathlib.Path, gigabytes: float, *options: str) -> dict[str, Any]:
    """Makes a checkpoint, converts it in a process of its own, and removes both."""
    size = make_checkpoint(workdir / "source", gigabytes)
    arguments = ["convert", str(workdir / "source"), str(workdir / "destination"), "--to", "pre_rmsnorm", *options]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    peak = int(done.stdout.split()[-2]) * 1024
    shutil.rmtree(workdir)
    return {
        "gigabytes": size / 1e9,
        "largest_tensor_gigabytes": VOCABULARY * WIDTH * BFLOAT16.itemsize / 1e9,
        "options": " ".join(options),
        "seconds": seconds,
        "peak_resident_gigabytes": peak / 1e9,
        "cores": len(os.sched_getaffinity(0)),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="a folder to make and to remove again")
    parser.add_argument("--json", type=pathlib.Path)
    chosen = parser.parse_args()
    runs = [measure(chosen.workdir, chosen.gigabytes, *options) for options in ((), ("--fold",))]
    text = json.dumps(runs, indent=2)
    print(text)
    if chosen.json:
        chosen.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
