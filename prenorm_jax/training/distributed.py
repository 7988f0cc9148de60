"""Several processes that train one model: how they find each other.

    srun ... python train.py ...                        SLURM: from its environment
    python train.py ... on every host of a TPU pod      Cloud TPU: from its environment
    python train.py --coordinator=HOST:PORT --processes=N --process=I ...      anywhere: I from 0 to N - 1, HOST that of process 0

The three flags may also be environment variables, JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. What is found is used;
`--distributed` says where to look, or `off`. jax.distributed does the rest.
"""

import argparse
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from prenorm_jax.models.config import ConfigError, require
from prenorm_jax.training.experiment import differences

KINDS = ("auto", "off", "plain", "slurm", "tpu")
# After how long without a sign of life one of the processes counts as lost, and the others end.
HEARTBEAT_SECONDS = 40
VARIABLES = {"coordinator": "JAX_COORDINATOR_ADDRESS", "processes": "JAX_NUM_PROCESSES", "process": "JAX_PROCESS_ID"}


@dataclasses.dataclass(frozen=True)
class Start:
    """How this process joins the others: what `jax.distributed.initialize` is called with.

    kind: off, plain, slurm or tpu; the other three fields are of plain alone.
    """

    kind: str
    coordinator: str = ""
    processes: int = 1
    process: int = 0


def add_flags(flags: argparse.ArgumentParser) -> None:
    """The flags that `read` reads."""
    flags.add_argument("--distributed", default="auto", metavar="|".join(KINDS), help="where the processes are listed")
    flags.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, on a free port")
    flags.add_argument("--processes", metavar="N", help="how many there are")
    flags.add_argument("--process", metavar="I", help="which one this is, from 0")
    flags.add_argument("--start-seconds", type=int, default=300, help="to wait for the others; default %(default)s")


def read(given: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Start:
    """What flags and environment say. Raises ConfigError for what does not fit together.

    >>> flags = argparse.ArgumentParser()
    >>> add_flags(flags)
    >>> read(flags.parse_args(["--coordinator=a:1234", "--processes=2", "--process=1"]), {})
    Start(kind='plain', coordinator='a:1234', processes=2, process=1)
    >>> read(flags.parse_args([]), {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"})
    Start(kind='slurm', coordinator='', processes=1, process=0)
    """
    kind = given.distributed
    require(kind in KINDS, "--distributed", kind, ", ".join(KINDS))
    plain = {flag: getattr(given, flag) or environment.get(name, "") for flag, name in VARIABLES.items()}
    if kind == "auto":
        kind = _found(any(plain.values()), environment)
    elif kind != "plain":
        flag = next((flag for flag in VARIABLES if getattr(given, flag)), None)
        require(flag is None, f"--{flag}", getattr(given, flag or "", None), f"nothing beside --distributed={kind}")
    if kind != "plain":
        return Start(kind)
    for flag, value in plain.items():
        if not value:
            rest = ", ".join(f"--{other}" for other in plain)
            raise ConfigError(f"--{flag}: missing; allowed: {rest} together (or ${', $'.join(VARIABLES.values())})")
    host, _, port = plain["coordinator"].rpartition(":")
    require(bool(host) and port.isdigit(), "--coordinator", plain["coordinator"], "HOST:PORT")
    require(plain["processes"].isdigit() and plain["processes"] != "0", "--processes", plain["processes"], "1 or more")
    processes = int(plain["processes"])
    ok = plain["process"].isdigit() and int(plain["process"]) < processes
    require(ok, "--process", plain["process"], f"0 to {processes - 1} for --processes={processes}")
    return Start("plain", plain["coordinator"], processes, int(plain["process"]))


def _found(plain: bool, environment: Mapping[str, str]) -> str:
    """What an environment says without being asked: several tasks of a SLURM step, several workers of a TPU pod."""
    if plain:
        return "plain"
    if "SLURM_PROCID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return "slurm"
    return "tpu" if "," in environment.get("TPU_WORKER_HOSTNAMES", "") else "off"


def start(how: Start, seconds: int = 300) -> None:
    """Joins the other processes, before anything else is asked of JAX.

    Where they can't be found in time this process ends, with one line on stderr and exit status 2: JAX's own way out is to abort.
    Raises ConfigError where what the environment says can't be.
    """
    if how.kind == "off":
        return
    arguments: dict[str, Any] = (
        {"coordinator_address": how.coordinator, "num_processes": how.processes, "process_id": how.process}
        if how.kind == "plain"
        else {"cluster_detection_method": "slurm"}
        if how.kind == "slurm"
        else {}
    )
    watch = threading.Timer(seconds, _give_up, (how, seconds))
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=seconds + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"--distributed={how.kind}: {line}; allowed: off, or what JAX can start from") from None
    finally:
        watch.cancel()


def require_same(said: Mapping[str, Any]) -> None:
    """Refuses processes that don't say the same: each would train a model of its own, and they would meet in one run.

    Raises: ConfigError, in all of them, naming what the first that differs says otherwise than process 0.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(said).encode()
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    rows = multihost_utils.process_allgather(np.frombuffer(text.ljust(longest), np.uint8))
    first, *others = (json.loads(bytes(row)) for row in np.asarray(rows))
    for process, other in enumerate(others, 1):
        for line in differences(first, other, ""):
            raise ConfigError(
                f"{line[1:]} (process 0 -> {process}); allowed: one command and the same data for all processes"
            )


def _give_up(how: Start, seconds: int) -> None:
    where = f" at {how.coordinator}" if how.kind == "plain" else ""
    print(
        f"--distributed={how.kind}: the processes did not find each other{where} in {seconds} s; "
        "allowed: as many of them as announced, with different numbers, all of which reach the first one's port",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)
