"""The front door is true: its Python runs, and its tables are those of the JSON files in results/."""

import json
import re
from pathlib import Path

import jax
import pytest

from prenorm_jax.measure import study
from prenorm_jax.measure.comparison import answers_table, times_table
from prenorm_jax.measure.equivalence import Report

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_its_python_runs(block):
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda path: path.stem)
def test_its_tables_are_made_from_json(path):
    result = json.loads(path.read_text())
    if "errors" in result:
        assert Report.of_json(result).as_markdown() in TEXT
        return
    assert times_table(result) in TEXT
    if path.stem.startswith("quickstart"):
        assert answers_table(result) in TEXT


@pytest.mark.parametrize("name", ["paper_vit_training", "paper_gpt"])
def test_its_step_times_are_made_from_json(name):
    assert study.table(json.loads((ROOT / f"results/speed/{name}.json").read_text())) in TEXT


def test_what_stands_beside_pytorch_is_made_from_json():
    result = json.loads((ROOT / "results/speed/peers.json").read_text())
    assert study.peers_table(result) in TEXT


def test_the_files_that_it_names_are_there():
    for name in re.findall(r"\]\(((?!http)[^)]+)\)", TEXT):
        assert (ROOT / name).exists(), name
