"""Tokens to rows of a table that may be split over devices.

Shapes: B examples, L tokens of each, V rows of the table, D their width, R lanes of the main branch.

A device has few tokens beside a vocabulary. So where "fsdp" splits the table's rows, the table stays: each device looks up those that it
has, for all examples of its group, and a sum along "fsdp", to which each token has one addend that is not zero, puts them together. In the
backward pass the gradients of the looked-up rows travel, in the dtype of the main branch, and are added up in float32 where the table's
rows are. Where a group's tokens are more than its rows are worth (MANY), the table is gathered, as weights are; and along "data" sums
over tokens travel then.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from prenorm_jax import placement
from prenorm_jax.placement import DATA, EXAMPLES, FSDP, TENSOR

Array = jax.Array
Finish = Callable[[Array, Array], Array]
Shapes = tuple[jax.ShapeDtypeStruct, ...]  # of the table and the positions

MANY = 2  # tokens for each row: a row of float32 travels in the bytes of two tokens, and so does a sum, there and back


def embed(table: Array, positions: Array, tokens: Array, finish: Finish) -> Array:
    """finish(table[tokens], positions).

    Args:
      table: (V, D), as `placement.TABLE` has it.
      positions: (L, R).
      tokens: (B, L) ints in [0, V).
      finish: (B, L, D) rows and (L, R) positions to (B, L, R), linear in both together, one example like another.

    >>> embed(jnp.eye(3), jnp.ones((2, 3)), jnp.array([[0, 2]]), lambda rows, positions: rows + positions[None])
    Array([[[2., 1., 1.],
            [1., 1., 2.]]], dtype=float32)
    """
    if not _stays(table, tokens):
        rows = placement.gathered(table, placement.TABLE)[placement.examples(tokens)]
        return finish(rows, positions)
    # As an index out of range is taken without a mesh; here no device would have its row.
    tokens = jnp.clip(jnp.where(tokens < 0, tokens + table.shape[0], tokens), 0, table.shape[0] - 1)
    shapes = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (table, positions))
    return _embed(table, positions, tokens, finish, shapes)


def _stays(table: Array, tokens: Array) -> bool:
    """Whether the table stays where it is: on several devices, with as many examples and as many whole rows each. ("tensor" splits rows
    of its own, for which XLA does the same.)"""
    here = placement.sizes()
    data, fsdp = here.get(DATA, 1), here.get(FSDP, 1)
    if data * fsdp == 1 or here[TENSOR] > 1 or not placement.own(tokens.shape[0]):
        return False
    return fsdp == 1 or (table.shape[0] % fsdp == 0 and tokens.size // data <= MANY * table.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _embed(table: Array, positions: Array, tokens: Array, finish: Finish, shapes: Shapes) -> Array:
    if placement.sizes()[FSDP] == 1:
        return finish(table[placement.examples(tokens)], positions)

    def on_one(table: Array, positions: Array, tokens: Array) -> Array:
        rows, there = _own(tokens, table.shape[0])
        x = finish(jnp.take(table, rows, axis=0, mode="clip"), positions)
        return jax.lax.psum_scatter(jnp.where(there[..., None], x, 0), FSDP, tiled=True)

    # Tokens are split along "data" alone: each device sees those of its group.
    specs = PartitionSpec(FSDP), PartitionSpec(), PartitionSpec(DATA)
    return jax.shard_map(on_one, in_specs=specs, out_specs=EXAMPLES, check_vma=False)(table, positions, tokens)


def _forward(table: Array, positions: Array, tokens: Array, finish: Finish, shapes: Shapes) -> tuple[Array, Array]:
    return _embed(table, positions, tokens, finish, shapes), tokens


def _backward(finish: Finish, shapes: Shapes, tokens: Array, dx: Array) -> tuple[Array, Array, None]:
    table, positions = shapes
    here = placement.sizes()
    own_rows = table.shape[0] // here[FSDP]
    summed = here[DATA] > 1 and tokens.size > MANY * own_rows
    together = [axis for axis in (FSDP, DATA) if here[axis] > 1 and not (summed and axis == DATA)]

    def gradients(dx: Array) -> tuple[Array, Array]:
        # Linear as it is, its transpose is the same wherever it is taken.
        rows = jnp.zeros((*dx.shape[:2], table.shape[1]), table.dtype)
        return jax.vjp(finish, rows, jnp.zeros(positions.shape, positions.dtype))[1](dx)

    def on_one(tokens: Array, dx: Array) -> Array:
        for axis in together:
            tokens, dx = (jax.lax.all_gather(each, axis, tiled=True) for each in (tokens, dx))
        rows, there = _own(tokens, own_rows)
        sums = jnp.zeros((own_rows, table.shape[1]), jnp.promote_types(table.dtype, jnp.float32))
        # Rows of other devices fall off the end.
        sums = sums.at[jnp.where(there, rows, own_rows)].add(gradients(dx)[0].astype(sums.dtype), mode="drop")
        if summed:  # in the main branch's dtype, but float16, beyond which a frequent token's sum may lie
            sums = jax.lax.psum(sums if dx.dtype == jnp.float16 else sums.astype(dx.dtype), DATA)
        return sums.astype(table.dtype)

    split = jax.shard_map(on_one, in_specs=(EXAMPLES, EXAMPLES), out_specs=PartitionSpec(FSDP), check_vma=False)
    return split(tokens, dx), gradients(dx)[1], None


_embed.defvjp(_forward, _backward)


def _own(tokens: Array, rows: int) -> tuple[Array, Array]:
    """Which of this device's `rows` rows each token is, and whether it is one of them."""
    own = tokens - jax.lax.axis_index(FSDP) * rows
    return own, (own >= 0) & (own < rows)
