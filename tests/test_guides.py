"""The guides are true: their Python runs, block after block, as a reader would run it; what they link to is there."""

import json
import re
from pathlib import Path

import jax
import pytest

from prenorm_jax.measure import __main__ as command
from prenorm_jax.measure import loader, weight_map

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.slow  # on one Python: the README's runs on both
@pytest.mark.parametrize("guide", ["convert_your_own.md"])
def test_its_python_runs(guide, capsys):
    text = (DOCS / guide).read_text()
    names = {"__name__": guide}
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
            line = text[: block.start(1)].count("\n")
            exec(compile("\n" * line + block[1], str(DOCS / guide), "exec"), names)
    for printed, said in zip(
        capsys.readouterr().out.splitlines(), re.findall(r"print\(error\)  # (.*)", text), strict=True
    ):
        pattern = ".*".join(re.escape(part) for part in said.split("..."))
        assert re.match(pattern, printed), printed


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_the_files_that_it_names_are_there(path):
    for name in re.findall(r"\]\(((?!http)[^)#]+)", path.read_text()):
        assert (DOCS / name).exists(), name


@pytest.mark.parametrize("name", ["vit_b16", "gpt_small"])
def test_the_weight_maps_table_is_in_its_page(name):
    result = json.loads((DOCS.parent / f"results/weight_map/{name}.json").read_text())
    assert weight_map.table(result) in (DOCS / "cost.md").read_text()


def test_the_loader_s_table_is_in_its_page():
    result = json.loads((DOCS.parent / "results/data/loader.json").read_text())
    assert loader.table(result) in (DOCS / "data.md").read_text()


def test_the_tables_of_what_was_measured_are_in_the_guide():
    text = (DOCS / "performance.md").read_text()
    for path in sorted((DOCS.parent / "results" / "speed").glob("*.json")):
        for table in command.tables(json.loads(path.read_text())):
            assert table in text, f"python -m prenorm_jax.measure print {path} --into docs/performance.md"
