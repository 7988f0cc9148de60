"""House rules of every test: 8 CPU devices, float64 allowed, full matrix precision, no silent rank promotion; warnings are errors."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="session")
def eight_devices():
    assert jax.device_count() == 8, "tests need 8 forced CPU devices: import nothing of jax before tests/conftest.py"
