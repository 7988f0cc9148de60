"""A function of parameters under test: evaluated with leaves changed, to see whether an output moves."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.bases import stacks
from prenorm_jax.main_branch.patterns import LayoutError
from prenorm_jax.paths import Tree, leaves, with_leaves

Flat = dict[str, Any]

EXACT, COARSEST = 1e-8, 0.1
"""How much of an output's size counts as unmoved: in float64, and at most."""
OWN = 1e-3
"""How much of an entry counts as size: float64's rounding of an entry is far below EXACT times this."""


class Probe:
    """A function of parameters, evaluated in the widest type that it lets through.

    Leaves that are one number throughout, as initialisation leaves biases, tables and gates, get random values: what they do is not seen
    where they do nothing. In float64 an output is unmoved to 1e-8 of what other parameters make of it (and an entry to 1e-11 of itself):
    a large constant in an output, a mask, hides nothing. A function that computes in less somewhere is measured: ten times what it makes
    of rounding in its parameters.

    Raises: LayoutError where it returns nothing of a floating dtype, or NaN. Entries that are infinite are masked: they are not looked at.
    """

    def __init__(self, fn: Callable[..., Any], params: Tree, inputs: tuple[Any, ...]):
        self.params, self.fn, self.random = params, jax.jit(fn), np.random.default_rng(0)
        self.masks: list[Any] = []
        wide = {path: _wide(leaf) for path, leaf in leaves(params).items()}
        try:
            self.inputs = jax.tree.map(_wide, inputs)
            self.outputs(wide)
            self.flat = wide
        except (TypeError, ValueError):  # a loop's carry of a fixed type, for example
            self.inputs = inputs
            self.flat = {path: np.asarray(leaf) if is_float(leaf) else leaf for path, leaf in leaves(params).items()}
        self.masks = [np.isinf(output) for output in self.outputs(self.flat)]
        told_apart = {path: self._told_apart(leaf) for path, leaf in self.flat.items()}
        if self.is_finite(told_apart):
            self.flat = told_apart
        self.sizes = self._sizes()
        self.tolerance = EXACT
        if re.search(
            r":(f32|f16|bf16)\[\d", str(jax.make_jaxpr(self.fn)(with_leaves(params, self.flat), *self.inputs))
        ):
            noise = EXACT * self.moved({path: self._rounded(leaf) for path, leaf in self.flat.items()}, self.flat)
            self.tolerance = min(max(10 * noise, 1e-6), COARSEST)

    def _told_apart(self, leaf: Any) -> Any:
        """Random values in the place of one number: of its sign and size, and as in a linear map where it is 0."""
        if not is_float(leaf) or leaf.size < 2 or np.any(leaf != leaf.reshape(-1)[0]):
            return leaf
        if np.any(leaf):
            return (leaf * self.random.uniform(0.5, 1.5, size=leaf.shape)).astype(leaf.dtype)
        return (self.random.normal(size=leaf.shape) / np.sqrt(leaf.shape[-2] if leaf.ndim > 1 else 1)).astype(
            leaf.dtype
        )

    def _sizes(self) -> list[float]:
        """How large a change of each output is: what other parameters make of it, and no more than its largest entry."""
        other = {
            path: leaf + 0.5 * self.values(leaf) if is_float(leaf) and leaf.size else leaf
            for path, leaf in self.flat.items()
        }
        sizes = []
        for output, found in zip(self.outputs(self.flat), self.outputs(other), strict=True):
            change = np.abs(output - found)
            largest = [np.max(x[np.isfinite(x)], initial=0.0) for x in (change, np.abs(output))]
            sizes.append(float(min(largest)))
        return sizes

    def _rounded(self, leaf: Any) -> Any:
        """A leaf moved by rounding, of single precision or its own."""
        if not is_float(leaf):
            return leaf
        return (leaf * (1 + max(1e-6, float(jnp.finfo(leaf.dtype).eps)) * self.random.normal(size=leaf.shape))).astype(
            leaf.dtype
        )

    def outputs(self, flat: Flat, fn: Callable[..., Any] | None = None) -> list[np.ndarray]:
        """What the function returns on this tree, as far as it is floating, in float64; 0 where it is masked."""
        found = jax.tree.leaves((fn or self.fn)(with_leaves(self.params, flat), *self.inputs))
        floats = [leaf for leaf in found if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
        if not floats:
            raise LayoutError("check: fn returns nothing of a floating dtype, so nothing can be seen to move")
        wide = [np.asarray(leaf).astype(np.float64) for leaf in floats]
        if [leaf.shape for leaf in wide] != [mask.shape for mask in self.masks]:
            return wide
        return [np.where(mask, 0.0, leaf) for mask, leaf in zip(self.masks, wide, strict=True)]

    def is_finite(self, flat: Flat) -> bool:
        """Whether the function is, on this tree."""
        return all(np.all(np.isfinite(output)) for output in self.outputs(flat))

    def moved(self, flat: Flat, base: Flat) -> float:
        """The largest change of an output from one tree to another, over its tolerance: more than 1 is seen."""
        return max(self.distances(self.outputs(flat), self.outputs(base)))

    def distances(self, actual: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> list[float]:
        """The largest difference of each output, over what counts as unmoved."""
        return list(map(self._distance, actual, expected, self.sizes))

    def _distance(self, a: np.ndarray, b: np.ndarray, size: float) -> float:
        if not np.all(np.isfinite(b)):
            raise LayoutError("check: fn is not finite on these inputs, so nothing can be seen to move")
        unmoved = self.tolerance * (size + OWN * np.abs(b)) + 1e-300
        worst = np.max(np.abs(a - b) / unmoved, initial=0.0)
        return float(worst) if np.isfinite(worst) else np.inf

    def constant(self, leaf: np.ndarray, axis: int) -> np.ndarray:
        """A random constant along an axis, as large as the leaf's entries."""
        shape = list(leaf.shape)
        shape[axis] = 1
        return (self.random.normal(size=shape) * _size(leaf)).astype(leaf.dtype)

    def values(self, leaf: np.ndarray) -> np.ndarray:
        """Random values, as large as the leaf's entries."""
        return (self.random.normal(size=leaf.shape) * _size(leaf)).astype(leaf.dtype)


def places(flat: Flat, lanes: int) -> list[tuple[str, int]]:
    """Every axis of a floating leaf that is as long as the main branch is wide."""
    return [
        (path, axis)
        for path, leaf in flat.items()
        if is_float(leaf)
        for axis in range(-np.ndim(leaf), 0)
        if leaf.shape[axis] == lanes
    ]


def can_scale(row: Any, leaf: np.ndarray, axis: int) -> bool:
    """Whether a leaf is a vector that can multiply another along an axis."""
    return is_float(row) and np.ndim(row) > 0 and row.shape[-1] == leaf.shape[axis] and stacks(row, leaf, axis)


def _wide(leaf: Any) -> Any:
    return np.asarray(leaf).astype(np.float64) if is_float(leaf) else leaf


def is_float(leaf: Any) -> bool:
    """Whether a leaf is an array of a floating dtype."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def _size(leaf: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(leaf, np.float64))))) or 1.0
