"""Makes the table of docs/pretrained.md: python tests/interop_torch/table.py

Every checkpoint is written by its own library with random weights, read, run and written again; a minute on two cores. Exit status 1
where anything does not hold.
"""

import pathlib
import sys
import tempfile

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_default_matmul_precision", "highest")

from import_figures import REFERENCES, measure  # noqa: E402

FILE = pathlib.Path(__file__).parents[2] / "docs" / "pretrained.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
HEAD = """\
| checkpoint | family | pre_ln | pre_rmsnorm | pre_crmsnorm | not recentered | float32, library | float32, ours | export = file |
|---|---|---|---|---|---|---|---|---|
"""


def holds(found: dict) -> bool:
    """What the page claims of a row."""
    exact = max(found[name] for name in ("float64", "pre_rmsnorm", "pre_crmsnorm")) <= 1e-9
    single = found["float32, ours"] <= 2 * found["float32, reference"]
    return exact and single and found["bit for bit"] and found["control"] >= 1e-3


def line(name: str, found: dict) -> str:
    """A row of the table."""
    numbers = ("float64", "pre_rmsnorm", "pre_crmsnorm", "control", "float32, reference", "float32, ours")
    cells = [name, f"`{found['family']}`", *(f"{found[key]:.1e}" for key in numbers)]
    return f"| {' | '.join(cells)} | {'bit for bit' if found['bit for bit'] else 'differs'} |\n"


def main() -> int:
    """Measures, and writes the table into the page."""
    with tempfile.TemporaryDirectory() as folder:
        found = {name: measure(name, pathlib.Path(folder, str(index))) for index, name in enumerate(sorted(REFERENCES))}
    before, rest = FILE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    FILE.write_text(before + BEGIN + HEAD + "".join(line(*pair) for pair in found.items()) + END + after)
    failed = [name for name, figures in found.items() if not holds(figures)]
    print(f"{FILE}: {len(found)} checkpoints; " + (f"failed: {', '.join(failed)}" if failed else "all hold"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
