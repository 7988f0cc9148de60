"""Doctests see single precision, as their readers would."""

import contextlib
import importlib.util
from collections.abc import Iterator

import jax
import pytest

# A file for users of torch, who need nothing else of this package.
collect_ignore = [] if importlib.util.find_spec("torch") else ["prenorm_jax/interop/torch_norms.py"]


@pytest.fixture(autouse=True)
def single_precision_doctests(request: pytest.FixtureRequest) -> Iterator[None]:
    is_doctest = type(request.node).__name__ == "DoctestItem"
    with jax.enable_x64(False) if is_doctest else contextlib.nullcontext():
        yield
