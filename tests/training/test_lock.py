"""One process to a workdir."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
import small_experiment as small

from prenorm_jax.models.config import ConfigError
from prenorm_jax.training import loop
from prenorm_jax.training.lock import locked

HOLDER = """
import pathlib, sys, time
from prenorm_jax.training.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_and_told_who_has_it(holder, tmp_path):
    experiment = small.experiment(tmp_path / "library")
    with pytest.raises(ConfigError) as error:
        loop.train(experiment, tmp_path)
    assert f"workdir: {tmp_path} is in use by process {holder.pid} on " in str(error.value)
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"library", "lock"}


def test_checkpoints_that_another_process_may_be_removing_are_not_read(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.checkpoints, "refuse_other_model", lambda *_: pytest.fail("read"))
    before = (tmp_path / "lock").read_text()
    with pytest.raises(ConfigError, match="is in use by process"):
        loop.train(small.experiment(tmp_path / "library"), tmp_path)
    assert (tmp_path / "lock").read_text() == before


def test_the_lock_of_a_killed_process_is_nobodys(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert str(holder.pid) in (tmp_path / "lock").read_text()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()


def test_another_workdir_is_free(holder, tmp_path):
    (tmp_path / "other").mkdir()
    with locked(tmp_path / "other"):
        pass
