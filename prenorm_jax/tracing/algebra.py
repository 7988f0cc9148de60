"""The polynomial that an equation computes, and along which axes of x its result runs.

A tracked value's axes are named by the axes of x that they run along, so x may be transposed, squeezed and broadcast on its way; an
axis along which the value is known to be constant is `FREE` until it meets one that is named.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from prenorm_jax.tracing import polynomials as P
from prenorm_jax.tracing.flow import Flow
from prenorm_jax.tracing.jaxprs import Axes, is_float, is_var, name_of, names, scalar_value, shape_of
from prenorm_jax.tracing.rules import ConstantAlong

FREE = -1
Dims = tuple[int, ...]
Term = tuple[P.Poly, Dims]

ARITHMETIC = names("add sub mul div add_any square integer_pow pow")
CONVERSIONS = names("convert_element_type copy copy_p reduce_precision pvary")
MOVES = names("broadcast_in_dim reshape squeeze transpose")


@dataclasses.dataclass
class Tracked:
    """A value as a polynomial, the axes of x that its axes run along, and what a shift of x adds to it."""

    poly: P.Poly
    dims: Dims
    change: P.Poly

    def live(self) -> bool:
        return bool(self.change)


class Algebra:
    """Polynomials in one value x of shape `shape` and its moments over `axes`."""

    def __init__(self, flow: Flow, facts: ConstantAlong, shape: tuple[int, ...], axes: Axes):
        self.flow, self.facts, self.shape, self.axes = flow, facts, shape, axes
        self.n = math.prod(shape[a] for a in axes)
        self.tracked: dict[Any, Tracked] = {}
        self.names: dict[Any, int] = {}
        self.varying: set[int] = set()

    def varies(self, symbol: int) -> bool:
        return symbol in self.varying

    def axes_in(self, var: Any, dims: Dims) -> Axes | None:
        """Where a value has x's axes, in full; None if it does not have them all."""
        if not set(self.axes) <= set(dims):
            return None
        axes = tuple(dims.index(a) for a in self.axes)
        return axes if all(shape_of(var)[k] == self.shape[a] for k, a in zip(axes, self.axes, strict=True)) else None

    def polynomial(self, eqn: Any) -> Term | None:
        """What an equation computes, if that is a polynomial; None otherwise."""
        name, args = name_of(eqn), eqn.invars
        if name in ARITHMETIC:
            return self._arithmetic(eqn)
        if not is_var(args[0]) or args[0] not in self.tracked or not is_float(args[0]):
            return None
        value = self.tracked[args[0]]
        if name in CONVERSIONS:
            return value.poly, value.dims
        if name == "neg":
            return P.add({}, value.poly, -1.0), value.dims
        if name == "reduce_sum":
            return self._row_sum(value, args[0], eqn.params["axes"])
        if name in MOVES:
            dims = self._moved(value.dims, eqn)
            return None if dims is None else (value.poly, dims)
        if name == "dot_general":
            return self._row_product(eqn)
        return None

    def _arithmetic(self, eqn: Any) -> Term | None:
        name, args = name_of(eqn), list(eqn.invars)
        power = 2 if name == "square" else eqn.params.get("y") if name == "integer_pow" else None
        if name == "pow":
            power = scalar_value(args.pop())
        dims = self._common_dims(args, shape_of(eqn.outvars[0]))
        if dims is None:
            return None
        polys = [self._operand(a, dims) for a in args]
        if name in ("square", "integer_pow", "pow"):
            return self._powered(polys[0], power, dims)
        if name == "div":
            polys[1] = self._reciprocal(args[1], dims)
        left, right = polys
        if left is None or right is None:
            return None
        result: P.Poly | None
        if name in ("mul", "div"):
            result = P.multiply(left, right)
        else:
            result = P.add(left, right, -1.0 if name == "sub" else 1.0)
        return None if result is None else (result, dims)

    def _common_dims(self, args: list, shape: tuple[int, ...]) -> Dims | None:
        """The axes of x that an elementwise result's axes run along; None where its operands disagree."""
        known = [v.dims for a in args if is_var(a) and (v := self.tracked.get(a)) is not None and v.dims]
        if not known or any(len(dims) != len(shape) for dims in known):
            return None if known or shape else ()
        found = []
        for k, size in enumerate(shape):
            named = {dims[k] for dims in known} - {FREE}
            if len(named) > 1 and size != 1:
                return None
            found.append(named.pop() if len(named) == 1 else FREE)
        wide = [a for a, size in zip(found, shape, strict=True) if a != FREE and size != 1]
        return tuple(found) if len(set(wide)) == len(wide) else None

    def _powered(self, base: P.Poly | None, power: float | None, dims: Dims) -> Term | None:
        if base is None or power not in (1, 2):
            return None
        result = base if power == 1 else P.multiply(base, base)
        return None if result is None else (result, dims)

    def _operand(self, atom: Any, dims: Dims) -> P.Poly | None:
        number = scalar_value(atom)
        if number is not None:
            return P.constant(P.unrounded(number, self.n))
        if is_var(atom) and atom in self.tracked:
            return self.tracked[atom].poly
        if not is_float(atom):
            return None
        name = self._name(atom, dims)
        return None if name is None else P.symbol(name)

    def _reciprocal(self, atom: Any, dims: Dims) -> P.Poly | None:
        number = scalar_value(atom)
        if number is not None:
            return P.constant(1.0 / P.unrounded(number, self.n)) if number else None
        if is_var(atom) and atom in self.tracked and self.tracked[atom].live():
            return None
        name = self._name(atom, dims, "1/")
        return None if name is None else P.symbol(name)

    def _name(self, atom: Any, dims: Dims, kind: str = "") -> int | None:
        """The symbol of a value that the shift does not reach, the same for all its broadcast and converted copies; None where it
        varies along an axis that is none of x's."""
        shape = shape_of(atom)
        dims = dims[len(dims) - len(shape) :] if shape else ()
        root, root_dims = self._root(atom, dims)
        if FREE in root_dims:
            return None
        key = (kind, root if is_var(root) else id(root.val), root_dims)
        if key not in self.names:
            self.names[key] = P.FIRST + len(self.names)
            along = tuple(k for k, a in enumerate(dims) if a in self.axes)
            if set(root_dims) & set(self.axes) and not self.facts.constant_along(atom, along):
                self.varying.add(self.names[key])
        return self.names[key]

    def _root(self, atom: Any, dims: Dims) -> tuple[Any, Dims]:
        while is_var(atom) and atom in self.flow.definer and atom not in self.tracked:
            eqn, _ = self.flow.definer[atom]
            name = name_of(eqn)
            if name == "convert_element_type" and is_float(eqn.invars[0]):
                atom = eqn.invars[0]
            elif name == "broadcast_in_dim":
                dims = tuple(dims[int(k)] for k in eqn.params["broadcast_dimensions"])
                atom = eqn.invars[0]
            else:
                break
        shape = shape_of(atom)
        return atom, tuple(a for a, size in zip(dims, shape, strict=True) if size != 1)

    def _row_sum(self, value: Tracked, atom: Any, axes: Axes) -> Term | None:
        wide = [k for k in axes if shape_of(atom)[k] != 1 or value.dims[k] in self.axes]
        summed = {value.dims[k] for k in wide}
        if summed != set(self.axes) or any(shape_of(atom)[k] != self.shape[value.dims[k]] for k in wide):
            return None
        poly = P.total_over_axes(value.poly, self.n, self.varies, self.name_sum)
        left = tuple(a for k, a in enumerate(value.dims) if k not in axes)
        return None if poly is None else (poly, left)

    def name_sum(self, inside: Any) -> int:
        """The symbol of a sum."""
        return self.names.setdefault(("sum", inside), P.FIRST + len(self.names))

    def _row_product(self, eqn: Any) -> Term | None:
        """sum_A of a product of two tracked values, written as a contraction: einsum("...d,...d->...")."""
        (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
        left, right = eqn.invars
        if not (is_var(right) and right in self.tracked):
            return None
        a, b = self.tracked[left], self.tracked[right]
        ours, theirs = [*left_batch, *left_sum], [*right_batch, *right_sum]
        if len(ours) != len(a.dims) or len(theirs) != len(b.dims):
            return None
        if any(a.dims[k] != b.dims[j] for k, j in zip(ours, theirs, strict=True)):
            return None
        poly = P.multiply(a.poly, b.poly)
        whole = all(d == FREE or shape_of(left)[k] == self.shape[d] for k, d in enumerate(a.dims))
        if poly is None or not whole:
            return None
        found = self._row_sum(Tracked(poly, a.dims, {}), left, tuple(left_sum))
        return None if found is None else (found[0], tuple(a.dims[k] for k in left_batch))

    def _moved(self, dims: Dims, eqn: Any) -> Dims | None:
        """The axes of x that a reshaped or transposed value runs along; None where that is no longer axis by axis."""
        shape, new, name = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0]), name_of(eqn)
        if name == "squeeze":
            return tuple(a for k, a in enumerate(dims) if k not in eqn.params["dimensions"])
        if name == "transpose":
            return tuple(dims[k] for k in eqn.params["permutation"])
        found = [FREE] * len(new)
        if name == "broadcast_in_dim":
            for i, k in enumerate(eqn.params["broadcast_dimensions"]):
                found[k] = dims[i] if shape[i] == new[k] else FREE
        else:
            sizes = [(n, a) for n, a in zip(shape, dims, strict=True) if n != 1]
            places = [k for k, n in enumerate(new) if n != 1]
            if [n for n, _ in sizes] != [new[k] for k in places]:
                return None
            for k, (_, a) in zip(places, sizes, strict=True):
                found[k] = a
        if len(new) == len(self.shape) and all(a in (FREE, k) for k, a in enumerate(found)):
            found = [k if size in (1, self.shape[k]) else a for k, (a, size) in enumerate(zip(found, new, strict=True))]
        return tuple(found)
