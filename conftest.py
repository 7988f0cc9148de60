"""Doctests see single precision, as their readers would."""

import contextlib
from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def single_precision_doctests(request: pytest.FixtureRequest) -> Iterator[None]:
    is_doctest = type(request.node).__name__ == "DoctestItem"
    with jax.enable_x64(False) if is_doctest else contextlib.nullcontext():
        yield
