"""What a second device costs: a training step on N devices against one device, at the same batch for each device.

Every case is compiled ahead of time in one process; windows of steps are taken in turn, one device, then each of the meshes, then again.
A ratio is taken between windows of the same round. There are two controls. One device once more, compiled by itself: what it differs
by from itself is the noise. And the same step on every device at once, each by itself, until the last is done: what an exchange that costs
nothing would take, for no two cards are equally fast, and a step on several waits for the slowest of them.

    python -m prenorm_jax.measure devices vit B/16 --per-device 256 --json FILE
    python -m prenorm_jax.measure devices gpt small --per-device 16 --options default,overlap,overlap+buckets --json FILE

`--options` names sets of XLA's options (OPTIONS), joined by "+"; each set makes cases of its own.
"""

import concurrent.futures
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from prenorm_jax.measure import step_time
from prenorm_jax.measure.equivalence import Form
from prenorm_jax.measure.works import Work, optimizer
from prenorm_jax.models.config import require, require_one_of
from prenorm_jax.training import sharding
from prenorm_jax.training.experiment import Mesh
from prenorm_jax.training.results import save_beside
from prenorm_jax.training.step import combined, compiler_options, init_state, make_train_step

BAR = 1.04
BY_ITSELF = "each by itself"  # a control
MESHES = ("data", "fsdp", "tensor")


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    # Collectives start early and are waited for late; the scheduler knows what they take.
    "overlap": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "serial": {"xla_gpu_enable_latency_hiding_scheduler": False},
    # How many bytes of gradients are exchanged at once: less starts earlier, more wastes less.
    "one-piece": combined(2**31),
    "buckets": combined(2**25),
    "small-buckets": combined(2**23),
    "tiny-buckets": combined(2**21),
    # Parts of what step.MESH_OPTIONS and step.BETWEEN_HOSTS have: gradients summed where they lie, a layer of ViT-B's at a time.
    "in-place": {"xla_disable_hlo_passes": "all-reduce-contiguous"},
    "layer-buckets": combined(2**24),
    # As XLA does it by itself: gradients are copied into one buffer and summed there.
    "contiguous": {"xla_disable_hlo_passes": ""},
    # How many multiprocessors an exchange takes from what runs beside it.
    "few-channels": {"xla_gpu_nccl_collective_max_nchannels": 8},
    "four-channels": {"xla_gpu_nccl_collective_max_nchannels": 4},
    "early": {"xla_gpu_experimental_collective_start_as_early_as_possible": True},
    # Products and collectives on streams of their own also where the scheduler is off.
    "memcpy": {"xla_gpu_use_memcpy_local_p2p": True},
    "user-buffers": {"xla_gpu_enable_nccl_user_buffers": True},
    "symmetric-buffers": {"xla_gpu_experimental_enable_nccl_symmetric_buffers": True},
    "priority": {"xla_gpu_enable_highest_priority_async_stream": True},
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
      work: on one device; on N devices its batch is N times that.
      form: the model's.
      meshes: of `MESHES`: along which axis the devices are.
      devices: N.
      options: names of OPTIONS, joined by "+".
    """

    work: Work
    form: Form
    meshes: tuple[str, ...]
    devices: int
    options: tuple[str, ...] = ("default",)


def case(work: Work, form: Form, mesh: Mesh, options: Mapping[str, Any], on: list[Any] | None = None) -> step_time.Case:
    """The compiled step of a work on a mesh (of these devices, where some are given), each device with the work's batch, and the state
    that it goes on from."""
    places = sharding.make_mesh(mesh, on)
    whole = dataclasses.replace(work, batch=work.batch * mesh.data * mesh.fsdp)
    model, tx = whole.config(form), optimizer()
    step: Any = make_train_step(model, whole.task, tx, coordinates=whole.coordinates, mesh=places, options=options)
    state = init_state(whole.params(form), tx)
    state = jax.device_put(state, sharding.state_shardings(state, model, tx, places))
    batch = sharding.whole_batch(whole.data(), places)
    program, seconds = step_time.compiled(step, state, batch)
    return step_time.Case(lambda state: program(state, batch)[0], state, program, seconds)


def each_by_itself(work: Work, form: Form, devices: int) -> step_time.Case:
    """The compiled steps of a work on one device each, all at once; a step is done when the last of them is."""
    cases = [case(work, form, Mesh(data=1), {}, [device]) for device in jax.devices()[:devices]]

    def step(states: list[Any]) -> list[Any]:
        return [case.step(state) for case, state in zip(cases, states, strict=True)]

    seconds = sum(case.compile_seconds for case in cases)
    return step_time.Case(step, [case.carry for case in cases], cases[0].compiled, seconds)


def measure(
    this: Comparison, *, windows: int = 7, window_seconds: float = 1.0, threads: int = 4, say: Callable[[str], None]
) -> dict[str, Any]:
    """Times every case, in turn, once all are compiled, `threads` at a time. Returns what `table` prints.

    Raises: ConfigError where there are fewer devices.
    """
    found = jax.device_count()
    require(found >= this.devices, "--devices", this.devices, f"at most the {found} there are")
    for axis in this.meshes:
        require_one_of("--meshes", axis, MESHES)
    sets = {name: chosen(name) for name in this.options}
    one = functools.partial(case, this.work, this.form, Mesh(data=1), {})
    wanted: dict[str, Callable[[], step_time.Case]] = {
        "one device": one,
        "one device again": one,
        BY_ITSELF: functools.partial(each_by_itself, this.work, this.form, this.devices),
    }
    for name, options in sets.items():
        for axis in this.meshes:
            mesh = Mesh(**{"data": 1, axis: this.devices})
            wanted[f"{axis}, {name}"] = functools.partial(case, this.work, this.form, mesh, options)
    cases = {}
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        futures = {name: pool.submit(make) for name, make in wanted.items()}
        for name, future in futures.items():
            try:
                cases[name] = future.result()
            except jax.errors.JaxRuntimeError as error:  # options come and go with XLA's versions
                say(f"{name}: left out: {str(error).splitlines()[0]}")
                continue
            say(f"{name}: compiled in {cases[name].compile_seconds:.0f} s")
    for each in cases.values():
        each.run(2)
    pace = max(cases["one device"].run(2), 1e-6)
    steps = int(np.clip(round(window_seconds / pace), 3, 100))
    times = step_time.interleaved(cases, warmup_steps=max(3, steps // 2), window_steps=steps, windows=windows)
    rows = {
        name: {
            "windows_s": list(times[name].windows),
            "ratio": times[name].against(times["one device"]),
            "ratio_to_each_by_itself": times[name].against(times[BY_ITSELF]) if BY_ITSELF in times else None,
            "peak_bytes": cases[name].peak_bytes,
            "collectives": collectives(cases[name].compiled.as_text()),
        }
        for name in cases
    }
    return {
        "devices": this.devices,
        "work": this.work.key,
        "form": this.form.name,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "window_steps": steps,
        "compiler_options": {name: str(value) for name, value in compiler_options(this.devices).items()},
        "options": {name: {key: str(value) for key, value in found.items()} for name, found in sets.items()},
        "rows": rows,
    }


def chosen(names: str) -> dict[str, Any]:
    """The options of names joined by "+". Raises ConfigError for an unknown one.

    >>> chosen("overlap")
    {'xla_gpu_enable_latency_hiding_scheduler': True}
    """
    found: dict[str, Any] = {}
    for name in names.split("+"):
        require_one_of("--options", name, tuple(OPTIONS))
        found |= OPTIONS[name]
    return found


KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(program: str) -> dict[str, int]:
    """How often each collective operation stands in a compiled program.

    >>> collectives("%a = f32[2] all-reduce-start(%x)\\n%b = f32[2] all-reduce-done(%a)")
    {'all-reduce': 1}
    """
    counts = {kind: program.count(f" {kind}(") + program.count(f" {kind}-start(") for kind in KINDS}
    return {kind: count for kind, count in counts.items() if count}


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a row a case, its step time and the ratio to one device, median (least to greatest of the windows)."""
    lines = [
        f"{result['work']} for each device, {result['form']}, {result['devices']} of {result['device']}, jax {result['jax']}",
        "",
        "| case | ms | against one device | against each by itself | peak memory | collectives |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        peak = f"{row['peak_bytes'] / 2**30:.2f} GiB" if row["peak_bytes"] else ""
        kinds = ", ".join(f"{count} {kind}" for kind, count in row["collectives"].items())
        lines.append(
            f"| {name} | {1e3 * float(np.median(row['windows_s'])):.2f} | "
            + " | ".join(
                "{:.3f} ({:.3f} to {:.3f})".format(*row[of]) if row[of] else ""
                for of in ("ratio", "ratio_to_each_by_itself")
            )
            + f" | {peak} | {kinds} |"
        )
    return "\n".join(lines)


def save(result: dict[str, Any], path: pathlib.Path) -> None:
    """Writes a result, beside those of other works that the file holds."""
    save_beside(path, "on_devices", [result], lambda each: (each["work"], each["form"], each["devices"]))
