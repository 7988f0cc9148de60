"""What the command `prenorm` shows in a terminal."""

import contextlib
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.markup import escape
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
    converted = sum(norm["converted"] for norm in plan.norms.values())
    reasons = Counter(norm["reason"] for norm in plan.norms.values() if norm["reason"])
    rows = [
        ("LayerNorms that RMSNorm may replace", f"{converted} of {len(plan.norms)}"),
        *((f"  {count} stay{'s' * (count == 1)}", reason) for reason, count in reasons.items()),
        ("tensors recentered", f"{len(plan.recenters)} of {len(plan.tensors)}"),
        ("readers that took a norm's weight and bias", str(len(plan.folds))),
        *((f"input of {module}", f"recenter it with RMSNorm: {reason}") for module, reason in plan.recentered.items()),
    ]
    if plan.untied:
        rows.append((plan.untied[0], f"untied from {plan.untied[1]}"))
    show(f"{path}: {plan.model_type}, pre_rmsnorm", rows)


def show(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Two columns under a title, on the output stream."""
    made = Table(title=escape(title), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        made.add_row(*map(escape, row))
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(made)
