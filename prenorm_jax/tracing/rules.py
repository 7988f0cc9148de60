"""How a feature axis moves through each primitive: one registry, two short functions a primitive.

Let 1_A be the all-ones vector over the axes A of an array, and c anything over its other axes.
  * `shift(eqn, i, axes, facts)`: adding c (x) 1_axes to operand i adds some c' (x) 1_axes' to each result j of the
    returned {j: axes'} and leaves the other results as they are, *whatever the other operands hold*; None if not so.
  * `zero(eqn, j, axes, facts)`: result j has zero mean over `axes` (all of them jointly) if every operand of the
    returned [(i, axes_i), ...] has zero mean over axes_i; None if that can't be said.
A primitive without a rule is never shifted and never known to be zero-mean, so a missing rule costs conversions, not
correctness. Rules may ask `facts.constant_along(atom, axes)`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

from prenorm_jax.tracing.flow import Flow
from prenorm_jax.tracing.jaxprs import Axes, is_float, is_var, name_of, names, scalar_value, shape_of


class Facts(Protocol):
    """What a rule may ask about the operands of its equation."""

    def constant_along(self, atom: Any, axes: Axes) -> bool:
        """Whether the operand has the same value at every position along `axes`."""


Shift = Callable[[Any, int, Axes, Facts], "dict[int, Axes] | None"]
Zero = Callable[[Any, int, Axes, Facts], "list[tuple[int, Axes]] | None"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """The two functions of one primitive; see the module's docstring."""

    shift: Shift
    zero: Zero


_RULES: dict[str, Rule] = {}


def register_rule(primitive: str, *, shift: Shift | None = None, zero: Zero | None = None) -> None:
    """Teach the tracer a primitive.

    Args:
      primitive: its name, as a jaxpr prints it.
      shift: (eqn, operand index, axes, facts) -> {result index: axes} or None. Left out: a shifted operand is refused.
      zero: (eqn, result index, axes, facts) -> [(operand index, axes), ...] or None. Left out: results are unknown.

    Both must be sound: the module's docstring says what they assert. A later registration replaces an earlier one.

    >>> register_rule("my_scale", shift=lambda eqn, i, axes, facts: {0: axes}, zero=lambda eqn, j, axes, facts: [(0, axes)])
    """
    _RULES[primitive] = Rule(shift or _unknown, zero or _unknown)


def rule_for(primitive: str) -> Rule:
    """The rule registered for a primitive; one that knows nothing, if there is none."""
    return _RULES.get(primitive, NO_RULE)


def has_rule(primitive: str) -> bool:
    """Whether a primitive has a rule."""
    return primitive in _RULES


def _unknown(eqn: Any, k: int, axes: Axes, facts: Facts) -> None:
    return None


NO_RULE = Rule(_unknown, _unknown)


class ConstantAlong:
    """`constant_along` by looking at how an operand was made."""

    def __init__(self, flow: Flow):
        self.flow = flow
        self._known: dict[tuple[Any, Axes], bool] = {}

    def constant_along(self, atom: Any, axes: Axes) -> bool:
        shape = shape_of(atom)
        axes = tuple(a for a in axes if a < len(shape) and shape[a] != 1)
        if not axes or not is_var(atom):
            return not axes
        if (atom, axes) not in self._known:
            self._known[atom, axes] = self._look(atom, axes)
        return self._known[atom, axes]

    def _look(self, var: Any, axes: Axes) -> bool:
        eqn, _ = self.flow.definer.get(var, (None, 0))
        if eqn is None:
            return False
        name = name_of(eqn)
        if name == "broadcast_in_dim":
            dims = eqn.params["broadcast_dimensions"]
            return self.constant_along(eqn.invars[0], tuple(dims.index(a) for a in axes if a in dims))
        if name in ELEMENTWISE:
            return all(len(shape_of(a)) in (0, len(shape_of(var))) and self.constant_along(a, axes) for a in eqn.invars)
        if name == "reshape":
            inner = regroup(shape_of(var), shape_of(eqn.invars[0]), axes)
            return inner is not None and self.constant_along(eqn.invars[0], inner)
        if name == "transpose":
            return self.constant_along(eqn.invars[0], tuple(eqn.params["permutation"][a] for a in axes))
        return False


ELEMENTWISE = names(
    "add sub mul div neg max min sqrt rsqrt integer_pow square convert_element_type lt le gt ge eq ne not and "
    "or exp log select_n copy pow abs sign tanh logistic floor ceil round is_finite stop_gradient pvary"
)


def regroup(shape: tuple[int, ...], other: tuple[int, ...], axes: Axes) -> Axes | None:
    """The axes of a reshape's other side that run over the same elements as `axes` of this side; None if there are none."""
    found: list[int] = []
    left = [i for i, n in enumerate(shape) if n != 1]
    right = [i for i, n in enumerate(other) if n != 1]
    wanted = {a for a in axes if shape[a] != 1}
    if math.prod(shape) != math.prod(other) or math.prod(shape) == 0:
        return None
    while left or right:
        ours: list[int] = []
        theirs: list[int] = []
        size_l = size_r = 1
        while not ours or size_l != size_r:
            if size_l <= size_r:
                ours.append(left.pop(0))
                size_l *= shape[ours[-1]]
            else:
                theirs.append(right.pop(0))
                size_r *= other[theirs[-1]]
        if wanted.isdisjoint(ours):
            continue
        if not wanted.issuperset(ours):
            return None
        found += theirs
    return tuple(found)


# --- elementwise -----------------------------------------------------------------------------------------------------


def _aligned(eqn: Any, i: int, axes: Axes) -> bool:
    """Operand i spans `axes` of the result at full size (a size-1 axis that is broadcast does not)."""
    shape, out = shape_of(eqn.invars[i]), shape_of(eqn.outvars[0])
    return len(shape) == len(out) and all(shape[a] == out[a] for a in axes)


def _same_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    floats = is_float(eqn.invars[i]) and is_float(eqn.outvars[0])
    return {0: axes} if floats and _aligned(eqn, i, axes) else None


def _same_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    return [(i, axes) for i in range(len(eqn.invars))]


def _unary_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    return [(0, axes)] if is_float(eqn.invars[0]) and is_float(eqn.outvars[0]) else None


def _mul_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    other = 1 - i
    if name_of(eqn) == "div" and i == 1:
        return None
    same = _same_shift(eqn, i, axes, facts)
    return same if same and facts.constant_along(eqn.invars[other], axes) else None


def _mul_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    left, right = eqn.invars
    if facts.constant_along(right, axes):
        return [(0, axes)]
    if name_of(eqn) == "mul" and facts.constant_along(left, axes):
        return [(1, axes)]
    return None


def _select_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    return {0: axes} if i > 0 and facts.constant_along(eqn.invars[0], axes) else None


def _select_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    if not facts.constant_along(eqn.invars[0], axes):
        return None
    return [(i, axes) for i in range(1, len(eqn.invars))]


def _each_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    return {i: axes}


def _each_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    return [(j, axes)]


for _name in ("add", "sub", "add_any"):
    register_rule(_name, shift=_same_shift, zero=_same_zero)
for _name in (
    "neg",
    "copy",
    "copy_p",
    "convert_element_type",
    "reduce_precision",
    "name",
    "sharding_constraint",
    "layout_constraint",
    "with_memory_space_constraint",
    "reshard",
    "relayout",
    "pvary",
):
    register_rule(_name, shift=_same_shift, zero=_unary_zero)
register_rule(
    "stop_gradient", zero=_unary_zero
)  # a shift would be seen by the gradient: mean and deviation may differ in it
for _name in ("mul", "div"):
    register_rule(_name, shift=_mul_shift, zero=_mul_zero)
register_rule("select_n", shift=_select_shift, zero=_select_zero)
register_rule("optimization_barrier", shift=_each_shift, zero=_each_zero)


# --- shape -----------------------------------------------------------------------------------------------------------


def _broadcast_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    dims = eqn.params["broadcast_dimensions"]
    return {0: tuple(int(dims[a]) for a in axes)} if i == 0 else None


def _broadcast_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    dims = eqn.params["broadcast_dimensions"]
    if scalar_value(eqn.invars[0]) == 0.0:
        return []
    shape, out = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    inner = [i for i, a in enumerate(dims) if a in axes and shape[i] == out[a]]
    spanned = any(shape[i] > 1 for i in inner)
    return [(0, tuple(i for i in inner if shape[i] > 1))] if spanned else None


def _reshape_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    if eqn.params.get("dimensions") is not None:
        return None
    found = regroup(shape_of(eqn.invars[0]), shape_of(eqn.outvars[0]), axes)
    return None if found is None else {0: found}


def _reshape_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    if eqn.params.get("dimensions") is not None:
        return None
    found = regroup(shape_of(eqn.outvars[0]), shape_of(eqn.invars[0]), axes)
    return [(0, found)] if found else None


def _transpose_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    order = list(eqn.params["permutation"])
    return {0: tuple(sorted(order.index(a) for a in axes))}


def _transpose_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    return [(0, tuple(sorted(int(eqn.params["permutation"][a]) for a in axes)))]


def _slice_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    return {0: axes} if i == 0 else None


def _slice_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    shape, out = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    return [(0, axes)] if all(shape[a] == out[a] for a in axes) else None


def _rev_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    return [(0, axes)]


def _concatenate_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    return None if eqn.params["dimension"] in axes else {0: axes}


def _concatenate_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    return None if eqn.params["dimension"] in axes else _same_zero(eqn, j, axes, facts)


def _pad_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    untouched = all(tuple(eqn.params["padding_config"][a]) == (0, 0, 0) for a in axes)
    return {0: axes} if i == 0 and untouched else None


def _pad_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    untouched = all(tuple(eqn.params["padding_config"][a]) == (0, 0, 0) for a in axes)
    return [(0, axes)] if untouched and scalar_value(eqn.invars[1]) == 0.0 else None


def _update_slice_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    operand, update = (shape_of(a) for a in eqn.invars[:2])
    return {0: axes} if i < 2 and all(operand[a] == update[a] for a in axes) else None


def _update_slice_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    return [(0, axes), (1, axes)] if _update_slice_shift(eqn, 0, axes, facts) else None


def _squeeze_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    kept = [a for a in range(len(shape_of(eqn.invars[0]))) if a not in eqn.params["dimensions"]]
    return {0: tuple(kept.index(a) for a in axes)} if set(axes) <= set(kept) else None


def _squeeze_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    kept = [a for a in range(len(shape_of(eqn.invars[0]))) if a not in eqn.params["dimensions"]]
    return [(0, tuple(kept[a] for a in axes))]


def _split_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    return dict.fromkeys(range(len(eqn.outvars)), axes)


def _split_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    return None if eqn.params["axis"] in axes else [(0, axes)]


def _stack_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    return {0: tuple(a + (a >= eqn.params["axis"]) for a in axes)}


def _stack_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    at = eqn.params["axis"]
    return None if at in axes else [(i, tuple(a - (a > at) for a in axes)) for i in range(len(eqn.invars))]


def _unstack_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    at = eqn.params["axis"]
    return None if at in axes else {j: tuple(a - (a > at) for a in axes) for j in range(len(eqn.outvars))}


def _unstack_zero(eqn: Any, j: int, axes: Axes, facts: Facts) -> list[tuple[int, Axes]] | None:
    return [(0, tuple(a + (a >= eqn.params["axis"]) for a in axes))]


def _tile_shift(eqn: Any, i: int, axes: Axes, facts: Facts) -> dict[int, Axes] | None:
    return {0: axes}


for _name, _shift, _zero in (
    ("tile", _tile_shift, _rev_zero),
    ("broadcast_in_dim", _broadcast_shift, _broadcast_zero),
    ("reshape", _reshape_shift, _reshape_zero),
    ("transpose", _transpose_shift, _transpose_zero),
    ("slice", _slice_shift, _slice_zero),
    ("dynamic_slice", _slice_shift, _slice_zero),
    ("rev", _slice_shift, _rev_zero),
    ("concatenate", _concatenate_shift, _concatenate_zero),
    ("pad", _pad_shift, _pad_zero),
    ("dynamic_update_slice", _update_slice_shift, _update_slice_zero),
    ("squeeze", _squeeze_shift, _squeeze_zero),
    ("split", _split_shift, _split_zero),
    ("stack", _stack_shift, _stack_zero),
    ("unstack", _unstack_shift, _unstack_zero),
):
    register_rule(_name, shift=_shift, zero=_zero)
