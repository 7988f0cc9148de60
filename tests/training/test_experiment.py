"""The strict reading of configs: every impossible tree is one line that names the field."""

import dataclasses

import pytest

from prenorm_jax.models.config import ConfigError
from prenorm_jax.training.experiment import (
    TASKS,
    as_tree,
    default_experiment,
    differences,
    override,
    read_experiment,
)


def digits_tree():
    tree = as_tree(default_experiment("image_classification"))
    tree["data"]["name"] = "digits"
    tree["model"].update(image_size=8, patch_size=2, channels=1, classes=10, width=16, heads=2, depth=1, mlp_width=32)
    return tree


@pytest.mark.parametrize("task", TASKS)
def test_a_tree_reads_back(task):
    experiment = default_experiment(task)
    assert read_experiment(as_tree(experiment)) == experiment


def test_integers_serve_as_numbers():
    tree = digits_tree()
    tree["optimizer"]["weight_decay"] = 0
    value = read_experiment(tree).optimizer.weight_decay
    assert (value, type(value)) == (0.0, float)


IMPOSSIBLE = [
    ("task", "vision", "config.task: got 'vision'; allowed: image_classification, language_modelling"),
    ("model.heads", 3, "config.model.heads: got 3; allowed: a divisor of model.width = 16"),
    ("model.patch_size", 3, "config.model.patch_size: got 3; allowed: a divisor of model.image_size = 8"),
    ("model.norm", "post_ln", "config.model.norm: got 'post_ln'; allowed: pre_ln, pre_rmsnorm, pre_crmsnorm, no_norm"),
    ("model.depth", 2.0, "config.model.depth: got 2.0; allowed: an integer"),
    ("model.depth", True, "config.model.depth: got True; allowed: an integer"),
    ("model.remat", 1, "config.model.remat: got 1; allowed: True or False"),
    ("model.classes", 7, "config.model.classes: got 7; allowed: 10 for config.data.name = digits"),
    (
        "data.name",
        "stdlib",
        "config.data.name: got 'stdlib'; allowed: digits, synthetic, image_folder, hugging_face, array_record for config.task",
    ),
    ("data.seed", -1, "config.data.seed: got -1; allowed: 0 or more"),
    ("train.seed", 2**31, "config.train.seed: got 2147483648; allowed: less than 2**31"),
    ("train.seed", 2**32, "config.train.seed: got 4294967296; allowed: an integer below 2**32"),
    ("model.depth", 10**23, "config.model.depth: got 100000000000000000000000; allowed: an integer below 2**32"),
    ("optimizer.learning_rate", "fast", "config.optimizer.learning_rate: got 'fast'; allowed: a number"),
    ("optimizer.learning_rate", float("nan"), "config.optimizer.learning_rate: got nan; allowed: 0 or more"),
    ("optimizer.b2", 1.0, "config.optimizer.b2: got 1.0; allowed: 0 or more and less than 1"),
    (
        "optimizer.warmup_steps",
        1000,
        "config.optimizer.warmup_steps: got 1000; allowed: less than config.train.steps = 1000",
    ),
    ("train.steps", -5, "config.train.steps: got -5; allowed: 1 or more"),
    ("train.coordinates", "polar", "config.train.coordinates: got 'polar'; allowed: pre_ln, native"),
    ("train.accumulate", 5, "config.train.accumulate: got 5; allowed: a divisor of train.batch_size = 64"),
    ("train.stepz", 5, "config.train.stepz: no such field (did you mean steps?); allowed: accumulate, "),
    ("model.context", 5, "config.model.context: no such field"),
    (
        "trian",
        {},
        "config.trian: no such field (did you mean train?); allowed: compare, data, estimate, mesh, model, optimizer, task, train",
    ),
    ("train", 5, "config.train: got 5; allowed: the fields of a section"),
    ("compare.windows", 0, "config.compare.windows: got 0; allowed: 1 or more"),
]


@pytest.mark.parametrize(("field", "value", "message"), IMPOSSIBLE, ids=[f"{f}={v}" for f, v, _ in IMPOSSIBLE])
def test_the_impossible_is_one_line(field, value, message):
    tree = digits_tree()
    node = tree
    *sections, name = field.split(".")
    for section in sections:
        node = node[section]
    node[name] = value
    with pytest.raises(ConfigError) as error:
        read_experiment(tree)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_missing_field_without_a_default_is_named():
    tree = digits_tree()
    del tree["model"]["width"]
    with pytest.raises(ConfigError, match=r"^config\.model\.width: missing; allowed: an integer$"):
        read_experiment(tree)
    with pytest.raises(ConfigError, match=r"^config\.task: got None"):
        read_experiment({})


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("train.steps", "20", 20),
        ("optimizer.learning_rate", "3", 3.0),
        ("optimizer.learning_rate", "1e-4", 1e-4),
        ("compare.only", "True", True),
        ("compare.enabled", "false", False),
        ("data.root", "a=b", "a=b"),
    ],
)
def test_a_flag_is_read_as_the_type_that_stands_there(field, text, value):
    tree = digits_tree()
    override(tree, field, text)
    section, name = field.split(".")
    assert (tree[section][name], type(tree[section][name])) == (value, type(value))


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("train.steps", "1.5", "config.train.steps: got '1.5'; allowed: an integer"),
        ("compare.only", "maybe", "config.compare.only: got 'maybe'; allowed: True or False"),
        ("train.stepz", "1", "config.train.stepz: no such field (did you mean steps?)"),
        ("trian.steps", "1", "config.trian: no such field (did you mean train?)"),
        ("train", "1", "config.train: got '1'; allowed: its fields one by one: steps"),
        ("train.steps.more", "1", "config.train.steps.more: no such field"),
    ],
)
def test_a_wrong_flag_is_one_line(field, text, message):
    tree = digits_tree()
    with pytest.raises(ConfigError) as error:
        override(tree, field, text)
    assert str(error.value).startswith(message)
    assert tree == digits_tree()


def test_a_flag_for_what_a_config_left_without_a_value_is_one_line():
    with pytest.raises(ConfigError, match=r"^config\.train: got None in the config; allowed: "):
        override({"train": None}, "train", "3")


def test_differences_name_the_fields():
    experiment = default_experiment("language_modelling")
    other = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, width=1536))
    assert differences(as_tree(experiment), as_tree(other)) == ["config.model.width: 768 -> 1536"]
    assert differences({"a": 1}, {}) == ["config.a: 1 -> (absent)"]
    assert differences(as_tree(other), as_tree(other)) == []
