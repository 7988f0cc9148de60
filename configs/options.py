"""The full tree of options from which every config starts, and the reading of a config's `:arg`."""

from ml_collections import ConfigDict

from prenorm_jax.models.config import ConfigError
from prenorm_jax.training.experiment import as_tree, default_experiment


def every_option(task: str) -> ConfigDict:
    """Every field that exists, at its default: task is "image_classification" (ViT-S/16) or "language_modelling" (GPT Small)."""
    return ConfigDict(as_tree(default_experiment(task)))


def read_arg(arg: str, **defaults: str) -> dict[str, str]:
    """`key=value,key=value` over `defaults`, which name the keys that exist.

    >>> read_arg("norm=pre_ln", variant="B/16", norm="pre_crmsnorm")
    {'variant': 'B/16', 'norm': 'pre_ln'}
    """
    values = dict(defaults)
    for part in filter(None, arg.split(",")):
        key, equals, value = part.partition("=")
        if key not in defaults or not equals:
            raise ConfigError(f"config arg: got {part!r}; allowed: {', '.join(f'{name}=...' for name in defaults)}")
        values[key] = value
    return values


def read_word(arg: str, *allowed: str) -> str:
    """An arg of one word; the first of `allowed` where there is none."""
    if arg and arg not in allowed:
        raise ConfigError(f"config arg: got {arg!r}; allowed: {', '.join(allowed)}")
    return arg or allowed[0]


def read_count(key: str, text: str) -> int:
    """A whole number above 0, of `key=text`.

    >>> read_count("epochs", "30")
    30
    """
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"config arg: got {key}={text}; allowed: a whole number above 0")
    return int(text)
