"""prenorm: checkpoints from elsewhere, at the command line. `prenorm COMMAND --help` says more; so does `python -m prenorm_jax.interop`."""

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence

from prenorm_jax.interop.plan import RefusedError
from prenorm_jax.interop.tensors import FormatError
from prenorm_jax.main_branch import LayoutError

COMMANDS = {
    "convert": "prenorm_jax.interop.convert",
    "verify": "prenorm_jax.interop.verify",
    "import": "prenorm_jax.interop.into_ours",
    "export": "prenorm_jax.interop.from_ours",
    "inspect": "prenorm_jax.interop.inspect",
}
"""Command -> its module, which has `arguments(parser)`, `run(arguments) -> exit status`, and its help as docstring."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit status: 0, 1 where what was asked does not hold, 2 for input that is refused."""
    parser = argparse.ArgumentParser("prenorm", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = importlib.import_module(module)
        summary, _, _ = (command.__doc__ or "").partition("\n")
        of_command = commands.add_parser(
            name, help=summary, description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.arguments(of_command)
        of_command.set_defaults(run=command.run)
    chosen = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    try:
        status: int = chosen.run(chosen)
    except KeyboardInterrupt:
        print("prenorm: interrupted; nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    except (FormatError, LayoutError, RefusedError, OSError) as error:
        print(f"prenorm: {error}", file=sys.stderr)
        return 2
    return status


def _stop(number: int, _: object) -> None:
    """As an exception, so that what is half written is removed on the way out."""
    print("prenorm: told to stop; nothing was written", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
