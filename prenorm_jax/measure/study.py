"""A table of step times: works x forms, timed one work after the other and written after each, so that a study can stop and go on.

Forms of a work are compiled ahead of time and timed in turn in one process (prenorm_jax.measure.step_time), with two controls: Pre-LN once
more, compiled by itself, and no norm. MFU is the analytic count of operations (prenorm_jax.training.counts) over the time and over the
device's peak, by both conventions of counting attention. A batch of 1 in inference and decoding is also timed call by call.
"""

import concurrent.futures
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from prenorm_jax.measure import step_time
from prenorm_jax.measure.works import Work
from prenorm_jax.models.config import ConfigError, require
from prenorm_jax.training import counts
from prenorm_jax.training.results import write_whole
from prenorm_jax.training.step import compiler_options


@dataclasses.dataclass(frozen=True)
class Study:
    """What is timed, and how long.

    Attributes:
      name: of the table.
      works: in the order in which they are timed.
      forms: rows of `step_time.TIMED`; the first is `step_time.BASELINE`.
      windows: of each form.
      window_seconds: how long a window takes, about; of 3 to 200 steps.
      latency_calls: at most so many single calls in each round, where a batch of 1 is inferred.
    """

    name: str
    works: tuple[Work, ...]
    forms: tuple[str, ...] = tuple(step_time.TIMED)
    windows: int = 5
    window_seconds: float = 1.0
    latency_calls: int = 40

    def __post_init__(self) -> None:
        require(self.forms[:1] == (step_time.BASELINE,), "forms", self.forms, f"{step_time.BASELINE} first")
        for form in self.forms:
            require(form in step_time.TIMED, "forms", form, ", ".join(step_time.TIMED))
        require(self.windows > 0, "windows", self.windows, "1 or more")

    def only(self, words: tuple[str, ...]) -> "Study":
        """The works whose keys hold all of `words`, whole: "batch 1" is not "batch 16". Raises ConfigError where there are none."""
        patterns = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)") for word in words]
        works = tuple(work for work in self.works if all(pattern.search(work.key) for pattern in patterns))
        require(bool(works), "--only", ",".join(words), "; ".join(work.key for work in self.works))
        return dataclasses.replace(self, works=works)


def read_study(config: str) -> Study:
    """The study of "FILE[:ARG]", a Python file with get_study(arg). Raises ConfigError."""
    path, _, arg = config.partition(":")
    require(pathlib.Path(path).is_file(), "CONFIG", path, "an existing Python file")
    spec: Any = importlib.util.spec_from_file_location("study", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    require(hasattr(module, "get_study"), "CONFIG", path, "a file with get_study(arg), as configs/paper_*.py")
    study: Study = module.get_study(arg)
    return study


def run(
    study: Study, out: pathlib.Path, *, seconds: float = float("inf"), threads: int = 1, say: Callable[[str], None]
) -> list[str]:
    """Times the works that `out` does not hold yet, and writes it after each.

    Args:
      seconds: no work is begun that would end later than that, if it takes half as long again as the longest so far.
      threads: how many forms are compiled at a time; their compile times are comparable where it is 1.

    Returns: the keys of the works that are left. Raises ConfigError for a file of another study, device or version.
    """
    begun, longest = time.monotonic(), 0.0
    result = _result(study, out)
    done = {entry["key"] for entry in result["entries"]}
    left = [work for work in study.works if work.key not in done]
    while left and time.monotonic() - begun + 1.5 * longest < seconds:
        work = left.pop(0)
        say(f"{work.key} ...")
        since = time.monotonic()
        entry = measure(work, study, threads)
        longest = max(longest, time.monotonic() - since)
        result["entries"].append({**entry, "seconds": time.monotonic() - since})
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, json.dumps(result, indent=1) + "\n")  # a call cut short leaves the file whole
        say(_line(entry))
    return [work.key for work in left]


def measure(work: Work, study: Study, threads: int = 1) -> dict[str, Any]:
    """One entry of a study's file: the work, and a row for each form."""
    cases = _cases(work, study.forms, threads)
    for case in cases.values():
        case.run(2)
    pace = max(cases[step_time.BASELINE].run(1), 1e-6)
    window_steps = int(np.clip(round(study.window_seconds / pace), 3, 200))
    warmup_steps = int(np.clip(round(study.window_seconds / pace), 3, 10))
    times = step_time.interleaved(cases, warmup_steps=warmup_steps, window_steps=window_steps, windows=study.windows)
    calls = int(np.clip(round(study.window_seconds / pace), 3, study.latency_calls))
    single = (
        step_time.latencies(cases, rounds=study.windows, calls=calls)
        if work.kind != "training" and work.batch == 1
        else {}
    )
    device, (amount, unit) = counts.device(), work.per_step
    rows = {}
    for name, case in cases.items():
        found = work.operations(step_time.TIMED[name])
        flops = {"full": sum(each.full for each in found), "causal": sum(each.causal for each in found)}
        median = times[name].median
        rows[name] = {
            "windows_s": list(times[name].windows),
            "ratio": times[name].against(times[step_time.BASELINE]),
            "per_second": amount / median,
            "flops": flops,
            "bytes": sum(each.bytes for each in found),
            "mfu": {key: value / median / device.peak_flops for key, value in flops.items()} if device else None,
            "peak_bytes": case.peak_bytes,
            "compile_s": case.compile_seconds,
            "finite": _finite(case.carry),
        }
        if single:
            rows[name]["latency_s"] = {f"p{q}": float(np.percentile(single[name].windows, q)) for q in (50, 95)}
    return {
        "key": work.key,
        "name": work.name,
        "batch": work.batch,
        "kind": work.kind,
        "coordinates": work.coordinates,
        "unit": unit,
        "per_step": amount,
        "window_steps": window_steps,
        "compiled_at_a_time": threads,
        "rows": rows,
    }


def _cases(work: Work, forms: tuple[str, ...], threads: int) -> dict[str, step_time.Case]:
    # Where nothing writes to them, forms of the same shapes run from the same parameters.
    shared: dict[tuple[Any, ...], Any] = {}

    def params(name: str) -> Any:
        form = step_time.TIMED[name]
        if work.kind == "training":
            return work.params(form)
        norm = form.norm.replace("no_norm", "pre_rmsnorm")
        key = (norm, form.layout)
        if key not in shared:
            shared[key] = work.params(form)
        return shared[key]

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        futures = {name: pool.submit(work.case, step_time.TIMED[name], params(name)) for name in forms}
        return {name: future.result() for name, future in futures.items()}


def _finite(carry: Any) -> bool:
    leaf = jax.tree.leaves(carry)[0]
    return bool(np.isfinite(np.asarray(leaf.ravel()[:4096], np.float32)).all())


def _result(study: Study, out: pathlib.Path) -> dict[str, Any]:
    """What `out` holds, or the head of a new file."""
    head = {
        "study": study.name,
        "forms": list(study.forms),
        "device": jax.devices()[0].device_kind,
        "host": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "compiler_options": {name: str(value) for name, value in compiler_options().items()},
    }
    command = " ".join(["python -m prenorm_jax.measure", *sys.argv[1:]])
    if not out.exists():
        return {**head, "commands": [command], "entries": []}
    found: dict[str, Any] = json.loads(out.read_text())
    for key, value in head.items():
        if found.get(key) != value and key != "host":
            raise ConfigError(
                f"--out: {out} was measured with {key} = {found.get(key)!r}, this is {value!r}; name another file"
            )
    if command not in found["commands"]:
        found["commands"].append(command)
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _line(entry: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{name} {1e3 * float(np.median(row['windows_s'])):.3g} ms ({row['ratio'][0]:.3f})"
        for name, row in entry["rows"].items()
    )


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a row a work, a column a form: the ratio to pre_ln, median (least to greatest of the windows). Below it the mean of the
    medians over the works of one kind."""
    forms = list(result["entries"][0]["rows"])
    lines = [
        f"| {result['study']}, {result['device']}, jax {result['versions']['jax']} | pre_ln | {' | '.join(forms[1:])} |",
        "|---" * (len(forms) + 1) + "|",
    ]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in result["entries"]:
        rows = entry["rows"]
        milliseconds = 1e3 * float(np.median(rows["pre_ln"]["windows_s"]))
        cells = ["{:.3f} ({:.3f} to {:.3f})".format(*rows[form]["ratio"]) for form in forms[1:]]
        lines.append(f"| {entry['key']} | {milliseconds:.2f} ms | {' | '.join(cells)} |")
        kind = entry["kind"] + (f", {entry['coordinates']}" if entry["kind"] == "training" else "")
        groups.setdefault(kind, []).append(rows)
    for kind, members in groups.items():
        if len(members) > 1:
            means = [f"{np.mean([rows[form]['ratio'][0] for rows in members]):.3f}" for form in forms[1:]]
            lines.append(f"| mean of {len(members)}, {kind} | | {' | '.join(means)} |")
    return "\n".join(lines)


def details(result: Mapping[str, Any]) -> str:
    """Markdown: a row for each work and form: time, throughput, MFU by both conventions, memory, compile time, latency."""
    lines = [
        "| work | form | ms | a second | MFU, full | MFU, causal | peak memory | compile | single calls: p50, p95 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in result["entries"]:
        for name, row in entry["rows"].items():
            mfu = [f"{row['mfu'][key]:.1%}" if row["mfu"] else "" for key in ("full", "causal")]
            peak = f"{row['peak_bytes'] / 2**30:.2f} GiB" if row["peak_bytes"] else ""
            single = row.get("latency_s")
            lines.append(
                f"| {entry['key']} | {name} | {1e3 * float(np.median(row['windows_s'])):.3f} "
                f"| {row['per_second']:,.0f} {entry['unit']} | {' | '.join(mfu)} | {peak} | {row['compile_s']:.1f} s "
                f"| {', '.join(f'{1e3 * value:.3f} ms' for value in single.values()) if single else ''} |"
                + ("" if row["finite"] else " not finite |")
            )
    return "\n".join(lines)


def peers_table(result: Mapping[str, Any]) -> str:
    """Markdown of benchmarks/peers.py: a row a work and form of ours; theirs over ours by round, median (least to greatest)."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    lines = [f"| {result['device']}; {versions} | peer | ms | ours | ms | peer / ours |", "|---" * 6 + "|"]
    for entry in result["peers"]:
        theirs = np.array(entry["theirs"]["windows_s"])
        for form, row in entry["ours"].items():
            ratios = theirs / np.array(row["windows_s"])
            lines.append(
                f"| {entry['work']} | {entry['theirs']['name']} | {1e3 * np.median(theirs):.2f} | {form} "
                f"| {1e3 * np.median(row['windows_s']):.2f} "
                f"| {np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f}) |"
            )
    return "\n".join(lines)
