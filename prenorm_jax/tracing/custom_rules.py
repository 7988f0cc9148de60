"""Is a custom derivative rule the true derivative of its function? Then the function may be entered like any other code.

A conversion rewrites a LayerNorm, and a `custom_jvp` or `custom_vjp` rule around it is a program of its own that would not follow. If the
rule is the function's true derivative, it can be left out. That is decided for the whole function, not for some inputs: the results and
the pulled-back cotangents of both, the rule and the derivative of the function itself, are functions of the arguments and cotangents that
are made of analytic primitives alone, and two analytic functions that agree at a random point agree everywhere around it (where they
differ, their difference is zero on a set of measure zero). Points of either sign and of several sizes are tried, since a square root's
domain ends at zero. They are evaluated in float64, whatever widths they were written in. A rule or function with a comparison, a maximum,
a rounding or anything else that is not analytic is not entered, nor is a function without a mean subtraction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.tracing.float64 import evaluate64
from prenorm_jax.tracing.flow import Flow
from prenorm_jax.tracing.jaxprs import Program, bind, bodies_in, is_float, is_var, name_of, names, shape_of, sub_program
from prenorm_jax.tracing.normal_form import normalize
from prenorm_jax.tracing.shift import Shifts
from prenorm_jax.tracing.sites import find_sites

ANALYTIC = names(
    "add sub mul div neg add_any square integer_pow sqrt rsqrt cbrt exp exp2 log log1p expm1 tanh logistic sin cos erf erfc "
    "broadcast_in_dim reshape transpose squeeze expand_dims slice rev concatenate pad split convert_element_type copy copy_p "
    "reduce_precision reduce_sum cumsum dot_general optimization_barrier name pvary"
)
TOLERANCE = 1e-9
"""Largest relative difference, in float64: a rule that is right measures 1e-13, one that is wrong 1e-3 and more."""

DRAWS: tuple[Callable[[np.random.Generator, tuple[int, ...]], Any], ...] = (
    lambda rng, shape: rng.uniform(0.5, 1.5, shape),
    lambda rng, shape: rng.standard_normal(shape),
    lambda rng, shape: -rng.uniform(0.5, 1.5, shape),
    lambda rng, shape: 10.0 * rng.standard_normal(shape),
)
"""Points of either sign and of several sizes: sqrt(x * x) is analytic on each side of zero, and another function there."""

_verdicts: dict[str, str] = {}


def enters(eqn: Any) -> bool:
    """Whether a custom derivative call is to be replaced by its function: it subtracts a mean, or hands on what it was given (to several
    readers, say), and its rule is the true derivative."""
    return (_hands_on(eqn) or _subtracts_a_mean(eqn)) and not refusal(eqn)


def refusal(eqn: Any) -> str:
    """Why a custom derivative rule can't be said to be its function's true derivative; "" if it can."""
    avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    if not all(map(is_float, (*eqn.invars, *eqn.outvars))):
        return "it takes or returns what is no float"
    try:
        rule, own = (_derivative(run, eqn) for run in (lambda *args: bind(eqn, list(args)), _function_of(eqn)))
    except Exception as error:
        return f"its rule can't be traced: {type(error).__name__}"
    key = f"{avals}\n{rule.jaxpr}\n{own.jaxpr}"
    known = _is_its_text(rule) and _is_its_text(own)
    if not known or key not in _verdicts:
        verdict = _strange(rule, "its rule") or _strange(own, "its function") or _difference(rule, own)
        if not known:
            return verdict
        _verdicts[key] = verdict
    return _verdicts[key]


def _is_its_text(program: Program) -> bool:
    """Whether a program is all that is printed of it: arrays of numbers, also those in sub-programs, are cut short in print."""
    eqns = program.jaxpr.eqns
    arrays = any(np.shape(a.val) for e in eqns for a in e.invars if not is_var(a))
    return not program.consts and not arrays and not any(bodies_in(e.params) for e in eqns)


def _hands_on(eqn: Any) -> bool:
    return not _body(eqn)[0].eqns


def _subtracts_a_mean(eqn: Any) -> bool:
    program = normalize(jax.make_jaxpr(_function_of(eqn))(*_shapes(eqn.invars)), lambda _: True)
    flow = Flow(program)
    return bool(find_sites(flow, Shifts(flow)))


def _body(eqn: Any) -> tuple[Any, list]:
    return sub_program(eqn.params, next(k for k in ("call_jaxpr", "fun_jaxpr") if k in eqn.params))


def _function_of(eqn: Any) -> Any:
    body, consts = _body(eqn)
    return lambda *args: jax.core.eval_jaxpr(body, consts, *args)


def _derivative(run: Any, eqn: Any) -> Program:
    """(arguments, cotangents) -> (results, pulled-back cotangents), as a program."""

    def pulled(args: list, cotangents: list) -> Any:
        outs, back = jax.vjp(run, *args)
        return outs, back(cotangents)

    closed = jax.make_jaxpr(pulled)(_shapes(eqn.invars), _shapes(eqn.outvars))
    return normalize(closed, lambda _: True)


def _shapes(atoms: list) -> list:
    return [jax.ShapeDtypeStruct(shape_of(a), a.aval.dtype) for a in atoms]


def _strange(program: Program, what: str) -> str:
    """What in a program is not analytic in its arguments, in words."""
    depends = set(program.args)
    for eqn in program.jaxpr.eqns:
        if eqn.effects:
            return f"{what} has a side effect"
        if not any(is_var(a) and a in depends for a in eqn.invars):
            continue
        depends.update(eqn.outvars)
        if name_of(eqn) not in ANALYTIC or not all(map(is_float, (*eqn.invars, *eqn.outvars))):
            return f"{what} uses {name_of(eqn)}, so it is not analytic"
    return ""


def _difference(rule: Program, own: Program) -> str:
    rng = np.random.default_rng(0)
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        conclusive = False
        for draw in DRAWS:
            args = [draw(rng, shape_of(v)) for v in rule.args]
            found, wanted = evaluate64(rule, args), evaluate64(own, args)
            if not all(bool(jnp.all(jnp.isfinite(b))) for b in wanted):
                continue  # outside of the function's domain
            conclusive = True
            for a, b in zip(found, wanted, strict=True):
                gap = jnp.max(jnp.abs(a - b), initial=0.0) / jnp.maximum(jnp.max(jnp.abs(b), initial=0.0), 1.0)
                if not gap <= TOLERANCE:
                    return f"its rule is not its function's derivative: they differ by {float(gap):.0e}"
    return "" if conclusive else "its function is finite at none of the points that were tried"
