"""Checkpoints of the reference libraries, made here: random weights, every parameter perturbed, so that gamma != 1 and beta != 0.

These tests run where torch, transformers and timm are installed; elsewhere they are not collected.
"""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py", "checkpoints.py"]
