"""Trains the experiment of a config file, then compares the variants with the weights it got.

python train.py --config=configs/quickstart.py[:arg] [--workdir=DIR] [--config.any.field=value ...]
"""

import argparse
import importlib.util
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import logging
from ml_collections import ConfigDict

from prenorm_jax import models
from prenorm_jax.models.config import ConfigError
from prenorm_jax.training import checkpoints, loop
from prenorm_jax.training.data import DataError
from prenorm_jax.training.experiment import Experiment, override, read_experiment


class Flags(argparse.ArgumentParser):
    """Flags whose errors are one line, like those of the config's fields."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def read_flags(argv: Sequence[str]) -> tuple[Experiment, pathlib.Path]:
    """The experiment and the workdir that the command line asks for. Raises ConfigError."""
    flags = Flags(usage=__doc__, allow_abbrev=False)
    flags.add_argument("--config", required=True, help="a file with get_config(arg), then :arg where it takes one")
    flags.add_argument("--workdir", type=pathlib.Path, help="default: runs/ and the config's name and arg")
    given, fields = flags.parse_known_args(argv)
    path, _, arg = given.config.partition(":")
    tree = load_config(path, arg).to_dict()
    for field in fields:
        match = re.fullmatch(r"--config\.([\w.]+)=(.*)", field, re.DOTALL)
        if not match:
            raise ConfigError(
                f"{field}: no such flag; allowed: --config=FILE[:arg], --workdir=DIR, --config.FIELD=VALUE"
            )
        override(tree, *match.groups())
    name = re.sub(r"[^\w.]+", "-", pathlib.Path(path).stem + (f":{arg}" if arg else ""))
    return read_experiment(tree), given.workdir or pathlib.Path("runs", name)


def load_config(path: str, arg: str) -> ConfigDict:
    """What the file's get_config(arg) returns. Raises ConfigError."""
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"--config: got {path!r}; allowed: an existing Python file")
    spec: Any = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def run(experiment: Experiment, workdir: pathlib.Path) -> None:
    """Trains unless compare.only, compares unless compare.enabled is False."""
    if not experiment.compare.only:
        params = loop.train(experiment, workdir)
    elif checkpoints.refuse_other_model(workdir, experiment) or checkpoints.latest(workdir):
        params = checkpoints.load(workdir).params
    else:
        params = models.init(experiment.model, experiment.train.seed, experiment.train.coordinates)
    if experiment.compare.enabled:
        from prenorm_jax import measure

        measure.compare_variants(experiment, params, workdir)


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, or 2 for what can't be (one line on stderr), 1 for a run that failed, 130 for one interrupted."""
    logging.set_verbosity(logging.ERROR)
    try:
        run(*read_flags(argv))
    except (ConfigError, DataError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("train.py: interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
