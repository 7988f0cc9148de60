"""The loader's speed: one entry a config and machine, made-up data where there are none, and one line for a mistake."""

import json
import pathlib

import pytest

from prenorm_jax.measure import loader

ROOT = pathlib.Path(__file__).parents[2]
SMALL = [
    "--config.model.width=8",
    "--config.model.depth=1",
    "--config.model.heads=2",
    "--config.model.mlp_width=8",
    "--config.train.batch_size=8",
    "--config.data.workers=0",
    "--seconds=0.1",
]


def entries(out):
    return json.loads(out.read_text())["loader"]


def test_a_config_is_measured_and_measured_again(tmp_path, capsys):
    out = tmp_path / "loader.json"
    command = [f"{ROOT}/configs/digits.py", *SMALL, "--out", str(out)]
    assert loader.main(command) == 0
    assert loader.main(command) == 0
    (entry,) = entries(out)
    assert entry["loader_per_second"] > 0
    assert entry["step_per_second"] > 0
    assert (entry["unit"], entry["batch_size"], entry["step_from"]) == ("images", 8, "measure")
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"| `{ROOT}/configs/digits.py` |")


@pytest.mark.parametrize(
    ("config", "arg", "study", "unit"),
    [
        ("deit3", "variant=B/16", "paper_vit_training", "images"),
        ("gpt_text", "corpus=wikitext,size=small", "paper_gpt", "tokens"),
    ],
)
def test_data_are_made_up_and_a_known_step_is_read(tmp_path, config, arg, study, unit):
    out, known = tmp_path / "loader.json", ROOT / f"results/speed/{study}.json"
    command = [f"{ROOT}/configs/{config}.py:{arg}", *SMALL, "--made", "20000" if unit == "tokens" else "12"]
    assert loader.main([*command, "--step", str(known), "--out", str(out)]) == 0
    (entry,) = entries(out)
    recorded = next(e for e in json.loads(known.read_text())["entries"] if e["name"] in ("ViT-B/16", "GPT Small"))
    assert entry["step_per_second"] == recorded["rows"]["pre_ln"]["per_second"]
    assert entry["unit"] == unit
    assert entry["made_up"] > 0


def test_a_mistake_is_one_line(tmp_path, capsys):
    out = ["--out", str(tmp_path / "loader.json")]
    known = ["--step", str(ROOT / "results/speed/paper_gpt.json")]
    assert loader.main([f"{ROOT}/configs/deit3.py:variant=H/14", *SMALL, "--made=12", *known, *out]) == 2
    assert "--step: " in capsys.readouterr().err
    assert loader.main([f"{ROOT}/configs/deit3.py", *SMALL, *out]) == 2
    assert capsys.readouterr().err.startswith("prenorm_jax.measure.loader: config.data.root: got ''")
    assert not (tmp_path / "loader.json").exists()
