"""Tokens looked up where the rows of their table are: what comes out and every gradient, as one device has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prenorm_jax import placement
from prenorm_jax.models import embedding
from prenorm_jax.training import sharding
from prenorm_jax.training.experiment import Mesh

ROWS, WIDTH, EXAMPLES = 24, 6, 16
MESHES = {"8": Mesh(), "4x2": Mesh(fsdp=2), "fsdp=8": Mesh(data=1, fsdp=8), "2x2x2": Mesh(fsdp=2, tensor=2)}


def recentered(rows, positions):
    return ((rows - rows.mean(-1, keepdims=True))[..., 1:] + positions).astype(dtype_of(rows))


def dtype_of(rows):
    return jnp.bfloat16 if rows.dtype == jnp.float32 else rows.dtype


def drawn(length, dtype, rows=ROWS, examples=EXAMPLES):
    rng = np.random.default_rng(0)
    table, positions = rng.normal(size=(rows, WIDTH)), rng.normal(size=(length, WIDTH - 1))
    tokens = jnp.asarray(rng.integers(0, rows, (examples, length)))
    mixed = jnp.asarray(rng.normal(size=(examples, length, WIDTH - 1)), dtype)
    return jnp.asarray(table, dtype), jnp.asarray(positions, dtype), tokens, mixed


def value_and_gradients(mesh, table, positions, tokens, mixed):
    """x, and the gradients of sum(x * mixed); on a mesh, or plainly."""

    def loss(table, positions, tokens):
        if mesh is None:
            x = recentered(table[tokens], positions[None])
        else:
            x = embedding.embed(table, positions, tokens, lambda rows, positions: recentered(rows, positions[None]))
        return (x * mixed).sum(), x

    def run(table, positions, tokens):
        with placement.within(mesh):
            (_, x), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(table, positions, tokens)
        return x, *gradients

    if mesh is None:
        return run(table, positions, tokens)
    places = jax.sharding.NamedSharding(mesh, placement.fitted(placement.TABLE, table.shape, dict(mesh.shape)))
    even = tokens.shape[0] % 8 == 0
    split = jax.jit(
        run,
        in_shardings=(
            places,
            sharding.everywhere(mesh),
            sharding.batch_sharding(mesh) if even else sharding.everywhere(mesh),
        ),
    )
    program = split.lower(table, positions, tokens).compile()
    return (*program(table, positions, tokens), program.as_text())


@pytest.mark.parametrize("length", [2, 30], ids=["rows travel", "sums travel"])
@pytest.mark.parametrize("name", MESHES)
def test_on_a_mesh_as_on_one_device(name, length):
    """Both in float64; the comparison sees a lost example."""
    arrays = drawn(length, jnp.float64)
    *found, _ = value_and_gradients(sharding.make_mesh(MESHES[name]), *arrays)
    expected = value_and_gradients(None, *arrays)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
    table, positions, tokens, mixed = arrays
    without = value_and_gradients(None, table, positions, tokens, mixed.at[0].set(0))
    assert abs(found[1] - without[1]).max() > 1e-3


@pytest.mark.parametrize(("rows", "examples"), [(ROWS + 1, EXAMPLES), (ROWS, EXAMPLES - 1)], ids=["rows", "examples"])
@pytest.mark.parametrize("name", ["8", "4x2"])
def test_what_an_axis_does_not_divide(name, rows, examples):
    arrays = drawn(3, jnp.float64, rows, examples)
    *found, _ = value_and_gradients(sharding.make_mesh(MESHES[name]), *arrays)
    for one, other in zip(found, value_and_gradients(None, *arrays), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [2, 4])
def test_tokens_travel_where_they_are_few(length):
    """32 and 64 of them, each in the bytes of half a row of 24: the table stays, or is gathered."""
    *_, program = value_and_gradients(sharding.make_mesh(MESHES["fsdp=8"]), *drawn(length, jnp.float32))
    gathered = [line for line in program.splitlines() if " all-gather" in line and f"f32[{ROWS},{WIDTH}]" in line]
    assert bool(gathered) == (length == 4)


def test_sums_that_travel_in_half_precision_do_not_overflow():
    """One token 81,920 times: its gradient's sum is more than float16 holds."""
    mesh, tokens = sharding.make_mesh(MESHES["8"]), jnp.zeros((8, 10240), jnp.int32)
    table, positions = jnp.ones((8, 2), jnp.float32), jnp.zeros((10240, 2), jnp.float32)

    def half(rows, positions):
        return (rows + positions[None]).astype("float16")

    def loss(table, tokens):
        with placement.within(mesh):
            return embedding.embed(table, positions, tokens, half).astype(jnp.float32).sum()

    places = sharding.everywhere(mesh), sharding.batch_sharding(mesh)
    np.testing.assert_allclose(jax.jit(jax.grad(loss), in_shardings=places)(table, tokens)[0], 81920)


@pytest.mark.parametrize("name", MESHES)
def test_an_id_out_of_range_is_the_one_that_it_is_on_one_device(name):
    table, positions, tokens, mixed = drawn(2, jnp.float64)
    tokens = tokens.at[0, 0].set(-1).at[1, 0].set(ROWS + 7)
    found = value_and_gradients(sharding.make_mesh(MESHES[name]), table, positions, tokens, mixed)[0]
    np.testing.assert_allclose(found, value_and_gradients(None, table, positions, tokens, mixed)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["8", "4x2", "fsdp=8"])
def test_of_a_wide_table_narrow_rows_travel(name):
    """Where rows travel, the gradients in float32 are those of one device, though bfloat16 is what is exchanged, and the table stays."""
    arrays = drawn(1, jnp.float32)
    *found, program = value_and_gradients(sharding.make_mesh(MESHES[name]), *arrays)
    expected = value_and_gradients(None, *arrays)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6, atol=1e-6)
    kinds = (" all-gather", " all-reduce", " reduce-scatter")
    exchanges = [line for line in program.splitlines() if any(kind in line for kind in kinds)]
    assert exchanges
    assert not any(f"f32[{ROWS},{WIDTH}]" in line for line in exchanges)
