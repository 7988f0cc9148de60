"""Compiled programs that outlive the process: the second run of a config starts in seconds."""

import os
import pathlib

import jax


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk: in $JAX_COMPILATION_CACHE_DIR, or else $XDG_CACHE_HOME/prenorm_jax (~/.cache/prenorm_jax).

    An empty JAX_COMPILATION_CACHE_DIR, or JAX_ENABLE_COMPILATION_CACHE=false, leaves it off. For entry points: a library must not
    decide this for its caller's process.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return  # jax has read it, and an empty one is off
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home) / "prenorm_jax"))
