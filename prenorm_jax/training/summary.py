"""What came of a run, from what it wrote: summary.json, summary.md and curves.png in its workdir."""

import io
import json
import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from prenorm_jax.training import keeping, metrics
from prenorm_jax.training.experiment import Experiment
from prenorm_jax.training.results import write_whole

PACES = ("step_seconds", "tokens_per_second", "images_per_second", "mfu")


def write(workdir: pathlib.Path, experiment: Experiment) -> dict[str, Any]:
    """Writes the three files, summary.json last, and returns what that holds: where it is, all are."""
    rows = metrics.read(workdir)
    found = of(rows, experiment)
    coordinates = f"{experiment.train.coordinates} coordinates"
    write_whole(workdir / "curves.png", draw(rows, f"{experiment.data.name}, {experiment.model.norm}, {coordinates}"))
    write_whole(workdir / "summary.md", table(found))
    write_whole(workdir / "summary.json", json.dumps(found, indent=2) + "\n")
    return found


def of(rows: list[metrics.Row], experiment: Experiment) -> dict[str, Any]:
    """The last and the best evaluation, the medians of the pace, and how many steps were skipped."""
    evals = [_values(row) for row in rows if row["kind"] == "eval"]
    trains = [row for row in rows if row["kind"] == "train"]
    settings = experiment.train
    by = settings.best_by
    order = sorted(evals, key=lambda row: keeping.score(row, by), reverse=True)
    paces = {name: [row[name] for row in trains if name in row] for name in PACES}
    return {
        "data": experiment.data.name,
        "norm": experiment.model.norm,
        "basis": experiment.model.basis if experiment.model.norm == "pre_crmsnorm" else None,
        "coordinates": settings.coordinates,
        "seed": settings.seed,
        "steps": settings.steps,
        "last": evals[-1] if evals else None,
        "best": order[0] if order else None,
        "best_by": by,
        "skipped_steps": sum(row["kind"] == "skipped" for row in rows),
        "median": {name: float(np.median(values)) for name, values in paces.items() if values},
    }


def table(found: dict[str, Any]) -> str:
    """A summary in Markdown."""
    names = [name for name in found["last"] or {} if name != "step"]
    lines = [
        f"{found['data']}, {found['norm']}{f' ({basis})' if (basis := found['basis']) else ''}, {found['coordinates']} coordinates, "
        f"seed {found['seed']}, {found['steps']} steps, {found['skipped_steps']} of them skipped",
        "",
        f"| held out | step | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for title, row in (("last", found["last"]), (f"best by {found['best_by']}", found["best"])):
        if row:
            lines.append(f"| {title} | {row['step']} | {' | '.join(f'{row[name]:.5g}' for name in names)} |")
    pace = ", ".join(f"{name} {value:.4g}" for name, value in found["median"].items())
    return "\n".join([*lines, "", f"Medians of the logged steps: {pace or 'none'}.", ""])


PANELS = {"loss": "loss (nats)", "accuracy": "accuracy", "learning_rate": "learning rate", "grad_norm": "gradient norm"}


def draw(rows: list[metrics.Row], title: str) -> bytes:
    """Loss, accuracy where there is one, learning rate and gradient norm of a run over its steps, as a PNG."""
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("train", "eval")}
    names = [name for name in PANELS if any(name in row for row in rows)]
    figure = Figure(figsize=(4.5 * max(1, len(names)), 3.6), layout="constrained")
    for panel, name in zip(figure.subplots(1, max(1, len(names)), squeeze=False)[0], names, strict=False):
        for kind, style in (
            ("train", {"color": "tab:blue", "alpha": 0.5}),
            ("eval", {"color": "tab:orange", "marker": "o"}),
        ):
            points = [(row["step"], row[name]) for row in kinds[kind] if name in row]
            if points:
                panel.plot(
                    *zip(*points, strict=True), label="training batch" if kind == "train" else "held out", **style
                )
        panel.set(xlabel="step", ylabel=PANELS[name], yscale="log" if name in ("loss", "grad_norm") else "linear")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    return picture.getvalue()


def _values(row: metrics.Row) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "kind"}
