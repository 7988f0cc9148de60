"""Where compiled programs are kept, and that a second process finds them; off where the environment says so."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import jax
from prenorm_jax.training.compilation_cache import use_compilation_cache
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
use_compilation_cache()
jax.jit(lambda x: x + 1)(1.0)
"""


def files(folder: pathlib.Path, **environment: str) -> int:
    """How many files the program leaves below `folder`, its working directory and its user's cache."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    run = {**kept, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder), **environment}
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=folder, env=run, check=True, timeout=120)
    return sum(path.is_file() for path in folder.rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "kept"),
    [
        ({}, "prenorm_jax"),
        ({"JAX_COMPILATION_CACHE_DIR": "elsewhere"}, "elsewhere"),
        ({"JAX_COMPILATION_CACHE_DIR": ""}, None),
    ],
    ids=["default", "the user's", "off"],
)
def test_where_programs_are_kept(tmp_path, environment, kept):
    found = files(tmp_path, **environment)
    assert bool(found) == bool(kept)
    if kept:
        assert all(path.relative_to(tmp_path).parts[0] == kept for path in tmp_path.rglob("*"))
        assert files(tmp_path, **environment) == found  # the second run compiled nothing new
