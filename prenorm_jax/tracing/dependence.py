"""How the values of a program depend on a shift of one of them.

The uses of a value x are followed forward. While a derived value is a polynomial of x and its row moments (`polynomials`), its
dependence on the shift is computed, and vanishes behind a LayerNorm of any form. A value that is itself x plus a row shift (an add
of another stream, a reshape, a product with a kernel, a loop's carry, ...) is cut there: what becomes of its own shift is a
question of its own. Whatever else still depends on the shift is a failure: an unknown primitive, a contraction over A, a result.
"""

from __future__ import annotations

import dataclasses
import heapq
from typing import Any

from prenorm_jax.tracing import linear_rules  # noqa: F401  (it registers its rules)
from prenorm_jax.tracing import polynomials as P
from prenorm_jax.tracing.flow import Flow
from prenorm_jax.tracing.jaxprs import Axes, is_float, is_var, names, scalar_value, shape_of, where
from prenorm_jax.tracing.rules import ConstantAlong, has_rule, rule_for

Node = tuple[Any, Axes]


@dataclasses.dataclass
class Tracked:
    """A value as a polynomial; `dims[k]` is the axis of x that its axis k runs along."""

    poly: P.Poly
    dims: tuple[int, ...]
    change: P.Poly

    def live(self) -> bool:
        return bool(self.change)


@dataclasses.dataclass
class Exploration:
    """What following one value's uses found: what its Inv needs, or why it fails; and the means taken of it."""

    needs: list[Node] = dataclasses.field(default_factory=list)
    failure: str | None = None
    cuts: int = 0
    sums: list[Any] = dataclasses.field(default_factory=list)  # equations that sum x over A
    centered: list[Any] = dataclasses.field(default_factory=list)  # values equal to x - mean(x), up to a number
    cancelled: list[Any] = dataclasses.field(default_factory=list)  # values with x in them that a shift does not change

    def fail(self, reason: str) -> None:
        self.failure = self.failure or reason


class Explorer:
    """Follows one value within its body."""

    def __init__(self, flow: Flow, facts: ConstantAlong, var: Any, axes: Axes, cut: bool):
        self.flow, self.facts, self.axes, self.cut = flow, facts, axes, cut
        self.shape = shape_of(var)
        self.n = 1
        for a in axes:
            self.n *= self.shape[a]
        self.body = flow.body_of[var]
        self.tracked: dict[Any, Tracked] = {}
        self.names: dict[Any, int] = {}
        self.varying: set[int] = set()
        self.queue: list[tuple[int, Any]] = []
        self.queued: set[int] = set()
        self.found = Exploration()
        all_dims = tuple(range(len(self.shape)))
        self.track(var, Tracked(P.symbol(P.X), all_dims, P.symbol(P.S)))

    def run(self) -> Exploration:
        while self.queue:
            _, eqn = heapq.heappop(self.queue)
            self.visit(eqn)
        return self.found

    def track(self, var: Any, value: Tracked) -> None:
        self.tracked[var] = value
        if P.is_centered(value.poly, self.n):
            self.found.centered.append(var)
        if not value.live():
            if any(P.X in m for m in value.poly):
                self.found.cancelled.append(var)
            return
        self.leave(var, value)
        for eqn, _ in self.flow.uses.get(var, ()):
            if id(eqn) not in self.queued:
                self.queued.add(id(eqn))
                heapq.heappush(self.queue, (self.flow.order[id(eqn)], eqn))

    def leave(self, var: Any, value: Tracked) -> None:
        """Account for a value that is a result of its body."""
        for position, out in enumerate(self.body.jaxpr.outvars):
            if out is not var:
                continue
            targets = self.flow.exits(self.body, position)
            axes = self.shifted_axes(var, value)
            if targets is None:
                kind = {
                    "while_cond": "it decides when a loop ends",
                    "custom": "it leaves a custom derivative rule's function",
                }
                self.found.fail(kind.get(self.body.role, f"it is output {position} of the program"))
            elif axes is None:
                self.found.fail("a sub-program returns what was derived from it")
            else:
                self.need_all(targets, axes)

    def need_all(self, targets: list[tuple[Any, int]], axes: Axes) -> None:
        for target, delta in targets:
            moved = tuple(a - delta for a in axes)
            if any(a < 0 for a in moved):
                self.found.fail("the axis is the one a scan iterates over")
            else:
                self.found.needs.append((target, moved))

    def shifted_axes(self, var: Any, value: Tracked) -> Axes | None:
        """The axes along which this value is merely shifted, or None."""
        if not P.is_row_shift(value.change, self.varies) or not set(self.axes) <= set(value.dims):
            return None
        axes = tuple(value.dims.index(a) for a in self.axes)
        return axes if all(shape_of(var)[k] == self.shape[a] for k, a in zip(axes, self.axes, strict=True)) else None

    # -- one equation --

    def visit(self, eqn: Any) -> None:
        live = [i for i, a in enumerate(eqn.invars) if is_var(a) and a in self.tracked and self.tracked[a].live()]
        result = (
            self.polynomial(eqn) if len(eqn.outvars) == 1 and is_float(eqn.outvars[0]) and not eqn.effects else None
        )
        if result is not None:
            self.follow(eqn, result)
            return
        for i in live:
            self.carry_over(eqn, i)

    def follow(self, eqn: Any, result: tuple[P.Poly, tuple[int, ...]]) -> None:
        poly, dims = result
        change = P.change(poly, self.n)
        out = eqn.outvars[0]
        if change is None:
            self.found.fail(f"its use grows too large to follow at {where(eqn)}")
            return
        value = Tracked(poly, dims, change)
        if self.cut and eqn.primitive.name in ("add", "sub", "add_any") and self.is_stream(value):
            axes = self.shifted_axes(out, value)
            if axes is not None:
                self.found.cuts += 1
                self.found.needs.append((out, axes))
                return
        if eqn.primitive.name == "reduce_sum" and set(poly) == {(P.M1,)}:
            self.found.sums.append(eqn)
        self.track(out, value)

    def is_stream(self, value: Tracked) -> bool:
        """x plus something of its own that varies along A: another branch was added."""
        others = any(P.X not in m and any(k >= P.FIRST and self.varies(k) for k in m) for m in value.poly)
        return others and any(P.X in m for m in value.poly)

    def carry_over(self, eqn: Any, i: int) -> None:
        """A live operand reaches something that is not polynomial: its result may be a shifted value itself."""
        atom = eqn.invars[i]
        axes = self.shifted_axes(atom, self.tracked[atom])
        inside = self.flow.inputs(eqn, i)
        name = eqn.primitive.name
        if axes is None:
            self.found.fail(f"a mean of it is used in {name} at {where(eqn)}")
        elif eqn.effects and inside is None:
            self.found.fail(f"it has a side effect in {name} at {where(eqn)}")
        elif inside is not None:
            children = self.flow.bodies_of[id(eqn)]
            if children[0].role == "custom":
                self.found.fail(
                    f"it enters a custom derivative rule ({custom_name(eqn)}), which may see its mean, at {where(eqn)}"
                )
            elif not inside:
                self.found.fail(f"it steers {name} at {where(eqn)}")
            else:
                self.need_all(inside, axes)
                self.found.needs += [(v, axes) for v in self.flow.passed_through(eqn, i)]
        else:
            moved = rule_for(name).shift(eqn, i, axes, self.facts)
            if moved is None:
                known = "reads its mean" if has_rule(name) or name in KNOWN_READERS else "has no rule"
                self.found.fail(f"{name} {known} at {where(eqn)}")
            else:
                self.found.needs += [(eqn.outvars[j], tuple(axes_j)) for j, axes_j in moved.items()]

    # -- polynomials of equations --

    def polynomial(self, eqn: Any) -> tuple[P.Poly, tuple[int, ...]] | None:
        name, args = eqn.primitive.name, eqn.invars
        if name in ("add", "sub", "mul", "div", "add_any", "square", "integer_pow", "pow"):
            return self.arithmetic(eqn)
        if not is_var(args[0]) or args[0] not in self.tracked or not is_float(args[0]):
            return None
        value = self.tracked[args[0]]
        if name in ("convert_element_type", "copy", "copy_p", "reduce_precision"):
            return value.poly, value.dims
        if name == "neg":
            return P.add({}, value.poly, -1.0), value.dims
        if name == "reduce_sum":
            return self.row_sum(value, args[0], eqn.params["axes"])
        if name in ("broadcast_in_dim", "reshape", "squeeze"):
            if self.cut and self.shifted_axes(args[0], value) is not None:
                return None  # a stream in another shape is a stream of its own
            dims = self.aligned_dims(value, args[0], eqn.outvars[0], eqn)
            return None if dims is None else (value.poly, dims)
        if name == "dot_general":
            return self.row_product(eqn)
        return None

    def arithmetic(self, eqn: Any) -> tuple[P.Poly, tuple[int, ...]] | None:
        name, args = eqn.primitive.name, list(eqn.invars)
        power = 2 if name == "square" else eqn.params.get("y") if name == "integer_pow" else None
        if name == "pow":
            power = scalar_value(args.pop())
        known = [self.tracked[a] for a in args if is_var(a) and a in self.tracked]
        dims = next((v.dims for v in known if len(v.dims) == len(shape_of(eqn.outvars[0]))), None)
        if dims is None or any(v.dims != dims and v.dims for v in known):
            return None
        polys = [self.operand(a, dims) for a in args]
        if name in ("square", "integer_pow", "pow"):
            return self.powered(polys[0], power, dims)
        if name == "div":
            polys[1] = self.reciprocal(args[1], dims)
        left, right = polys
        if left is None or right is None:
            return None
        result: P.Poly | None
        if name in ("mul", "div"):
            result = P.multiply(left, right)
        else:
            result = P.add(left, right, -1.0 if name == "sub" else 1.0)
        return None if result is None else (result, dims)

    def powered(
        self, base: P.Poly | None, power: float | None, dims: tuple[int, ...]
    ) -> tuple[P.Poly, tuple[int, ...]] | None:
        if base is None or power not in (1, 2):
            return None
        result = base if power == 1 else P.multiply(base, base)
        return None if result is None else (result, dims)

    def operand(self, atom: Any, dims: tuple[int, ...]) -> P.Poly | None:
        number = scalar_value(atom)
        if number is not None:
            return P.constant(number)
        if is_var(atom) and atom in self.tracked:
            return self.tracked[atom].poly
        if not is_float(atom):
            return None
        return P.symbol(self.name(atom, dims))

    def reciprocal(self, atom: Any, dims: tuple[int, ...]) -> P.Poly | None:
        number = scalar_value(atom)
        if number is not None:
            return P.constant(1.0 / number) if number else None
        if is_var(atom) and atom in self.tracked and self.tracked[atom].live():
            return None
        return P.symbol(self.name(atom, dims, "1/"))

    def name(self, atom: Any, dims: tuple[int, ...], kind: str = "") -> int:
        """The symbol of a value that the shift does not reach, the same for all its broadcast and converted copies."""
        shape = shape_of(atom)
        dims = dims[len(dims) - len(shape) :] if shape else ()
        root, root_dims = self.root(atom, dims)
        key = (kind, root if is_var(root) else id(root.val), root_dims)
        if key not in self.names:
            self.names[key] = P.FIRST + len(self.names)
            along = tuple(k for k, a in enumerate(dims) if a in self.axes)
            if set(root_dims) & set(self.axes) and not self.facts.constant_along(atom, along):
                self.varying.add(self.names[key])
        return self.names[key]

    def root(self, atom: Any, dims: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
        while is_var(atom) and atom in self.flow.definer and atom not in self.tracked:
            eqn, _ = self.flow.definer[atom]
            name = eqn.primitive.name
            if name == "convert_element_type" and is_float(eqn.invars[0]):
                atom = eqn.invars[0]
            elif name == "broadcast_in_dim":
                dims = tuple(dims[int(k)] for k in eqn.params["broadcast_dimensions"])
                atom = eqn.invars[0]
            else:
                break
        shape = shape_of(atom)
        return atom, tuple(a for a, size in zip(dims, shape, strict=True) if size != 1)

    def varies(self, symbol: int) -> bool:
        return symbol in self.varying

    def row_sum(self, value: Tracked, atom: Any, axes: Axes) -> tuple[P.Poly, tuple[int, ...]] | None:
        summed = {value.dims[k] for k in axes}
        if summed != set(self.axes) or any(shape_of(atom)[k] != self.shape[value.dims[k]] for k in axes):
            return None
        poly = P.total_over_axes(value.poly, self.n, self.varies, self.name_sum)
        left = tuple(a for k, a in enumerate(value.dims) if k not in axes)
        return None if poly is None else (poly, left)

    def name_sum(self, inside: P.Monomial) -> int:
        return self.names.setdefault(("sum", inside), P.FIRST + len(self.names))

    def row_product(self, eqn: Any) -> tuple[P.Poly, tuple[int, ...]] | None:
        """sum_A of a product of two tracked values, written as a contraction: einsum("...d,...d->...")."""
        (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
        left, right = eqn.invars
        if not (is_var(right) and right in self.tracked):
            return None
        a, b = self.tracked[left], self.tracked[right]
        full = len(left_sum) + len(left_batch) == len(a.dims) == len(b.dims) and a.dims == b.dims
        if not full or tuple(left_sum) != tuple(right_sum) or tuple(left_batch) != tuple(right_batch):
            return None
        if list(left_batch) != sorted(left_batch) or shape_of(left) != self.shape or shape_of(right) != self.shape:
            return None
        poly = P.multiply(a.poly, b.poly)
        return None if poly is None else self.row_sum(Tracked(poly, a.dims, {}), left, tuple(left_sum))

    def aligned_dims(self, value: Tracked, atom: Any, out: Any, eqn: Any) -> tuple[int, ...] | None:
        """The axes of x that a reshaped value runs along; None where that is no longer axis by axis."""
        shape, new, rank = shape_of(atom), shape_of(out), len(self.shape)
        if eqn.primitive.name == "squeeze":
            return tuple(a for k, a in enumerate(value.dims) if k not in eqn.params["dimensions"])
        if eqn.primitive.name == "broadcast_in_dim":
            targets = [int(k) for k in eqn.params["broadcast_dimensions"]]
            lined_up = all(a == k for a, k in zip(value.dims, targets, strict=True))
            return tuple(range(rank)) if len(new) == rank and lined_up else None
        sizes = [(n, a) for n, a in zip(shape, value.dims, strict=True) if n != 1]
        places = [k for k, n in enumerate(new) if n != 1]
        if [n for n, _ in sizes] != [new[k] for k in places]:
            return None
        if len(new) == rank and [a for _, a in sizes] == places:
            return tuple(range(rank))
        return tuple(a for _, a in sizes) if len(places) == len(new) else None


KNOWN_READERS = names(
    "exp log tanh logistic erf max min abs sign rsqrt sqrt pow sin cos argmax argmin sort top_k reduce_max "
    "reduce_min eq lt gt le ge is_finite cumprod cumlogsumexp"
)


def custom_name(eqn: Any) -> str:
    """The name of a custom_jvp or custom_vjp function, as far as JAX recorded it."""
    return str(eqn.params.get("name") or eqn.primitive.name)
