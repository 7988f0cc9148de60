"""These run in the environment of requirements-torch.txt, which has the reference libraries: `python -m pytest tests/interop_torch`."""

import importlib.util

import pytest

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["*.py"]


@pytest.fixture(autouse=True)
def quiet_reference_library():
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
