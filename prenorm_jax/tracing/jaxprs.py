"""Jaxprs in normal form, and the dataflow between a program and its sub-programs.

A traced program is brought into a form on which the two analyses (`shift`, `zero_mean`) are easy to state:
  * calls that mean nothing but grouping (`jit`, `closed_call`, ...) are inlined;
  * one value, one variable: common subexpressions are merged, so "the mean of x" computed twice is one variable;
  * scalar arithmetic on literals is evaluated (`jnp.var` hides `d - ddof` and a `where` behind it);
  * `scan`, `while`, `cond`, `remat` and custom derivative calls stay, each with a body of its own variables.
Nothing here changes a value, an effect or the order of effects. `jax.extend.core` is the only interface to JAX's
internals; what differs between JAX versions is read in the functions at the end of this file.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Iterator

import jax
import numpy as np
from jax.extend import core as jex

INLINED = frozenset({"jit", "pjit", "closed_call", "core_call", "core_closed_call"})
CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})
_FOLDABLE = frozenset("add sub mul div neg max min sqrt rsqrt integer_pow square convert_element_type lt le gt ge eq ne not and or".split())

Axes = tuple[int, ...]


def is_var(atom: Any) -> bool:
    """Whether an operand is a variable (and not a literal)."""
    return not isinstance(atom, jex.Literal)


def is_float(atom: Any) -> bool:
    """Whether an operand holds floating point numbers (of any width)."""
    return np.issubdtype(_np_dtype(atom.aval), np.floating) or str(_np_dtype(atom.aval)).startswith(("bfloat", "float"))


def shape_of(atom: Any) -> tuple[int, ...]:
    """Shape of an operand; () for tokens and other shapeless values."""
    return tuple(getattr(atom.aval, "shape", ()))


def _np_dtype(aval: Any) -> Any:
    return getattr(aval, "dtype", np.dtype(bool))


def scalar_value(atom: Any) -> float | None:
    """The number a scalar literal holds, else None."""
    if is_var(atom) or np.shape(atom.val) != ():
        return None
    try:
        return float(atom.val)
    except (TypeError, ValueError):
        return None


# --- normal form -----------------------------------------------------------------------------------------------------


class _Normalizer:
    """Rewrites one body at a time; fresh variables everywhere, so that no two bodies share one."""

    def __init__(self, inline_custom: bool):
        self.inline_custom = inline_custom

    def body(self, jaxpr: Any, const_atoms: list) -> Any:
        env: dict = {}
        eqns: list = []
        seen: dict = {}
        constvars = []
        for var, atom in zip(jaxpr.constvars, const_atoms, strict=True):
            env[var] = atom
            if is_var(atom):
                constvars.append(atom)
        invars = [jex.Var(v.aval) for v in jaxpr.invars]
        env.update(zip(jaxpr.invars, invars, strict=True))
        self.emit(jaxpr, env, eqns, seen, "")
        outvars = [_read(env, a) for a in jaxpr.outvars]
        return remake(jaxpr, constvars, invars, outvars, live_eqns(eqns, outvars))

    def emit(self, jaxpr: Any, env: dict, eqns: list, seen: dict, scope: str) -> None:
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            args = [_read(env, a) for a in eqn.invars]
            if self._inlines(eqn, name):
                inner, consts = sub_program(eqn.params, "jaxpr" if "jaxpr" in eqn.params else "call_jaxpr")
                inner_env = dict(zip(inner.invars, args, strict=True))
                inner_env.update({v: literal(c, v.aval) for v, c in zip(inner.constvars, consts, strict=True)})
                self.emit(inner, inner_env, eqns, seen, _join(scope, eqn))
                outs = [_read(inner_env, a) for a in inner.outvars]
            else:
                outs = self._simplified(eqn, name, args) or self._eqn(eqn, args, eqns, seen, scope)
            env.update(zip(eqn.outvars, outs, strict=True))

    def _inlines(self, eqn: Any, name: str) -> bool:
        if name in CUSTOM:
            return self.inline_custom
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
        if name in _FOLDABLE and shape_of(out) == () and all(scalar_value(a) is not None for a in args):
            with jax.ensure_compile_time_eval():
                value = eqn.primitive.bind(*(np.asarray(a.val, a.aval.dtype) for a in args), **eqn.params)
            return [literal(np.asarray(value), out.aval)]
        return None

    def _eqn(self, eqn: Any, args: list, eqns: list, seen: dict, scope: str) -> list:
        params = {k: self._param(v) for k, v in eqn.params.items()}
        key = None
        if not eqn.effects and not bodies_in(eqn.params):
            key = (eqn.primitive, tuple(_key(a) for a in args), _params_key(eqn.params), tuple(map(str, _avals(eqn))))
            if key in seen:
                return seen[key]
        outs = [jex.Var(v.aval) for v in eqn.outvars]
        new = eqn.replace(invars=args, outvars=outs, params=params)
        eqns.append(_rescope(new, scope))
        if key is not None:
            seen[key] = outs
        return outs

    def _param(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)) and value and all(_is_program(v) for v in value):
            return type(value)(self._param(v) for v in value)
        if not _is_program(value):
            return value
        jaxpr, consts = open_program(value)
        new = self.body(jaxpr, [literal(c, v.aval) for v, c in zip(jaxpr.constvars, consts, strict=True)])
        return close_like(value, new)


def live_eqns(eqns: list, outvars: list) -> list:
    """The equations that an output or an effect needs, in their order."""
    needed = {a for a in outvars if is_var(a)}
    kept = []
    for eqn in reversed(eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            kept.append(eqn)
            needed.update(a for a in eqn.invars if is_var(a))
    return kept[::-1]


def _join(scope: str, eqn: Any) -> str:
    stack = str(eqn.source_info.name_stack)
    return "/".join(s for s in (scope, stack) if s)


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
    items = []
    for name, value in sorted(params.items()):
        try:
            hash(value)
            items.append((name, type(value), value))
        except TypeError:
            items.append((name, id(value)))
    return tuple(items)


def literal(value: Any, aval: Any) -> Any:
    """A literal operand; arrays are allowed (constants of a nested body become literals of it)."""
    return jex.Literal(value, aval)


@dataclasses.dataclass
class Program:
    """A normalized program: `jaxpr` with the values of its constvars."""

    jaxpr: Any
    consts: list

    def __call__(self, *args: Any) -> list:
        return jax.core.eval_jaxpr(self.jaxpr, self.consts, *args)


def normalize(closed: Any, inline_custom: bool = False) -> Program:
    """Bring the output of `jax.make_jaxpr` into normal form. Values, effects and their order are unchanged."""
    jaxpr, consts = open_program(closed)
    constvars = [jex.Var(v.aval) for v in jaxpr.constvars]
    body = _Normalizer(inline_custom).body(jaxpr, constvars)
    return Program(body, list(consts))


# --- dataflow --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Body:
    """One jaxpr of a program: the whole, or the body of an equation of `parent`."""

    jaxpr: Any
    parent: Body | None = None
    eqn: Any = None
    role: str = "main"  # main, scan, while, while_cond, cond, region, custom
    trips: int = 1

    def in_custom(self) -> bool:
        return self.role == "custom" or (self.parent is not None and self.parent.in_custom())


class Flow:
    """Where every variable of a program is defined and used, across body boundaries.

    An axis of an operand and the same axis inside the body differ by `delta` (0, or 1 for what a scan iterates over).
    """

    def __init__(self, program: Program):
        self.program = program
        self.body_of: dict[Any, Body] = {}
        self.definer: dict[Any, tuple[Any, int]] = {}
        self.uses: dict[Any, list[tuple[Any, int]]] = {}
        self.order: dict[int, int] = {}
        self.bodies: list[Body] = []
        self.bodies_of: dict[int, list[Body]] = {}
        self.body_of_eqn: dict[int, Body] = {}
        self._add(Body(program.jaxpr))

    def _add(self, body: Body) -> None:
        self.bodies.append(body)
        for var in (*body.jaxpr.constvars, *body.jaxpr.invars):
            self.body_of[var] = body
        for eqn in body.jaxpr.eqns:
            self.order[id(eqn)] = len(self.order)
            self.body_of_eqn[id(eqn)] = body
            for i, atom in enumerate(eqn.invars):
                if is_var(atom):
                    self.uses.setdefault(atom, []).append((eqn, i))
            for j, var in enumerate(eqn.outvars):
                self.body_of[var] = body
                self.definer[var] = (eqn, j)
            children = [Body(jaxpr, body, eqn, role, body.trips * trips) for jaxpr, role, trips in bodies_of(eqn)]
            if children:
                self.bodies_of[id(eqn)] = children
                for child in children:
                    self._add(child)

    @property
    def main(self) -> Body:
        return self.bodies[0]

    def inputs(self, eqn: Any, i: int) -> list[tuple[Any, int]] | None:
        """Body variables fed by operand i of a structured equation; [] if it only steers (a cond's index), None if
        equation `eqn` has no bodies."""
        children = self.bodies_of.get(id(eqn))
        if children is None:
            return None
        role = children[0].role
        if role == "scan":
            consts, carry = scan_counts(eqn)
            return [(children[0].jaxpr.invars[i], 0 if i < consts + carry else 1)]
        if role == "cond":
            return [] if i == 0 else [(c.jaxpr.invars[i - 1], 0) for c in children]
        if role in ("while", "while_cond"):
            cond, loop = (c.jaxpr for c in sorted(children, key=lambda c: c.role, reverse=True))
            nc, nb = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            if i < nc:
                return [(cond.invars[i], 0)]
            if i < nc + nb:
                return [(loop.invars[i - nc], 0)]
            return [(cond.invars[i - nb], 0), (loop.invars[i - nc], 0)]
        return [(children[0].jaxpr.invars[i], 0)]

    def passed_through(self, eqn: Any, i: int) -> list[Any]:
        """Results that equal operand i when a loop makes no trip."""
        children = self.bodies_of[id(eqn)]
        if children[0].role == "scan":
            consts, carry = scan_counts(eqn)
            return [eqn.outvars[i - consts]] if consts <= i < consts + carry else []
        if children[0].role in ("while", "while_cond"):
            skip = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
            return [eqn.outvars[i - skip]] if i >= skip else []
        return []

    def exits(self, body: Body, position: int) -> list[tuple[Any, int]] | None:
        """Variables that output `position` of a body becomes; None where it is a result of the program or decides
        about a loop."""
        eqn = body.eqn
        if body.role in ("main", "while_cond", "custom"):
            return None
        if body.role == "scan":
            consts, carry = scan_counts(eqn)
            if position < carry:
                return [(body.jaxpr.invars[consts + position], 0), (eqn.outvars[position], 0)]
            return [(eqn.outvars[position], -1)]
        if body.role == "while":
            cond = next(c for c in self.bodies_of[id(eqn)] if c.role == "while_cond")
            nc, nb = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            return [
                (body.jaxpr.invars[nb + position], 0),
                (cond.jaxpr.invars[nc + position], 0),
                (eqn.outvars[position], 0),
            ]
        return [(eqn.outvars[position], 0)]

    def sources(self, var: Any) -> list[tuple[Any, Any, int, int]] | None:
        """Every atom whose value `var` can hold, for a body's argument or a structured equation's result, as
        (atom, equation and operand index it is taken from or None, -1, delta). None for any other variable."""
        if var in self.definer:
            return self._result_sources(*self.definer[var])
        body = self.body_of[var]
        if body.eqn is None or var in body.jaxpr.constvars:
            return None
        eqn, position = body.eqn, body.jaxpr.invars.index(var)
        if body.role == "scan":
            consts, carry = scan_counts(eqn)
            found = [(eqn.invars[position], eqn, position, -1 if position >= consts + carry else 0)]
            if consts <= position < consts + carry:
                found.append((body.jaxpr.outvars[position - consts], None, -1, 0))
            return found
        if body.role == "cond":
            return [(eqn.invars[position + 1], eqn, position + 1, 0)]
        if body.role in ("while", "while_cond"):
            nc, nb = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            own = nc if body.role == "while_cond" else nb
            operand = position + nb if body.role == "while_cond" else position + nc
            if position < own:
                operand = position if body.role == "while_cond" else position + nc
                return [(eqn.invars[operand], eqn, operand, 0)]
            loop = next(c for c in self.bodies_of[id(eqn)] if c.role == "while")
            return [(eqn.invars[operand], eqn, operand, 0), (loop.jaxpr.outvars[position - own], None, -1, 0)]
        return [(eqn.invars[position], eqn, position, 0)]

    def _result_sources(self, eqn: Any, j: int) -> list[tuple[Any, Any, int, int]] | None:
        children = self.bodies_of.get(id(eqn))
        if children is None:
            return None
        role = children[0].role
        if role == "scan":
            consts, carry = scan_counts(eqn)
            inside = children[0].jaxpr.outvars[j]
            if j >= carry:
                return [(inside, None, -1, 1)]
            return [(inside, None, -1, 0), (eqn.invars[consts + j], eqn, consts + j, 0)]
        if role in ("while", "while_cond"):
            loop = next(c for c in children if c.role == "while")
            i = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"] + j
            return [(loop.jaxpr.outvars[j], None, -1, 0), (eqn.invars[i], eqn, i, 0)]
        return [(c.jaxpr.outvars[j], None, -1, 0) for c in children]


# --- what depends on the JAX version ---------------------------------------------------------------------------------


def _is_program(value: Any) -> bool:
    return isinstance(value, (jex.Jaxpr, jex.ClosedJaxpr))


def open_program(value: Any) -> tuple[Any, list]:
    """(jaxpr, consts) of a closed or open jaxpr; the two are one class from JAX 0.12 on."""
    jaxpr = getattr(value, "jaxpr", value) if isinstance(value, jex.ClosedJaxpr) else value
    return jaxpr, list(getattr(value, "consts", ()) or ())


def close_like(old: Any, jaxpr: Any) -> Any:
    """`jaxpr` (which has no constvars) as the kind of object that `old` was."""
    return jex.ClosedJaxpr(jaxpr, []) if isinstance(old, jex.ClosedJaxpr) else jaxpr


def close(jaxpr: Any, consts: list) -> Any:
    """A closed jaxpr."""
    return jex.ClosedJaxpr(jaxpr, consts)


def remake(jaxpr: Any, constvars: list, invars: list, outvars: list, eqns: list) -> Any:
    """A jaxpr with new contents and the effects and debug information of `jaxpr`."""
    return jex.Jaxpr(constvars, invars, outvars, eqns, jaxpr.effects, jaxpr.debug_info)


def sub_program(params: dict, key: str) -> tuple[Any, list]:
    """(jaxpr, consts) of a call's parameter."""
    return open_program(params[key])


def bodies_in(params: dict) -> bool:
    """Whether an equation has any sub-program."""
    return any(_is_program(v) or (isinstance(v, (tuple, list)) and v and all(map(_is_program, v))) for v in params.values())


def bodies_of(eqn: Any) -> list[tuple[Any, str, int]]:
    """(jaxpr, role, trips) of each sub-program that the analyses may enter; none for an unknown call."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return [(open_program(params["jaxpr"])[0], "scan", max(int(params["length"]), 1))]
    if name == "while":
        cond, loop = open_program(params["cond_jaxpr"])[0], open_program(params["body_jaxpr"])[0]
        return [(cond, "while_cond", 1), (loop, "while", 1)]
    if name == "cond":
        return [(open_program(b)[0], "cond", 1) for b in params["branches"]]
    if name in ("remat2", "remat", "checkpoint", *INLINED):
        key = "jaxpr" if "jaxpr" in params else "call_jaxpr"
        return [(open_program(params[key])[0], "region", 1)]
    if name in CUSTOM:
        key = "call_jaxpr" if "call_jaxpr" in params else "fun_jaxpr"
        return [(open_program(params[key])[0], "custom", 1)]
    return []


def replace_bodies(eqn: Any, jaxprs: list) -> dict:
    """The parameters of `eqn` with its sub-programs replaced, in the order of `bodies_of`."""
    name, params = eqn.primitive.name, dict(eqn.params)
    if name == "while":
        params["cond_jaxpr"] = close_like(params["cond_jaxpr"], jaxprs[0])
        params["body_jaxpr"] = close_like(params["body_jaxpr"], jaxprs[1])
    elif name == "cond":
        params["branches"] = tuple(close_like(b, j) for b, j in zip(params["branches"], jaxprs, strict=True))
    else:
        key = next(k for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params)
        params[key] = close_like(params[key], jaxprs[0])
    return params


def bind(eqn: Any, args: list) -> list:
    """The results of one equation on other operands."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)
    outs = eqn.primitive.bind(*functions, *args, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def scan_counts(eqn: Any) -> tuple[int, int]:
    """(number of constants, number of carries) of a scan."""
    if "num_carry" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def where(eqn: Any) -> str:
    """Where an equation comes from: its name scopes and the first line outside JAX, as far as JAX recorded them."""
    stack = str(eqn.source_info.name_stack)
    line = ""
    for frame in _frames(eqn):
        path = str(frame.file_name)
        if not any(part in path for part in ("/jax/", "/jaxlib/", "/flax/", "/haiku/", "/equinox/", "<frozen", "<string")):
            line = f"{path.rsplit('/', 1)[-1]}:{frame.line_num} ({frame.function_name})"
            break
    return " at ".join(s for s in (stack, line) if s) or eqn.primitive.name


def _frames(eqn: Any) -> Iterator[Any]:
    traceback = getattr(eqn.source_info, "traceback", None)
    return iter(traceback.frames if traceback is not None else ())
