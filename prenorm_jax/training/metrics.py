"""What a run says of itself while it runs: rows of metrics.jsonl, and the same for TensorBoard and Weights & Biases; lines, and a bar.

metrics.jsonl is the record: one JSON object a line, {"kind": "train" or "eval", "step": ..., ...}. A resumed run
drops the rows beyond the step it resumes from, so that every step stands there once.
"""

import contextlib
import json
import os
import pathlib
import types
from collections.abc import Mapping
from typing import Any

import rich.console
import rich.progress

from prenorm_jax.training import boards
from prenorm_jax.training.experiment import Experiment
from prenorm_jax.training.results import write_whole

Row = dict[str, Any]


class Metrics:
    """Writes rows to workdir/metrics.jsonl, workdir/tensorboard and where else the experiment says; a context manager."""

    def __init__(self, workdir: pathlib.Path, step: int, experiment: Experiment) -> None:
        """Keeps the rows up to `step`, the step from which the run goes on."""
        path = workdir / "metrics.jsonl"
        _keep_up_to(path, step)
        self._lines = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._boards = boards.of(workdir, step, experiment)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._lines)
        for board in self._boards:
            board.close()

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Adds one row; it has reached the operating system when this returns, so that a killed process loses none."""
        _append(self._lines, json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for board in self._boards:
            board.write(kind, step, values)


class Nowhere(Metrics):
    """What a process writes that is not the first of its run: nothing."""

    def __init__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Writes nothing."""


def read(workdir: pathlib.Path) -> list[Row]:
    """The rows of workdir/metrics.jsonl, oldest first, without lines that are none; none where there is no such file."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        # A process killed inside a write leaves half a line.
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int) and "kind" in row:
                rows.append(row)
    return rows


def _append(file: int, line: str) -> None:
    """All of the line, or, where the disk is full in the middle of it, nothing."""
    data, end = line.encode(), os.fstat(file).st_size
    written = 0
    try:
        while written < len(data):
            written += os.write(file, data[written:])
    except OSError:
        os.ftruncate(file, end)
        raise


def _keep_up_to(path: pathlib.Path, step: int) -> None:
    rows = [row for row in read(path.parent) if row["step"] <= step]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


class Progress:
    """A progress bar on a terminal, plain lines elsewhere; a context manager."""

    def __init__(self, console: rich.console.Console, step: int, steps: int) -> None:
        self._console, self._steps = console, steps
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step"),
            rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=step)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._bar.stop()

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Shows a logged step."""
        text = line(values, self._steps - step)
        self._bar.update(self._task, completed=step, description=text)
        if not self._console.is_terminal:
            self.say(f"step {step}/{self._steps}  {text}")

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


# Of a row's values, how each is called and written; in this order.
WORDS: dict[str, str] = {
    "loss": "loss {:.4f}",
    "accuracy": "accuracy {:.4f}",
    "learning_rate": "lr {:.3g}",
    "grad_norm": "gradient norm {:.3g}",
    "main_branch_mean": "main-branch mean {:.1e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "images_per_second": "{:,.0f} images/s",
    "mfu": "MFU {:.1%}",
}


def line(values: Mapping[str, float], steps_left: int) -> str:
    """A row as people read it, with the time that is left at its pace.

    >>> line({"loss": 2.5, "learning_rate": 1e-3, "step_seconds": 0.5, "tokens_per_second": 12345.6}, 7300)
    'loss 2.5000  lr 0.001  12,346 tokens/s  1:00:50 left'
    """
    parts = [words.format(values[name]) for name, words in WORDS.items() if name in values]
    minutes, seconds = divmod(round(steps_left * values["step_seconds"]), 60)
    hours, minutes = divmod(minutes, 60)
    return "  ".join([*parts, f"{hours}:{minutes:02}:{seconds:02} left"])
