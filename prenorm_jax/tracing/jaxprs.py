"""Jaxprs: what the tracer asks of them, and what differs between JAX versions.

`jax.extend.core` is the only interface to JAX's internals; what depends on its version is in the second half of this file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

INLINED = frozenset({"jit", "pjit", "closed_call", "core_call", "core_closed_call"})
CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})
DRAWS = frozenset({"rng_uniform", "infeed"})  # without operands that determine them: neither merged nor constant
Axes = tuple[int, ...]


def names(text: str) -> frozenset[str]:
    """A set of primitives' names, from one line of them."""
    return frozenset(text.split())


def is_var(atom: Any) -> bool:
    """Whether an operand is a variable (and not a literal)."""
    return not isinstance(atom, jex.Literal)


def is_float(atom: Any) -> bool:
    """Whether an operand holds floating point numbers (of any width)."""
    return is_float_dtype(_np_dtype(atom.aval))


def is_float_dtype(dtype: Any) -> bool:
    """Whether a dtype is a floating point one (of any width)."""
    return bool(jax.dtypes.issubdtype(dtype, np.floating))


QUANTIZE = "quantize"  # what a conversion is called here that no rule passes through


def name_of(eqn: Any) -> str:
    """The name of an equation's primitive. A conversion to fewer digits than bfloat16 or float16 have is not what it is to wider floats,
    where the rounding is an implementation's: it is part of the function, so it has a name of its own."""
    name = str(eqn.primitive.name)
    if name == "reduce_precision":
        return QUANTIZE if eqn.params["mantissa_bits"] < 7 or eqn.params["exponent_bits"] < 5 else name
    if name == "convert_element_type" and is_float(eqn.outvars[0]) and _np_dtype(eqn.outvars[0].aval).itemsize < 2:
        return QUANTIZE
    return name


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


def uniform_value(value: Any) -> float | None:
    """The number that a constant array of more than one entry holds everywhere, or None."""
    if (
        np.size(value) < 2
        or jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended)
        or isinstance(value, jax.core.Tracer)
    ):
        return None
    array = np.asarray(value)
    first = array.reshape(-1)[0]
    return float(first) if is_float_dtype(array.dtype) and bool(np.all(array == first)) else None


def literal(value: Any, aval: Any) -> Any:
    """A literal operand; arrays are allowed (constants of a nested body become literals of it)."""
    return jex.Literal(value, aval)


def live_eqns(eqns: list, outvars: list) -> list:
    """The equations that an output or an effect needs, in their order."""
    needed = {a for a in outvars if is_var(a)}
    kept = []
    for eqn in reversed(eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            kept.append(eqn)
            needed.update(a for a in eqn.invars if is_var(a))
    return kept[::-1]


@dataclasses.dataclass
class Program:
    """A normalized program: a jaxpr without constvars, whose last arguments are the constants `consts`."""

    jaxpr: Any
    consts: list

    def __call__(self, *args: Any) -> list:
        consts = (_typed(c, v.aval) for v, c in self.constants.items())
        return jax.core.eval_jaxpr(with_pvary(self.jaxpr), [], *args, *consts)

    @property
    def args(self) -> list:
        """The variables of the arguments proper."""
        return self.jaxpr.invars[: len(self.jaxpr.invars) - len(self.consts)]

    @property
    def constants(self) -> dict:
        """The variables of the constants, with their values."""
        return dict(zip(self.jaxpr.invars[len(self.args) :], self.consts, strict=True))


class Varying(jex.Literal):  # type: ignore[misc]  # final for type checkers alone
    """A number that `pvary` says may differ between devices, which `shard_map` wants to know and the analyses don't."""

    def __init__(self, value: Any, aval: Any, eqn: Any):
        super().__init__(value, aval)
        self.eqn = eqn  # a pvary of a number

    def bound(self) -> Any:
        """Its value inside `shard_map`."""
        return bind(self.eqn, [np.asarray(self.val, self.eqn.invars[0].aval.dtype)])[0]


def with_pvary(jaxpr: Any) -> Any:
    """The jaxpr with `Varying` numbers written as equations again, in all its bodies."""
    eqns: list[Any] = []
    changed = False
    for eqn in jaxpr.eqns:
        args = list(eqn.invars)
        for i, atom in enumerate(args):
            if isinstance(atom, Varying):
                args[i] = jex.Var(atom.aval)
                eqns.append(atom.eqn.replace(invars=[literal(atom.val, atom.eqn.invars[0].aval)], outvars=[args[i]]))
        bodies = [body for body, *_ in bodies_of(eqn)]
        inner = [with_pvary(body) for body in bodies]
        same = all(a is b for a, b in zip(bodies, inner, strict=True))
        changed |= not same or any(isinstance(a, Varying) for a in eqn.invars)
        eqns.append(eqn.replace(invars=args, params=eqn.params if same else replace_bodies(eqn, inner)))
    return remake(jaxpr, list(jaxpr.invars), list(jaxpr.outvars), eqns) if changed else jaxpr


# --- what depends on the JAX version ---------------------------------------------------------------------------------


def is_program(value: Any) -> bool:
    return isinstance(value, (jex.Jaxpr, jex.ClosedJaxpr))


def open_program(value: Any) -> tuple[Any, list]:
    """(jaxpr, consts) of a closed or open jaxpr; the two are one class from JAX 0.12 on."""
    jaxpr = getattr(value, "jaxpr", value) if isinstance(value, jex.ClosedJaxpr) else value
    return jaxpr, list(getattr(value, "consts", ()) or ())


def custom_name(eqn: Any) -> str:
    """The name of a custom_jvp or custom_vjp function, as far as JAX recorded it."""
    body = next((body for body, *_ in bodies_of(eqn)), None)
    recorded = str(getattr(getattr(body, "debug_info", None), "func_src_info", None) or "").split(" at ")[0]
    return recorded or name_of(eqn)


def has_side_effect(eqn: Any) -> bool:
    """Whether running an equation is seen elsewhere; that it names a mesh axis is no such effect."""
    return any(type(e).__name__ != "NamedAxisEffect" for e in eqn.effects)


def is_ref(atom: Any) -> bool:
    """Whether an operand is a mutable array."""
    return hasattr(atom.aval, "inner_aval")


def platform_branch(eqn: Any) -> int | None:
    """Which branch of a cond over platforms runs here; None for any other cond."""
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        return None
    here = {jax.default_backend(), jax.devices()[0].client.platform}
    here |= {"cuda", "rocm"} if "gpu" in here else set()
    return next(k for k, own in enumerate(platforms) if own is None or not here.isdisjoint(own))


def close_like(old: Any, jaxpr: Any) -> Any:
    """`jaxpr` (which has no constvars) as the kind of object that `old` was."""
    return jex.ClosedJaxpr(jaxpr, []) if isinstance(old, jex.ClosedJaxpr) else jaxpr


def close(jaxpr: Any, consts: list) -> Any:
    """A closed jaxpr."""
    return jex.ClosedJaxpr(jaxpr, consts)


def remake(jaxpr: Any, invars: list, outvars: list, eqns: list) -> Any:
    """A jaxpr with new contents and the effects and debug information of `jaxpr`."""
    return jex.Jaxpr([], invars, outvars, eqns, jaxpr.effects, jaxpr.debug_info)


def sub_program(params: dict, key: str) -> tuple[Any, list]:
    """(jaxpr, consts) of a call's parameter."""
    return open_program(params[key])


def _typed(value: Any, aval: Any) -> Any:
    return value if getattr(value, "dtype", None) == aval.dtype else np.asarray(value).astype(aval.dtype)


def bodies_in(params: dict) -> bool:
    """Whether an equation has any sub-program."""
    return any(
        is_program(v) or (isinstance(v, (tuple, list)) and v and all(map(is_program, v))) for v in params.values()
    )


def bodies_of(eqn: Any) -> list[tuple[Any, str, int]]:
    """(jaxpr, role, trips) of each sub-program that the analyses may enter; none for an unknown call."""
    name, params = name_of(eqn), eqn.params
    if name == "scan":
        return [(open_program(params["jaxpr"])[0], "scan", max(int(params["length"]), 1))]
    if name == "while":
        cond, loop = open_program(params["cond_jaxpr"])[0], open_program(params["body_jaxpr"])[0]
        return [(cond, "while_cond", 1), (loop, "while", 1)]
    if name == "cond":
        return [(open_program(b)[0], "cond", 1) for b in params["branches"]]
    if name == "shard_map":
        return [(open_program(params["jaxpr"])[0], "shard", 1)]
    if name in ("remat2", "remat", "checkpoint", *INLINED):
        key = "jaxpr" if "jaxpr" in params else "call_jaxpr"
        return [(open_program(params[key])[0], "region", 1)]
    if name in CUSTOM:
        key = "call_jaxpr" if "call_jaxpr" in params else "fun_jaxpr"
        return [(open_program(params[key])[0], "custom", 1)]
    return []


def replace_bodies(eqn: Any, jaxprs: list) -> dict:
    """The parameters of `eqn` with its sub-programs replaced, in the order of `bodies_of`."""
    name, params = name_of(eqn), dict(eqn.params)
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


LIBRARIES = (
    "/jax/",
    "/jaxlib/",
    "/flax/",
    "/haiku/",
    "/equinox/",
    "/penzai/",
    "/prenorm_jax/norms",
    "/prenorm_jax/tracing/",
    "<frozen",
    "<string",
)


def where(eqn: Any) -> str:
    """Where an equation comes from: its name scopes and its line in the caller's code, as far as JAX recorded them."""
    scopes = "/".join(s for s in str(eqn.source_info.name_stack).split("/") if s and not s.endswith(")"))
    return " at ".join(s for s in (scopes, line_of(eqn)) if s) or name_of(eqn)


def line_of(eqn: Any) -> str:
    """The innermost line behind an equation that is neither a library's nor a norm function's own; "" where none is recorded."""
    frames = [f for f in _frames(eqn) if not any(part in str(f.file_name) for part in LIBRARIES)]
    outside = [f for f in frames if not _is_norm(str(f.function_name))] or frames
    if not outside:
        return ""
    name = str(outside[0].function_name).replace("<locals>.", "")
    return f"{str(outside[0].file_name).rsplit('/', 1)[-1]}:{outside[0].line_num} ({name})"


def _is_norm(function: str) -> bool:
    """Whether a function is named after what it normalizes: the line that calls it says more."""
    *owners, own = function.lower().split(".")
    return "norm" in own or own in ("ln", "_ln") or (bool(owners) and owners[-1].endswith("norm"))


def _frames(eqn: Any) -> Iterator[Any]:
    traceback = getattr(eqn.source_info, "traceback", None)
    return iter(traceback.frames if traceback is not None else ())
