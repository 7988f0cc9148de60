"""docs/cases.md names every case and nothing else."""

import ast
import re
from pathlib import Path

from cases import CASES
from strangers import EXACT, MISDESCRIBED, REFUSED

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "cases.md"


def test_the_page_names_every_case_and_nothing_else():
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    named = {name for *_, tests, _ in rows for name in re.findall("`([^`]+)`", tests)}
    named |= set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    functions = {
        node.name
        for path in HERE.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    tables = {*CASES, *EXACT, *REFUSED, *MISDESCRIBED}
    of_tables = {"test_looped", "test_stacked", "test_exact", "test_refused", "test_misdescribed"}
    functions -= {*of_tables, "test_the_page_names_every_case_and_nothing_else"}
    assert named - tables - functions == set()
    assert (tables | functions) - named == set()
