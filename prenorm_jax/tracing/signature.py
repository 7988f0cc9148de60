"""The arguments of a call, split into arrays and the rest, and the program traced for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.paths import leaves as paths_of
from prenorm_jax.tracing.custom_rules import enters
from prenorm_jax.tracing.decision import ConversionError
from prenorm_jax.tracing.jaxprs import Program
from prenorm_jax.tracing.normal_form import normalize


@dataclasses.dataclass
class Arguments:
    """(params, *inputs) flattened. Arrays are traced, and so are Python numbers among the inputs; what is no array (Python numbers
    among the parameters, such as an Equinox module's dropout rate, and a flag such as train=True) is part of the program."""

    tree: Any
    leaves: list[Any]
    is_array: list[bool]
    n_params: int  # arrays among the parameters; they come first
    paths: list[str]  # of those
    weak: list[bool]  # arrays that began as Python numbers, and widen nothing

    @classmethod
    def of(cls, params: Any, inputs: tuple[Any, ...]) -> Arguments:
        leaves, tree = jax.tree.flatten((params, inputs))
        names = list(paths_of(params))
        is_array = [_is_array(leaf, k >= len(names)) for k, leaf in enumerate(leaves)]
        paths = [name for name, array in zip(names, is_array[: len(names)], strict=True) if array]
        weak = [_is_weak(leaf) for leaf, array in zip(leaves, is_array, strict=True) if array]
        return cls(tree, leaves, is_array, len(paths), paths, weak)

    @property
    def arrays(self) -> list[Any]:
        return [leaf for leaf, array in zip(self.leaves, self.is_array, strict=True) if array]

    @property
    def key(self) -> Any:
        """What a trace depends on."""
        avals = tuple(
            (np.shape(a), str(jnp.result_type(a)), weak) for a, weak in zip(self.arrays, self.weak, strict=True)
        )
        statics = tuple(_Same(leaf) for leaf, array in zip(self.leaves, self.is_array, strict=True) if not array)
        config = (jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision)  # type: ignore[attr-defined]
        return (self.tree, avals, statics, config)

    @property
    def avals(self) -> list[Any]:
        """The arrays, or their types where these are to be other ones."""
        return [
            a if _is_weak(a) == weak else jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a), weak_type=weak)
            for a, weak in zip(self.arrays, self.weak, strict=True)
        ]

    def unflatten(self, arrays: list[Any]) -> tuple[Any, tuple[Any, ...]]:
        """(params, inputs) with other arrays."""
        new = iter(arrays)
        return jax.tree.unflatten(
            self.tree, [next(new) if array else leaf for leaf, array in zip(self.leaves, self.is_array, strict=True)]
        )

    def is_float(self, k: int) -> bool:
        dtype = self.arrays[k].dtype
        return bool(jax.dtypes.issubdtype(dtype, np.floating))

    def concrete(self) -> bool:
        """Whether every array has a value."""
        return not any(isinstance(a, (jax.core.Tracer, jax.ShapeDtypeStruct)) for a in self.arrays)


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What a conversion knows its parameters by: for each path the number of axes, and whether it is a weak type."""

    known: dict[str, tuple[int, bool]]

    @classmethod
    def of(cls, arguments: Arguments) -> Parameters:
        arrays = zip(arguments.paths, arguments.arrays, arguments.weak, strict=False)
        return cls({path: (np.ndim(array), weak) for path, array, weak in arrays})

    def arguments(self, params: Any, inputs: tuple[Any, ...]) -> Arguments:
        """The arguments of a later call, whose parameters are of the types that they had at conversion: recentering a leaf that began as
        a Python number must not make it widen what it meets.

        Raises: ConversionError if one of them has another number of axes.
        """
        found = Arguments.of(params, inputs)
        for k, (path, array) in enumerate(zip(found.paths, found.arrays, strict=False)):
            rank, weak = self.known.get(path, (np.ndim(array), found.weak[k]))
            if np.ndim(array) != rank:
                raise ConversionError(
                    f"{path}: has {np.ndim(array)} axes, and had {rank} when it was converted; convert again for these parameters"
                )
            found.weak[k] = weak
        return found


class _Same:
    """A static argument in a cache key: equal if it is the same object, or an equal one where objects can be compared."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return hash(type(self.value))

    def __eq__(self, other: Any) -> bool:
        if self.value is other.value:
            return True
        return (
            type(self.value) is type(other.value)
            and isinstance(self.value, (bool, int, float, str))
            and self.value == other.value
        )


def _is_number(leaf: Any) -> bool:
    """Whether it is Python's own."""
    return isinstance(leaf, (bool, int, float, complex)) and not isinstance(leaf, np.generic)


def _is_weak(leaf: Any) -> bool:
    return _is_number(leaf) or bool(getattr(leaf, "weak_type", False))


def _is_array(leaf: Any, is_input: bool) -> bool:
    if _is_number(leaf):
        return is_input and not isinstance(leaf, bool)
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


@dataclasses.dataclass
class Traced:
    """A program in normal form and the structure of what it returns."""

    program: Program
    out_tree: Any


def trace_program(fn: Callable[..., Any], arguments: Arguments, inline_custom: bool = False) -> Traced:
    """Trace fn(params, *inputs) for these arguments.

    Raises: ConversionError where Python needs the value of a number among the inputs.
    """
    structures = []

    def flat(*arrays: Any) -> list[Any]:
        params, inputs = arguments.unflatten(list(arrays))
        outs, tree = jax.tree.flatten(fn(params, *inputs))
        structures.append(tree)
        return outs

    try:
        closed = jax.make_jaxpr(flat)(*arguments.avals)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError) as error:
        if not any(map(_is_number, arguments.arrays)):
            raise
        raise ConversionError(
            "the function needs the value of what it traces (for range, if or float); Python numbers among the inputs are traced like "
            "arrays: close over them, for example with functools.partial(fn, n=2), so that they are part of the program"
        ) from error
    return Traced(normalize(closed, (lambda eqn: True) if inline_custom else enters), structures[-1])


def output_paths(out_tree: Any) -> list[str]:
    """A name for every output leaf, "output" for a single one."""
    indices = jax.tree.unflatten(out_tree, list(range(out_tree.num_leaves)))
    return [f"output{jax.tree_util.keystr(path)}" for path, _ in jax.tree_util.tree_flatten_with_path(indices)[0]]
