"""Writing a program down again with some values known to be zero or one.

x - 0 = x, 0 / d = 0, 0^2 = 0: with a mean known to be zero, LayerNorm's equations become RMSNorm's by propagating that zero. With a
scale known to be one and a bias known to be zero, its affine goes the same way. Everything else is left as it was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from prenorm_jax.tracing.flow import Body, Flow
from prenorm_jax.tracing.jaxprs import (
    Program,
    is_float,
    is_var,
    live_eqns,
    name_of,
    names,
    open_program,
    remake,
    replace_bodies,
    scalar_value,
    shape_of,
)


class Emitter:
    """Emits a program body by body. `zeros` and `ones` are variables (old or new) that hold nothing else."""

    def __init__(self, flow: Flow):
        self.flow = flow
        self.env: dict[Any, Any] = {}
        self.zeros: set[Any] = set()
        self.ones: set[Any] = set()

    def body(self, body: Body) -> Any:
        jaxpr = body.jaxpr
        eqns: list[Any] = []
        for var in jaxpr.invars:
            self.inherit(body, var)
            self.defined(var, var, eqns)
        for eqn in jaxpr.eqns:
            self.equation(eqn, eqns)
        outvars = [self.materialized(self.read(a), eqns) for a in jaxpr.outvars]
        return remake(jaxpr, list(jaxpr.invars), outvars, live_eqns(eqns, outvars))

    def inherit(self, body: Body, var: Any) -> None:
        """An argument of a body is zero (one) if all that it can hold is."""
        if body.eqn is None or body.in_custom():
            return
        sources = [self.read(a) for a, *_ in self.flow.sources(var) or ()]
        for known in (self.zeros, self.ones):
            if sources and all(is_var(a) and a in known for a in sources):
                known.add(var)

    def defined(self, var: Any, atom: Any, eqns: list) -> None:
        """Called when `var` of the old program is available as `atom`."""

    def operands(self, eqn: Any, args: list, eqns: list) -> list:
        """Called before an equation is written; may replace its operands."""
        return args

    def equation(self, eqn: Any, eqns: list) -> None:
        args = self.operands(eqn, [self.read(a) for a in eqn.invars], eqns)
        simpler = self.simplified(eqn, args, eqns)
        if simpler is not None:
            self.env[eqn.outvars[0]] = simpler
            self.defined(eqn.outvars[0], simpler, eqns)
            return
        children = self.flow.bodies_of.get(id(eqn))
        params = replace_bodies(eqn, [self.body(c) for c in children]) if children else eqn.params
        eqns.append(eqn.replace(invars=[self.materialized(a, eqns) for a in args], params=params))
        for var in eqn.outvars:
            self.defined(var, var, eqns)

    def read(self, atom: Any) -> Any:
        return self.env.get(atom, atom) if is_var(atom) else atom

    def is_zero(self, atom: Any) -> bool:
        return atom in self.zeros if is_var(atom) else False

    def is_one(self, atom: Any) -> bool:
        return atom in self.ones if is_var(atom) else scalar_value(atom) == 1.0

    def materialized(self, atom: Any, eqns: list) -> Any:
        if not is_var(atom) or (atom not in self.zeros and atom not in self.ones):
            return atom
        make = jnp.zeros if atom in self.zeros else jnp.ones
        return self.spliced(lambda: make(shape_of(atom), atom.aval.dtype), [], eqns)

    def spliced(self, fn: Callable[..., Any], args: list, eqns: list) -> Any:
        """Append the equations of fn(*args); return its result."""
        closed = jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(shape_of(a), a.aval.dtype) for a in args))
        jaxpr, _ = open_program(closed)
        env = dict(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            outs = [jex.Var(v.aval) for v in eqn.outvars]
            env.update(zip(eqn.outvars, outs, strict=True))
            eqns.append(eqn.replace(invars=[env[a] if is_var(a) else a for a in eqn.invars], outvars=outs))
        out = jaxpr.outvars[0]
        return env[out] if is_var(out) else out

    def simplified(self, eqn: Any, args: list, eqns: list) -> Any:
        """What an equation's result equals, if an operand that is zero or one makes it simpler."""
        if len(eqn.outvars) != 1 or not is_float(eqn.outvars[0]):
            return None
        zero, one = [self.is_zero(a) for a in args], [self.is_one(a) for a in args]
        known = any(zero) or any(is_var(a) and o for a, o in zip(args, one, strict=True))
        return self._zero_rule(eqn, args, zero, eqns) or self._one_rule(eqn, args, one, eqns) if known else None

    def _zero_rule(self, eqn: Any, args: list, zero: list[bool], eqns: list) -> Any:
        name, out = name_of(eqn), eqn.outvars[0]
        vanishes = (
            (name in _UNIFORM and zero[0])
            or (name == "mul" and any(zero))
            or (name in ("add", "sub", "add_any") and all(zero))
            or (name == "integer_pow" and zero[0] and eqn.params["y"] > 0)
            or (name in ("neg", "reduce_sum") and zero[0])
            or (name == "div" and zero[0] and not is_var(args[1]))
        )
        if vanishes:
            self.zeros.add(out)
            return out
        if name in ("add", "sub", "add_any") and any(zero):
            other = self.spread(args[1] if zero[0] else args[0], out, eqns)
            return (
                self.spliced(jax.lax.neg, [other], eqns) if other is not None and name == "sub" and zero[0] else other
            )
        return None

    def _one_rule(self, eqn: Any, args: list, one: list[bool], eqns: list) -> Any:
        name, out = name_of(eqn), eqn.outvars[0]
        if (name in _UNIFORM and one[0]) or (name in ("mul", "div") and all(one)):
            self.ones.add(out)
            return out
        if name == "mul" and any(one):
            return self.spread(args[1] if one[0] else args[0], out, eqns)
        if name == "div" and one[1]:
            return self.spread(args[0], out, eqns)
        return None

    def spread(self, atom: Any, like: Any, eqns: list) -> Any:
        """`atom` in the shape of `like`; None if it has another type."""
        if atom.aval.dtype != like.aval.dtype or not is_var(atom):
            return None
        if shape_of(atom) == shape_of(like):
            return atom
        if self.is_zero(atom) or self.is_one(atom):
            (self.zeros if self.is_zero(atom) else self.ones).add(like)
            return like
        return self.spliced(lambda a: jnp.broadcast_to(a, shape_of(like)), [atom], eqns)


_UNIFORM = names(
    "convert_element_type broadcast_in_dim reshape squeeze transpose square copy copy_p reduce_precision "
    "stop_gradient slice name tile expand_dims pvary"
)


class _Assuming(Emitter):
    def __init__(self, flow: Flow, zeros: Iterable[int], ones: Iterable[int]):
        super().__init__(flow)
        invars = flow.program.args
        self.zeros = {invars[k] for k in zeros}
        self.ones = {invars[k] for k in ones}


def assume(program: Program, zeros: Iterable[int], ones: Iterable[int]) -> Program:
    """The program for arguments of which some (by position) are all zeros or all ones; it no longer looks at them."""
    flow = Flow(program)
    return Program(_Assuming(flow, zeros, ones).body(flow.main), program.consts)
