"""Carrying a plan out: the sums that are zero are gone, and the values that are to be recentered are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from prenorm_jax.precision import single_or_wider
from prenorm_jax.tracing.emit import Emitter
from prenorm_jax.tracing.jaxprs import Axes, Program, bind, is_var, literal, live_eqns, remake
from prenorm_jax.tracing.plan import Plan


def recentered(value: Any, axes: Axes) -> Any:
    """`value` minus its mean over `axes`, computed in float32 or wider; shape and dtype stay.

    >>> recentered(jnp.array([1.0, 2.0, 6.0]), (0,))
    Array([-2., -1.,  3.], dtype=float32)
    """
    dtype = jnp.result_type(value)
    wide = jax.lax.convert_element_type(value, single_or_wider(dtype))
    return jax.lax.convert_element_type(wide - jnp.mean(wide, axes, keepdims=True), dtype)


def rewrite(plan: Plan) -> Program:
    """Carry a plan out on its program. The leaves' recentering is left to the caller: it belongs to the parameters."""
    return _Rewriter(plan).program()


class _Rewriter(Emitter):
    def __init__(self, plan: Plan):
        super().__init__(plan.flow)
        self.zero_sums = {id(e) for e in plan.zeros}
        self.values: dict[Any, list[Axes]] = {}
        self.uses: dict[tuple[int, int], Axes] = {}
        self.constants: dict[Any, list[Axes]] = {}
        for made in plan.made:
            if made.use is not None:
                self.uses[made.use] = made.axes
            elif made.kind in ("value", "constant"):
                target = self.values if made.kind == "value" else self.constants
                target.setdefault(made.atom, []).append(made.axes)

    def program(self) -> Program:
        old = self.flow.program
        extra = {}
        for var, all_axes in self.constants.items():
            value = self.evaluated(var)
            for axes in all_axes:
                with np.errstate(invalid="ignore"):  # a row with an infinity is none, recentered or not
                    value = value - value.mean(axes, keepdims=True)
            new = jex.Var(var.aval)
            extra[new] = value  # in float64: the program rounds it, its verification does not
            self.env[var] = new
        jaxpr = self.body(self.flow.main)
        used = {a for e in jaxpr.eqns for a in e.invars if is_var(a)} | {a for a in jaxpr.outvars if is_var(a)}
        consts = {v: c for v, c in {**old.constants, **extra}.items() if v in used}
        return Program(remake(jaxpr, [*old.args, *consts], jaxpr.outvars, jaxpr.eqns), list(consts.values()))

    def evaluated(self, var: Any) -> np.ndarray:
        """The numbers of a value that depends on nothing, in float64."""
        old = self.flow.program
        known = old.constants
        if var in known:
            return np.asarray(known[var]).astype(np.float64)
        eqns = live_eqns([e for e in old.jaxpr.eqns if not e.effects], [var])
        with jax.ensure_compile_time_eval():
            for eqn in eqns:
                args = [known[a] if is_var(a) else a.val for a in eqn.invars]
                known.update(zip(eqn.outvars, bind(eqn, args), strict=True))
            return np.asarray(known[var]).astype(np.float64)

    def defined(self, var: Any, atom: Any, eqns: list) -> None:
        for axes in self.values.get(var, ()):
            atom = self.recenter(self.materialized(atom, eqns), axes, eqns)
            self.env[var] = atom

    def operands(self, eqn: Any, args: list, eqns: list) -> list:
        for i in range(len(args)):
            if (id(eqn), i) in self.uses:
                args[i] = self.recenter(self.materialized(args[i], eqns), self.uses[id(eqn), i], eqns)
        return args

    def equation(self, eqn: Any, eqns: list) -> None:
        if id(eqn) in self.zero_sums:
            self.zeros.add(eqn.outvars[0])
        elif not eqn.outvars or not all(v in self.constants for v in eqn.outvars):
            super().equation(eqn, eqns)

    def recenter(self, atom: Any, axes: Axes, eqns: list) -> Any:
        if not is_var(atom):
            value = np.asarray(atom.val).astype(np.float64)
            return literal((value - value.mean(axes, keepdims=True)).astype(atom.aval.dtype), atom.aval)
        with jax.named_scope("recenter"):
            return self.spliced(lambda v: recentered(v, axes), [atom], eqns)
