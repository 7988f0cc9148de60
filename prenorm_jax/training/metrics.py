"""What a run says of itself: rows of metrics.jsonl, TensorBoard scalars, a progress bar, and the picture of the loss.

metrics.jsonl is the record: one JSON object a line, {"kind": "train" or "eval", "step": ..., ...}. A resumed run
drops the rows beyond the step it resumes from, so that every step stands there once.
"""

import json
import os
import pathlib
import types
from typing import Any

import rich.console
import rich.progress
import tensorboardX
from matplotlib.figure import Figure

Row = dict[str, Any]


class Metrics:
    """Writes rows to workdir/metrics.jsonl and workdir/tensorboard; a context manager."""

    def __init__(self, workdir: pathlib.Path, step: int) -> None:
        """Keeps the rows up to `step`, the step from which the run goes on."""
        self._path = workdir / "metrics.jsonl"
        _keep_up_to(self._path, step)
        self._lines = self._path.open("a")
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception: object) -> None:
        self._lines.close()
        self._board.close()

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Adds one row; it has reached the operating system when this returns, so that a killed process loses none."""
        self._lines.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)


def read(workdir: pathlib.Path) -> list[Row]:
    """The rows of workdir/metrics.jsonl, oldest first; none where there is no such file."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # a process killed inside a write leaves half a line, always the last one
    return rows


def _keep_up_to(path: pathlib.Path, step: int) -> None:
    rows = [row for row in read(path.parent) if row["step"] <= step]
    # Replaced as a whole: a kill right here leaves the old file or the new one.
    rewritten = path.with_suffix(".jsonl.part")
    rewritten.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(rewritten, path)


class Progress:
    """A progress bar on a terminal, plain lines elsewhere; a context manager."""

    def __init__(self, console: rich.console.Console, step: int, steps: int) -> None:
        self._console, self._steps = console, steps
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step"),
            rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(),
            rich.progress.TimeRemainingColumn(),
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

    def train(self, step: int, values: dict[str, float]) -> None:
        """Shows a logged step."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._bar.update(self._task, completed=step, description=text)
        if not self._console.is_terminal:
            self.say(f"step {step}/{self._steps}  {text}")

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def draw(rows: list[Row], path: pathlib.Path, title: str) -> None:
    """The loss of a run over its steps, training and held-out, and the accuracy where there is one, as a PNG."""
    train = [row for row in rows if row["kind"] == "train"]
    evals = [row for row in rows if row["kind"] == "eval"]
    scored = any("accuracy" in row for row in evals)
    figure = Figure(figsize=(10 if scored else 6, 4), layout="constrained")
    panels = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    for panel, name in zip(panels, ("loss", "accuracy"), strict=False):
        panel.plot(
            [row["step"] for row in train],
            [row[name] for row in train],
            color="tab:blue",
            alpha=0.5,
            label="training batch",
        )
        panel.plot(
            [row["step"] for row in evals], [row[name] for row in evals], "o-", color="tab:orange", label="held out"
        )
        panel.set(xlabel="step", ylabel="loss (nats)" if name == "loss" else name)
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_yscale("log")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
