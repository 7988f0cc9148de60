"""What happens to a run when its machine, its disk or its data fail: every fault, made on purpose, in one command.

    PYTHONPATH=. python tests/training/run_faults.py --json=results/training/faults.json [--into=docs/running.md] [--only=PATTERN]

A run of a tiny model in processes of its own is brought down, started again, and compared with a run that nothing disturbed: no row of
its metrics and no bit of its parameters may differ, nothing before the newest checkpoint may have to be done again, and nobody may hang.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import small_experiment as small

from prenorm_jax.models.config import ViTConfig
from prenorm_jax.training import checkpoints, metrics
from prenorm_jax.training.experiment import Data, Experiment, Mesh, as_tree

ROOT = pathlib.Path(__file__).parents[2]
TIMINGS = ("step_seconds", "tokens_per_second", "images_per_second")
NO_HANG = 60.0  # seconds that a process may take to end after a fault
PATIENCE = 600.0  # seconds that a run may take to start, or to end of itself, on a machine that others use too

# A run as train.py does it, of an experiment in a file, and with steps that take long enough to be hit.
PROGRAM = """
import json, pathlib, sys, time
import train
from prenorm_jax.training import data, disk, distributed, experiment
import numpy as np
given = json.loads(pathlib.Path(sys.argv[1]).read_text())
if given["processes"] > 1:
    distributed.start(distributed.Start("plain", given["coordinator"], given["processes"], int(sys.argv[3])))
if given["blind"]:
    disk.require_room = lambda *arguments: None
batches = data.train_batches
class Disturbed:
    def __init__(self, inner): self.inner, self.taken = inner, 0
    def __next__(self):
        self.taken += 1
        time.sleep(given["pause"])
        batch = next(self.inner)
        return {**batch, "weights": batch["weights"] * np.float32("nan")} if self.taken in given["nan"] else batch
    def get_state(self): return {"inner": self.inner.get_state(), "taken": self.taken}
    def set_state(self, state): self.inner.set_state(state["inner"]); self.taken = state["taken"]
    def close(self): self.inner.close()
data.train_batches = lambda *a, **k: Disturbed(batches(*a, **k))
train.read_flags = lambda argv: (experiment.read_experiment(given["experiment"]), pathlib.Path(sys.argv[2]))
sys.exit(train.main([]))
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """A run in processes of its own, in a folder."""

    experiment: Experiment
    workdir: pathlib.Path
    pause: float = 0.0
    nan: tuple[int, ...] = ()
    processes: int = 1
    blind: bool = False

    def start(self) -> list[subprocess.Popen[str]]:
        """Its processes, running."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = self.workdir.with_name(f"{self.workdir.name}.json")
        settings.write_text(
            json.dumps(
                {
                    "experiment": as_tree(self.experiment),
                    "pause": self.pause,
                    "nan": self.nan,
                    "blind": self.blind,
                    "processes": self.processes,
                    "coordinator": f"127.0.0.1:{port}",
                }
            )
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": FAST, "JAX_PLATFORMS": "cpu", **QUIET}
        return [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(settings), str(self.workdir), str(index)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(self.processes)
        ]

    def finish(self) -> list[tuple[int, str, str]]:
        """Runs it to its end: (exit status, output, errors) of each process."""
        return [ended(process) for process in self.start()]


# One device, as a user has it; without LLVM's expensive passes.
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_COMPILATION_CACHE_DIR": ""}


def ended(process: subprocess.Popen[str], within: float = PATIENCE) -> tuple[int, str, str]:
    """Waits for it. Raises AssertionError where it takes longer."""
    try:
        out, err = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running after {within} s: {process.communicate()[1]}") from None
    return process.returncode, out, err


def last_step(workdir: pathlib.Path) -> int:
    """Of the newest row."""
    rows = metrics.read(workdir)
    return max((row["step"] for row in rows), default=0)


def saved_step(workdir: pathlib.Path) -> int:
    """Of the newest checkpoint on disk."""
    base = checkpoints.folder(workdir)
    return max((int(path.name) for path in base.iterdir() if path.name.isdigit()), default=0) if base.is_dir() else 0


def wait(processes: list[subprocess.Popen[str]], due: Callable[[], bool]) -> None:
    """Until `due()`, watching closely."""
    deadline = time.monotonic() + PATIENCE
    while not due():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


@dataclasses.dataclass
class Room:
    """A folder to break things in, and the run that nothing disturbs."""

    folder: pathlib.Path
    kills: int
    rng: random.Random
    whole: Job

    def job(self, name: str, **fields: Any) -> Job:
        """The same run in another workdir."""
        return dataclasses.replace(self.whole, workdir=self.folder / name, **fields)

    def require_same(self, workdir: pathlib.Path, whole: pathlib.Path | None = None) -> None:
        """That a run ended with the bits and the rows of the undisturbed one."""
        whole = whole or self.whole.workdir
        expected, found = (checkpoints.load(path) for path in (whole, workdir))
        assert expected.step == found.step, (expected.step, found.step)
        for x, y in zip(jax.tree.leaves(expected.params), jax.tree.leaves(found.params), strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), "parameters differ"
        assert rows(whole) == rows(workdir), "rows differ"


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """A run's rows, less what depends on the clock."""
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in metrics.read(workdir)]


def require_continued(before: int, output: str) -> None:
    """That a run went on from the checkpoint that was newest when it was brought down, or a newer one: nothing before it is lost."""
    found = re.search(r"resuming at step (\d+)", output)
    assert (int(found[1]) if found else 0) >= before, (before, output)


# --- the faults: each returns what it did and saw, in words


def sigkill(room: Room) -> str:
    """SIGKILL at random moments, every third of them inside a save."""
    job, inside, moments, before = room.job("sigkill"), 0, [], 0
    for index in range(room.kills):
        [process] = job.start()
        start = last_step(job.workdir)
        if index % 3 == 2:
            moment = saved_step(job.workdir)
            wait([process], lambda at=job, moment=moment: last_step(at.workdir) > moment + 1 and bool(half_written(at)))
        else:
            step = room.rng.randrange(start, min(start + 9, room.whole.experiment.train.steps - 4))
            wait([process], lambda at=job, step=step: last_step(at.workdir) >= step)
            time.sleep(room.rng.random() * 0.05)
        goes_on_from, before = before, saved_step(job.workdir)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL
        if "  loss " in output:  # it was killed behind a step of its own, and not before it had begun
            require_continued(goes_on_from, output)
        inside += bool(half_written(job))
        moments.append(last_step(job.workdir))
        # Start over in another workdir when the run would end before the next kill.
        if moments[-1] > room.whole.experiment.train.steps - 16:
            [(status, output, errors)] = job.finish()
            assert status == 0, errors
            require_continued(before, output)
            room.require_same(job.workdir)
            job, before = room.job(f"sigkill-{index}"), 0
    [(status, output, errors)] = job.finish()
    assert status == 0, errors
    require_continued(before, output)
    room.require_same(job.workdir)
    assert inside >= room.kills // 4, inside
    return f"{room.kills} kills behind steps {', '.join(map(str, moments))}; {inside} of them inside a save"


def half_written(job: Job) -> list[pathlib.Path]:
    """Folders of a save under way."""
    return list(checkpoints.folder(job.workdir).glob("*tmp*"))


def asked_to_stop(number: signal.Signals) -> Callable[[Room], str]:
    def fault(room: Room) -> str:
        job = room.job(number.name)
        [process] = job.start()
        wait([process], lambda: last_step(job.workdir) >= 9)
        since = time.monotonic()
        process.send_signal(number)
        status, _, errors = ended(process, NO_HANG)
        took = time.monotonic() - since
        stopped = last_step(job.workdir)
        assert (status, errors) == (128 + number, said_of_interrupt(stopped)), (status, errors)
        assert saved_step(job.workdir) == stopped
        [(status, output, errors)] = job.finish()
        assert status == 0, errors
        require_continued(stopped, output)
        room.require_same(job.workdir)
        return f"step {stopped} was saved, exit status {128 + number} after {took:.1f} s"

    return fault


def said_of_interrupt(step: int) -> str:
    return f"train.py: interrupted; step {step} is saved, and the same command continues there\n"


def corrupted(room: Room) -> str:
    """The newest checkpoint's arrays with a flipped bit in each file."""
    job = room.job("corrupted")
    shutil.copytree(room.whole.workdir, job.workdir)
    steps = sorted(int(path.name) for path in checkpoints.folder(job.workdir).iterdir())
    for path in (checkpoints.folder(job.workdir) / str(steps[-1]) / "parameters").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    [(status, output, errors)] = job.finish()
    assert status == 0, errors
    assert f"warning: checkpoint {steps[-1]} is damaged" in output
    assert (job.workdir / "damaged" / str(steps[-1])).is_dir()
    require_continued(steps[-2], output)
    room.require_same(job.workdir)
    return f"checkpoint {steps[-1]} was set aside with a warning, the run went on from {steps[-2]}"


def truncated_tokens(room: Room) -> str:
    """A file of token ids that loses its end between two starts, to less than a window."""
    tokens = room.folder / "tokens"
    tokens.mkdir()
    for side in ("train", "val"):
        np.random.default_rng(0).integers(256, size=2000).astype(np.uint16).tofile(tokens / f"{side}.bin")
    data = Data(name="text", root=str(tokens))
    job = room.job("tokens", experiment=dataclasses.replace(room.whole.experiment, data=data))
    [process] = job.start()
    wait([process], lambda: saved_step(job.workdir) >= 8)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    whole = (tokens / "train.bin").read_bytes()
    (tokens / "train.bin").write_bytes(whole[:10])
    before = contents(job.workdir)
    [(status, _, errors)] = job.finish()
    assert status == 2, errors
    assert re.fullmatch(rf"train\.py: {re.escape(str(tokens / 'train.bin'))}: [^\n]*\n", errors), errors
    assert contents(job.workdir) == before
    (tokens / "train.bin").write_bytes(whole)
    again = room.job("tokens-whole", experiment=job.experiment)
    for each in (job, again):
        [(status, _, errors)] = each.finish()
        assert status == 0, errors
    room.require_same(job.workdir, again.workdir)
    return "exit status 2, one line that names the file, nothing written; mended, the run went on"


def contents(workdir: pathlib.Path) -> dict[str, bytes]:
    """Every file of a workdir."""
    return {str(path): path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def truncated_picture(room: Room) -> str:
    """A picture that is cut off while the run goes on."""
    from PIL import Image

    base, rng = room.folder / "pictures", np.random.default_rng(0)
    for side in ("train", "val"):
        for label in range(2):
            (base / side / str(label)).mkdir(parents=True)
            for index in range(16):
                pixels = rng.integers(256, size=(8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(base / side / str(label) / f"{index}.png")
    (base / "processor").mkdir()
    said = {
        "do_resize": False,
        "do_rescale": True,
        "do_normalize": False,
        "image_mean": [0, 0, 0],
        "image_std": [1, 1, 1],
    }
    (base / "processor" / "preprocessor_config.json").write_text(json.dumps(said))
    pictures = base / "data"
    pictures.mkdir()
    for side in ("train", "val"):
        (base / side).rename(pictures / side)
    model = ViTConfig(image_size=8, patch_size=4, channels=3, classes=2, width=8, depth=1, heads=2, mlp_width=8)
    experiment = dataclasses.replace(
        room.whole.experiment,
        task="image_classification",
        model=model,
        data=Data(name="image_folder", root=str(pictures), processor=str(base / "processor")),
    )
    job = room.job("pictures", experiment=experiment)
    [process] = job.start()
    wait([process], lambda: saved_step(job.workdir) >= 4)
    spoilt = pictures / "train" / "1" / "7.png"
    whole = spoilt.read_bytes()
    spoilt.write_bytes(whole[:60])
    since = time.monotonic()
    status, _, errors = ended(process, NO_HANG)
    took = time.monotonic() - since
    assert status == 2, errors
    assert errors.startswith("train.py: ")
    assert str(spoilt) in errors, errors
    assert errors.count("\n") == 1, errors
    before = saved_step(job.workdir)
    spoilt.write_bytes(whole)
    again = room.job("pictures-whole", experiment=experiment)
    [(status, output, errors)] = job.finish()
    assert status == 0, errors
    require_continued(before, output)
    assert again.finish()[0][0] == 0
    room.require_same(job.workdir, again.workdir)
    return f"exit status 2 after {took:.1f} s, one line that names the file; mended, the run went on from step {before}"


def nan_batch(room: Room) -> str:
    """A batch that makes the loss NaN."""
    bad = 11
    job = room.job("nan", nan=(bad,))
    [(status, _, errors)] = job.finish()
    assert status == 1, errors
    assert errors.startswith(f"train.py: the loss of step {bad} is nan; parameters of before it"), errors
    assert errors.count("\n") == 1
    kept = saved_step(job.workdir)
    loaded = checkpoints.load(job.workdir)
    assert kept == loaded.step < bad
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(loaded.params))
    train = dataclasses.replace(job.experiment.train, skip_nonfinite=1)
    skipping = dataclasses.replace(job, experiment=dataclasses.replace(job.experiment, train=train))
    [(status, output, errors)] = skipping.finish()
    assert status == 0, errors
    assert f"step {bad}: the loss is nan; skipped (1 of at most 1)" in output
    fresh = dataclasses.replace(skipping, workdir=room.folder / "nan-whole")
    assert fresh.finish()[0][0] == 0
    room.require_same(job.workdir, fresh.workdir)
    return f"exit status 1, step {bad} named, checkpoint {kept} kept and finite; with skip_nonfinite=1 the run went on and ended"


def full_disk(seen: bool) -> Callable[[Room], str]:
    """A small file system of its own that is full in the middle of the run; seen: before a save is begun, or else in the middle of it."""

    def fault(room: Room) -> str:
        disk = room.folder / f"disk-{seen}"
        disk.mkdir()
        try:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], check=True, capture_output=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            told = getattr(error, "stderr", b"") or str(error).encode()
            raise AssertionError(f"no small disk could be mounted ({told.decode().strip()}); needs root") from None
        try:
            train = dataclasses.replace(room.whole.experiment.train, keep=1000)
            job = room.job(
                f"{disk.name}/run", experiment=dataclasses.replace(room.whole.experiment, train=train), blind=not seen
            )
            [(status, _, errors)] = job.finish()
            assert status == 1, errors
            # Where a write fails that others wait for, TensorStore prints of those, and no one can keep it from that.
            [told] = [line for line in errors.splitlines() if line.startswith("train.py: ")]
            assert told.startswith(f"train.py: {job.workdir}: no space left on the disk; stopped"), errors
            assert ("a checkpoint takes about" in told) == seen, errors
            assert not seen or errors.count("\n") == 1, errors
            reached, kept = last_step(job.workdir), saved_step(job.workdir)
            assert (job.workdir / "metrics.jsonl").read_text().endswith("\n"), "half a row"
            trained = [row["step"] for row in metrics.read(job.workdir) if row["kind"] == "train"]
            assert trained == list(range(1, reached + 1))
            assert 0 < kept <= reached < train.steps, (kept, reached)
            assert checkpoints.load(job.workdir).step == kept
            subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True, capture_output=True)
            [(status, output, errors)] = job.finish()
            assert status == 0, errors
            require_continued(kept, output)
            room.require_same(job.workdir)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        return f"exit status 1 behind step {reached}, one line says so, checkpoint {kept} and all rows whole; with room it went on"

    return fault


def second_process(room: Room) -> str:
    """Another run in the same workdir."""
    job = room.job("twice")
    [process] = job.start()
    wait([process], lambda: last_step(job.workdir) >= 2)
    [(status, _, errors)] = dataclasses.replace(job, pause=0.0).finish()
    assert status == 2, errors
    assert f"is in use by process {process.pid} on " in errors
    assert errors.count("\n") == 1
    status, _, errors = ended(process)
    assert status == 0, errors
    room.require_same(job.workdir)
    return "exit status 2, one line that names the first one, which was not disturbed"


def two_processes(room: Room) -> Experiment:
    """The run over two processes, which share each batch."""
    return dataclasses.replace(room.whole.experiment, mesh=Mesh(data=2))


def whole_of_two(room: Room) -> Job:
    """The undisturbed run of two processes; made once."""
    job = room.job("two-whole", experiment=two_processes(room), processes=2)
    if not job.workdir.exists():
        for status, _, errors in together(job.start()):
            assert status == 0, errors
    return job


def together(processes: list[subprocess.Popen[str]], within: float = PATIENCE) -> list[tuple[int, str, str]]:
    """Waits for all of them."""
    return [ended(process, within) for process in processes]


def require_both_continue(job: Job, before: int) -> None:
    """That both processes, started again, go on from there and end."""
    found = together(job.start())
    assert [status for status, _, _ in found] == [0, 0], found
    require_continued(before, found[0][1])


def one_of_two_killed(victim: int) -> Callable[[Room], str]:
    def fault(room: Room) -> str:
        whole = whole_of_two(room)
        job = room.job(f"two-killed-{victim}", experiment=whole.experiment, processes=2)
        processes = job.start()
        wait(processes, lambda: last_step(job.workdir) >= 9)
        before, since = saved_step(job.workdir), time.monotonic()
        processes[victim].send_signal(signal.SIGKILL)
        status, _, errors = ended(processes[1 - victim], NO_HANG)
        took = time.monotonic() - since
        processes[victim].communicate()
        assert status != 0
        lines = [line for line in errors.splitlines() if line.startswith("train.py: ")]
        require_both_continue(job, before)
        room.require_same(job.workdir, whole.workdir)
        told = "one line" if lines else "ended by JAX's coordination service"
        return (
            f"the other one stopped after {took:.1f} s with exit status {status} ({told}); started again, both went on"
        )

    return fault


def one_of_two_asked(room: Room) -> str:
    whole = whole_of_two(room)
    job = room.job("two-asked", experiment=whole.experiment, processes=2)
    processes = job.start()
    wait(processes, lambda: last_step(job.workdir) >= 9)
    since = time.monotonic()
    processes[1].send_signal(signal.SIGTERM)
    found = together(processes, NO_HANG)
    took = time.monotonic() - since
    stopped = last_step(job.workdir)
    for status, _, errors in found:
        assert status == 128 + signal.SIGTERM, (status, errors)
        assert said_of_interrupt(stopped) in errors, errors
    assert saved_step(job.workdir) == stopped
    require_both_continue(job, stopped)
    room.require_same(job.workdir, whole.workdir)
    return f"both stopped behind step {stopped}, after {took:.1f} s; started again, both went on"


FAULTS: dict[str, Callable[[Room], str]] = {
    "SIGKILL": sigkill,
    "SIGTERM": asked_to_stop(signal.SIGTERM),
    "SIGINT": asked_to_stop(signal.SIGINT),
    "newest checkpoint corrupted": corrupted,
    "token file cut off": truncated_tokens,
    "picture cut off while training": truncated_picture,
    "NaN batch": nan_batch,
    "disk full, before a save": full_disk(seen=True),
    "disk full, inside a save": full_disk(seen=False),
    "second process in the workdir": second_process,
    "second of two processes killed": one_of_two_killed(1),
    "first of two processes killed": one_of_two_killed(0),
    "SIGTERM to one of two processes": one_of_two_asked,
}


STEPS = 60
PAUSE = 0.02  # seconds a step waits, so that there is something to hit


@contextlib.contextmanager
def room(kills: int, steps: int = STEPS, seed: int | None = None) -> Iterator[Room]:
    """A folder, and in it the run that nothing disturbs."""
    with tempfile.TemporaryDirectory() as folder:
        experiment = dataclasses.replace(
            small.experiment(pathlib.Path(folder, "library"), steps=steps, eval_every=7, checkpoint_every=4, keep=3),
            mesh=Mesh(data=1),
        )
        whole = Job(experiment, pathlib.Path(folder, "whole"), pause=PAUSE)
        [(status, _, errors)] = dataclasses.replace(whole, pause=0.0).finish()
        assert status == 0, errors
        yield Room(pathlib.Path(folder), kills, random.Random(seed), whole)


def attempt(name: str, room: Room) -> dict[str, Any]:
    """One fault: what came of it, whether all of it holds, and how long that took."""
    since = time.monotonic()
    try:
        seen, holds = FAULTS[name](room), True
    except Exception as error:
        seen, holds = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}", False
    return {"fault": name, "holds": holds, "seen": seen, "seconds": round(time.monotonic() - since, 1)}


def table(result: dict[str, Any]) -> str:
    """The outcomes in Markdown."""
    lines = ["| fault | what came of it | holds |", "|---|---|---|"]
    for row in result["rows"]:
        lines.append(f"| {row['fault']} | {row['seen']} | {'yes' if row['holds'] else '**no**'} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """All of them; exit status 1 where one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument(
        "--into", type=pathlib.Path, help="a Markdown file with a table below <!-- results/training/faults.json -->"
    )
    parser.add_argument("--only", default="", metavar="PATTERN", help="faults whose names match")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, help="of the random moments")
    given = parser.parse_args()
    before = json.loads(given.json.read_text())["rows"] if given.json and given.json.exists() else []
    found = {row["fault"]: row for row in before}  # what --only leaves out stays
    with room(given.kills, seed=given.seed) as here:
        for name in FAULTS:
            if re.search(given.only, name):
                found[name] = row = attempt(name, here)
                print("ok  " if row["holds"] else "FAIL", name, "|", row["seconds"], "s |", row["seen"], flush=True)
    done = [found[name] for name in FAULTS if name in found]
    result = {"jax": jax.__version__, "steps": STEPS, "kills": given.kills, "rows": done}
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    if given.into:
        text = given.into.read_text()
        marker = "<!-- results/training/faults.json -->\n\n"
        before, _, rest = text.partition(marker)
        after = rest.partition("\n\n")[2]
        given.into.write_text(f"{before}{marker}{table(result)}\n{after}")
    sys.exit(not all(row["holds"] for row in done))


if __name__ == "__main__":
    main()
