"""Evaluates a checkpoint in every form and reports whether they are the same function.

python eval.py --workdir=DIR [--forms=pre_ln,pre_rmsnorm,pre_crmsnorm-reflect,pre_crmsnorm-drop]
python eval.py --config=configs/pretrained.py:IMPORT --config.data.root=DATA [--workdir=DIR] [--forms=...] [--config.FIELD=VALUE ...]
python eval.py --workdir=DIR --prompt="def main" [--new_tokens=100] [--temperature=0.8] [--top_k=40]

The first two write equivalence.json, equivalence.md and equivalence.png into DIR and exit with 1 where something does not hold: of a
run of train.py, or of what `prenorm import` wrote. The third prints text from a byte-level GPT.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from absl import logging

from prenorm_jax.measure import evaluation
from prenorm_jax.models.config import ConfigError
from prenorm_jax.training.command_line import Flags, read_config, say
from prenorm_jax.training.compilation_cache import use_compilation_cache
from prenorm_jax.training.data import DataError


def read_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; fields of a config in `fields`. Raises ConfigError."""
    flags = Flags(usage=__doc__, allow_abbrev=False)
    flags.add_argument("--workdir", type=pathlib.Path, help="of a run of train.py; with --config: where to write")
    flags.add_argument("--config", metavar="FILE[:ARG]", help="an experiment that begins with an imported checkpoint")
    flags.add_argument("--forms", default="", help="comma-separated; default: all")
    flags.add_argument(
        "--best", action="store_true", help="the best checkpoint on disk, not the newest (train.keep_best)"
    )
    flags.add_argument("--prompt", help="print a continuation of this text instead")
    flags.add_argument("--new_tokens", type=int, help="default: 100")
    flags.add_argument("--temperature", type=float, help="default: 0, always the likeliest token")
    flags.add_argument("--top_k", type=int)
    given, given_fields = flags.parse_known_args(argv)
    if given_fields and not given.config:
        raise ConfigError(f"{given_fields[0]}: no such flag without --config")
    if not (given.workdir or given.config):
        raise ConfigError("the following arguments are required: --workdir, or --config")
    if given.prompt is not None and not given.workdir:
        raise ConfigError("--prompt: got no --workdir; allowed: that of a run")
    if given.prompt is not None and given.forms:
        raise ConfigError(
            "--forms: got it with --prompt; allowed: without, since text is written in the run's own form"
        )
    for flag in ("new_tokens", "temperature", "top_k"):
        if given.prompt is None and getattr(given, flag) is not None:
            raise ConfigError(f"--{flag}: got it without --prompt; allowed: with a text to continue")
    if given.best and given.config:
        raise ConfigError("--best: got it with --config; allowed: with the workdir of a run alone")
    given.fields = given_fields
    return given


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 if everything holds, 1 if something does not, 2 for what can't be (one line on stderr)."""
    logging.set_verbosity(logging.ERROR)
    use_compilation_cache()
    try:
        flags = read_flags(argv)
        if flags.prompt is not None:
            new_tokens = 100 if flags.new_tokens is None else flags.new_tokens
            text = (flags.prompt, new_tokens, flags.temperature or 0.0, flags.top_k)
            print(evaluation.write_text(flags.workdir, *text, best=flags.best))
            return 0
        forms = tuple(filter(None, flags.forms.split(",")))
        if flags.config:
            experiment, name = read_config(flags.config, flags.fields)
            failures = evaluation.evaluate_import(experiment, flags.workdir or pathlib.Path("runs", name), forms)
        else:
            failures = evaluation.evaluate_checkpoint(flags.workdir, forms, flags.best)
    except (ConfigError, DataError, OSError) as error:
        say("eval.py", error)
        return 2
    except KeyboardInterrupt:
        say("eval.py", "interrupted")
        return 130
    for line in failures:
        say("eval.py", line)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
