"""The table of public models in docs/tracing.md and results/tracing/public_models.json, from the packages that are installed here; rows of
others stay as they are.

    PYTHONPATH=. JAX_PLATFORMS=cpu python tests/tracing/public_table.py

`public_models` (transformers 4.52.4) and `public_packages` say what is run; old packages want environments of their own, and one command
in each fills the table.
"""

import json
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "tracing.md"
RESULTS = HERE.parents[1] / "results" / "tracing" / "public_models.json"
START, END = "<!-- public models: made by tests/tracing/public_table.py -->", "<!-- end of public models -->"
HEAD = ["| model | class | norms converted | reductions | difference | the others |", "|---|---|---|---|---|---|"]


def rows_of(script: str) -> list[str]:
    """The rows that a script prints; none where its packages are not installed."""
    done = subprocess.run([sys.executable, HERE / script], capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if line.startswith("| ") and line not in HEAD]


def key(row: str) -> tuple[str, str]:
    """Model and class; a package's version is no part of it."""
    name, cls = (cell.strip() for cell in row.split("|")[1:3])
    return name.rsplit(" ", 1)[0] if name[-1].isdigit() and "." in name else name, cls


def merged(old: list[str], new: list[str]) -> list[str]:
    """Old rows in their order, each replaced where there is a new one; then what is new altogether."""
    made = {key(row): row for row in new}
    known = {key(row) for row in old}
    return [made.get(key(row), row) for row in old] + [row for k, row in made.items() if k not in known]


def as_json(rows: list[str]) -> str:
    """The rows as a list of records."""
    names = ("model", "class", "converted", "reductions", "difference", "others")
    cells = ([cell.strip().strip("`") for cell in row.split("|")[1:-1]] for row in rows)
    return json.dumps([dict(zip(names, own, strict=False)) for own in cells], indent=1) + "\n"


def write(new: list[str], path: pathlib.Path = DOCS, results: pathlib.Path = RESULTS) -> None:
    text = path.read_text()
    before, rest = text.split(START)
    inside, after = rest.split(END)
    old = [line for line in inside.splitlines() if line.startswith("| ") and line not in HEAD]
    rows = merged(old, new)
    path.write_text("\n".join([before + START, "", *HEAD, *rows, "", END + after]))
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(as_json(rows))


if __name__ == "__main__":
    write([row for script in ("public_models.py", "public_packages.py") for row in rows_of(script)])
