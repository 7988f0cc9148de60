"""A traced program in normal form, on which the two analyses (`shift`, `zero_mean`) are easy to state.

  * Calls that mean nothing but grouping (`jit`, `closed_call`, ...) are inlined.
  * One value, one variable: common subexpressions are merged, so "the mean of x" computed twice is one variable.
  * Scalar arithmetic on literals is evaluated (`jnp.var` hides `d - ddof` and a `where` behind it), and a product with an array of
    one number is a sum.
  * `scan`, `while`, `cond`, `remat`, `shard_map` and custom derivative calls stay, each with a body of its own variables.
  * What no result and no effect needs is gone.
Nothing here changes a value, an effect or the order of effects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from prenorm_jax.tracing.jaxprs import (
    CUSTOM,
    DRAWS,
    INLINED,
    Program,
    Varying,
    bodies_in,
    close_like,
    is_float,
    is_program,
    is_var,
    line_of,
    literal,
    live_eqns,
    name_of,
    names,
    open_program,
    remake,
    scalar_value,
    shape_of,
    sub_program,
    uniform_value,
)

_FOLDABLE = names(
    "add sub mul div neg max min sqrt rsqrt integer_pow square convert_element_type lt le gt ge eq ne not and or"
)


_MOVES = names("broadcast_in_dim reshape transpose squeeze")


class _Normalizer:
    """Rewrites one body at a time; fresh variables everywhere, so that no two bodies share one."""

    def __init__(self, enters: Callable[[Any], bool]):
        self.enters = enters
        self.uniform: dict[Any, float] = {}  # variables that hold one number everywhere

    def number(self, atom: Any) -> float | None:
        """The number that an array of more than one entry holds everywhere, if that is known."""
        return self.uniform.get(atom) if is_var(atom) else uniform_value(atom.val)

    def body(self, jaxpr: Any, const_atoms: list) -> Any:
        env: dict = {}
        eqns: list = []
        seen: dict = {}
        env.update(zip(jaxpr.constvars, const_atoms, strict=True))
        invars = [jex.Var(v.aval) for v in jaxpr.invars]
        env.update(zip(jaxpr.invars, invars, strict=True))
        self.emit(jaxpr, env, eqns, seen, "")
        outvars = [_read(env, a) for a in jaxpr.outvars]
        return remake(jaxpr, [*invars, *filter(is_var, const_atoms)], outvars, live_eqns(eqns, outvars))

    def emit(self, jaxpr: Any, env: dict, eqns: list, seen: dict, scope: str, caller: Any = None) -> None:
        for eqn in jaxpr.eqns:
            if caller is not None and not line_of(eqn):
                eqn = _called_from(eqn, caller)
            name = name_of(eqn)
            args = [_read(env, a) for a in eqn.invars]
            if self._inlines(eqn, name):
                inner, consts = sub_program(eqn.params, "jaxpr" if "jaxpr" in eqn.params else "call_jaxpr")
                inner_env = dict(zip(inner.invars, args, strict=True))
                inner_env.update({v: literal(c, v.aval) for v, c in zip(inner.constvars, consts, strict=True)})
                self.emit(inner, inner_env, eqns, seen, _join(scope, eqn), eqn)
                outs = [_read(inner_env, a) for a in inner.outvars]
            elif (
                plainer := _as_sum(eqn, name, args, [self.number(a) for a in args]) or _as_mul(eqn, name)
            ) is not None:
                inner, _ = open_program(plainer)
                inner_env = dict(zip(inner.invars, args, strict=True))
                self.emit(inner, inner_env, eqns, seen, _join(scope, eqn))
                outs = [_read(inner_env, inner.outvars[0])]
            else:
                outs = self._simplified(eqn, name, args) or self._eqn(eqn, args, eqns, seen, scope)
            env.update(zip(eqn.outvars, outs, strict=True))

    def _inlines(self, eqn: Any, name: str) -> bool:
        if name in CUSTOM:
            return self.enters(eqn)
        if name not in INLINED:
            return False
        shardings = [*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ())]
        return all(type(s).__name__ == "UnspecifiedValue" for s in shardings)

    def _simplified(self, eqn: Any, name: str, args: list) -> list | None:
        out = eqn.outvars[0] if len(eqn.outvars) == 1 else None
        if out is None or eqn.effects:
            return None
        if name == "select_n" and scalar_value(args[0]) is not None:
            chosen = args[1 + int(args[0].val)]
            return [chosen] if chosen.aval.shape == out.aval.shape else None
        if name == "convert_element_type" and args[0].aval == out.aval:
            return [args[0]]
        if name == "pvary" and scalar_value(args[0]) is not None:
            return [Varying(args[0].val, out.aval, eqn)]
        if name in _FOLDABLE and shape_of(out) == () and all(scalar_value(a) is not None for a in args):
            value = _computed(eqn, [a.val for a in args])
            varying = next((a for a in args if isinstance(a, Varying)), None)
            if varying is not None:
                return [Varying(value, out.aval, _pvary_of(varying.eqn, out.aval))]
            return [literal(value, out.aval)]
        return None

    def _eqn(self, eqn: Any, args: list, eqns: list, seen: dict, scope: str) -> list:
        params = {k: self._param(v) for k, v in eqn.params.items()}
        key = None
        if not eqn.effects and not bodies_in(eqn.params) and name_of(eqn) not in DRAWS:
            key = (eqn.primitive, tuple(_key(a) for a in args), _params_key(eqn.params), tuple(map(str, _avals(eqn))))
            if key in seen:
                return seen[key]
        outs = [jex.Var(v.aval) for v in eqn.outvars]
        new = eqn.replace(invars=args, outvars=outs, params=params)
        eqns.append(_rescope(new, scope))
        number = self._number_of(eqn, args)
        if number is not None:
            self.uniform[outs[0]] = number
        if key is not None:
            seen[key] = outs
        return outs

    def _number_of(self, eqn: Any, args: list) -> float | None:
        """The number that a result holds everywhere, where each operand holds one everywhere."""
        numbers = [self.number(a) if scalar_value(a) is None else scalar_value(a) for a in args]
        name = name_of(eqn)
        if name not in _FOLDABLE | _MOVES or None in numbers or not all(map(is_float, [*args, *eqn.outvars])):
            return None
        return numbers[0] if name in _MOVES else float(_computed(eqn, numbers))

    def _param(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)) and value and all(is_program(v) for v in value):
            make = getattr(value, "_make", type(value))  # a named tuple's
            return make(self._param(v) for v in value)
        if not is_program(value):
            return value
        jaxpr, consts = open_program(value)
        new = self.body(jaxpr, [literal(c, v.aval) for v, c in zip(jaxpr.constvars, consts, strict=True)])
        return close_like(value, new)


def _computed(eqn: Any, numbers: list) -> np.ndarray:
    """What an elementwise equation makes of one number of each operand."""
    with jax.ensure_compile_time_eval():
        args = (np.asarray(n, a.aval.dtype) for n, a in zip(numbers, eqn.invars, strict=True))
        return np.asarray(eqn.primitive.bind(*args, **eqn.params))


def _as_sum(eqn: Any, name: str, args: list, numbers: list[float | None]) -> Any:
    """A product with an array of one number, as a sum times that number: means are also taken as x @ (ones / d)."""
    uniform = [k for k, number in enumerate(numbers) if number is not None] if name == "dot_general" else []
    if len(uniform) != 1 or any(a.aval.dtype != eqn.outvars[0].aval.dtype or not is_float(a) for a in args):
        return None
    k = uniform[0]
    sums, batches = eqn.params["dimension_numbers"]
    shape, out = shape_of(args[1 - k]), shape_of(eqn.outvars[0])
    free = [a for a in range(len(shape)) if a not in sums[1 - k] and a not in batches[1 - k]]
    order = [*batches[1 - k], *free]
    start = len(out) - len(free) if k == 0 else len(batches[0])
    places = [*range(len(batches[0])), *range(start, start + len(free))]

    def rewritten(*pair: Any) -> Any:
        kept = jax.lax.reduce_sum(pair[1 - k], tuple(sums[1 - k]))
        left = [a for a in range(len(shape)) if a not in sums[1 - k]]
        kept = jax.lax.transpose(kept, [left.index(a) for a in order])
        return jax.lax.broadcast_in_dim(kept * np.asarray(numbers[k], kept.dtype), out, places)

    return jax.make_jaxpr(rewritten)(*(jax.ShapeDtypeStruct(shape_of(a), a.aval.dtype) for a in args))


def _as_mul(eqn: Any, name: str) -> Any:
    """A product without a sum, as einsum("bd,d->bd") writes it, as an elementwise one."""
    if name != "dot_general" or any(eqn.params["dimension_numbers"][0]):
        return None
    if any(a.aval.dtype != eqn.outvars[0].aval.dtype or not is_float(a) for a in eqn.invars):
        return None
    left, right = eqn.params["dimension_numbers"][1]
    shapes = [shape_of(a) for a in eqn.invars]

    def rewritten(*pair: Any) -> Any:
        orders = [
            [*own, *(a for a in range(len(shape)) if a not in own)]
            for own, shape in zip((left, right), shapes, strict=True)
        ]
        a, b = (jax.lax.transpose(x, order) for x, order in zip(pair, orders, strict=True))
        before, rows, columns = len(left), a.ndim - len(left), b.ndim - len(left)
        a = jax.lax.expand_dims(a, range(before + rows, before + rows + columns))
        b = jax.lax.expand_dims(b, range(before, before + rows))
        return (
            a * b
            if a.shape == b.shape
            else jax.lax.mul(*(jax.lax.broadcast_in_dim(x, out, range(x.ndim)) for x in (a, b)))
        )

    out = shape_of(eqn.outvars[0])
    return jax.make_jaxpr(rewritten)(*(jax.ShapeDtypeStruct(shape_of(a), a.aval.dtype) for a in eqn.invars))


def _pvary_of(eqn: Any, aval: Any) -> Any:
    """The pvary equation for numbers of this type."""
    number = jex.Var(jax.core.ShapedArray((), aval.dtype))
    return eqn.replace(invars=[number], outvars=[jex.Var(aval)])


def _join(scope: str, eqn: Any) -> str:
    stack = str(eqn.source_info.name_stack)
    return "/".join(s for s in (scope, stack) if s)


def _called_from(eqn: Any, caller: Any) -> Any:
    """An equation of a function of JAX, with the line that called it: its own are none of the caller's code."""
    return eqn.replace(source_info=eqn.source_info.replace(traceback=caller.source_info.traceback))


def _rescope(eqn: Any, scope: str) -> Any:
    """Keep the outer name scopes of an inlined equation (they locate it in the report and in profiles)."""
    if not scope:
        return eqn
    info = eqn.source_info
    try:
        return eqn.replace(source_info=info.replace(name_stack=_stack_of(info.name_stack, scope)))
    except (AttributeError, TypeError):
        return eqn


def _stack_of(stack: Any, scope: str) -> Any:
    outer = type(stack)()
    for name in scope.split("/"):
        outer = outer.extend(name)
    return outer + stack


def _read(env: dict, atom: Any) -> Any:
    return env[atom] if is_var(atom) else atom


def _avals(eqn: Any) -> list:
    return [v.aval for v in eqn.outvars]


def _key(atom: Any) -> Any:
    if is_var(atom):
        return id(atom)
    value = np.asarray(atom.val) if np.shape(atom.val) == () else None
    return (str(atom.aval), value.tobytes() if value is not None else id(atom))


def _params_key(params: dict) -> Any:
    items: list[Any] = []
    for name, value in sorted(params.items()):
        try:
            hash(value)
            items.append((name, type(value), value))
        except TypeError:
            items.append((name, id(value)))
    return tuple(items)


def normalize(closed: Any, enters: Callable[[Any], bool]) -> Program:
    """Bring the output of `jax.make_jaxpr` into normal form. Values, effects and their order are unchanged.

    `enters` says of a custom derivative call whether its function takes its place.
    """
    jaxpr, consts = open_program(closed)
    constvars = [jex.Var(v.aval) for v in jaxpr.constvars]
    normalizer = _Normalizer(enters)
    numbers = ((v, uniform_value(c)) for v, c in zip(constvars, consts, strict=True))
    normalizer.uniform.update({v: n for v, n in numbers if n is not None})
    body = normalizer.body(jaxpr, constvars)
    return Program(body, list(consts))
