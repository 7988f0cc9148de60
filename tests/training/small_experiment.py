"""An experiment that trains in no time: a tiny byte-level GPT on a folder of generated Python files."""

import dataclasses
import pathlib
from typing import Any

from prenorm_jax.models.config import GPTConfig
from prenorm_jax.training.experiment import Compare, Data, Experiment, Mesh, Optimizer, Train

MODEL = GPTConfig(width=16, depth=1, heads=2, mlp_width=32, context=16, vocab_size=256, norm="pre_rmsnorm")
TRAIN = Train(
    steps=12, batch_size=4, log_every=1, eval_every=4, eval_batch_size=4, eval_examples=10, checkpoint_every=5, keep=3
)


def experiment(library: pathlib.Path, **train: Any) -> Experiment:
    """The experiment on the files below `library`, which are written if there are none."""
    if not library.exists():
        library.mkdir(parents=True)
        for index in range(40):
            (library / f"module_{index}.py").write_text(f"def function_{index}(x):\n    return x + {index}\n" * 5)
    return Experiment(
        task="language_modelling",
        model=MODEL,
        data=Data(name="stdlib", root=str(library), seed=1),
        optimizer=Optimizer(learning_rate=1e-2, warmup_steps=3),
        train=dataclasses.replace(TRAIN, **train),
        mesh=Mesh(data=1),
        compare=Compare(enabled=False),
    )
