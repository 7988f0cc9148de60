"""Where a step's device time goes: every kernel of a traced step, by the part of the model that asked for it.

A kernel belongs to the first part whose pattern its instruction matches: the name of the HLO instruction, the target of a custom
call, and the names that the program gave to the operation (jax.named_scope). A fused kernel carries the name of its last operation.
Of several devices the first one's kernels are told; an exchange runs beside other kernels, so that parts can add up to more than a step.
"""

import collections
import dataclasses
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from prenorm_jax.measure import devices
from prenorm_jax.measure.equivalence import Form
from prenorm_jax.measure.works import Work
from prenorm_jax.training.experiment import Mesh

PARTS: tuple[tuple[str, str], ...] = (
    ("exchange between devices", r"^(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|nccl)"),
    ("attention", r"fmha|cudnn|dot_product_attention|attention/(_forward|_backward)"),
    ("matrix products", r"cublas|__triton_gemm|gemm_fusion|\bdot\b|/dot_general$|gelu_gradient"),
    ("optimizer", r"optimizer"),
    ("weight map", r"weight_map"),
    ("loss", r"loss"),
    ("GELU", r"gelu"),
    ("column reductions", r"column_sum|reduce_fusion.*(attention|mlp)/"),
    ("norms and residuals", r"norm|residual"),
    ("copies", r"\bcopy|transpose|memcpy|wrapped_slice|concatenate|/_stack/"),
)
REST = "rest"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One HLO instruction's device time: milliseconds and calls in a step, the part it belongs to, and what it was called."""

    instruction: str
    part: str
    ms: float
    calls: float
    scope: str


def profile(step: Callable[[Any], Any], carry: Any, hlo: str, steps: int = 3) -> list[Kernel]:
    """Kernels of `step(carry) -> carry`, the longest first, from a trace of `steps` of them.

    Args:
      hlo: the compiled program's text (`compiled.as_text()`), which names each instruction's operation.
    """
    carry = jax.block_until_ready(step(carry))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                carry = step(carry)
            jax.block_until_ready(carry)
        (found,) = pathlib.Path(folder).rglob("*.xplane.pb")
        seconds: dict[str, list[float]] = collections.defaultdict(list)
        with warnings.catch_warnings():
            # Python 3.12 has one about the compiled types of jax's reader; as an error it would end the process.
            warnings.simplefilter("ignore", DeprecationWarning)
            for instruction, duration in _kernels(jax.profiler.ProfileData.from_file(str(found))):
                seconds[instruction].append(duration)
    scopes = _scopes(hlo)
    kernels = [
        Kernel(
            name, _part(name, scopes.get(name, "")), 1e3 * sum(times) / steps, len(times) / steps, scopes.get(name, "")
        )
        for name, times in seconds.items()
    ]
    return sorted(kernels, key=lambda kernel: -kernel.ms)


def profile_work(work: Work, form: Form, steps: int = 3, mesh: Mesh | None = None) -> list[Kernel]:
    """Kernels of a work's step in a form; on a mesh, each of whose devices has the work's batch, where one is given."""
    case = devices.case(work, form, mesh, {}) if mesh else work.case(form)
    return profile(case.step, case.carry, case.compiled.as_text(), steps)


def by_part(kernels: list[Kernel]) -> dict[str, float]:
    """Milliseconds of a step by part, in the order of `PARTS`."""
    sums = {part: 0.0 for part, _ in PARTS} | {REST: 0.0}
    for kernel in kernels:
        sums[kernel.part] += kernel.ms
    return {part: ms for part, ms in sums.items() if ms}


def _kernels(data: Any) -> Iterator[tuple[str, float]]:
    """(HLO instruction, seconds) of every kernel: on a GPU from the streams of its planes, on a CPU from the executor's threads."""
    planes = [plane for plane in data.planes if plane.name.startswith("/device:GPU")]
    for plane in planes[:1] or [plane for plane in data.planes if plane.name.startswith("/host:CPU")]:
        for line in plane.lines:
            if planes and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    yield str(stats["hlo_op"]), event.duration_ns * 1e-9
                elif planes:
                    yield event.name, event.duration_ns * 1e-9


_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*$", re.MULTILINE)


def _scopes(hlo: str) -> dict[str, str]:
    """Instruction -> custom-call target and operation name, as far as the program's text has them."""
    scopes = {}
    for match in _INSTRUCTION.finditer(hlo):
        line = match.group()
        named = re.search(r'op_name="([^"]*)"', line)
        target = re.search(r'custom_call_target="([^"]*)"', line)
        scopes[match.group(1)] = _plain(" ".join(found.group(1) for found in (target, named) if found))
    return scopes


def _plain(name: str) -> str:
    """An operation's name without what differentiation, batching and nested calls add to it.

    >>> _plain("jit(train_step)/transpose(jvp(jit(run_block)))/mlp/dot_general")
    'train_step/run_block/mlp/dot_general'
    """
    inner = re.sub(r"\b(?:transpose|jvp|vmap|jit)\(([^()]*)\)", r"\1", name)
    return inner if inner == name else _plain(inner)


def _part(instruction: str, scope: str) -> str:
    text = f"{instruction} {scope}"
    return next((part for part, pattern in PARTS if re.search(pattern, text)), REST)


def table(kernels: list[Kernel], rows: int = 25, floors: Mapping[str, float] | None = None) -> str:
    """Markdown: milliseconds by part, beside its floor where one is given (`counts.floors`), then the longest kernels."""
    floors, parts = floors or {}, by_part(kernels)
    total = sum(parts.values())
    lines = ["| part | ms | share | floor, ms |", "|---|---|---|---|"]
    for part in dict.fromkeys([*parts, *floors]):
        ms = parts.get(part, 0.0)
        lines.append(f"| {part} | {ms:.2f} | {ms / total:.1%} | {f'{floors[part]:.2f}' if part in floors else ''} |")
    lines.append(f"| all | {total:.2f} | | {f'{sum(floors.values()):.2f}' if floors else ''} |")
    lines += ["", "| kernel | part | ms | calls | named |", "|---|---|---|---|---|"]
    lines += [f"| {k.instruction} | {k.part} | {k.ms:.3f} | {k.calls:g} | {k.scope[-90:]} |" for k in kernels[:rows]]
    return "\n".join(lines)
