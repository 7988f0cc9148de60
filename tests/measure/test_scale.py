"""One conversion is measured in a process of its own; the table is made of what was measured."""

import json
from pathlib import Path

import pytest

from prenorm_jax.measure import scale

ROOT = Path(__file__).parents[2]
TINY = {"width": 8, "depth": 1, "heads": 2, "mlp_width": 16}


@pytest.mark.parametrize("conversion", scale.CONVERSIONS)
def test_each_conversion_is_measured(conversion, monkeypatch, capsys):
    monkeypatch.setitem(scale.GPT_SIZES, "tiny", TINY)
    assert scale.main(["--size", "tiny", "--conversion", conversion, "--dtype", "bfloat16"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["tree_gib"] * 2**30 == 2 * row["parameters"]
    assert row["seconds"] > 0
    assert row["converted_leaves"] > 10
    assert f"| {conversion} | bfloat16 | looped |" in scale.table([row])


def test_the_published_figures_keep_the_bounds():
    rows = json.loads((ROOT / "results/cost/scale.json").read_text())["rows"]
    assert [(row["conversion"], row["dtype"], row["layers"] == "scanned") for row in rows] == list(scale.RUNS)
    for row in rows:
        assert row["parameters"] > 1.3e9
        assert row["seconds"] < 60
        assert row["peak_over_tree"] < 2.2
    assert scale.table(rows) in (ROOT / "docs/cost.md").read_text()
