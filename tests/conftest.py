"""House rules of every test: 8 CPU devices, float64 allowed, full matrix precision, no silent rank promotion; warnings are errors."""

import dataclasses
import importlib.metadata
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # no test finds what another run compiled
# Tests compile far more than they compute: without LLVM's expensive passes, in one piece and, where XLA still has them, with its older
# emitters they take a quarter of the time.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    COMPILE_FAST += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {COMPILE_FAST}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="session")
def eight_devices():
    assert jax.device_count() == 8, "tests need 8 forced CPU devices: import nothing of jax before tests/conftest.py"


def _assert_same(actual, expected, tolerance=0.0):
    """Two trees of arrays: the same structure, dtypes and shapes, and values within `tolerance` of the expected leaf's largest one."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        where = jax.tree_util.keystr(path)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
        worst = np.max(np.abs(a - b), initial=0.0)  # NaN is never within a tolerance
        assert worst <= tolerance * np.max(np.abs(b), initial=0.0), f"{where}: differs by {worst}"


@pytest.fixture
def assert_same():
    return _assert_same


def _without_key_biases(gradient):
    """Leaves of a gradient by path, less those of keys' biases: the same to every query, they move no softmax, and their gradient is
    rounding, which has no scale of its own."""
    from prenorm_jax.paths import leaves

    scale = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(gradient))
    found = dict(leaves(gradient))
    for path in [path for path in found if path.endswith("attn/key/bias")]:
        assert np.max(np.abs(found.pop(path))) <= 1e-13 * scale
    return found


@pytest.fixture
def without_key_biases():
    return _without_key_biases


def _random_params(config, seed=0, dtype=np.float64):
    """A Pre-LN tree of normal values, norm scales around 1 with one 0, one negative and one tiny entry in each norm."""
    from prenorm_jax import models

    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        value = rng.normal(size=shape) * (1 if len(shape) < 2 else shape[-2] ** -0.5)
        if path[-1].key == "scale":
            value = 1 + 0.3 * value
            value[..., :3] = 0.0, -0.7, 1e-30
        return jnp.asarray(value, dtype)

    shapes = models.abstract(dataclasses.replace(config, norm="pre_ln"))
    return jax.tree_util.tree_map_with_path(lambda path, shape: leaf(path, shape.shape), shapes)


@pytest.fixture(scope="session")
def random_params():
    return _random_params
