"""Parameter trees as paths: "blocks/0/attn/query/kernel" to an array, whatever the containers are."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


class TreeError(ValueError):
    """A leaf that can't be added to, or removed from, its container, or that can't be told from another."""


def leaves(tree: Tree) -> dict[str, Any]:
    """Path -> leaf of any pytree of arrays: nested dicts, Flax states, dataclasses, lists.

    Raises: TreeError for two leaves of one path.

    >>> list(leaves({"a": {"kernel": jax.numpy.ones(2)}, "b": [jax.numpy.ones(1)]}))
    ['a/kernel', 'b/0']
    """
    found: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = _path(keys)
        if path in found:
            raise TreeError(f"{path}: two leaves have this path (a key holds a '/'?); rename one of them")
        found[path] = leaf
    return found


def with_leaves(tree: Tree, flat: Mapping[str, Any], like: Mapping[str, tuple[str, int]] | None = None) -> Tree:
    """`tree` with the leaves of `flat`: replaced, added beside others or removed; `tree` itself is left as it is.

    Containers keep their type. Leaves can be added to and removed from mappings only, which may lie in lists and tuples; a new leaf's
    parents are made where they are missing,
    and its box (a Flax Variable, a partitioned parameter) is like its neighbours', or like that of the leaf that `like` names for it,
    less one of its (negative) axes.
    Raises: TreeError where a leaf would have to be added to or removed from something else.
    """
    if list(leaves(tree)) == list(flat):
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(tree), list(flat.values()))
    unused = dict(flat)
    boxes = _boxes(tree)
    for path, (source, axis) in (like or {}).items():
        # A leaf of something that is no mapping has no box of its own; nothing can be added there either.
        if source in boxes:
            unused[path] = _in_box_less_axis(boxes[source], unused[path], axis)
    parents = {path[: end.start()] for path in flat for end in re.finditer("/", path)} | set(flat)
    result = _rebuilt(tree, "", unused, parents)
    if unused:
        raise TreeError(f"{next(iter(unused))}: can't be added to this container; pass the parameters as nested dicts")
    return result


def with_moved_axes(tree: Tree, moves: Mapping[str, tuple[int, int]]) -> Tree:
    """`tree` with an axis of some leaves, path -> (from, to), moved elsewhere, and the names of axes in their boxes with it.

    Raises: TreeError for a leaf that has no such axis.

    >>> with_moved_axes({"a": jax.numpy.ones((2, 3))}, {"a": (1, 0)})["a"].shape
    (3, 2)
    """
    moved = leaves(tree)
    for path, (source, target) in moves.items():
        if max(source, target) >= moved[path].ndim:
            raise TreeError(
                f"{path} {moved[path].shape}: it has no axis {max(source, target)}; its layers are elsewhere"
            )
        moved[path] = _moved(moved[path], source, target)

    def renamed(keys: tuple[Any, ...], box: Any) -> Any:
        move = moves.get(_path(keys))
        return _renamed(box, moved[_path(keys)].ndim, lambda names: _moved_name(names, *move)) if move else box

    return jax.tree_util.tree_map_with_path(
        renamed, with_leaves(tree, moved), is_leaf=lambda node: not isinstance(node, Mapping | list | tuple)
    )


def _moved(leaf: Any, source: int, target: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(_moved_name(tuple(leaf.shape), source, target), leaf.dtype)
    return (np if isinstance(leaf, np.ndarray) else jnp).moveaxis(leaf, source, target)


def _moved_name(names: tuple[Any, ...], source: int, target: int) -> tuple[Any, ...]:
    rest = names[:source] + names[source + 1 :]
    return (*rest[:target], names[source], *rest[target:])


def _rebuilt(node: Tree, prefix: str, unused: dict[str, Any], parents: set[str]) -> Tree:
    if isinstance(node, Mapping):
        kept = {key: child for key, child in _children(node).items() if f"{prefix}{key}" in parents or child is None}
        children = {key: _rebuilt(child, f"{prefix}{key}/", unused, parents) for key, child in kept.items()}
        for path in [p for p in unused if p.startswith(prefix)]:
            *names, last = path[len(prefix) :].split("/")
            parent = children
            for name in names:
                parent = parent.setdefault(name, {}) if isinstance(parent, dict) else None
            if not isinstance(parent, dict):
                raise TreeError(f"{path}: can't be added to this container; pass the parameters as nested dicts")
            parent[last] = _boxed_like(node, unused.pop(path))
        return type(node)(children)  # type: ignore[call-arg]
    if isinstance(node, list | tuple):
        held, structure = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
        inner = [(f"{prefix}{_path(keys)}", child) for keys, child in held]
        if all(path in unused or not jax.tree_util.all_leaves([child]) for path, child in inner):
            rebuilt = [_rebuilt(child, f"{path}/", unused, parents) for path, child in inner]
            return jax.tree_util.tree_unflatten(structure, rebuilt)
    paths = [f"{prefix}{path}".rstrip("/") for path in leaves(node)]
    missing = [path for path in paths if path not in unused]
    if missing:
        raise TreeError(
            f"{missing[0]}: can't be removed from a {type(node).__name__}; pass the parameters as nested dicts"
        )
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(node), [unused.pop(path) for path in paths])


def _children(node: Mapping[Any, Any]) -> dict[Any, Any]:
    """What a mapping holds, as jax sees it: a Flax State shows its nested dicts as States when asked itself."""
    held = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)[0]
    return {getattr(path[0], "key", path[0]): child for path, child in held}


def _boxed_like(siblings: Mapping[Any, Any], value: Any) -> Any:
    """`value`, in the box that the leaves beside or below it are in (a Flax Variable, for example)."""
    if not jax.tree_util.all_leaves([value]):
        return value  # it has a box
    for box in _boxes(siblings).values():
        if len(jax.tree_util.tree_leaves(box)) == 1:
            return jax.tree_util.tree_map(lambda _: value, box)
    return value


def _boxes(tree: Tree) -> dict[str, Any]:
    """Path -> leaf, in its box."""
    held = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: not isinstance(node, Mapping | list | tuple))
    return {_path(keys): box for keys, box in held[0]}


def _in_box_less_axis(box: Any, value: Any, axis: int) -> Any:
    """`value` in a box whose names of axes are those of `box` but for one."""
    return _renamed(box, value.ndim + 1, lambda names: names[:axis] + names[axis:][1:], value)


def _renamed(box: Any, rank: int, change: Callable[[tuple[Any, ...]], tuple[Any, ...]], value: Any = None) -> Any:
    """A box with the names of its axes changed, where it has as many, and with another value, if one is given."""
    names_of_axes = {
        name: change(names)
        for name, names in getattr(box, "get_metadata", lambda: vars(box) if hasattr(box, "__dict__") else {})().items()
        if isinstance(names, tuple) and len(names) == rank
    }
    new = jax.tree_util.tree_map(lambda held: held if value is None else value, box)
    if not names_of_axes:
        return new
    if dataclasses.is_dataclass(new) and not isinstance(new, type):
        return dataclasses.replace(new, **names_of_axes)
    new.set_metadata(**names_of_axes)
    return new


def _path(keys: tuple[Any, ...]) -> str:
    """The path as text; the field in which a box (a Flax Variable, a partitioned parameter) keeps its array is not part of it."""
    names = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in keys]
    if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and names[-1] == "value":
        names = names[:-1]
    return "/".join(names)
