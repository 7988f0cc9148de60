"""What the command lines of train.py and eval.py have in common: flags, and config files with fields set from outside."""

import argparse
import importlib.util
import pathlib
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from prenorm_jax.models.config import ConfigError, require
from prenorm_jax.training.experiment import Experiment, override, read_experiment


def say(program: str, error: object) -> None:
    """One line on stderr, whatever names with line breaks the error quotes."""
    print(f"{program}: {' '.join(str(error).splitlines())}", file=sys.stderr)


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
    if not (path.endswith(".py") and pathlib.Path(path).is_file()):
        raise ConfigError(f"--config: got {path!r}; allowed: an existing Python file")
    tree = _tree(path, arg)
    for field in fields:
        if not (parts := re.fullmatch(r"--config\.([\w.]+)=(.*)", field, re.DOTALL)):
            raise ConfigError(
                f"{field}: no such flag; allowed: --config=FILE[:ARG], --workdir=DIR, --config.FIELD=VALUE"
            )
        override(tree, *parts.groups())
    return read_experiment(tree), re.sub(r"[^\w.]+", "-", f"{pathlib.Path(path).stem} {arg}".strip())


def _tree(path: str, arg: str) -> dict[str, Any]:
    """What get_config(arg) of a Python file returns."""
    try:
        spec: Any = importlib.util.spec_from_file_location("config", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(
                f"--config: {path} has no get_config(arg); allowed: a config of an experiment, as in configs/gpt.py"
            )
        found: Any = module.get_config(arg)
    except ConfigError:
        raise
    except Exception as error:
        line = next(
            (f", line {at.lineno}" for at in traceback.extract_tb(error.__traceback__) if at.filename == path), ""
        )
        raise ConfigError(
            f"--config: cannot read {path} ({type(error).__name__}: {error}{line}); allowed: a config as in configs/gpt.py"
        ) from error
    require(hasattr(found, "to_dict"), f"--config: get_config of {path}", found, "a ConfigDict")
    tree: dict[str, Any] = found.to_dict()
    return tree
