"""Checkpoints that need no torch: ViTs of big_vision and vision_transformer are read, run, changed, written; others are refused."""

import dataclasses
import json

import jax
import numpy as np
import originals
import pytest

from prenorm_jax import models
from prenorm_jax.interop.__main__ import main
from prenorm_jax.interop.exporting import exported
from prenorm_jax.interop.formats import open_checkpoint
from prenorm_jax.interop.importing import import_checkpoint
from prenorm_jax.interop.positions import resized
from prenorm_jax.interop.source import ImportRefused
from prenorm_jax.paths import leaves

pytestmark = pytest.mark.slow  # on one Python

IMAGES = np.random.default_rng(1).normal(size=(3, originals.IMAGE, originals.IMAGE, 3))


@pytest.fixture
def written(tmp_path):
    """write(changes, dtype): a big_vision file with some arrays changed, or removed (None)."""

    def write(changes=(), dtype=np.float32):
        flat = leaves(originals.perturbed(originals.MODELS["big_vision"], dtype=dtype)) | dict(changes)
        np.savez(tmp_path / "vit.npz", **{name: value for name, value in flat.items() if value is not None})
        return tmp_path / "vit.npz"

    return write


@pytest.mark.parametrize("name", originals.MODELS)
def test_it_is_the_originals_function_and_exports_bit_for_bit(name, tmp_path):
    params = originals.perturbed(originals.MODELS[name])
    originals.save(params, tmp_path / "vit.npz", prefix="params/" if "pooled" in name else "")
    imported = import_checkpoint(tmp_path / "vit.npz")
    expected = originals.MODELS[name].apply({"params": params}, IMAGES)
    config = dataclasses.replace(imported.config, dtype="float64")
    found = jax.jit(lambda params: models.apply(config, params, IMAGES)[0])(imported.params)
    assert np.max(np.abs(found - expected)) <= 1e-9 * np.max(np.abs(expected))
    other = dataclasses.replace(config, gelu="erf")
    control = jax.jit(lambda params: models.apply(other, params, IMAGES)[0])(imported.params)
    assert np.max(np.abs(control - expected)) >= 1e-5 * np.max(np.abs(expected))
    there, back = open_checkpoint(tmp_path / "vit.npz").read(), exported(imported)
    assert back.keys() == there.keys()
    assert all(
        back[key].tobytes() == value.tobytes() and back[key].dtype == value.dtype for key, value in there.items()
    )


def test_the_commands_import_and_export_a_file_bit_for_bit(written, tmp_path, capsys):
    file = written()
    assert main(["import", str(file), str(tmp_path / "imported")]) == 0
    assert "big_vision, width 16, depth 2, 2 heads" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "imported"), str(tmp_path / "back")]) == 0
    there, back = open_checkpoint(file).read(), open_checkpoint(tmp_path / "back" / "vit.npz").read()
    assert there.keys() == back.keys()
    assert all(there[name].tobytes() == back[name].tobytes() for name in there)
    said = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    assert (said["size"], said["image_mean"]) == ({"height": 8, "width": 8}, [0.5] * 3)
    assert main(["import", str(file), str(tmp_path / "imported")]) == 2
    assert "exists" in capsys.readouterr().err
    before = sorted((tmp_path / "back").rglob("*"))
    assert main(["import", str(tmp_path / "back"), str(tmp_path / "back" / "within")]) == 2
    assert "lies in the source, which is left as it is" in capsys.readouterr().err
    assert sorted((tmp_path / "back").rglob("*")) == before


def test_another_image_size_and_another_head_are_made_on_request(written):
    before, after = import_checkpoint(written()), import_checkpoint(written(), image_size=16, classes=7)
    table = before.params["position"]["table"]
    assert (table.shape, after.params["position"]["table"].shape) == ((4, 16), (16, 16))
    np.testing.assert_array_equal(after.params["position"]["table"], resized(table, 4))
    assert {leaf.shape for leaf in leaves(after.params["head"]).values()} == {(16, 7), (7,)}
    assert not any(np.any(leaf) for leaf in leaves(after.params["head"]).values())
    np.testing.assert_array_equal(after.params["norm"]["scale"], before.params["norm"]["scale"])


QUERY = "Transformer/encoderblock_1/MultiHeadDotProductAttention_0/query/bias"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({QUERY: None}, rf"missing \(1\): {QUERY}"),
        ({"Transformer/stranger": np.zeros(3, np.float32)}, r"unused \(1\): Transformer/stranger"),
        ({"head/bias": np.zeros(4, np.float32)}, r"of another shape \(1\): head/bias is \(4,\), expected \(3,\)"),
        ({"head/bias": np.array([0, np.nan, np.inf], np.float32)}, "head/bias has 2 values that are NaN or infinite"),
        ({"head/bias": np.zeros(3, np.int32)}, "head/bias is of int32, expected floating point"),
        ({"pos_embedding": np.zeros((1, 5, 16), np.float32)}, "5 rows, no square grid"),
        ({"MAPHead_0/probe": np.zeros((1, 1, 16), np.float32)}, "pools by an attention"),
    ],
    ids=["missing", "unused", "shape", "nan", "integer", "grid", "map"],
)
def test_a_file_that_is_not_the_model_is_refused(changes, says, written):
    with pytest.raises(ImportRefused, match=says):
        import_checkpoint(written(changes))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "llama"}, "RMSNorm already"),
        ({"model_type": "bert"}, "Post-LN"),
        ({"model_type": "gpt_neox"}, "rotary"),
        ({"model_type": "unheard_of"}, "not known here"),
        ({"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 3}, "missing|allowed"),
    ],
    ids=["llama", "bert", "gpt_neox", "unknown", "contradiction"],
)
def test_another_kind_of_model_is_refused(config, says, written):
    file = written()
    (file.parent / "config.json").write_text(json.dumps(config))
    with pytest.raises(ImportRefused, match=says):
        import_checkpoint(file)


def test_a_field_that_is_none_and_a_family_that_is_none_are_refused(written):
    with pytest.raises(ImportRefused, match="rotary: no such field"):
        import_checkpoint(written(), rotary=True)
    with pytest.raises(ImportRefused, match="allowed: hf_gpt2"):
        import_checkpoint(written(), family="bert")
