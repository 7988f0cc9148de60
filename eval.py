"""Evaluates a checkpoint in every form and reports whether they are the same function.

python eval.py --workdir=DIR [--forms=pre_ln,pre_rmsnorm,pre_crmsnorm-reflect,pre_crmsnorm-drop]
python eval.py --workdir=DIR --prompt="def main" [--new_tokens=100] [--temperature=0.8] [--top_k=40]

The first writes equivalence.json, equivalence.md and equivalence.png into DIR and exits with 1 where something does not hold; the
second prints text from a byte-level GPT.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from absl import logging

from prenorm_jax.measure import evaluation
from prenorm_jax.models.config import ConfigError
from prenorm_jax.training.compilation_cache import use_compilation_cache
from prenorm_jax.training.data import DataError
from train import Flags


def read_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags. Raises ConfigError."""
    flags = Flags(usage=__doc__, allow_abbrev=False)
    flags.add_argument("--workdir", type=pathlib.Path, required=True, help="of a run of train.py")
    flags.add_argument("--forms", default="", help="comma-separated; default: all")
    flags.add_argument("--prompt", help="print a continuation of this text instead")
    flags.add_argument("--new_tokens", type=int, default=100)
    flags.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    flags.add_argument("--top_k", type=int)
    return flags.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 if everything holds, 1 if something does not, 2 for what can't be (one line on stderr)."""
    logging.set_verbosity(logging.ERROR)
    use_compilation_cache()
    try:
        flags = read_flags(argv)
        if flags.prompt is not None:
            print(evaluation.write_text(flags.workdir, flags.prompt, flags.new_tokens, flags.temperature, flags.top_k))
            return 0
        failures = evaluation.evaluate_checkpoint(flags.workdir, tuple(filter(None, flags.forms.split(","))))
    except (ConfigError, DataError, FileNotFoundError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    for line in failures:
        print(f"eval.py: {line}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
