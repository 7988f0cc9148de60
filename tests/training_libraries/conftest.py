"""These run where datasets and tokenizers are, as in the environment of requirements-torch.txt: `pytest tests/training_libraries`."""

import importlib.util

if importlib.util.find_spec("datasets") is None:
    collect_ignore_glob = ["*.py"]
