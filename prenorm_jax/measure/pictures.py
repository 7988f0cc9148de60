"""The pictures that go with the tables: step-time bars, the roofline, errors by dtype, the main branch by layer."""

import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from prenorm_jax.training.counts import DEVICES

COLOURS = {
    "pre_ln": "#4c4c4c",
    "pre_ln again": "#9a9a9a",
    "pre_rmsnorm": "#1f77b4",
    "pre_crmsnorm-reflect": "#2ca02c",
    "pre_crmsnorm-drop": "#98df8a",
    "no_norm": "#d9b38c",
}


def step_times(times: Mapping[str, Mapping[str, Any]], path: pathlib.Path, title: str) -> None:
    """Bars of the ratio to pre_ln with the range over windows, a panel for each kind of work."""
    figure = Figure(figsize=(4.2 * len(times), 3.6), layout="constrained")
    for axes, (work, rows) in zip(
        np.atleast_1d(figure.subplots(1, len(times), sharey=True)), times.items(), strict=True
    ):
        ratios = np.array([row["ratio"] for row in rows.values()])
        spread = np.abs(ratios[:, 1:].T - ratios[:, 0])
        axes.barh(list(rows), ratios[:, 0], xerr=spread, color=[COLOURS[name] for name in rows], capsize=3)
        for position, row in enumerate(rows.values()):
            milliseconds = 1e3 * np.median(row["windows_s"])
            axes.text(
                0.02,
                position,
                f"{milliseconds:.2f} ms",
                va="center",
                color="white",
                fontsize=8,
                transform=axes.get_yaxis_transform(),
            )
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(work, fontsize=10)
        axes.set_xlabel("step time / pre_ln")
    figure.axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)


def study(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """Bars of the ratio to pre_ln with the range over windows, a group for each work of a study."""
    entries = result["entries"]
    forms = [form for form in entries[0]["rows"] if form != "pre_ln"]
    figure = Figure(figsize=(max(6.0, 1.1 * len(entries) + 2), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(forms)
    for index, form in enumerate(forms):
        ratios = np.array([entry["rows"][form]["ratio"] for entry in entries])
        spread = np.abs(ratios[:, 1:].T - ratios[:, 0])
        places = np.arange(len(entries)) + (index + 0.5) * width - 0.4
        axes.bar(
            places, ratios[:, 0], width, yerr=spread, label=form, color=COLOURS[form], error_kw={"elinewidth": 0.8}
        )
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    least = min(row["ratio"][1] for entry in entries for row in entry["rows"].values())
    axes.set_ylim(bottom=max(0.0, least - 0.05))
    axes.set_xticks(range(len(entries)), [entry["key"].replace(", ", "\n") for entry in entries], fontsize=6)
    axes.set_ylabel("step time / pre_ln")
    axes.legend(fontsize=7, ncols=3)
    axes.set_title(f"{result['study']}, {result['device']}, jax {result['versions']['jax']}", fontsize=9)
    figure.savefig(path, dpi=130)


def roofline(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """Achieved TFLOP/s against the operations that each byte of the least traffic pays for, under the device's roofs where they are known:
    the vendor's dashed, what a large product and a large copy reach solid."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    intensities = []
    for form in result["entries"][0]["rows"]:
        rows = [entry["rows"][form] for entry in result["entries"]]
        x = [row["flops"]["causal"] / row["bytes"] for row in rows]
        y = [row["flops"]["causal"] / np.median(row["windows_s"]) / 1e12 for row in rows]
        axes.scatter(x, y, s=14, color=COLOURS[form], label=form)
        intensities += x
    device = DEVICES.get(result["device"])
    if device:
        span = np.geomspace(min(intensities) / 2, max(*intensities, 400.0) * 2)
        axes.plot(span, np.minimum(device.product_flops, device.copy_bytes * span) / 1e12, color="black", linewidth=1)
        axes.plot(span, np.minimum(device.peak_flops, device.peak_bytes * span) / 1e12, "--", color="grey", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations / byte of the least traffic")
    axes.set_ylabel("TFLOP/s")
    axes.legend(fontsize=7)
    axes.set_title(f"{result['study']}, {result['device']}", fontsize=9)
    figure.savefig(path, dpi=130)


def equivalence(errors: Mapping[str, Mapping[str, Any]], path: pathlib.Path, title: str) -> None:
    """Logit errors by dtype and form; the main branch's error and mean by layer in the narrowest dtype."""
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(13, 3.8), layout="constrained")
        bars, layers, means = figure.subplots(1, 3)
        forms = list(next(iter(errors.values())))
        width = 0.8 / len(forms)
        for index, form in enumerate(forms):
            heights = [max(rows[form]["logits_rms"], 1e-17) for rows in errors.values()]
            bars.bar(np.arange(len(errors)) + index * width, heights, width, label=form, color=COLOURS[form])
        bars.set_xticks(np.arange(len(errors)) + 0.4 - width / 2, list(errors))
        bars.set_yscale("log")
        bars.set_title("logits: rms error / rms, against float64 pre_ln")
        bars.legend(fontsize=7)
        for dtype, line in zip(errors, ("-", "--", ":"), strict=False):
            for form in forms:
                row = errors[dtype][form]
                label = form if line == "-" else None
                floor = 1e-17
                layers.plot(np.maximum(row["stream_rms"], floor), line, color=COLOURS[form], label=label)
                means.plot(np.maximum(row["stream_mean"], floor), line, color=COLOURS[form], label=label)
        styles = ", ".join(
            f"{line} {dtype}" for dtype, line in zip(errors, ("solid", "dashed", "dotted"), strict=False)
        )
        layers.set_title(f"main branch: rms error by layer\n({styles})")
        means.set_title("main branch: |mean| / rms by layer")
        for axes in (layers, means):
            axes.set_yscale("log")
            axes.set_xlabel("after layer")
            axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        figure.suptitle(title)
        figure.savefig(path, dpi=130)


def drift(study: Mapping[str, Any], shown: str, path: pathlib.Path, title: str) -> None:
    """Logit errors by the main branch's mean, a panel for each dtype; the main branch's mean by layer in the dtype `shown`."""
    figure = Figure(figsize=(4.2 * (len(study["dtypes"]) + 1), 3.8), layout="constrained")
    *panels, layers = figure.subplots(1, len(study["dtypes"]) + 1)
    rows = [row for row in study["rows"] if row["question"] == "computation"]
    for axes, dtype in zip(panels, study["dtypes"], strict=True):
        for form in dict.fromkeys(row["form"] for row in rows):
            errors = [row["logits_rms"][-1] for row in rows if (row["dtype"], row["form"]) == (dtype, form)]
            axes.plot(study["means"], errors, DRIFT_LINES.get(form, "-"), color=_colour(form), marker=".", label=form)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_yscale("log")
        axes.set_xlabel("mean of the main branch, standard deviations")
        axes.set_title(f"{dtype}: rms error of the logits", fontsize=10)
    panels[0].legend(fontsize=7)
    for row in rows:
        if row["dtype"] == shown and row["stream_mean"] and row["mean"] in (study["means"][0], study["means"][-1]):
            width = 1 if row["mean"] == study["means"][0] else 2
            line = DRIFT_LINES.get(row["form"], "-")
            layers.plot(np.maximum(row["stream_mean"], 1e-17), line, color=_colour(row["form"]), linewidth=width)
    layers.set_yscale("log")
    layers.set_xlabel("after layer")
    layers.set_title(f"{shown}: |mean| / sd of the main branch\n(thick: begun at {study['means'][-1]} sd)", fontsize=10)
    figure.suptitle(f"width {study['width']}, {max(study['depths'])} layers; {title}", fontsize=9)
    figure.savefig(path, dpi=130)


DRIFT_LINES = {"pre_ln, fast variance": ":", "pre_rmsnorm, no gauge": "--"}


def _colour(form: str) -> str:
    return COLOURS[form.partition(",")[0]]
