"""What the command `prenorm` shows in a terminal."""

import contextlib
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from prenorm_jax.interop.plan import Plan


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar over `total` bytes, on the error stream; what it yields is told each tensor that is done and its bytes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("converting", total=total)
        yield lambda name, size: bar.update(task, advance=size, description=name[-40:])


def print_conversion(path: pathlib.Path, plan: Plan) -> None:
    """What was done to a checkpoint."""
    console = Console(soft_wrap=True)
    rows = [
        ("LayerNorms that RMSNorm may replace", f"{_converted(plan)} of {len(plan.norms)}"),
        *((f"  {count} stay", reason) for reason, count in _reasons(plan).items()),
        ("tensors recentered", f"{len(plan.recenters)} of {len(plan.tensors)}"),
        ("readers that took a norm's weight and bias", str(len(plan.folds))),
        *(
            (f"input of {module}", f"to be recentered with RMSNorm: {reason}")
            for module, reason in plan.recentered.items()
        ),
    ]
    if plan.untied:
        rows.append((f"{plan.untied[0]}", f"untied from {plan.untied[1]}"))
    console.print(table(f"{path}: {plan.model_type}, pre_rmsnorm", rows))


def table(title: str, rows: list[tuple[str, str]]) -> Table:
    """Two columns under a title."""
    made = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        made.add_row(*row)
    return made


def _converted(plan: Plan) -> int:
    return sum(norm["converted"] for norm in plan.norms.values())


def _reasons(plan: Plan) -> Counter[str]:
    return Counter(norm["reason"] for norm in plan.norms.values() if norm["reason"])
