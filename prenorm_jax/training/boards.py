"""Where rows go besides metrics.jsonl: TensorBoard's event files, and Weights & Biases where the experiment says so."""

import importlib
import pathlib
import time
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from prenorm_jax.models.config import ConfigError
from prenorm_jax.training.experiment import Experiment, as_tree


class Board(Protocol):
    """Somewhere to write rows to."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def of(workdir: pathlib.Path, step: int, experiment: Experiment) -> list[Board]:
    """The boards of an experiment, from `step` on."""
    found: list[Board] = [TensorBoard(workdir / "tensorboard", step)]
    if experiment.train.wandb != "off":
        found.append(WeightsAndBiases(workdir, experiment))
    return found


def require_libraries(experiment: Experiment) -> None:
    """Raises ConfigError where the experiment asks for a board whose library is missing."""
    if experiment.train.wandb != "off":
        _wandb()


class TensorBoard:
    """Scalars, written by the caller's own thread: that of tensorboardX's SummaryWriter dies of a full disk, and its queue then blocks."""

    def __init__(self, folder: pathlib.Path, step: int) -> None:
        """What other files of the folder hold beyond `step` is void from here on."""
        folder.mkdir(parents=True, exist_ok=True)
        # Two writers in one second would share a file.
        self._events = EventsWriter(str(folder / "events"), filename_suffix=f".{uuid.uuid4().hex[:8]}")
        self._events.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One event, on its way to the disk when this returns."""
        scalars = [Summary.Value(tag=f"{kind}/{name}", simple_value=value) for name, value in values.items()]
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        self._events.flush()

    def close(self) -> None:
        """No more events."""
        self._events.close()


class WeightsAndBiases:
    """A run of wandb in the workdir, of the same id whenever it is resumed; offline, `wandb sync` uploads it later."""

    def __init__(self, workdir: pathlib.Path, experiment: Experiment) -> None:
        name = workdir / "wandb_id"
        if not name.exists():
            name.write_text(uuid.uuid4().hex)
        settings = experiment.train
        self._run = _wandb().init(
            project=settings.wandb_project,
            id=name.read_text(),
            name=workdir.name,
            dir=str(workdir),
            mode=settings.wandb,
            resume="allow",
            config=as_tree(experiment),
        )
        self._run.define_metric("*", step_metric="step")  # a resumed run goes back in steps, and wandb's own never do

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Hands the values to wandb's process."""
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        """Waits until wandb has them."""
        self._run.finish()


def _wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ConfigError(
            "config.train.wandb: needs the library wandb; pip install wandb, or config.train.wandb=off"
        ) from None
