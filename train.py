"""Trains the experiment of a config file, then compares the variants with the weights it got.

python train.py --config=configs/quickstart.py[:arg] [--workdir=DIR] [--config.any.field=value ...]
    on several hosts: the same on each; prenorm_jax/training/distributed.py says how they find each other
    --config.estimate=True: what a device would hold and do, and nothing else
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import jax
from absl import logging

from prenorm_jax import measure
from prenorm_jax.models.config import ConfigError
from prenorm_jax.training import checkpoints, distributed, estimate, loop, memory
from prenorm_jax.training.command_line import Flags, read_config, say
from prenorm_jax.training.compilation_cache import use_compilation_cache
from prenorm_jax.training.data import DataError
from prenorm_jax.training.disk import DiskFull
from prenorm_jax.training.experiment import Experiment
from prenorm_jax.training.initial import initial_params
from prenorm_jax.training.interrupts import Interrupted
from prenorm_jax.training.lost import ProcessLost, leave


def read_flags(argv: Sequence[str]) -> tuple[Experiment, pathlib.Path]:
    """The experiment and the workdir; joins the other processes, where there are any. Raises ConfigError."""
    flags = Flags(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flags.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a Python file with get_config(arg)")
    flags.add_argument("--workdir", type=pathlib.Path, help="default: runs/ and the config's name and arg")
    distributed.add_flags(flags)
    given, fields = flags.parse_known_args(argv)
    distributed.start(distributed.read(given), given.start_seconds)
    experiment, name = read_config(given.config, fields)
    return experiment, given.workdir or pathlib.Path("runs", name)


def run(experiment: Experiment, workdir: pathlib.Path) -> None:
    """Trains unless compare.only, compares unless compare.enabled is False; with `estimate`, does neither."""
    if experiment.estimate:
        print(estimate.of(experiment))
        return
    if not experiment.compare.only:
        params = loop.train(experiment, workdir)
    elif checkpoints.latest(workdir):
        checkpoints.refuse_other_model(workdir, experiment)
        params = checkpoints.load(workdir, into=experiment).params
    else:
        params = initial_params(experiment)
    # What several processes trained lies on all of them; what they saved, one can compare (compare.only).
    if experiment.compare.enabled and jax.process_count() == 1:
        measure.compare_variants(experiment, params, workdir)


def main(argv: Sequence[str]) -> int:
    """Exit status: 0; 2 for what can't be, 1 for a run that failed, 128 + signal for one stopped; a line on stderr for each."""
    logging.set_verbosity(logging.FATAL)  # what Orbax logs of an error it raises as well
    use_compilation_cache()
    try:
        run(*read_flags(argv))
    except Interrupted as error:
        say("train.py", error)
        return error.status
    except (ConfigError, DataError) as error:
        say("train.py", error)
        return leave(2)
    except (FloatingPointError, DiskFull, ProcessLost, OSError) as error:
        say("train.py", error)
        return leave(1)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        line = memory.in_a_line(error)
        if line is None:
            raise
        say("train.py", line)
        return leave(1)
    except KeyboardInterrupt:
        say("train.py", "interrupted")
        return leave(130)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
