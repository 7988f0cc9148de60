"""A number for each array of a checkpoint that one changed bit changes. Orbax's files hold no checksum of the arrays themselves: a bit that
flips on the disk would come back as another weight.

For elements with bits b_i at place i of the array, sum_i b_i (2 i + 1) mod 2^32. A sum mod 2^32 does not depend on its order, so neither on
the mesh that it is taken on nor on the number of processes; an odd factor is invertible, so a change of any one element shows.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def fingerprints(**trees: Any) -> dict[str, int]:
    """{"name/path/of/leaf": number} for the arrays of trees, computed where the arrays are.

    >>> fingerprints(a={"b": jnp.ones(2)})
    {'a/b': 4261412864}
    """
    found = jax.device_get(_of_leaves(trees))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(number)
        for path, number in jax.tree_util.tree_leaves_with_path(found)
    }


def of_text(text: str) -> int:
    """The same for a text, its CRC-32."""
    return zlib.crc32(text.encode())


@jax.jit
def _of_leaves(tree: Any) -> Any:
    # In one program: of many, each with an exchange between devices, some would wait for others on a host that plays many devices.
    return jax.tree.map(fingerprint, tree)


def fingerprint(leaf: jax.Array) -> jax.Array:
    """() uint32, of an array of any shape and dtype."""
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    width = min(leaf.dtype.itemsize, 4)  # of wider ones, two numbers each
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):  # without a reshape: a split array stays where it is
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def of_host_array(array: np.ndarray) -> int:
    """The same number of a host array, of any dtype.

    >>> of_host_array(np.ones(2, np.float32)), int(fingerprint(jnp.ones(2)))
    (4261412864, 4261412864)
    """
    width = min(array.dtype.itemsize, 4)
    bits = np.ascontiguousarray(array).reshape(-1).view(f"uint{8 * width}").astype(np.uint32)
    return int(np.sum(bits * (2 * np.arange(bits.size, dtype=np.uint32) + np.uint32(1)), dtype=np.uint32))
