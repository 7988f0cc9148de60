"""`prenorm verify` on converted checkpoints, and on ones that are not the same function; the swap for torch users."""

import json

import pytest
import torch
from figures import convert, loaded
from models import MODELS, inputs, perturbed

from prenorm_jax.interop import torch_norms
from prenorm_jax.interop.__main__ import main

NAMES = ["gpt2", "bloom", "vit", "whisper"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> (source, converted, prenorm.json)."""
    made = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        perturbed(MODELS[name], torch.float64).save_pretrained(folder / "source")
        manifest = convert(folder / "source", folder / "converted")
        made[name] = folder / "source", folder / "converted", manifest
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_conversion_is_verified(name, checkpoints, tmp_path, capsys):
    source, converted, manifest = checkpoints[name]
    report = tmp_path / "report.json"
    assert main(["verify", str(source), str(converted), "--length", "8", "--json", str(report)]) == 0
    assert "It holds." in capsys.readouterr().out
    said = json.loads(report.read_text())
    assert said["failures"] == []
    swapped = next(row for row in said["rows"] if row["run"] == "DST, RMSNorm in place" and row["dtype"] == "float64")
    assert swapped["relative"] <= 1e-9
    assert len(said["means"]) == sum(norm["converted"] for norm in manifest["norms"].values())
    assert all(after < 1e-12 for _, after in said["means"].values())


def test_weights_that_are_not_recentered_do_not_verify(checkpoints, tmp_path, capsys):
    source, converted, _ = checkpoints["gpt2"]
    fake = tmp_path / "fake"
    fake.mkdir()
    for file in source.iterdir():
        (fake / file.name).write_bytes(file.read_bytes())
    (fake / "prenorm.json").write_bytes((converted / "prenorm.json").read_bytes())
    assert main(["verify", str(source), str(fake), "--length", "8"]) == 1
    assert "Does not hold" in capsys.readouterr().out
    assert main(["verify", str(source), str(source), "--length", "8"]) == 2
    assert "no prenorm.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_the_swap_replaces_what_the_manifest_lists_and_keeps_the_function(name, checkpoints):
    source, converted, manifest = checkpoints[name]
    given = inputs(MODELS[name], torch.float64)
    with torch.no_grad():
        expected = loaded(name, source, torch.float64)(**given).logits
        model = loaded(name, converted, torch.float64)
        swapped = torch_norms.swap_norms(model, converted)
        found = model(**given).logits
    assert set(swapped) == {norm for norm, said in manifest["norms"].items() if said["converted"]}
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()  # these models take softmaxes in float32


def test_a_manifest_of_another_model_is_refused_and_changes_nothing(checkpoints):
    model = loaded("vit", checkpoints["vit"][0], torch.float64)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="no such module"):
        torch_norms.swap_norms(model, checkpoints["gpt2"][1])
    manifest = json.loads((checkpoints["vit"][1] / "prenorm.json").read_text())
    for norm in manifest["norms"].values():
        norm["eps"] = 0.5
    with pytest.raises(ValueError, match=r"eps=0\.5"):
        torch_norms.swap_norms(model, manifest)
    assert [type(module) for module in model.modules()] == before
