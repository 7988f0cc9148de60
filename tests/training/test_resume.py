"""A run killed with SIGKILL, at random moments and inside a save, ends with the bits of the run that nothing stopped."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest
import small_experiment as small

from prenorm_jax.training import checkpoints, metrics
from prenorm_jax.training.experiment import as_tree

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 60
PROGRAM = """
import json, pathlib, sys
from prenorm_jax.training import experiment, loop
loop.train(experiment.read_experiment(json.loads(pathlib.Path(sys.argv[1]).read_text())), pathlib.Path(sys.argv[2]))
"""
TIMINGS = ("step_seconds", "tokens_per_second")


def start(settings: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen[str]:
    # The child sees one device, as a user does, and not the eight of these tests.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(settings), str(workdir)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def kill_when(process: subprocess.Popen[str], due: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not due():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def last_step(workdir: pathlib.Path) -> int:
    rows = metrics.read(workdir)
    return rows[-1]["step"] if rows else 0


def half_written(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Folders of a save under way."""
    return list(checkpoints.folder(workdir).glob("*tmp*"))


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(tmp_path):
    # A file a step, no pause between saves: a kill inside one is easy to time, and every resume starts somewhere else.
    experiment = small.experiment(tmp_path / "library", steps=STEPS, eval_every=7, checkpoint_every=4)
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(as_tree(experiment)))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(settings, whole)

    rng = random.Random()
    moments = sorted(rng.sample(range(6, STEPS - 6), 2))
    for moment in moments:
        kill_when(start(settings, killed), lambda moment=moment: last_step(killed) >= moment)
        # Killing takes place a moment after the row was seen; the run must not have ended before.
        assert last_step(killed) < STEPS, moments
    before = checkpoints.latest(killed)
    kill_when(start(settings, killed), lambda: bool(half_written(killed)) and last_step(killed) > moments[-1])
    left_behind = half_written(killed)
    assert before is not None
    output = finish(start(settings, killed))
    finish(undisturbed)

    assert "resuming at step" in output, output
    assert not half_written(killed)
    print(f"killed at {moments} and inside a save that left {[path.name for path in left_behind]}")
    expected, found = (checkpoints.load(workdir) for workdir in (whole, killed))
    assert expected.step == found.step == STEPS
    for x, y in zip(jax.tree.leaves(expected.params), jax.tree.leaves(found.params), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    rows = [
        [{key: value for key, value in row.items() if key not in TIMINGS} for row in metrics.read(workdir)]
        for workdir in (whole, killed)
    ]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[1] if row["kind"] == "train"] == list(range(1, STEPS + 1))
