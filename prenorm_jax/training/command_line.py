"""What the command lines of train.py and eval.py have in common: flags, and config files with fields set from outside."""

import argparse
import importlib.util
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from prenorm_jax.models.config import ConfigError
from prenorm_jax.training.experiment import Experiment, override, read_experiment


class Flags(argparse.ArgumentParser):
    """Flags whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(message)


def read_config(config: str, fields: Sequence[str]) -> tuple[Experiment, str]:
    """The experiment of FILE[:ARG] with fields set by --config.FIELD=VALUE, and a name for it.

    Args:
      config: a Python file with `get_config(arg)`, and behind a colon what to call it with.
      fields: the flags that set fields.

    Raises: ConfigError.
    """
    path, _, arg = config.partition(":")
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"--config: got {path!r}; allowed: an existing Python file")
    spec: Any = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(
            f"--config: {path} has no get_config(arg); allowed: a config of an experiment, as in configs/gpt.py"
        )
    tree = module.get_config(arg).to_dict()
    for field in fields:
        if not (parts := re.fullmatch(r"--config\.([\w.]+)=(.*)", field, re.DOTALL)):
            raise ConfigError(
                f"{field}: no such flag; allowed: --config=FILE[:ARG], --workdir=DIR, --config.FIELD=VALUE"
            )
        override(tree, *parts.groups())
    return read_experiment(tree), re.sub(r"[^\w.]+", "-", f"{pathlib.Path(path).stem} {arg}".strip())
