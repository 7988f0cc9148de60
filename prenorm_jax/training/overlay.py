"""The loss curves of several runs in one picture, and whether the variants' lie within what another seed does to Pre-LN.

python -m prenorm_jax.training.overlay --out=FILE WORKDIR WORKDIR ...      writes FILE.png, FILE.json and FILE.md

The runs train one model on one data set for as many steps, in any variants, coordinates and seeds. A variant is held against the Pre-LN
run of its own seed; how far apart two Pre-LN runs of different seeds end is the spread. Without both there is no verdict.
One pair of runs is one draw of what roundings and seeds do: beside the verdicts stand root mean squares over all runs and all pairs.
"""

import argparse
import collections
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from prenorm_jax.models.config import NORMS, ConfigError
from prenorm_jax.training import charts, metrics
from prenorm_jax.training.experiment import COORDINATES, Experiment, as_tree, differences, read_experiment
from prenorm_jax.training.results import write_whole

# Fields in which runs that are compared may differ.
BESIDE: dict[str, tuple[str, ...]] = {
    "data": ("seed", "threads", "workers"),
    "optimizer": (),
    "train": (
        *(
            "seed",
            "coordinates",
            "accumulate",
            "log_every",
            "eval_every",
            "eval_batch_size",
            "checkpoint_every",
            "keep",
        ),
        *("keep_best", "best_by", "restart_optimizer", "skip_nonfinite", "profile", "wandb", "wandb_project"),
    ),
}
COLOURS = {"pre_ln": "#4c4c4c", "pre_rmsnorm": "#1f77b4", "reflect": "#2ca02c", "drop": "#98df8a"}


def read(workdirs: Sequence[pathlib.Path]) -> dict[str, Any]:
    """What the runs recorded, and how far they are apart; see `compared`.

    Raises: ConfigError for a folder that is no finished run, and for runs that can't be compared.
    """
    runs, first = [], None
    for workdir in workdirs:
        experiment = _experiment(workdir)
        first = first or experiment
        _require_comparable(workdir, experiment, first)
        rows = metrics.read(workdir)
        evals = [row for row in rows if row["kind"] == "eval"]
        if not evals or evals[-1]["step"] != experiment.train.steps:
            raise ConfigError(
                f"{workdir}: no evaluation at step {experiment.train.steps}; allowed: runs that have ended"
            )
        model, settings = experiment.model, experiment.train
        runs.append(
            {
                "workdir": str(workdir),
                "norm": model.norm,
                "basis": model.basis if model.norm == "pre_crmsnorm" else None,
                "coordinates": settings.coordinates,
                "seed": [settings.seed, experiment.data.seed],
                "steps": settings.steps,
                "last": {name: value for name, value in evals[-1].items() if name not in ("kind", "step")},
                "eval": [[row["step"], row["loss"]] for row in evals],
                "train": [[row["step"], row["loss"]] for row in rows if row["kind"] == "train"],
            }
        )
    assert first is not None
    runs.sort(key=lambda run: (NORMS.index(run["norm"]), run["coordinates"] != "pre_ln", run["seed"]))
    return {"data": first.data.name, **compared(runs)}


def compared(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Adds to each run its distances from the Pre-LN run of its seed, and whether they are within those of the Pre-LN runs from each other.

    Distances are of the last held-out losses ("difference", "within") and, in the mean over the evaluations, of the curves
    ("curve_difference", "curve_within"): where runs part as roundings do, the last loss is one draw, and the curve is many.
    "seeds_rms" is the root mean square of what the last losses of two Pre-LN runs differ by, over all pairs; "variants_rms" that of the
    variants' distances, by coordinates.

    >>> run = {"coordinates": "pre_ln", "basis": None, "train": []}
    >>> losses = {("pre_ln", 0): 1.00, ("pre_ln", 1): 1.02, ("pre_rmsnorm", 0): 1.01}
    >>> runs = [{**run, "norm": n, "seed": s, "last": {"loss": x}, "eval": [[1, x]]} for (n, s), x in losses.items()]
    >>> found = compared(runs)
    >>> round(found["spread"], 3), [each["within"] for each in found["runs"]]
    (0.02, [None, None, True])
    """
    pre_ln = [run for run in runs if run["norm"] == "pre_ln"]
    pairs = [(a, b) for a in pre_ln for b in pre_ln if a["seed"] < b["seed"]]
    spread = max((abs(_difference(a, b)) for a, b in pairs), default=None)
    curve_spread = max((_curve_difference(a, b) for a, b in pairs), default=None)
    found = []
    for run in runs:
        against = next((other for other in pre_ln if other["seed"] == run["seed"]), None)
        held = against is not None and run["norm"] != "pre_ln"
        difference = _difference(run, against) if held and against else None
        curve_difference = _curve_difference(run, against) if held and against else None
        found.append(
            {
                **run,
                "difference": difference,
                "curve_difference": curve_difference,
                "within": None if difference is None or spread is None else abs(difference) <= spread,
                "curve_within": None
                if curve_difference is None or curve_spread is None
                else curve_difference <= curve_spread,
            }
        )
    distances = {
        coordinates: [
            run["difference"] for run in found if run["coordinates"] == coordinates and run["difference"] is not None
        ]
        for coordinates in COORDINATES
    }
    return {
        "spread": spread,
        "curve_spread": curve_spread,
        "seeds_rms": _root_mean_square([_difference(a, b) for a, b in pairs]),
        "variants_rms": {name: _root_mean_square(differences) for name, differences in distances.items()},
        "runs": found,
    }


def table(result: dict[str, Any]) -> str:
    """The comparison in Markdown."""
    names = [name for name in ("loss", "accuracy", "bits_per_byte", "perplexity") if name in result["runs"][0]["last"]]
    heads = [
        "run",
        *[f"held-out {name}" for name in names],
        "loss less Pre-LN's of its seed",
        "within the seeds' spread",
        "curves apart",
        "within the seeds' spread",
    ]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for run in result["runs"]:
        values = [label(run), *[f"{run['last'][name]:.4f}" for name in names]]
        lines.append(f"| {' | '.join([*values, *_distances(run)])} |")
    spread = (
        f"Pre-LN seeds end up to {result['spread']:.4f} apart, their curves {result['curve_spread']:.4f} in the mean over evaluations."
        if result["spread"] is not None
        else "Without two Pre-LN runs of different seeds there is no spread, and no verdict."
    )
    if result["spread"] is not None:
        variants = [
            f"{value:.4f} ({name} coordinates)" for name, value in result["variants_rms"].items() if value is not None
        ]
        spread += f" Root mean square: two seeds end {result['seeds_rms']:.4f} apart"
        spread += f", variants {' and '.join(variants)} from Pre-LN of their seed." if variants else "."
    return "\n".join([*lines, "", spread, ""])


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
    """Training and held-out loss, and the held-out loss less that of the Pre-LN run of the same seed, as a PNG."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    train, held_out, apart = figure.subplots(1, 3)
    pre_ln = {str(run["seed"]): dict(run["eval"]) for run in result["runs"] if run["norm"] == "pre_ln"}
    seeds = collections.defaultdict(list)
    for run in result["runs"]:
        seeds[_variant(run)].append(_seed(run))
    for run in result["runs"]:
        variant = _variant(run)
        first = seeds[variant][0] == _seed(run)  # one line of the legend for all seeds of a variant
        style = {
            "color": COLOURS[run["basis"] or run["norm"]],
            "linestyle": "-" if run["coordinates"] == "pre_ln" else "--",
            "linewidth": 1.2 if first else 0.7,
            "label": f"{variant}, seed {', '.join(seeds[variant])}" if first else None,
        }
        for panel, name in ((train, "train"), (held_out, "eval")):
            if run[name]:
                panel.plot(*zip(*run[name], strict=True), **style, alpha=0.5 if panel is train else 1.0)
        other = next(
            (curve for seed, curve in pre_ln.items() if run["norm"] != "pre_ln" and seed == str(run["seed"])), None
        )
        if run["norm"] == "pre_ln" and pre_ln and str(run["seed"]) != next(iter(pre_ln)):
            other = next(iter(pre_ln.values()))
        if other:
            steps = [(step, loss - other[step]) for step, loss in run["eval"] if step in other]
            apart.plot(*zip(*steps, strict=True), **style)
    apart.axhline(0, color="black", linewidth=0.6)
    for panel, title in (
        (train, "training batch"),
        (held_out, "held out"),
        (apart, "held out, less Pre-LN of its seed (of the first)"),
    ):
        panel.set(xlabel="step", ylabel="loss (nats)", title=title)
        panel.grid(alpha=0.3)
    held_out.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def label(run: dict[str, Any]) -> str:
    """A run's name: variant, coordinates, seed."""
    return f"{_variant(run)}, seed {_seed(run)}"


def _variant(run: dict[str, Any]) -> str:
    name = f"{run['norm']}-{run['basis']}" if run["basis"] else run["norm"]
    return f"{name}, {run['coordinates']} coordinates"


def _seed(run: dict[str, Any]) -> str:
    seeds = run["seed"] if isinstance(run["seed"], list) else [run["seed"]]
    return "/".join(map(str, dict.fromkeys(seeds)))


def _experiment(workdir: pathlib.Path) -> Experiment:
    path = workdir / "config.json"
    try:
        return read_experiment(json.loads(path.read_text()))
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(f"{workdir}: no run of train.py ({error})") from None


def _require_comparable(workdir: pathlib.Path, experiment: Experiment, first: Experiment) -> None:
    try:
        charts.refuse_other_model(first.model, experiment.model)
    except ConfigError as error:
        raise ConfigError(
            f"{workdir}: another model than the first run's ({error}); allowed: variants of one"
        ) from None
    one, other = _what_is_learnt(first), _what_is_learnt(experiment)
    for difference in differences(one, other):
        raise ConfigError(
            f"{workdir}: {difference}; allowed: what the first run has, since no other can be compared with it"
        )


def _what_is_learnt(experiment: Experiment) -> dict[str, Any]:
    """Of an experiment, what two runs have to share: the rest is their model's form, their seeds, and what they do beside learning."""
    tree = as_tree(experiment)
    return {
        section: {name: value for name, value in tree[section].items() if name not in beside}
        for section, beside in BESIDE.items()
    }


def _difference(run: dict[str, Any], other: dict[str, Any]) -> float:
    return float(run["last"]["loss"] - other["last"]["loss"])


def _root_mean_square(values: Sequence[float]) -> float | None:
    return float(np.sqrt(np.mean(np.square(values)))) if values else None


def _curve_difference(run: dict[str, Any], other: dict[str, Any]) -> float:
    there = dict(map(tuple, other["eval"]))
    return float(np.mean([abs(loss - there[step]) for step, loss in run["eval"] if step in there]))


def _distances(run: dict[str, Any]) -> list[str]:
    """A table's cells: how far the ends are apart, whether that is within the spread, and the same of the curves."""
    verdict = {None: "", True: "yes", False: "no"}
    ends, curves = run["difference"], run["curve_difference"]
    return [
        "" if ends is None else f"{ends:+.4f}",
        verdict[run["within"]],
        "" if curves is None else f"{curves:.4f}",
        verdict[run["curve_within"]],
    ]


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0; 1 where a variant ends outside the spread, 2 for what can't be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path, metavar="WORKDIR")
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="FILE", help="without an ending")
    given = parser.parse_args(arguments)
    try:
        result = read(given.workdirs)
    except ConfigError as error:
        print(f"prenorm_jax.training.overlay: {error}", file=sys.stderr)
        return 2
    try:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(given.out.with_name(f"{given.out.name}.json"), json.dumps(result) + "\n")
        write_whole(given.out.with_name(f"{given.out.name}.md"), table(result))
        draw(result, given.out.with_name(f"{given.out.name}.png"))
    except OSError as error:
        print(f"prenorm_jax.training.overlay: cannot write {given.out}: {error.strerror}", file=sys.stderr)
        return 2
    print(table(result))
    return int(any(run["within"] is False for run in result["runs"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
