"""The rewritten program: sums that are zero are gone, and with them the subtraction of a mean.

With sum_A(x) = 0 proven, mean(x) = 0, x - 0 = x and mean(x)^2 = 0: LayerNorm's equations become RMSNorm's by propagating one zero.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from prenorm_jax.tracing.jaxprs import (
    Axes,
    Body,
    Flow,
    Program,
    bind,
    is_float,
    is_var,
    literal,
    live_eqns,
    open_program,
    remake,
    replace_bodies,
    shape_of,
)
from prenorm_jax.tracing.plan import Plan


def recentered(value: Any, axes: Axes) -> Any:
    """`value` minus its mean over `axes`, computed in float32 or wider; shape and dtype stay.

    >>> recentered(jnp.array([1.0, 2.0, 6.0]), (0,))
    Array([-2., -1.,  3.], dtype=float32)
    """
    dtype = jnp.result_type(value)
    wide = jax.lax.convert_element_type(value, jnp.promote_types(dtype, jnp.float32))
    return jax.lax.convert_element_type(wide - jnp.mean(wide, axes, keepdims=True), dtype)


def rewrite(plan: Plan) -> Program:
    """Carry a plan out on its program. The leaves' recentering is left to the caller: it belongs to the parameters."""
    return _Rewriter(plan).program()


class _Rewriter:
    def __init__(self, plan: Plan):
        self.flow: Flow = plan.flow
        self.zero_sums = {id(e) for e in plan.zeros}
        self.values: dict[Any, list[Axes]] = {}
        self.uses: dict[tuple[int, int], Axes] = {}
        self.constants: dict[Any, list[Axes]] = {}
        for made in plan.made:
            if made.kind == "use":
                self.uses[made.use] = made.axes
            elif made.kind in ("value", "constant"):
                target = self.values if made.kind == "value" else self.constants
                target.setdefault(made.atom, []).append(made.axes)
        self.env: dict[Any, Any] = {}
        self.zeros: set[Any] = set()

    def program(self) -> Program:
        old = self.flow.program
        extra = {}
        for var, all_axes in self.constants.items():
            value = self.evaluated(var)
            for axes in all_axes:
                value = value - value.mean(axes, keepdims=True)
            new = jex.Var(var.aval)
            extra[new] = value.astype(var.aval.dtype)
            self.env[var] = new
        jaxpr = self.body(self.flow.main)
        constvars = [*old.jaxpr.constvars, *extra]
        used = {a for e in jaxpr.eqns for a in e.invars if is_var(a)} | {a for a in jaxpr.outvars if is_var(a)}
        consts = [(v, c) for v, c in zip(constvars, [*old.consts, *extra.values()], strict=True) if v in used]
        jaxpr = remake(jaxpr, [v for v, _ in consts], jaxpr.invars, jaxpr.outvars, jaxpr.eqns)
        return Program(jaxpr, [c for _, c in consts])

    def evaluated(self, var: Any) -> np.ndarray:
        """The number array of a value that depends on nothing, in float64."""
        old = self.flow.program
        known = dict(zip(old.jaxpr.constvars, old.consts, strict=True))
        if var in known:
            return np.asarray(known[var]).astype(np.float64)
        main = self.flow.main.jaxpr
        eqns = live_eqns([e for e in main.eqns if not e.effects], [var])
        with jax.ensure_compile_time_eval():
            for eqn in eqns:
                args = [known[a] if is_var(a) else a.val for a in eqn.invars]
                known.update(zip(eqn.outvars, bind(eqn, args), strict=True))
            return np.asarray(known[var]).astype(np.float64)

    def body(self, body: Body) -> Any:
        jaxpr, eqns = body.jaxpr, []
        for var in jaxpr.invars:
            self.recenter_value(var, var, eqns)
        for eqn in jaxpr.eqns:
            if all(v in self.constants for v in eqn.outvars):
                continue
            self.equation(eqn, eqns)
        outvars = [self.materialized(self.read(a), eqns) for a in jaxpr.outvars]
        return remake(jaxpr, list(jaxpr.constvars), list(jaxpr.invars), outvars, live_eqns(eqns, outvars))

    def equation(self, eqn: Any, eqns: list) -> None:
        if id(eqn) in self.zero_sums:
            self.zeros.add(eqn.outvars[0])
            return
        args = [self.read(a) for a in eqn.invars]
        for i, arg in enumerate(args):
            if (id(eqn), i) in self.uses:
                args[i] = self.recenter(self.materialized(arg, eqns), self.uses[id(eqn), i], eqns)
        simpler = self.simplified(eqn, args, eqns)
        if simpler is not None:
            self.env[eqn.outvars[0]] = simpler
            self.recenter_value(eqn.outvars[0], simpler, eqns)
            return
        args = [self.materialized(a, eqns) for a in args]
        children = self.flow.bodies_of.get(id(eqn))
        params = replace_bodies(eqn, [self.body(c) for c in children]) if children else eqn.params
        eqns.append(eqn.replace(invars=args, params=params))
        for var in eqn.outvars:
            self.recenter_value(var, var, eqns)

    def read(self, atom: Any) -> Any:
        return self.env.get(atom, atom) if is_var(atom) else atom

    def is_zero(self, atom: Any) -> bool:
        return is_var(atom) and atom in self.zeros

    def materialized(self, atom: Any, eqns: list) -> Any:
        if not self.is_zero(atom):
            return atom
        return self.spliced(lambda: jnp.zeros(shape_of(atom), atom.aval.dtype), [], eqns)

    def recenter_value(self, var: Any, atom: Any, eqns: list) -> None:
        for axes in self.values.get(var, ()):
            atom = self.recenter(self.materialized(atom, eqns), axes, eqns)
            self.env[var] = atom

    def recenter(self, atom: Any, axes: Axes, eqns: list) -> Any:
        if not is_var(atom):
            value = np.asarray(atom.val).astype(np.float64)
            return literal((value - value.mean(axes, keepdims=True)).astype(atom.aval.dtype), atom.aval)
        return self.spliced(lambda v: recentered(v, axes), [atom], eqns)

    def spliced(self, fn: Any, args: list, eqns: list) -> Any:
        """Append the equations of fn(*args); return its result."""
        with jax.named_scope("recenter"):
            closed = jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype) for a in args))
        jaxpr, _ = open_program(closed)
        env = dict(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            outs = [jex.Var(v.aval) for v in eqn.outvars]
            env.update(zip(eqn.outvars, outs, strict=True))
            eqns.append(eqn.replace(invars=[env[a] if is_var(a) else a for a in eqn.invars], outvars=outs))
        out = jaxpr.outvars[0]
        return env[out] if is_var(out) else out

    def simplified(self, eqn: Any, args: list, eqns: list) -> Any:
        """The operand or zero that an equation's result equals, if a zero operand makes it so."""
        zero = [self.is_zero(a) for a in args]
        if not any(zero) or len(eqn.outvars) != 1 or not is_float(eqn.outvars[0]):
            return None
        name, out = eqn.primitive.name, eqn.outvars[0]
        if name in _ZERO_TO_ZERO or name == "mul" or (name in ("add", "sub", "add_any") and all(zero)):
            return self.zero_like(out)
        if name == "integer_pow" and eqn.params["y"] > 0:
            return self.zero_like(out)
        if name == "div" and zero[0] and not zero[1] and not is_var(args[1]):
            return self.zero_like(out)
        if name in ("add", "sub", "add_any"):
            other = args[1] if zero[0] else args[0]
            if shape_of(other) != shape_of(out) or other.aval.dtype != out.aval.dtype:
                return None
            return self.spliced(jax.lax.neg, [other], eqns) if name == "sub" and zero[0] else other
        return None

    def zero_like(self, var: Any) -> Any:
        self.zeros.add(var)
        return var


_ZERO_TO_ZERO = frozenset(
    "neg convert_element_type broadcast_in_dim reshape squeeze transpose square copy copy_p reduce_precision reduce_sum"
    " stop_gradient slice".split()
)
