"""One training run of a tiny model on a mesh, for the tests of sharding; as a program, one of several processes of such a run.

python trajectories.py NAME DATA FSDP TENSOR [flags of prenorm_jax.training.distributed]: prints the losses as JSON
"""

import argparse
import dataclasses
import json
import sys

import jax
import numpy as np

from prenorm_jax import models
from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training import distributed, sharding
from prenorm_jax.training.experiment import Mesh, Optimizer
from prenorm_jax.training.optimizer import make_optimizer
from prenorm_jax.training.step import init_state, make_train_step
from prenorm_jax.training.tasks import ImageClassification, LanguageModelling

STEPS, BATCH = 20, 16
SIZES = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 32}
VIT = ViTConfig(**SIZES, image_size=8, patch_size=4, channels=2, classes=8)
GPT = GPTConfig(**SIZES, context=8, vocab_size=60, vocab_multiple=8)
PACKED = {"norm": "pre_crmsnorm"}
RUNS = {
    # Pre-LN coordinates mapped to the packed form; the compact form, whose width of 15 no mesh divides.
    "vit": (dataclasses.replace(VIT, **PACKED), "pre_ln"),
    "vit native": (dataclasses.replace(VIT, **PACKED, scan_layers=True, unroll=True), "native"),
    "gpt": (dataclasses.replace(GPT, **PACKED, scan_layers=True, remat=True, remat_saves="activations"), "pre_ln"),
    "gpt native": (dataclasses.replace(GPT, **PACKED, tied=False), "native"),
}
OPTIMIZER = Optimizer(learning_rate=3e-3, warmup_steps=5, average=0.9)


def batch_of(model: ViTConfig | GPTConfig, seed: int) -> dict[str, np.ndarray]:
    """A batch whose examples count unequally: a mean of the devices' means would be another number."""
    rng = np.random.default_rng(seed)
    if isinstance(model, ViTConfig):
        inputs = rng.normal(size=(BATCH, model.image_size, model.image_size, model.channels)).astype(model.dtype)
        targets = rng.integers(model.classes, size=BATCH)
    else:
        window = rng.integers(model.vocab_size, size=(BATCH, model.context + 1))
        inputs, targets = window[:, :-1].astype(np.int32), window[:, 1:]
    return {
        "inputs": inputs,
        "targets": targets.astype(np.int32),
        "weights": np.linspace(0, 2, BATCH, dtype=model.dtype),
    }


def task_of(model: ViTConfig | GPTConfig):
    return LanguageModelling(model.vocab_size) if isinstance(model, GPTConfig) else ImageClassification(0.1)


def losses(model, coordinates, mesh=None, accumulate=1, weights=lambda weights: weights):
    """The losses of all steps and the last state; with a mesh, each process feeds its share of each batch."""
    tx = make_optimizer(OPTIMIZER, STEPS)
    step = make_train_step(model, task_of(model), tx, coordinates=coordinates, accumulate=accumulate, mesh=mesh)

    def begin():
        return init_state(models.init(model, 0, coordinates), tx)

    if mesh is None:
        state = jax.jit(begin)()
    else:
        places = sharding.state_shardings(jax.eval_shape(begin), model, tx, mesh)
        state = jax.jit(begin, out_shardings=places)()
    found = []
    for index in range(STEPS):
        batch = batch_of(model, index % 5)
        batch["weights"] = weights(batch["weights"])
        if mesh is not None:
            index, count = sharding.share(mesh)
            rows = slice(index * BATCH // count, (index + 1) * BATCH // count)
            batch = sharding.whole_batch({key: x[rows] for key, x in batch.items()}, mesh)
        state, values = step(state, batch)
        found.append(float(values["loss"]))
    return np.array(found), state


def main(arguments: list[str]) -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("run", choices=RUNS)
    flags.add_argument("mesh", type=int, nargs=3)
    distributed.add_flags(flags)
    given = flags.parse_args(arguments)
    distributed.start(distributed.read(given), given.start_seconds)
    model, coordinates = RUNS[given.run]
    mesh = sharding.make_mesh(Mesh(**dict(zip(("data", "fsdp", "tensor"), given.mesh, strict=True))))
    print(json.dumps(losses(model, coordinates, mesh)[0].tolist()))


if __name__ == "__main__":
    main(sys.argv[1:])
