"""`convert`: LayerNorm becomes RMSNorm in any JAX program, found and proven by tracing.

LayerNorm ignores the mean of its input, so a Transformer's main branch may be kept at zero mean, and there LayerNorm *is* RMSNorm:
    LN(x) = gamma * (x - mean x) / sqrt(mean((x - mean x)^2) + eps) + beta = gamma * x / sqrt(mean(x^2) + eps) + beta.
(arXiv 2305.14858; identities 1 and 2 of this package.) Which values may be shifted, and which then have zero mean, is proven for
the traced program; see `shift`, `zero_mean` and `plan`. The parameters keep their structure, shapes and dtypes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from prenorm_jax.tracing.decision import ConversionError, Decision, decide
from prenorm_jax.tracing.jaxprs import Program
from prenorm_jax.tracing.plan import POLICIES
from prenorm_jax.tracing.report import Report, report_of
from prenorm_jax.tracing.signature import Arguments, Parameters, Traced, output_paths, trace_program
from prenorm_jax.tracing.verify import TOLERANCE, difference


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted program: `fn(params, *inputs)` equals the original on the original parameters.

    Attributes:
      fn: takes what the original took, also at other shapes; jittable, differentiable, vmappable.
      params: the recentered parameters, in the structure they came in.
      report: what was done, and why not where it was not.
      prepare: what was done to the parameters, as a function of them: `params == prepare(original)`. It is differentiable, so that
        fn(prepare(theta), ...) can be trained in theta, with the original's gradients.
    """

    fn: Callable[..., Any]
    params: Any
    report: Report
    prepare: Callable[[Any], Any]


def convert(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    fold: bool = False,
    partial: bool = False,
    verify: bool = True,
    activations: str = "pays",
    inline_custom: bool = False,
) -> Converted:
    """Turn the LayerNorms of a program into RMSNorms, where that is provably the same function.

    Args:
      fn: jittable function of (params, *inputs), in any library.
      params: its parameters, any pytree; leaves that are no arrays are left alone.
      *inputs: example inputs. The result takes other shapes, too, and is traced and proven anew for each.
      fold: also move norm scales and biases into the linear maps that read them, where all of them can take them.
      partial: accept that nothing could be converted; otherwise that is an error.
      verify: compare in float64 on the given inputs, for the given and for random parameters.
      activations: where leaves do not suffice, recenter activations if that "pays" (fewer reductions in all), "always" or "never".
      inline_custom: differentiate the functions under custom_jvp and custom_vjp themselves instead of keeping their rules. It lets
        LayerNorms inside them be converted, and is right only if the rules are the functions' true derivatives.

    Returns:
      Converted(fn, params, report). Gradients with respect to inputs are the original's; with respect to parameters they are the
      original's along all directions that keep the recentered leaves at zero mean.

    Raises:
      ConversionError: nothing was converted and `partial` is False; or verification failed, naming the worst output.
      ValueError: an unknown policy.

    >>> import jax, jax.numpy as jnp
    >>> def fn(params, x):
    ...     h = x @ params["write"]
    ...     h = h - h.mean(-1, keepdims=True)
    ...     return h / jnp.sqrt((h * h).mean(-1, keepdims=True) + 1e-6) @ params["read"]
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> params = {"write": jax.random.normal(keys[0], (4, 8)), "read": jax.random.normal(keys[1], (8, 2))}
    >>> out = convert(fn, params, jax.random.normal(keys[2], (5, 4)))
    >>> out.report.converted, out.report.leaves
    (1, (('write', (-1,)),))
    """
    if activations not in POLICIES:
        raise ValueError(f"activations={activations!r}; choose one of {', '.join(POLICIES)}")
    arguments = Arguments.of(params, inputs)
    if verify and not arguments.concrete():
        raise ValueError(
            "verification needs arrays with values; pass verify=False to convert under jit or from shapes alone"
        )
    traced = trace_program(fn, arguments, inline_custom)
    floats = [k for k in range(arguments.n_params) if arguments.is_float(k)]
    decision, plan, program = decide(traced.program, arguments.paths, floats, activations, fold)
    report = report_of(plan, program, decision)
    if not report.converted and not partial:
        raise ConversionError(f"no LayerNorm was converted; partial=True accepts that\n{report}")
    if verify:
        report = dataclasses.replace(report, error=_verified(traced, program, arguments, decision))
    known = Parameters.of(arguments)
    run = _ConvertedFn(fn, decision, known, inline_custom)
    run.remember(arguments, traced, program)

    def prepare(params: Any) -> Any:
        arguments = known.arguments(params, ())
        return arguments.unflatten(decision.among(arguments.paths).prepared(arguments.arrays))[0]

    return Converted(run, prepare(params), report, prepare)


def _verified(traced: Traced, program: Program, arguments: Arguments, decision: Decision) -> float:
    error, output = difference(traced.program, program, arguments.arrays, arguments.n_params, decision.prepared)
    if not error <= TOLERANCE:
        name = output_paths(traced.out_tree)[output]
        raise ConversionError(
            f"verification failed in float64: {name} differs by {error:.1e} of its largest entry (allowed: {TOLERANCE:.0e}); "
            "please report the program"
        )
    return error


class _ConvertedFn:
    """The converted function: traced, proven and rewritten once for each structure and shape of its arguments."""

    def __init__(self, fn: Callable[..., Any], decision: Decision, parameters: Parameters, inline_custom: bool):
        self._fn, self._decision, self._parameters, self._inline_custom = fn, decision, parameters, inline_custom
        self._known: dict[Any, tuple[Callable[..., list[Any]], Any]] = {}

    def remember(self, arguments: Arguments, traced: Traced, program: Program) -> None:
        self._known[arguments.key] = (jax.jit(program.__call__), traced.out_tree)

    def __call__(self, params: Any, *inputs: Any) -> Any:
        arguments = self._parameters.arguments(params, inputs)
        key = arguments.key
        if key not in self._known:
            traced = trace_program(self._fn, arguments, self._inline_custom)
            self.remember(arguments, traced, self._decision.among(arguments.paths).rewritten(traced.program))
        run, out_tree = self._known[key]
        return jax.tree.unflatten(out_tree, run(*arguments.arrays))
