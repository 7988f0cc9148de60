"""Two processes over loopback train as one does; what does not fit together is one line."""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from trajectories import RUNS, losses

from prenorm_jax.models.config import ConfigError
from prenorm_jax.training import distributed

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = pathlib.Path(__file__).with_name("trajectories.py")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(arguments: list[str], devices: int, program: pathlib.Path = PROGRAM) -> subprocess.Popen[str]:
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    return subprocess.Popen(
        [sys.executable, str(program), *arguments],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# The mesh's axes within a process, and across both: then both feed the same examples.
@pytest.mark.slow
@pytest.mark.parametrize(("run", "mesh"), [("vit", "2 2 1"), ("gpt", "1 1 2")])
def test_two_processes_give_the_losses_of_one(run, mesh):
    devices = int(np.prod([int(size) for size in mesh.split()])) // 2
    coordinator = f"127.0.0.1:{free_port()}"
    both = [
        start([run, *mesh.split(), f"--coordinator={coordinator}", "--processes=2", f"--process={index}"], devices)
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in both]
    for process, (_, errors) in zip(both, outputs, strict=True):
        assert process.returncode == 0, errors
    first, second = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
    assert first == second
    np.testing.assert_allclose(first, losses(*RUNS[run])[0], rtol=1e-6)


@pytest.mark.slow
def test_processes_that_were_given_something_else_are_refused_in_all_of_them(tmp_path):
    """Not one workdir, here; each would wait for the other's checkpoint."""
    coordinator = f"127.0.0.1:{free_port()}"
    flags = [f"--config={ROOT / 'configs/digits.py'}", "--config.compare.enabled=False", f"--coordinator={coordinator}"]
    flags += ["--processes=2", "--config.mesh.data=2"]
    commands = [[*flags, f"--process={index}", f"--workdir={tmp_path / str(index)}"] for index in range(2)]
    both = [start(arguments, 1, ROOT / "train.py") for arguments in commands]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2
        assert f"train.py: --workdir: {tmp_path / '0'} -> {tmp_path / '1'} (process 0 -> 1); allowed: one" in errors
    assert list(tmp_path.iterdir()) == []


def read(arguments: list[str], environment: dict[str, str]) -> distributed.Start:
    flags = argparse.ArgumentParser()
    distributed.add_flags(flags)
    return distributed.read(flags.parse_args(arguments), environment)


PLAIN = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ([], {}, distributed.Start("off")),
        ([], PLAIN, distributed.Start("plain", "host:1", 4, 3)),
        (["--process=0"], PLAIN, distributed.Start("plain", "host:1", 4, 0)),
        (["--distributed=off"], PLAIN, distributed.Start("off")),
        ([], {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, distributed.Start("off")),
        ([], {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, distributed.Start("slurm")),
        ([], {"TPU_WORKER_HOSTNAMES": "a,b"}, distributed.Start("tpu")),
    ],
)
def test_processes_are_found_in_flags_and_environment(arguments, environment, expected):
    assert read(arguments, environment) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--distributed=mpi"], "--distributed: got 'mpi'; allowed: auto, off, plain, slurm, tpu"),
        (["--distributed=plain"], "--coordinator: missing; allowed: --coordinator, --processes, --process together"),
        (["--distributed=slurm", "--process=0"], "--process: got '0'; allowed: nothing beside --distributed=slurm"),
        (["--coordinator=host", "--processes=2", "--process=0"], "--coordinator: got 'host'; allowed: HOST:PORT"),
        (["--coordinator=h:1", "--processes=0", "--process=0"], "--processes: got '0'; allowed: 1 or more"),
        (
            ["--coordinator=h:1", "--processes=2", "--process=2"],
            "--process: got '2'; allowed: 0 to 1 for --processes=2",
        ),
    ],
)
def test_what_does_not_fit_together_is_one_line(arguments, message):
    with pytest.raises(ConfigError) as error:
        read(arguments, {})
    assert str(error.value).startswith(message)


@pytest.mark.slow
def test_a_process_that_finds_no_other_says_so():
    arguments = [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", "--process=0", "--start-seconds=3"]
    process = start(["vit", "2", "1", "1", *arguments], 1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"did not find each other at {arguments[0].partition('=')[2]} in 3 s" in errors.splitlines()[-1], errors
