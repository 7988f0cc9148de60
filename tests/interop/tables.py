"""The tables of docs/checkpoints.md, made from the JSON files in results/interop.

PYTHONPATH=. python tests/interop/tables.py      writes them into the page
"""

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "checkpoints.md"
RESULTS = ROOT / "results" / "interop"


def architectures(table: dict[str, Any]) -> list[list[str]]:
    """One row a model; the larger error of the plain and the folded conversion."""
    head = [
        "model",
        "LayerNorms replaced",
        "LayerNorm kept",
        "RMSNorm",
        "float32, of LayerNorm's error",
        "not converted",
    ]
    rows = []
    for name, pair in table.items():
        both = list(pair.values())
        ratio = max(row["float32_after"] / row["float32_before"] for row in both)
        rows.append(
            [
                name,
                f"{both[0]['converted']} of {both[0]['norms']}",
                *(f"{max(row[key] for row in both):.1e}" for key in ("layer_norm", "rms_norm")),
                f"{ratio:.2f}",
                f"{min(row['unconverted'] for row in both):.1e}",
            ]
        )
    return [head, *rows]


def faults(rows: list[dict[str, Any]]) -> list[list[str]]:
    """One row a fault."""
    said = [[row["fault"], str(row["status"]), row["message"].replace("|", "\\|")] for row in rows]
    return [["what is wrong", "exit status", "what `prenorm convert` says"], *said]


def conversion(rows: list[dict[str, Any]]) -> list[list[str]]:
    """One row a run."""
    measured = [
        [
            f"`prenorm convert {row['options']}".rstrip() + "`",
            f"{row['gigabytes']:.2f} GB",
            f"{row['seconds']:.0f} s",
            f"{row['peak_resident_gigabytes']:.2f} GB",
            f"{row['largest_tensor_gigabytes']:.2f} GB",
        ]
        for row in rows
    ]
    return [["", "checkpoint", "time", "peak memory", "its largest tensor"], *measured]


def fuzz(counts: dict[str, Any]) -> list[list[str]]:
    """One row a kind of file."""
    kinds = {kind: count for kind, count in counts.items() if isinstance(count, dict)}
    rows = [[kind, f"{count['refused']:,}", f"{count['accepted']:,}"] for kind, count in kinds.items()]
    total = [f"{sum(count[key] for count in kinds.values()):,}" for key in ("refused", "accepted")]
    return [["hostile inputs", "refused", "read whole"], *rows, ["all", *total]]


TABLES: dict[str, Callable[[Any], list[list[str]]]] = {
    "architectures": architectures,
    "faults": faults,
    "conversion_cpu": conversion,
    "fuzz": fuzz,
}


def markdown(name: str) -> str:
    """A table, from its JSON file."""
    head, *rows = TABLES[name](json.loads((RESULTS / f"{name}.json").read_text()))
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def filled(page: str) -> str:
    """The page with its tables made anew, each behind a line that names its file."""
    for name in TABLES:
        start = f"<!-- results/interop/{name}.json -->\n\n"
        page = re.sub(
            f"({re.escape(start)})(?:\\|.*\n)*", lambda found, name=name: f"{found[1]}{markdown(name)}\n", page
        )
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
