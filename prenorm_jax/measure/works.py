"""What is timed: a model of the paper's sizes at a batch, in training, inference or decoding, with parameters that cost nothing to make.

Speed does not ask what the weights are, so they are random numbers of the right shapes and scales, drawn on the host: no initialiser is
compiled and no data set is read. They are never zeros or copies of one row: a GPU runs faster on those.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prenorm_jax import models
from prenorm_jax.measure.equivalence import PRE_LN, Config, Form
from prenorm_jax.measure.step_time import Case, decoding_case, inference_case, training_case
from prenorm_jax.models import GPTConfig, ViTConfig
from prenorm_jax.models.config import require, require_one_of
from prenorm_jax.paths import Tree
from prenorm_jax.training import counts
from prenorm_jax.training.experiment import COORDINATES, Optimizer
from prenorm_jax.training.optimizer import make_optimizer
from prenorm_jax.training.tasks import ImageClassification, LanguageModelling, Task

KINDS = ("training", "inference", "decoding")
FAMILIES: dict[str, tuple[str, Callable[..., Config]]] = {
    "vit": ("ViT-", models.vit_config),
    "gpt": ("GPT ", models.gpt_config),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """A step to time, whatever the form that it runs in.

    Attributes:
      name: as tables call the model, "ViT-B/16".
      model: its config; the form is put in by `config`.
      batch: examples of a step; a GPT's are as long as its context.
      kind: one of `KINDS`; in decoding each example is a cache of its context, and a step reads one token more of each.
      coordinates: of training, "native" or "pre_ln".
    """

    name: str
    model: Config
    batch: int
    kind: str
    coordinates: str = "native"

    def __post_init__(self) -> None:
        require_one_of("work.kind", self.kind, KINDS)
        require_one_of("work.coordinates", self.coordinates, COORDINATES)
        require(self.batch > 0, "work.batch", self.batch, "1 or more")
        decodes = self.kind == "decoding"
        require(not decodes or isinstance(self.model, GPTConfig), "work.kind", self.kind, "decoding for a GPT")

    @property
    def key(self) -> str:
        """What tells it from another in tables and files: "ViT-B/16, batch 256, training, native"."""
        tokens = f" x {self.model.context}" if isinstance(self.model, GPTConfig) else ""
        coordinates = f", {self.coordinates}" if self.kind == "training" else ""
        return f"{self.name}, batch {self.batch}{tokens}, {self.kind}{coordinates}"

    @property
    def per_step(self) -> tuple[int, str]:
        """How much a step gets through: (images, "images") or (tokens, "tokens")."""
        if isinstance(self.model, GPTConfig):
            return self.batch * (1 if self.kind == "decoding" else self.model.context), "tokens"
        return self.batch, "images"

    @property
    def task(self) -> Task:
        """What it is trained on."""
        if isinstance(self.model, ViTConfig):
            return ImageClassification(0.1)
        return LanguageModelling(self.model.vocab_size, logits=self.model.dtype)

    def config(self, form: Form) -> Config:
        """The model in a form."""
        return form.of(self.model)

    def params(self, form: Form) -> Tree:
        """Random parameters of a form: in training those that are trained, in the work's coordinates and the parameters' dtype;
        else those that it runs with, in the computation's."""
        config = self.config(form)
        if self.kind != "training":
            return random_params(_narrow(models.abstract(config), config.dtype))
        shapes = models.abstract(PRE_LN.of(self.model))
        if self.coordinates == "native":
            shapes = jax.eval_shape(lambda params: models.native(params, config), shapes)
        return random_params(shapes)

    def data(self, seed: int = 0) -> dict[str, np.ndarray]:
        """A batch: {"inputs", "targets", "weights"}."""
        rng = np.random.default_rng(seed)
        weights = np.ones(self.batch, np.float32)
        if isinstance(self.model, GPTConfig):
            window = rng.integers(self.model.vocab_size, size=(self.batch, self.model.context + 1), dtype=np.int32)
            return {"inputs": window[:, :-1], "targets": window[:, 1:], "weights": weights}
        shape = (self.batch, self.model.image_size, self.model.image_size, self.model.channels)
        targets = rng.integers(self.model.classes, size=self.batch, dtype=np.int32)
        return {"inputs": rng.standard_normal(shape, np.float32), "targets": targets, "weights": weights}

    def case(self, form: Form, params: Tree | None = None) -> Case:
        """Its compiled step in a form, from `params` or from random ones."""
        params = self.params(form) if params is None else params
        if self.kind == "inference":
            return inference_case(self.config(form), params, self.data()["inputs"])
        if self.kind == "decoding":
            return decoding_case(self.config(form), params, self.batch)
        return training_case(
            self.config(form), params, self.task, optimizer(), self.data(), coordinates=self.coordinates
        )

    def operations(self, form: Form) -> list[counts.Operation]:
        """What a step in a form has to do."""
        return counts.operations(self.config(form), self.batch, kind=self.kind, coordinates=self.coordinates)


def work(family: str, size: str, batch: int, kind: str, coordinates: str = "native", **fields: Any) -> Work:
    """A work of one of the paper's sizes, computing in bfloat16; further fields go to the model's config.

    >>> work("vit", "B/16", 256, "training").key
    'ViT-B/16, batch 256, training, native'
    >>> work("gpt", "small", 1, "inference", context=512).key
    'GPT Small, batch 1 x 512, inference'
    """
    require_one_of("family", family, tuple(FAMILIES))
    prefix, make = FAMILIES[family]
    name = prefix + (size if family == "vit" else size[:1].upper() + size[1:])
    # A trained step is fastest on stacked layers; in inference, cutting them out of the stack would cost a copy.
    stacked = kind == "training"
    given = {"dtype": "bfloat16", "scan_layers": stacked, "unroll": stacked, **fields}
    return Work(name, make(size, **given), batch, kind, coordinates)


def random_params(shapes: Tree, seed: int = 0) -> Tree:
    """A tree of random leaves on the device for a tree of shapes and dtypes: norm scales around 1, biases around 0, matrices of a gain
    of 1, so that every form's activations stay finite.

    >>> random_params({"scale": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)})["scale"].shape
    (2, 3)
    """
    rng = np.random.default_rng(seed)
    # Leaves are cut out of one pool of numbers, whose odd length keeps rows of any even width from being alike.
    pool = rng.standard_normal(2**20 + 7, np.float32)

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        gain = 0.02 if name == "table" or len(shape.shape) < 2 else math.prod(shape.shape[:-1]) ** -0.5
        values = (np.roll(pool, rng.integers(len(pool))) * gain + (name == "scale")).astype(shape.dtype)
        return jnp.asarray(np.resize(values, shape.shape))

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def _narrow(shapes: Tree, dtype: str) -> Tree:
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape.shape, dtype), shapes)


@functools.cache
def optimizer() -> optax.GradientTransformation:
    """What timed works are trained with."""
    # So small a learning rate that no form leaves the finite numbers, the one without norms included.
    return make_optimizer(Optimizer(learning_rate=1e-7, warmup_steps=1), 10**6)
