"""A program evaluated in float64, whatever widths it was written in.

Rounding a bfloat16 stream hides errors of 1e-2, so a conversion is judged where rounding plays no part: every float in the program
is widened, conversions between float types become the identity, and matrix products accumulate in float64. Primitives whose
meaning depends on the width of their operands (bit casts, random bits, whatever is not listed here) run as written, on operands
narrowed to the types they were traced with.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.tracing.jaxprs import (
    CUSTOM,
    INLINED,
    Program,
    Varying,
    bind,
    close_like,
    is_float,
    is_ref,
    is_var,
    name_of,
    names,
    open_program,
    platform_branch,
    scan_counts,
    shape_of,
)

_WIDENED = names(
    "add sub mul div add_any neg square integer_pow pow sqrt rsqrt cbrt exp exp2 log log1p expm1 tanh logistic "
    "sin cos erf erfc erf_inv max min abs sign lt le gt ge eq ne select_n stop_gradient copy copy_p "
    "broadcast_in_dim reshape transpose squeeze slice dynamic_slice dynamic_update_slice rev concatenate pad "
    "split reduce_sum reduce_max reduce_min reduce_prod cumsum cumprod cummax cummin cumlogsumexp tile gather "
    "scatter scatter-add scatter_add name sharding_constraint optimization_barrier is_finite sort clamp "
    "expand_dims stack unstack broadcast_to reshard layout_constraint relayout pvary tan asin acos atan atan2 sinh cosh asinh acosh "
    "atanh rem floor ceil round lgamma digamma log2 top_k argmax argmin scatter-sub scatter-mul scatter-min scatter-max "
    "reduce_window_sum reduce_window_max reduce_window_min psum psum_invariant pmin pmax ppermute pbroadcast preduced all_gather "
    "all_gather_invariant reduce_scatter all_to_all new_ref get swap addupdate freeze"
)


def evaluate64(program: Program, args: list[Any]) -> list[Any]:
    """The program's results with all floating point arithmetic in float64. Call it under `jax.enable_x64(True)`."""
    values = zip((*args, *program.consts), program.jaxpr.invars, strict=True)
    return _run(program.jaxpr, [], [_wide(a if is_float(v) else _as_traced(a, v.aval)) for a, v in values])


def _as_traced(value: Any, aval: Any) -> Any:
    """An index in the width that it was traced in: NumPy's are int64 where JAX has int32."""
    extended = jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)
    return value if extended else jnp.asarray(value, aval.dtype)


def _wide(value: Any) -> Any:
    if hasattr(value, "aval") and is_ref(value):
        return value
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        value = np.asarray(value)
        dtype = value.dtype
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return value
    return jnp.asarray(value, jnp.float64) if jnp.issubdtype(dtype, jnp.floating) else jnp.asarray(value)


def _narrow(value: Any, aval: Any) -> Any:
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return value
    return jax.lax.convert_element_type(value, aval.dtype)


def _run(jaxpr: Any, consts: list, args: list) -> list:
    env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        if is_var(atom):
            return env[atom]
        return _wide(atom.bound() if isinstance(atom, Varying) else np.asarray(atom.val, atom.aval.dtype))

    last_use = {a: k for k, e in enumerate(jaxpr.eqns) for a in e.invars if is_var(a)}
    kept = {a for a in jaxpr.outvars if is_var(a)}
    for k, eqn in enumerate(jaxpr.eqns):
        if not eqn.outvars and not any(map(is_ref, eqn.invars)):
            continue  # a print or a check: it is for the program's own runs
        with eqn.ctx.manager:
            env.update(zip(eqn.outvars, _equation(eqn, [read(a) for a in eqn.invars]), strict=True))
        for a in (*eqn.invars, *eqn.outvars):
            if is_var(a) and a not in kept and last_use.get(a, k) == k:
                env.pop(a, None)
    return [read(a) for a in jaxpr.outvars]


def _equation(eqn: Any, args: list) -> list:
    name = name_of(eqn)
    if name == "convert_element_type" and is_float(eqn.outvars[0]):
        return [jax.lax.convert_element_type(args[0], jnp.float64)]
    if name == "reduce_precision":
        return args
    if name in ("dot_general", "conv_general_dilated") and is_float(eqn.outvars[0]):
        wide = [_wide(jax.lax.convert_element_type(a, jnp.float64)) for a in args]
        return [eqn.primitive.bind(*wide, **{**eqn.params, "preferred_element_type": jnp.dtype("float64")})]
    if name in _WIDENED:
        return bind(_updating64(eqn), _agreed(args, eqn))
    structured = _STRUCTURED.get(name)
    if structured is not None:
        return structured(eqn, args)
    narrow = [_narrow(a, v.aval) for a, v in zip(args, eqn.invars, strict=True)]
    return [_wide(o) for o in bind(eqn, narrow)]


def _updating64(eqn: Any) -> Any:
    """A scatter whose update function takes float64, too; any other equation as it is."""
    update = eqn.params.get("update_jaxpr")
    if update is None or not is_float(eqn.outvars[0]):
        return eqn
    jaxpr, _ = open_program(update)
    entries = [jnp.zeros((), jnp.float64)] * len(jaxpr.invars)
    wide, consts = open_program(jax.make_jaxpr(lambda *a: _run(jaxpr, eqn.params["update_consts"], list(a)))(*entries))
    return eqn.replace(params={**eqn.params, "update_jaxpr": close_like(update, wide), "update_consts": tuple(consts)})


def _agreed(args: list, eqn: Any) -> list:
    """Widened operands beside ones that are not floats stay as they are; index operands are never floats."""
    return [
        jax.lax.convert_element_type(a, jnp.float64) if is_float(v) and not is_ref(v) else a
        for a, v in zip(args, eqn.invars, strict=True)
    ]


def _call(eqn: Any, args: list) -> list:
    jaxpr, consts = open_program(eqn.params[next(k for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params)])
    return _run(jaxpr, [_wide(c) for c in consts], args)


def _scan(eqn: Any, args: list) -> list:
    n_consts, n_carry = scan_counts(eqn)
    jaxpr, closed = open_program(eqn.params["jaxpr"])
    consts, carry, xs = args[:n_consts], args[n_consts : n_consts + n_carry], args[n_consts + n_carry :]

    def step(c: tuple, x: tuple) -> tuple:
        outs = _run(jaxpr, [_wide(k) for k in closed], [*consts, *c, *x])
        return tuple(map(_strong, outs[:n_carry])), tuple(outs[n_carry:])

    length, reverse = eqn.params["length"], eqn.params["reverse"]
    final, ys = jax.lax.scan(  # type: ignore[var-annotated]
        step, tuple(map(_strong, carry)), tuple(xs), length=length, reverse=reverse
    )
    return [*final, *ys]


def _while(eqn: Any, args: list) -> list:
    nc, nb = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond, body = open_program(eqn.params["cond_jaxpr"])[0], open_program(eqn.params["body_jaxpr"])[0]

    def going(carry: Any) -> Any:
        return _run(cond, [], [*args[:nc], *carry])[0]

    def step(carry: Any) -> Any:
        new = tuple(map(_strong, _run(body, [], [*args[nc : nc + nb], *carry])))
        if not shape_of(cond.outvars[0]):
            return new
        # Under vmap one predicate for each example: those that are done stay as they are.
        return tuple(map(functools.partial(_where, going(carry)), new, carry))

    return list(jax.lax.while_loop(lambda carry: going(carry).any(), step, tuple(map(_strong, args[nc + nb :]))))


def _where(wanted: Any, new: Any, old: Any) -> Any:
    """New or old, example by example: the first axes of a batched loop's carry are those of its predicate."""
    return jax.lax.select(jax.lax.broadcast_in_dim(wanted, new.shape, range(wanted.ndim)), new, old)


def _cond(eqn: Any, args: list) -> list:
    branches = [open_program(b)[0] for b in eqn.params["branches"]]
    here = platform_branch(eqn)
    if here is not None:
        return _run(branches[here], [], args[1:])
    runs = [lambda *a, b=b: tuple(map(_strong, _run(b, [], list(a)))) for b in branches]
    return list(jax.lax.switch(jnp.asarray(args[0], jnp.int32), runs, *args[1:]))


def _shard_map(eqn: Any, args: list) -> list:
    params = eqn.params
    body = open_program(params["jaxpr"])[0]
    run = jax.shard_map(
        lambda *a: tuple(_run(body, [], list(a))),
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=tuple(params["out_specs"]),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    return list(run(*args))


def _strong(value: Any) -> Any:
    """Without a weak type, so that a loop's carry keeps its type."""
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
        return value
    return jax.lax.convert_element_type(value, value.dtype)


_STRUCTURED = {"scan": _scan, "while": _while, "cond": _cond, "shard_map": _shard_map}
_STRUCTURED |= dict.fromkeys(("remat2", "remat", "checkpoint"), _call)
_STRUCTURED |= dict.fromkeys((*INLINED, *CUSTOM), _call)
