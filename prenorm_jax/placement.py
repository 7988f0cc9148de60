"""Where a model's arrays lie on a mesh of devices. Without a mesh, nothing here does anything.

A mesh has three axes. "data" and "fsdp" split the batch; "fsdp" and "tensor" split the weights; "tensor" splits heads, the columns of an
MLP, and the vocabulary. Weights are stored split along both and gathered along "fsdp" where they are used, in the dtype that they are
used in; their gradients go back split. (Of a token table rows may travel instead: `models.embedding`.) What is never split is the main
branch's axis: so the maps between charts, which sum along it, stay on one device, and its width may be odd. (The table is mapped nowhere
where it is tied, and has an even width there.)

    reader kernel (R, F)   COLUMNS   split along F        F: heads, MLP columns, vocabulary
    writer kernel (F, R)   ROWS      split along F
    table (V, D)           TABLE     split along V, or along both axes where that does not come out
    positions, patches     POSITIONS, PATCHES   split along their first axis

`within(mesh)` puts a mesh in force for the functions below, while a program is traced.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

Array = jax.Array

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
BATCH = (DATA, FSDP)

Place = tuple[PartitionSpec, ...]
"""How the last axes of a leaf are split; where there are several ways, the first of those that split it most."""
COLUMNS: Place = (PartitionSpec(None, (TENSOR, FSDP)),)
ROWS: Place = (PartitionSpec((TENSOR, FSDP), None),)
# A vocabulary is a multiple of 128, seldom of 256.
TABLE: Place = (*ROWS, PartitionSpec(TENSOR, FSDP))
Specs = tuple[PartitionSpec | None, ...]
SUMMED = None
"""In `on_each_device`: a result of which each device has the share of its examples."""
HEADS = PartitionSpec(BATCH, None, TENSOR, None)
EXAMPLES, WHOLE = PartitionSpec(BATCH), PartitionSpec()
POSITIONS: Place = (PartitionSpec(FSDP, None),)
PATCHES: Place = (PartitionSpec(FSDP, None, None, None),)
UNSPLIT: Place = (WHOLE,)
AT_ONCE = 2**29
"""Up to so many bytes of all layers' weights are exchanged together (ViT-B's are 170 MB); of more, a layer's at a time."""


@contextlib.contextmanager
def within(mesh: jax.sharding.Mesh | None) -> Iterator[None]:
    """Puts `mesh`, whose axes are `AXES`, in force; None changes nothing. What is computed with then has to lie on the mesh."""
    with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def sizes() -> Mapping[str, int]:
    """Devices along each axis of the mesh in force; empty where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(mesh.shape) if mesh.axis_names == AXES else {}


def fitted(place: Place, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """How an array of this shape is split: as `place` says, less the mesh axes that do not divide theirs.

    >>> sizes = {"data": 1, "fsdp": 4, "tensor": 2}
    >>> tuple(fitted(COLUMNS, (12, 7, 16), sizes))
    (None, None, ('tensor', 'fsdp'))
    >>> tuple(fitted(COLUMNS, (7, 10), sizes))
    (None, 'tensor')
    >>> tuple(fitted(TABLE, (10, 8), sizes))
    ('tensor', 'fsdp')
    """
    return max((_fitted(spec, shape, sizes) for spec in place), key=lambda spec: parts(spec, sizes))


def parts(spec: PartitionSpec, sizes: Mapping[str, int]) -> int:
    """How many parts a spec makes of an array."""
    return math.prod(sizes[name] for entry in spec for name in _tuple(entry))


def _fitted(spec: PartitionSpec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    found: list[Any] = []
    for size, wanted in zip(shape[len(shape) - len(spec) :], spec, strict=True):
        kept: list[str] = []
        for axis in _tuple(wanted):
            if size % math.prod(sizes[name] for name in [*kept, axis]) == 0:
                kept.append(axis)
        found.append(tuple(kept) if len(kept) > 1 else kept[0] if kept else None)
    return PartitionSpec(*[None] * (len(shape) - len(spec)), *found)


def examples(x: Array) -> Array:
    """An array whose first axis runs over examples, or over their tokens: split by them, whole otherwise."""
    return _put(x, (PartitionSpec(BATCH, *[None] * (x.ndim - 1)),))


def gathered(weight: Array, stored: Place) -> Array:
    """A weight that is `stored` so, whole along "fsdp"; its gradient is split as it is stored."""
    if sizes().get(FSDP, 1) == 1:
        return weight
    return checkpoint_name(_gathered(weight, stored), "gathered")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(weight: Array, stored: Place) -> Array:
    return _put(weight, tuple(PartitionSpec(*[TENSOR if TENSOR in _tuple(e) else None for e in s]) for s in stored))


# Without a rule of its own the gradient would be whole as well: summed everywhere, where a share of it is needed.
_gathered.defvjp(
    lambda weight, stored: (_gathered(weight, stored), None),
    lambda stored, _, gradient: (_put(gradient, stored),),
)


def exchanged_beside(index: int, layers: int, size: int) -> slice:
    """Which of so many layers, whose weights are `size` bytes each, have these exchanged while layer `index` is computed: gathered in the
    forward pass, where they are split along "fsdp", and their gradients in the backward pass (`in_turn`).

    Along "fsdp" those of the next layer, so that a device holds few gathered layers; where all are few bytes and the devices one
    process's, nothing waits, and all are exchanged at once. Along "data" alone the gradients of few bytes go at once beside the second
    layer, all but the first two's; others as XLA puts them together. (docs/scale.md has the figures.)
    """
    here = sizes()
    few = layers * size <= AT_ONCE and jax.process_count() == 1
    if here.get(FSDP, 1) > 1:
        return slice(index + 1, index + 1 if few else index + 2)
    return slice(2, layers if few and here.get(DATA, 1) > 1 and index == 1 else 2)


def in_turn(ahead: list[Any], branch: Any) -> tuple[list[Any], Any]:
    """Weights of later layers, a tree for each, and the main branch (with what is being written to it), as they are. They are gathered
    no earlier than the main branch is there, and the exchange of their gradients ends before the backward pass goes on from it."""
    return _in_turn(ahead, branch) if ahead else (ahead, branch)


@jax.custom_vjp
def _in_turn(ahead: Any, branch: Any) -> tuple[Any, Any]:
    return _behind(ahead, branch), branch


def _behind(ahead: Any, branch: Any) -> Any:
    # One number of a device's own rows stands for the main branch, which would be copied: it is used on both sides of the barrier.
    number = on_each_device(lambda x: x[0, 0], (jax.tree.leaves(branch)[0],), (EXAMPLES,), WHOLE)
    ahead, number = _at_once(ahead, number)
    # What comes out of a barrier and isn't used is taken out of it: a small leaf takes the number's NaN, if it is one.
    leaves, structure = jax.tree.flatten(ahead)
    least = min(range(len(leaves)), key=lambda i: leaves[i].size)
    leaves[least] = jnp.where(jnp.isnan(number), jnp.nan, leaves[least])
    return jax.tree.unflatten(structure, leaves)


def _at_once(weights: Any, branch: Any) -> tuple[Any, Any]:
    """Both, once matrices and main branch are there. Vectors are not waited for: their exchanges are small and best left to the end."""
    leaves, structure = jax.tree.flatten(weights)
    matrices = [leaf for leaf in leaves if leaf.ndim > 1]
    matrices, branch = jax.lax.optimization_barrier((matrices, branch))
    there = iter(matrices)
    return jax.tree.unflatten(structure, [next(there) if leaf.ndim > 1 else leaf for leaf in leaves]), branch


_in_turn.defvjp(
    lambda ahead, branch: ((_behind(ahead, branch), branch), None),
    lambda _, gradients: _at_once(*gradients),
)


def on_each_device(
    function: Callable[..., Any],
    arrays: tuple[Array, ...],
    given: tuple[PartitionSpec, ...],
    made: Specs | PartitionSpec,
) -> Any:
    """`function` of arrays, called on each device with its own part of them: for kernels that XLA can't split.

    Args:
      given: how each array is split, from its first axis on; what does not divide an axis leaves it whole.
      made: how the result is split, or each of them; of those that are SUMMED, the sum over all examples is returned.
    """
    here = sizes()
    if math.prod(here.values()) == 1:
        return function(*arrays)
    parts = tuple(
        fitted((PartitionSpec(*spec, *[None] * (array.ndim - len(spec))),), array.shape, here)
        for spec, array in zip(given, arrays, strict=True)
    )

    def on_one(*own: Array) -> Any:
        results = function(*own)
        if isinstance(made, PartitionSpec):
            return results
        return tuple(
            jax.lax.psum(one, BATCH) if spec is SUMMED else one for one, spec in zip(results, made, strict=True)
        )

    out: Any = made if isinstance(made, PartitionSpec) else tuple(WHOLE if spec is SUMMED else spec for spec in made)
    # A kernel doesn't say along which axes its result varies, so there is nothing to check.
    return jax.shard_map(on_one, in_specs=parts, out_specs=out, check_vma=False)(*arrays)


def own(count: int, axes: tuple[str, ...] = BATCH) -> int:
    """How many of so many examples, or of their tokens, a device has; 0 where they don't come out even.

    Args:
      axes: those of the mesh that split them, or whatever is counted.
    """
    here = sizes()
    parts = math.prod(here.get(axis, 1) for axis in axes)
    return 0 if count % parts else count // parts


def _tuple(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _put(x: Array, place: Place) -> Array:
    here = sizes()
    if math.prod(here.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitted(place, x.shape, here))
