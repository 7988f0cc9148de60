"""The document of the drift study, made from its result: docs/drift.md."""

from collections.abc import Mapping
from typing import Any

from prenorm_jax.measure.drift import FORMS, FORMS_OF


def markdown(result: Mapping[str, Any], picture: str) -> str:
    """The document: tables of the deepest read-out of every width, and the picture."""
    lines = [
        "# What rounding does to each form",
        "",
        f"Made by `python -m prenorm_jax.measure.drift {result['preset']}` on {result['device']}, in {result['seconds']:.0f} s. "
        "What is measured: the docstring of `prenorm_jax.measure.drift`.",
        "",
        f"![errors, and the mean by layer]({picture})",
        "",
        *_findings(result),
    ]
    for study in result["studies"]:
        for question, words in QUESTIONS.items():
            lines += [
                "",
                f"## Width {study['width']}, {max(study['depths'])} layers: {words}",
                "",
                *_table(study, question),
            ]
        lines += [
            "",
            f"## Width {study['width']}: by depth, {shown(study)}, mean {study['means'][0]:g} sd",
            "",
            *_by_depth(study),
        ]
    return "\n".join(lines) + "\n"


QUESTIONS = {
    "computation": "computing in a dtype; error of the logits (rms, relative to the float64 oracle's), same argmax",
    "checkpoint": "converting a stored checkpoint; computed in float64, error against that checkpoint's own logits",
}


def _findings(result: Mapping[str, Any]) -> list[str]:
    """What the tables say of the widest model at its deepest read-out, with its figures."""
    study = result["studies"][-1]
    error = {(r["question"], r["dtype"], r["form"], r["mean"]): r["logits_rms"][-1] for r in study["rows"]}
    dtype, low, high = shown(study), min(study["means"]), max(study["means"])

    def computed(form: str, mean: float, dtype: str = dtype) -> str:
        return f"{error['computation', dtype, form, mean]:.1e}"

    def ratios(question: str, form: str, other: str) -> str:
        found = [
            error[question, d, form, m] / error[question, d, other, m] for d in study["dtypes"] for m in study["means"]
        ]
        return f"{min(found):.2f} to {max(found):.2f} times"

    figures = {
        "layers": max(study["depths"]),
        "width": study["width"],
        "dtype": dtype,
        "low": f"{low:g}",
        "high": f"{high:g}",
        "ln_low": computed("pre_ln", low),
        "ln_high": computed("pre_ln", high),
        "rms_low": computed("pre_rmsnorm", low),
        "rms_high": computed("pre_rmsnorm", high),
        "fast_high": computed("pre_ln, fast variance", high),
        "ln_float32": computed("pre_ln", high, "float32"),
        "fast_float32": computed("pre_ln, fast variance", high, "float32"),
        "reflect": ratios("computation", "pre_crmsnorm-reflect", "pre_rmsnorm"),
        "drop": ratios("computation", "pre_crmsnorm-drop", "pre_rmsnorm"),
        "reflect_stored": ratios("checkpoint", "pre_crmsnorm-reflect", "pre_rmsnorm"),
        "drop_stored": ratios("checkpoint", "pre_crmsnorm-drop", "pre_rmsnorm"),
        "gauge": ratios("computation", "pre_rmsnorm", "pre_rmsnorm, no gauge"),
    }
    return FINDINGS.format(**figures).splitlines()


FINDINGS = """\
At width {width} and {layers} layers:

- Pre-LN in {dtype} misses the logits by {ln_low} where its main branch has a mean of {low} standard deviations, by {ln_high} where it has
  {high}; Pre-RMSNorm of the same weights by {rms_low} and {rms_high}. What is lost is lost where the main branch is stored, so a variance
  in two passes instead of one (Flax's default: {fast_high}) is no remedy. In float32 it is one: {ln_float32} instead of {fast_float32}.
- Computing in a dtype, `reflect` misses by {reflect} what Pre-RMSNorm does, `drop` by {drop}.
- Converting a stored checkpoint to `reflect` costs {reflect_stored} what converting it to Pre-RMSNorm does, to `drop` {drop_stored}.
  Numbers that were rounded before, less their common mean, are rounded alike: errors along a row lean to one side, and the coordinate that
  `drop` leaves out is minus the sum of the others. Convert to `drop` from a wide dtype, or use `reflect`.
- The gauge: {gauge} the error without it. At these random weights, what rounding leaves of a mean is too small to be seen beside other
  rounding.
"""


def _table(study: Mapping[str, Any], question: str) -> list[str]:
    means = study["means"]
    lines = [f"| dtype | form | {' | '.join(f'mean {mean:g} sd' for mean in means)} |", "|---" * (len(means) + 2) + "|"]
    rows = {(row["dtype"], row["form"], row["mean"]): row for row in study["rows"] if row["question"] == question}
    for dtype in study["dtypes"]:
        for form in FORMS_OF[question]:
            if question == "checkpoint" and form == "pre_ln":  # its own oracle
                continue
            cells = (rows[dtype, form, mean] for mean in means)
            texts = (f"{row['logits_rms'][-1]:.1e}, {100 * row['agreement'][-1]:.1f} %" for row in cells)
            lines.append(f"| {dtype} | {form} | {' | '.join(texts)} |")
    return lines


def _by_depth(study: Mapping[str, Any]) -> list[str]:
    depths = study["depths"]
    lines = [
        f"| form | {' | '.join(f'{depth} layers' for depth in depths)} | mean of the main branch, last layer |",
        "|---" * (len(depths) + 2) + "|",
    ]
    rows = {(row["question"], row["dtype"], row["mean"], row["form"]): row for row in study["rows"]}
    for form in FORMS:
        row = rows["computation", shown(study), study["means"][0], form]
        last = f"{row['stream_mean'][-1]:.1e}" if row["stream_mean"] else "none"
        lines.append(f"| {form} | {' | '.join(f'{error:.1e}' for error in row['logits_rms'])} | {last} |")
    return lines


def shown(study: Mapping[str, Any]) -> str:
    """The dtype of the tables and panels that show one: that of training."""
    return "bfloat16" if "bfloat16" in study["dtypes"] else study["dtypes"][-1]
