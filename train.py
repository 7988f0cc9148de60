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

from prenorm_jax import measure, models
from prenorm_jax.models.config import ConfigError
from prenorm_jax.training import checkpoints, loop
from prenorm_jax.training.compilation_cache import use_compilation_cache
from prenorm_jax.training.data import DataError
from prenorm_jax.training.experiment import Experiment, override, read_experiment
from prenorm_jax.training.interrupts import Interrupted


class Flags(argparse.ArgumentParser):  # whose errors are one line; eval.py has them too
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def read_flags(argv: Sequence[str]) -> tuple[Experiment, pathlib.Path]:
    """The experiment and the workdir that the command line asks for. Raises ConfigError."""
    flags = Flags(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flags.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a Python file with get_config(arg)")
    flags.add_argument("--workdir", type=pathlib.Path, help="default: runs/ and the config's name and arg")
    given, fields = flags.parse_known_args(argv)
    path, _, arg = given.config.partition(":")
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"--config: got {path!r}; allowed: an existing Python file")
    spec: Any = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tree = module.get_config(arg).to_dict()
    for field in fields:
        if not (parts := re.fullmatch(r"--config\.([\w.]+)=(.*)", field, re.DOTALL)):
            raise ConfigError(f"{field}: no such flag; allowed: --config=FILE[:ARG], --workdir=DIR, --config.FIELD=X")
        override(tree, *parts.groups())
    name = re.sub(r"[^\w.]+", "-", f"{pathlib.Path(path).stem} {arg}".strip())
    return read_experiment(tree), given.workdir or pathlib.Path("runs", name)


def run(experiment: Experiment, workdir: pathlib.Path) -> None:
    """Trains unless compare.only, compares unless compare.enabled is False."""
    if not experiment.compare.only:
        params = loop.train(experiment, workdir)
    elif checkpoints.latest(workdir):
        checkpoints.refuse_other_model(workdir, experiment)
        params = checkpoints.load(workdir).params
    else:
        params = models.init(experiment.model, experiment.train.seed, experiment.train.coordinates)
    if experiment.compare.enabled:
        measure.compare_variants(experiment, params, workdir)


def main(argv: Sequence[str]) -> int:
    """Exit status: 0; 2 for what can't be, 1 for a run that failed, 128 + signal for one stopped; a line on stderr for each."""
    logging.set_verbosity(logging.ERROR)
    use_compilation_cache()
    try:
        run(*read_flags(argv))
    except (ConfigError, DataError, FloatingPointError, Interrupted) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return error.status if isinstance(error, Interrupted) else 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
