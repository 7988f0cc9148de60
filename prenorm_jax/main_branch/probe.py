"""A function of parameters under test: evaluated with leaves changed, to see whether an output moves."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.bases import stacks
from prenorm_jax.main_branch.patterns import LayoutError
from prenorm_jax.paths import Tree, leaves, with_leaves

Flat = dict[str, Any]

EXACT, COARSEST = 1e-8, 0.1
"""How much of an output's largest entry counts as unmoved: in float64, and at most."""


class Probe:
    """A function of parameters, evaluated in the widest type that it lets through.

    In float64 an output is unmoved to 1e-8 of its largest entry. A function that computes in less somewhere is measured: ten times what it
    makes of rounding in its parameters.

    Raises: LayoutError where it returns nothing of a floating dtype, or something that is not finite.
    """

    def __init__(self, fn: Callable[..., Any], params: Tree, inputs: tuple[Any, ...]):
        self.params, self.fn, self.random = params, jax.jit(fn), np.random.default_rng(0)
        wide = {path: _wide(leaf) for path, leaf in leaves(params).items()}
        try:
            self.inputs = jax.tree.map(_wide, inputs)
            self.outputs(wide)
            self.flat = wide
        except (TypeError, ValueError):  # a loop's carry of a fixed type, for example
            self.inputs = inputs
            self.flat = {path: np.asarray(leaf) if is_float(leaf) else leaf for path, leaf in leaves(params).items()}
        self.tolerance = EXACT
        if re.search(
            r":(f32|f16|bf16)\[\d", str(jax.make_jaxpr(self.fn)(with_leaves(params, self.flat), *self.inputs))
        ):
            noise = EXACT * self.moved({path: self._rounded(leaf) for path, leaf in self.flat.items()}, self.flat)
            self.tolerance = min(max(10 * noise, 1e-6), COARSEST)

    def _rounded(self, leaf: Any) -> Any:
        """A leaf moved by rounding, of single precision or its own."""
        if not is_float(leaf):
            return leaf
        return (leaf * (1 + max(1e-6, float(jnp.finfo(leaf.dtype).eps)) * self.random.normal(size=leaf.shape))).astype(
            leaf.dtype
        )

    def outputs(self, flat: Flat, fn: Callable[..., Any] | None = None) -> list[Any]:
        """What the function returns on this tree, as far as it is floating."""
        found = jax.tree.leaves((fn or self.fn)(with_leaves(self.params, flat), *self.inputs))
        floats = [leaf for leaf in found if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
        if not floats:
            raise LayoutError("check: fn returns nothing of a floating dtype, so nothing can be seen to move")
        return floats

    def is_finite(self, flat: Flat) -> bool:
        """Whether the function is, on this tree."""
        return all(np.all(np.isfinite(np.asarray(output).astype(np.float64))) for output in self.outputs(flat))

    def moved(self, flat: Flat, base: Flat) -> float:
        """The largest change of an output from one tree to another, over its tolerance: more than 1 is seen."""
        return max(self.distances(flat, base))

    def distances(self, flat: Flat, base: Flat) -> list[float]:
        """The change of each output."""
        return [self.distance(a, b) for a, b in zip(self.outputs(flat), self.outputs(base), strict=True)]

    def distance(self, actual: Any, expected: Any) -> float:
        """The largest difference of two outputs, over what counts as unmoved."""
        a, b = (np.asarray(value).astype(np.float64) for value in (actual, expected))
        if not np.all(np.isfinite(b)):
            raise LayoutError("check: fn is not finite on these inputs, so nothing can be seen to move")
        worst = np.max(np.abs(a - b), initial=0.0) / max(np.max(np.abs(b), initial=0.0), 1e-30) / self.tolerance
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
