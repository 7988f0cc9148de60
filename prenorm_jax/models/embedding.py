"""Tokens to rows of a table that may be split over devices.

Shapes: B examples, L tokens, V rows of the table, D their width, R lanes of the main branch.

On a mesh nothing as large as the table travels. Where "fsdp" splits its rows, each device looks up those that it has, for all
examples of its group, and a sum along "fsdp", to which each token has one addend that is not zero, puts them together. In the backward
pass the gradients of the looked-up rows travel, in the dtype of the main branch, and are added up in float32 where the table's rows
are; along "data" the sums travel instead, in that dtype as well, where there are more tokens than rows.
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


def embed(table: Array, positions: Array, tokens: Array, finish: Finish) -> Array:
    """finish(table[tokens], positions).

    Args:
      table: (V, D), as `placement.TABLE` has it.
      positions: (L, R).
      tokens: (B, L) ints in [0, V).
      finish: (B, L, D) rows and (L, R) positions to (B, L, R), linear in both together, one example like another.

    >>> embed(jnp.eye(3), jnp.ones((2, 3)), jnp.array([[0, 2]]), lambda rows, positions: rows + positions)
    Array([[[2., 1., 1.],
            [1., 1., 2.]]], dtype=float32)
    """
    if not _apart(table, tokens):
        rows = placement.gathered(table, placement.TABLE)[placement.examples(tokens)]
        return finish(rows, positions)
    shapes = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (table, positions))
    return _embed(table, positions, tokens, finish, shapes)


def _apart(table: Array, tokens: Array) -> bool:
    """Whether there are several devices, with as many examples and as many whole rows of the table each."""
    here = placement.sizes()
    several = here.get(DATA, 1) * here.get(FSDP, 1) > 1
    even = several and placement.own(tokens.shape[0]) and table.shape[0] % here[FSDP] == 0
    return bool(even) and here[TENSOR] == 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _embed(table: Array, positions: Array, tokens: Array, finish: Finish, shapes: Shapes) -> Array:
    def on_one(table: Array, positions: Array, tokens: Array) -> Array:
        rows, there = _own(tokens, table.shape[0])
        x = finish(jnp.take(table, rows, axis=0, mode="clip"), positions)
        return jax.lax.psum_scatter(jnp.where(there[..., None], x, 0), FSDP, tiled=True)

    arrays = table, positions, tokens
    # Tokens are split along "data" alone: each device sees those of its group.
    specs = PartitionSpec(FSDP), PartitionSpec(), PartitionSpec(DATA)
    return jax.shard_map(on_one, in_specs=specs, out_specs=EXAMPLES, check_vma=False)(*arrays)


def _forward(table: Array, positions: Array, tokens: Array, finish: Finish, shapes: Shapes) -> tuple[Array, Array]:
    return _embed(table, positions, tokens, finish, shapes), tokens


def _backward(finish: Finish, shapes: Shapes, tokens: Array, dx: Array) -> tuple[Array, Array, None]:
    table, positions = shapes
    here = placement.sizes()
    own_rows = table.shape[0] // here[FSDP]
    # Of N devices along "data", each receives (N - 1) / N of all tokens, or twice that of its rows where sums travel.
    summed = here[DATA] > 1 and tokens.size > 2 * own_rows
    together = (FSDP,) if summed else (FSDP, DATA)

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
        if summed:
            sums = jax.lax.psum(sums.astype(dx.dtype), DATA)
        return sums.astype(table.dtype)

    split = jax.shard_map(on_one, in_specs=(EXAMPLES, EXAMPLES), out_specs=PartitionSpec(FSDP), check_vma=False)
    return split(tokens, dx), gradients(dx)[1], None


_embed.defvjp(_forward, _backward)


def _own(tokens: Array, rows: int) -> tuple[Array, Array]:
    """Which of this device's `rows` rows each token is, and whether it is one of them."""
    own = tokens - jax.lax.axis_index(FSDP) * rows
    return own, (own >= 0) & (own < rows)
