"""What the loader of a config delivers, beside what its training step takes.

python -m prenorm_jax.measure.loader CONFIG[:ARG] [--config.FIELD=VALUE ...] --out FILE [--seconds S] [--made N] [--step FILE | measure]
    batches of the config's training data as the loop takes them; --made N: of N photographs or tokens made up for it, where the data
    are not here. The step's need is measured on this machine's device (default), or read from the JSON of `measure time`.

FILE gets one entry a config and machine; a second run of the same replaces it. Without CONFIG the table of FILE is printed. `--into GUIDE`
puts it between <!-- FILE --> and <!-- end --> there.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from prenorm_jax import models
from prenorm_jax.measure.__main__ import with_tables
from prenorm_jax.models.config import ConfigError, GPTConfig
from prenorm_jax.training import data
from prenorm_jax.training.command_line import Flags, read_config
from prenorm_jax.training.compilation_cache import use_compilation_cache
from prenorm_jax.training.data import DataError
from prenorm_jax.training.experiment import Experiment
from prenorm_jax.training.optimizer import make_optimizer
from prenorm_jax.training.step import init_state, make_train_step
from prenorm_jax.training.tasks import task_of

WIDTH, HEIGHT = 500, 375  # a photograph of ImageNet's usual size
STEPS = 10


def measure(experiment: Experiment, name: str, seconds: float, made: int, step_from: str) -> dict[str, Any]:
    """An entry: examples a second that the loader gives and that the step takes, and where each was measured."""
    with contextlib.ExitStack() as stack:
        if made:
            experiment = stack.enter_context(made_up(experiment, made))
        examples = data.load(experiment).train
        batches = data.train_batches(examples, experiment.data, experiment.train.batch_size)
        stack.callback(batches.close)
        loaded = loader_rate(batches, experiment, seconds)
        batch = next(batches)
    model = experiment.model
    taken, device = step_rate(experiment, batch) if step_from == "measure" else known_rate(name, step_from)
    return {
        "config": name,
        "unit": "tokens" if isinstance(model, GPTConfig) else "images",
        "made_up": made,
        "batch_size": experiment.train.batch_size,
        "workers": experiment.data.workers,
        "threads": experiment.data.threads,
        "cores": len(os.sched_getaffinity(0)),
        "host": platform.processor() or platform.machine(),
        "loader_per_second": loaded,
        "step_per_second": taken,
        "step_device": device,
        "step_from": step_from,
    }


def loader_rate(batches: data.Batches, experiment: Experiment, seconds: float) -> float:
    """Examples (or tokens) a second, once the readers are under way."""
    # What was read ahead while nobody took any would look like speed: as many batches as wait are taken first.
    waiting = 2 * max(1, experiment.data.workers) * (1 + experiment.data.threads)
    first = time.perf_counter()
    while waiting > 0 and time.perf_counter() - first < max(seconds, 5.0):
        next(batches)
        waiting -= 1
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds or count < 3:
        next(batches)
        count += 1
    return count * experiment.train.batch_size * _per_example(experiment) / spent


def step_rate(experiment: Experiment, batch: data.Batch) -> tuple[float, str]:
    """Examples (or tokens) a second of the training step on a batch that lies on the device, and the device."""
    settings = experiment.train
    tx = make_optimizer(experiment.optimizer, settings.steps)
    state = init_state(models.init(experiment.model, settings.seed, settings.coordinates), tx)
    step = make_train_step(
        experiment.model,
        task_of(experiment),
        tx,
        coordinates=settings.coordinates,
        accumulate=settings.accumulate,
        stochastic_depth=settings.stochastic_depth,
    )
    placed = jax.device_put(batch)
    state, values = step(state, placed)
    jax.block_until_ready(values)
    start = time.perf_counter()
    for _ in range(STEPS):
        state, values = step(state, placed)
    jax.block_until_ready(values)
    spent = (time.perf_counter() - start) / STEPS
    return settings.batch_size * _per_example(experiment) / spent, jax.devices()[0].device_kind


def known_rate(config: str, file: str) -> tuple[float, str]:
    """The Pre-LN training step's rate of the size that a config's arg names, as `measure time` wrote it, and its device.

    Raises: ConfigError where the file has none.
    """
    result = json.loads(pathlib.Path(file).read_text())
    for entry in result["entries"]:
        size = entry["name"].replace("ViT-", "variant=").replace("GPT ", "size=").lower()
        if entry["kind"] == "training" and entry["coordinates"] == "native" and size in config.lower():
            return float(entry["rows"]["pre_ln"]["per_second"]), result["device"]
    raise ConfigError(f"--step: {file} has no training in native coordinates of {config}; allowed: one that has")


def _per_example(experiment: Experiment) -> int:
    return experiment.model.context if isinstance(experiment.model, GPTConfig) else 1


@contextlib.contextmanager
def made_up(experiment: Experiment, count: int) -> Iterator[Experiment]:
    """The experiment on `count` photographs in class folders, or on `count` tokens in .bin files, in a folder that goes afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        if isinstance(experiment.model, GPTConfig):
            for side in ("train", "val"):
                np.random.default_rng(0).integers(experiment.model.vocab_size, size=count).astype(np.uint16).tofile(
                    root / f"{side}.bin"
                )
            made = dataclasses.replace(experiment.data, name="text", root=folder, token_dtype="uint16")
        else:
            for side in ("train", "val"):
                write_photographs(root / side, count if side == "train" else 8)
            made = dataclasses.replace(experiment.data, name="image_folder", root=folder, processor="")
        yield dataclasses.replace(experiment, data=made)


def write_photographs(root: pathlib.Path, count: int) -> None:
    """Parts of scikit-learn's two sample photographs, 500 x 375, as JPEG of quality 90, in the folders 0 and 1."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    for label, pixels in enumerate(load_sample_images().images):
        (root / str(label)).mkdir(parents=True)
        photograph = Image.fromarray(pixels)
        for index in range(-(-count // 2)):
            left = int(rng.integers(photograph.width - WIDTH + 1))
            top = int(rng.integers(photograph.height - HEIGHT + 1))
            part = photograph.crop((left, top, left + WIDTH, top + HEIGHT))
            part.save(root / str(label) / f"{index}.jpg", quality=90)


def table(result: dict[str, Any]) -> str:
    """Markdown: what the loader gives, alone and a core, beside what the step takes."""
    lines = [
        "| config | loader | workers x threads, cores | a core | the step takes, on | loader / step |",
        "|---|---|---|---|---|---|",
    ]
    for entry in result["loader"]:
        loaded, taken, unit = entry["loader_per_second"], entry["step_per_second"], entry["unit"]
        made = " (made up)" if entry["made_up"] else ""
        lines.append(
            f"| `{entry['config']}`{made} | {loaded:,.0f} {unit}/s | {max(1, entry['workers'])} x {entry['threads']}, "
            f"{entry['cores']} | {loaded / entry['cores']:,.0f} | {taken:,.0f}, {entry['step_device']} | {loaded / taken:.2f} |"
        )
    return "\n".join(lines)


def save(entry: dict[str, Any], out: pathlib.Path) -> None:
    """Adds an entry to a file, in the place of one of the same config, cores and device."""
    same = ("config", "cores", "step_device")
    result = json.loads(out.read_text()) if out.exists() else {"loader": []}
    others = [other for other in result["loader"] if any(other[key] != entry[key] for key in same)]
    result["loader"] = [*others, entry]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    """Exit status: 0; 2 for what can't be (one line on stderr)."""
    flags = Flags(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flags.add_argument("config", nargs="?", metavar="CONFIG[:ARG]")
    flags.add_argument("--out", type=pathlib.Path, required=True, metavar="FILE")
    flags.add_argument("--into", type=pathlib.Path, metavar="GUIDE")
    flags.add_argument("--seconds", type=float, default=10.0)
    flags.add_argument("--made", type=int, default=0, metavar="N")
    flags.add_argument("--step", default="measure", metavar="FILE")
    try:
        given, fields = flags.parse_known_args(arguments)
        if given.config:
            use_compilation_cache()
            experiment, _ = read_config(given.config, fields)
            save(measure(experiment, given.config, given.seconds, given.made, given.step), given.out)
        text = table(json.loads(given.out.read_text()))
        print(text)
        if given.into:
            given.into.write_text(with_tables(given.into.read_text(), str(given.out), text))
    except (ConfigError, DataError, OSError, ValueError) as error:
        print(f"prenorm_jax.measure.loader: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
