"""What an experiment is: frozen records, and the strict reading of a plain nested dict into them.

The dict is what a file in configs/ returns after `--config.any.field=value` flags. Whatever is impossible in it
becomes a ConfigError whose message is one line: the field as one would write it on the command line, what was given,
what is allowed.
"""

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Mapping

from prenorm_jax.models.config import (
    ConfigError,
    GPTConfig,
    Transformer,
    ViTConfig,
    gpt_config,
    require,
    require_one_of,
    vit_config,
)

MODELS: dict[str, type[Transformer]] = {"image_classification": ViTConfig, "language_modelling": GPTConfig}
TASKS = tuple(MODELS)
COORDINATES = ("pre_ln", "native")
OPTIMIZERS = ("adamw", "lamb")
LOSSES = ("softmax", "sigmoid")
CROPS = ("centre", "resized", "simple")

# What a data set asks of the model that reads it: the task it serves, and model fields whose values it fixes.
DATA_SETS: dict[str, tuple[tuple[str, ...], dict[str, int]]] = {
    "digits": (("image_classification",), {"image_size": 8, "channels": 1, "classes": 10}),
    "stdlib": (("language_modelling",), {"vocab_size": 256}),
    "synthetic": (TASKS, {}),
    "image_folder": (("image_classification",), {}),
    "hugging_face": (("image_classification",), {}),
    "array_record": (("image_classification",), {}),
    "text": (("language_modelling",), {}),
}


# The types of fields, as messages call them.
KINDS: dict[type, str] = {int: "an integer", float: "a number", bool: "True or False", str: "text"}


def _require_numbers(record: object, section: str, at_least: dict[str, float]) -> None:
    for field, least in at_least.items():
        value = getattr(record, field)
        require(math.isfinite(value) and value >= least, f"{section}.{field}", value, f"{least} or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where examples come from.

    name: digits (scikit-learn's 8x8 scans), stdlib (the Python standard library as bytes), synthetic (noise, for timing),
      image_folder (pictures, a folder a class), hugging_face (pictures that the library datasets saved), array_record (pictures as
      TensorFlow Datasets writes them), text (a text, or token ids).
    seed: of the order of examples, of the augmentation and of the synthetic set.
    augment: whether digits move by up to a pixel, pictures are cut, mirrored, coloured and mixed as the fields below say, and text
      windows start anywhere.
    root: the folder of stdlib's .py files; empty means the running interpreter's own standard library. Of image_folder and text: the
      folder or file, held out as a whole, or a folder with train and val in it. Of the others: the folder.
    processor: the folder with preprocessor_config.json (pictures) or tokenizer.json (text); pictures need none: they are then prepared
      as is usual for ImageNet.
    examples: how many examples the synthetic set has.
    threads: how many threads of a process read ahead.
    workers: how many processes read ahead, each with its threads; 0: this one. Neither changes a value or the order.

    Of text: token_dtype: uint16 or uint32, of a .bin file with no tokens.json beside it.
    Of pictures: image_key, label_key: the columns of hugging_face, the features of array_record.
      crop: of training pictures: centre (as in an evaluation), resized (a random part) or simple (nearly all, anywhere).
      least_area: of a resized crop, as a share of the picture. flip: whether cut pictures are mirrored half of the time.
      three_augment: whether a cut picture is grey, solarized or blurred. colour_jitter: how far from 1 its brightness, contrast and
      saturation are multiplied. mixup, cutmix: the a of Beta(a, a) that examples are blended by; 0: not. repeats: how many times a
      batch has each of its examples, each time augmented anew (Hoffer et al., 2020).
      eval_crop: the share of a resized picture's shorter edge that an evaluation sees, where there is no processor.
    """

    name: str = "synthetic"
    seed: int = 0
    augment: bool = True
    root: str = ""
    processor: str = ""
    examples: int = 4096
    threads: int = 2
    workers: int = 0
    token_dtype: str = "uint16"
    image_key: str = "image"
    label_key: str = "label"
    crop: str = "centre"
    least_area: float = 0.08
    flip: bool = True
    three_augment: bool = False
    colour_jitter: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    repeats: int = 1
    eval_crop: float = 0.875

    def __post_init__(self) -> None:
        require_one_of("data.name", self.name, tuple(DATA_SETS))
        require_one_of("data.token_dtype", self.token_dtype, ("uint16", "uint32"))
        require_one_of("data.crop", self.crop, CROPS)
        least = {"seed": 0, "examples": 8, "threads": 0, "workers": 0, "repeats": 1}
        _require_numbers(self, "data", {**least, "colour_jitter": 0, "mixup": 0, "cutmix": 0})
        require(self.seed < 2**32, "data.seed", self.seed, "less than 2**32")
        for field in ("least_area", "eval_crop"):
            require(0 < getattr(self, field) <= 1, f"data.{field}", getattr(self, field), "more than 0, 1 at most")
        coloured = self.three_augment or self.colour_jitter > 0
        require(
            self.crop != "centre" or not coloured, "data.crop", self.crop, "resized or simple, with changed colours"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (Loshchilov & Hutter, 2019) or LAMB (You et al., 2020) behind clipping by global norm, on a linear warm-up and a cosine decay.

    name: adamw or lamb. learning_rate is the peak; the cosine ends at learning_rate * final_fraction. clip_norm = 0 means no clipping.
    average: beside the weights a moving average of them is kept, average <- average * this + weights * (1 - this), after each step; it is
      what is evaluated, and what a run returns. 0 means none.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    final_fraction: float = 0.0
    warmup_steps: int = 100
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    average: float = 0.0

    def __post_init__(self) -> None:
        _require_numbers(
            self, "optimizer", {"learning_rate": 0, "warmup_steps": 0, "eps": 0, "weight_decay": 0, "clip_norm": 0}
        )
        require_one_of("optimizer.name", self.name, OPTIMIZERS)
        require(0 <= self.final_fraction <= 1, "optimizer.final_fraction", self.final_fraction, "0 to 1")
        for field in ("b1", "b2", "average"):
            value = getattr(self, field)
            require(0 <= value < 1, f"optimizer.{field}", value, "0 or more and less than 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """The loop.

    batch_size: examples of one optimizer step, whatever accumulate is.
    accumulate: how many micro-batches, one after the other, a batch is split into.
    coordinates: "pre_ln" trains the Pre-LN parameters and maps them inside the loss; "native" trains the variant's own.
    loss: of images: softmax (cross entropy), or sigmoid (binary cross entropy of every class, mixed labels all being present).
    stochastic_depth: how likely a sample skips a residual branch in training (Huang et al., 2016); what is left is scaled up.
    log_every, eval_every, checkpoint_every: in steps; 0 for the latter two means after the last step alone.
    eval_examples: held-out examples of one evaluation; 0 means all of them.
    keep: how many checkpoints stay on disk, the newest.
    keep_best: how many stay besides, the best by the held-out best_by (loss or accuracy); every checkpoint is evaluated then.
    restart_optimizer: whether a checkpoint in other coordinates, or of another optimizer, may be continued, with mapped parameters and an
      optimizer that begins anew.
    skip_nonfinite: how many steps whose loss or gradient is not finite a run may leave out before it stops.
    init_from: whose parameters training begins with: a folder that `prenorm import` wrote, or the workdir of a run of the same model in
      any variant and coordinates; empty means random ones.
    profile: steps to trace, "10:13" for 10, 11 and 12, into the workdir's profile/; empty means none.
    wandb: off, offline or online: whether rows go to Weights & Biases too, into the project wandb_project.
    """

    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    seed: int = 0
    coordinates: str = "pre_ln"
    label_smoothing: float = 0.0
    loss: str = "softmax"
    stochastic_depth: float = 0.0
    log_every: int = 10
    eval_every: int = 100
    eval_batch_size: int = 64
    eval_examples: int = 0
    checkpoint_every: int = 200
    keep: int = 2
    keep_best: int = 0
    best_by: str = "loss"
    restart_optimizer: bool = False
    skip_nonfinite: int = 0
    init_from: str = ""
    profile: str = ""
    wandb: str = "off"
    wandb_project: str = "prenorm_jax"

    def __post_init__(self) -> None:
        least_one = ("steps", "batch_size", "accumulate", "log_every", "eval_batch_size", "keep")
        least_zero = ("seed", "eval_every", "eval_examples", "checkpoint_every", "keep_best", "skip_nonfinite")
        _require_numbers(self, "train", {**dict.fromkeys(least_one, 1), **dict.fromkeys(least_zero, 0)})
        require(self.seed < 2**31, "train.seed", self.seed, "less than 2**31")
        require_one_of("train.coordinates", self.coordinates, COORDINATES)
        require_one_of("train.best_by", self.best_by, ("loss", "accuracy"))
        require_one_of("train.wandb", self.wandb, ("off", "offline", "online"))
        require_one_of("train.loss", self.loss, LOSSES)
        traced = re.fullmatch(r"(\d+):(\d+)", self.profile)
        require(
            not self.profile or (traced is not None and 0 < int(traced[1]) < int(traced[2])),
            "train.profile",
            self.profile,
            "FIRST:END, as in 10:13 for steps 10, 11 and 12",
        )
        if traced:
            require(
                int(traced[1]) <= self.steps, "train.profile", self.profile, f"steps up to {self.steps}, train.steps"
            )
        for field in ("label_smoothing", "stochastic_depth"):
            require(0 <= getattr(self, field) < 1, f"train.{field}", getattr(self, field), "0 or more, below 1")
        require(
            self.batch_size % self.accumulate == 0,
            "train.accumulate",
            self.accumulate,
            f"a divisor of train.batch_size = {self.batch_size}",
        )

    def due(self, step: int, every: int) -> bool:
        """Whether what is done `every` so many steps, and behind the last one, is done behind `step`; 0: behind the last one alone."""
        return step == self.steps or (every > 0 and step % every == 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """The devices of a run, in three axes whose product is their number; in one process it may be less.

    data: copies of the model, each on examples of its own; 0 means what the other two leave.
    fsdp: like data, but each holds a share of the weights and of the optimizer's state, and gathers a weight where it is used.
    tensor: how many devices work on one example: they share its heads, the columns of its MLPs, and the vocabulary.
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        _require_numbers(self, "mesh", {"data": 0, "fsdp": 1, "tensor": 1})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """The comparison of the variants after a run: interleaved windows of timed steps, the same weights in each variant.

    only: compare without training, with the weights of the workdir's checkpoint, or the initial ones where there is
    none.
    """

    enabled: bool = True
    only: bool = False
    warmup_steps: int = 10
    window_steps: int = 20
    windows: int = 5

    def __post_init__(self) -> None:
        _require_numbers(self, "compare", {"warmup_steps": 1, "window_steps": 1, "windows": 1})
        require(self.enabled or not self.only, "compare.only", self.only, "False where compare.enabled = False")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a run depends on. The class of `model` follows from `task`: ViTConfig or GPTConfig.

    estimate: says what a device would hold and do, for the mesh asked for and others, and trains nothing.
    """

    task: str
    model: ViTConfig | GPTConfig
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    mesh: Mesh = Mesh()
    compare: Compare = Compare()
    estimate: bool = False

    def __post_init__(self) -> None:
        require_one_of("task", self.task, TASKS)
        tasks, fixed = DATA_SETS[self.data.name]
        serving = ", ".join(name for name, (served, _) in DATA_SETS.items() if self.task in served)
        require(self.task in tasks, "data.name", self.data.name, f"{serving} for config.task = {self.task}")
        for field, value in fixed.items():
            given = getattr(self.model, field)
            require(given == value, f"model.{field}", given, f"{value} for config.data.name = {self.data.name}")
        if self.data.name == "digits":  # part of scikit-learn, with an augmentation of its own
            for field, plain in (("root", ""), ("crop", "centre")):
                given = getattr(self.data, field)
                require(given == plain, f"data.{field}", given, f"{plain or 'none'} for config.data.name = digits")
        if self.task != "image_classification":
            require(
                self.train.loss == "softmax", "train.loss", self.train.loss, f"softmax for config.task = {self.task}"
            )
            for field in ("mixup", "cutmix"):
                given = getattr(self.data, field)
                require(given == 0, f"data.{field}", given, f"0 for config.task = {self.task}")
        has_head = getattr(self.model, "head", True)
        require(
            has_head,
            "model.head",
            has_head,
            "True: images are classified (prenorm import --classes N gives a new head)",
        )
        scores = ("loss", "accuracy") if self.task == "image_classification" else ("loss",)
        require(
            self.train.best_by in scores, "train.best_by", self.train.best_by, f"loss for config.task = {self.task}"
        )
        require(
            self.optimizer.warmup_steps < self.train.steps,
            "optimizer.warmup_steps",
            self.optimizer.warmup_steps,
            f"less than config.train.steps = {self.train.steps}",
        )


def default_experiment(task: str) -> Experiment:
    """Where configs start: ViT-S/16 or GPT Small on synthetic data. Raises ConfigError for an unknown task."""
    require_one_of("task", task, TASKS)
    return Experiment(task=task, model=vit_config("S/16") if task == "image_classification" else gpt_config("small"))


def as_tree(experiment: Experiment) -> dict[str, typing.Any]:
    """The nested dict of plain values that `read_experiment` reads back into an equal experiment."""
    return dataclasses.asdict(experiment)


def read_experiment(tree: Mapping[str, object]) -> Experiment:
    """Reads a nested dict, as configs/ return it. Raises ConfigError for what is unknown, ill-typed or impossible.

    >>> tree = as_tree(default_experiment("language_modelling"))
    >>> tree["model"]["heads"] = 5
    >>> read_experiment(tree)
    Traceback (most recent call last):
    prenorm_jax.models.config.ConfigError: config.model.heads: got 5; allowed: a divisor of model.width = 768
    """
    try:
        require_one_of("task", tree.get("task"), TASKS)
        sections = {
            "model": MODELS[str(tree["task"])],
            "data": Data,
            "optimizer": Optimizer,
            "train": Train,
            "mesh": Mesh,
            "compare": Compare,
        }
        for key in tree:
            _require_known(key, key, ("task", "estimate", *sections))
        records = {name: _read_record(kind, name, tree.get(name, {})) for name, kind in sections.items()}
        estimate = _read_value("estimate", tree.get("estimate", False), bool)
        return Experiment(task=str(tree["task"]), estimate=estimate, **records)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"config.{error}") from None


def override(tree: dict[str, typing.Any], field: str, text: str, where: str = "config") -> None:
    """Sets, in place, what `--config.<field>=<text>` says; `text` is read as the type of the value that stands there.

    >>> tree = as_tree(default_experiment("language_modelling"))
    >>> override(tree, "train.steps", "20")
    >>> tree["train"]["steps"]
    20

    Raises: ConfigError for a field that is not there, and for a text that is not of its type.
    """
    name, _, rest = field.partition(".")
    path = f"{where}.{name}"
    _require_known(path, name, tuple(tree))
    value = tree[name]
    if isinstance(value, dict):
        if not rest:
            raise ConfigError(f"{path}: got {text!r}; allowed: its fields one by one: {', '.join(value)}")
        override(value, rest, text, path)
    elif rest:
        raise ConfigError(f"{path}.{rest}: no such field; {path} is a value of its own")
    else:
        tree[name] = _parse(path, text, type(value))


def _parse(field: str, text: str, kind: type) -> object:
    if kind not in KINDS:
        raise ConfigError(
            f"{field}: got {kind.__name__.removesuffix('Type')} in the config; allowed: {', '.join(KINDS.values())}"
        )
    if kind is bool:
        words = {"true": True, "false": False, "1": True, "0": False}
        require(text.lower() in words, field, text, KINDS[bool])
        return words[text.lower()]
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{field}: got {text!r}; allowed: {KINDS[kind]}") from None


def differences(old: Mapping[str, object], new: Mapping[str, object], prefix: str = "config") -> list[str]:
    """The fields in which two trees differ, each as "config.model.width: 64 -> 128"."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}.{key}")
        elif before != after:
            lines.append(f"{prefix}.{key}: {before} -> {after}")
    return lines


def _read_record(kind: type, section: str, tree: object) -> object:
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"{section}: got {tree!r}; allowed: the fields of a section, such as config.{section}.x = ..."
        )
    types = typing.get_type_hints(kind)
    for key in tree:
        _require_known(f"{section}.{key}", key, tuple(types))
    for field in dataclasses.fields(kind):
        if field.name not in tree and field.default is dataclasses.MISSING:
            raise ConfigError(f"{section}.{field.name}: missing; allowed: {KINDS[types[field.name]]}")
    return kind(**{key: _read_value(f"{section}.{key}", value, types[key]) for key, value in tree.items()})


def _require_known(field: str, key: str, known: tuple[str, ...]) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"{field}: no such field{hint}; allowed: {', '.join(sorted(known))}")


def _read_value(field: str, value: object, kind: type) -> object:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is a subclass of int: True must not pass as a count.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{field}: got {value!r}; allowed: {KINDS[kind]}")
    if kind is int and value >= 2**32:  # type: ignore[operator]
        raise ConfigError(f"{field}: got {value!r}; allowed: an integer below 2**32")
    return value
