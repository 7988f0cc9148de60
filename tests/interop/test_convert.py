import json
import os

import ml_dtypes
import numpy as np
import pytest
import small

import prenorm_jax as pn
from prenorm_jax.interop import streaming
from prenorm_jax.interop.__main__ import main
from prenorm_jax.interop.convert import DTYPES, MANIFEST, write
from prenorm_jax.interop.formats import open_checkpoint
from prenorm_jax.interop.plan import make_plan

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def convert(source, destination, *options):
    assert main(["convert", str(source), str(destination), "--to", "pre_rmsnorm", *options]) == 0
    return open_checkpoint(destination).read(), json.loads((destination / MANIFEST).read_text())


@pytest.mark.parametrize("fold", [False, True], ids=["", "fold"])
@pytest.mark.parametrize("stored", [np.float64, np.float32, BFLOAT16], ids=str)
@pytest.mark.parametrize("wanted", [None, "float64", "float32", "bfloat16", "float16"])
def test_tensor_by_tensor_is_what_a_whole_tree_becomes(stored, wanted, fold, tmp_path, monkeypatch, assert_same):
    monkeypatch.setattr(streaming, "BLOCK", 17)  # several blocks a tensor, the last of them short
    source = small.write(tmp_path / "source", small.gpt2(stored), shards=2)
    plan = make_plan(open_checkpoint(source), fold=fold)
    found, _ = convert(
        source, tmp_path / "destination", *(["--fold"] if fold else []), *(["--dtype", wanted] if wanted else [])
    )
    (branch,) = plan.branches.values()
    tree = {name: tensor.read() for name, tensor in plan.tensors.items()}
    mask = tree.pop("transformer.h.0.attn.bias")
    wide = {name: leaf.astype(np.float64) for name, leaf in tree.items()}
    # The mean is removed and the affine folded in float64, and then rounded once; what is only copied is rounded alone.
    changed = pn.recenter(pn.fold_affine(wide, branch) if fold else wide, branch)
    if fold:  # there the norms lose their leaves; stock code has them, as ones and zeros
        ones = {
            name: np.full(leaf.shape, float(name.endswith("weight")))
            for name, leaf in wide.items()
            if name not in changed
        }
        changed |= ones
    target = DTYPES[wanted] if wanted else np.dtype(stored)
    expected = {name: pn.precision.rounded(leaf, target) for name, leaf in changed.items()}
    assert_same(found, {**expected, "transformer.h.0.attn.bias": mask})


def test_the_source_s_shards_names_and_files_are_kept(tmp_path):
    source = small.write(tmp_path / "source", shards=3)
    (source / "onnx").mkdir()
    for name in ("pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", ".gitattributes"):
        (source / name).write_text("not of this chart")
    (source / "chat").mkdir()
    (source / "chat" / "template.jinja").write_text("{{ messages }}")
    found, _ = convert(source, tmp_path / "destination")
    assert set(found) == {*small.gpt2(), "lm_head.weight"}
    held = {
        str(path.relative_to(tmp_path / "destination"))
        for path in (tmp_path / "destination").rglob("*")
        if path.is_file()
    }
    shards = {f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)}
    assert held == {
        *shards,
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.json",
        "README.md",
        MANIFEST,
        "chat/template.jinja",
    }


def test_a_cache_that_may_not_be_written_to_is_a_source(tmp_path):
    source = small.write(tmp_path / "source")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in list(source.iterdir()):  # as the hub's cache has them
        file.chmod(0o444)
        os.rename(file, blobs / file.name)
        file.symlink_to(blobs / file.name)
    source.chmod(0o555)
    convert(source, tmp_path / "destination")
    for file in (tmp_path / "destination").iterdir():
        assert not file.is_symlink()
        assert file.stat().st_mode & 0o200, file


def test_config_json_says_what_was_done(tmp_path):
    source = small.write(tmp_path / "source", config={**small.CONFIG, "torch_dtype": "float32", "more": {"kept": 1}})
    found, manifest = convert(source, tmp_path / "destination", "--dtype", "bfloat16")
    config = json.loads((tmp_path / "destination" / "config.json").read_text())
    assert config == {**small.CONFIG, "torch_dtype": "bfloat16", "more": {"kept": 1}, "tie_word_embeddings": False}
    assert manifest["untied"] == {"lm_head.weight": "transformer.wte.weight"}
    assert found["transformer.h.0.attn.bias"].dtype == bool


def test_the_manifest_lists_every_layer_norm(tmp_path):
    _, manifest = convert(small.write(tmp_path / "source"), tmp_path / "destination")
    names = [f"transformer.h.{i}.{norm}" for i in range(small.DEPTH) for norm in ("ln_1", "ln_2")] + [
        "transformer.ln_f"
    ]
    assert manifest["norms"] == {name: {"converted": True, "reason": None, "eps": 1e-5} for name in names}
    assert manifest["recenter"] == []
    assert (manifest["format"], manifest["architecture"], manifest["chart"]) == (1, "gpt2", "pre_rmsnorm")
    assert list(manifest["streams"]) == ["transformer"]


def test_the_model_card_grows(tmp_path):
    convert(small.write(tmp_path / "source"), tmp_path / "destination", "--fold")
    card = (tmp_path / "destination" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# A model\n")
    for part in (
        "## Pre-RMSNorm",
        "takes the place of 5 of its 5 LayerNorms",
        "were folded",
        "`tie_word_embeddings: false`",
    ):
        assert part in card


def test_a_tied_table_that_stays_asks_for_a_recentered_input(tmp_path):
    found, manifest = convert(small.write(tmp_path / "source"), tmp_path / "destination", "--keep-tied")
    assert "lm_head.weight" not in found
    assert np.array_equal(found["transformer.wte.weight"], small.gpt2()["transformer.wte.weight"])
    assert [entry["module"] for entry in manifest["recenter"]] == ["transformer.h.0"]


def test_progress_accounts_for_every_byte(tmp_path):
    checkpoint = open_checkpoint(small.write(tmp_path / "source", shards=2))
    done = {}
    write(
        checkpoint,
        make_plan(checkpoint),
        tmp_path / "destination",
        advance=lambda name, size: done.update({name: size}),
    )
    stored = open_checkpoint(tmp_path / "destination").tensors
    assert done == {name: tensor.nbytes for name, tensor in stored.items()}


def test_a_single_file_is_converted_with_what_lies_beside_it(tmp_path):
    source = small.write(tmp_path / "source")
    convert(source / "model.safetensors", tmp_path / "destination")
    assert (tmp_path / "destination" / "tokenizer.json").exists()


def test_inspect_says_what_a_conversion_would_do(tmp_path, capsys):
    source = small.write(tmp_path / "source", shards=2)
    assert main(["inspect", str(source), "--tensors"]) == 0
    before = capsys.readouterr().out
    convert(source, tmp_path / "destination")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "destination")]) == 0
    after = capsys.readouterr().out
    for part in (
        "safetensors, 3 files",
        "chart",
        "as released, so pre_ln",
        "architecture",
        "gpt2",
        "width 8; 10 writers, 5 norms, 5 readers",
        "5 of 5 can be RMSNorms; eps 1e-05",
        "tied to transformer.wte.weight; a conversion unties it",
        "reads transformer behind transformer.h.0.ln_1",
        "float32 (8, 24)",
        "writes to transformer",
    ):
        assert part in before, part
    assert "pre_rmsnorm" in after
    assert "as released" not in after


def test_inspect_knows_what_it_can_t_convert(tmp_path, capsys):
    np.savez(tmp_path / "vit.npz", **{"head/kernel": np.zeros((4, 2), np.float32)})
    assert main(["inspect", str(tmp_path / "vit.npz")]) == 0
    assert "no: no config.json beside it" in capsys.readouterr().out
    llama = small.write(tmp_path / "llama", config={"model_type": "llama"})
    assert main(["inspect", str(llama)]) == 0
    assert "RMSNorms already" in capsys.readouterr().out
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 2
    assert "prenorm: " in capsys.readouterr().err


def test_a_mask_is_copied_infinities_and_all(tmp_path):
    masks = {
        "transformer.h.0.attn.masked_bias": np.array(-np.inf, np.float16),  # -1e9, saved in half precision
        "transformer.h.1.attn.masked_bias": np.array(-1e9, np.float32),
    }
    source = small.write(tmp_path / "source", small.gpt2() | masks)
    found, _ = convert(source, tmp_path / "destination", "--dtype", "float16")
    for name, mask in masks.items():
        assert (found[name].dtype, found[name]) == (mask.dtype, mask)


def test_a_model_card_in_any_encoding_grows(tmp_path):
    source = small.write(tmp_path / "source")
    (source / "README.md").write_bytes("Größe".encode("latin-1"))
    convert(source, tmp_path / "destination")
    assert (tmp_path / "destination" / "README.md").read_bytes().startswith("Größe".encode("latin-1"))


def test_the_head_of_a_classifier_of_tokens_is_a_reader(tmp_path):
    head = {"classifier.weight": np.ones((3, small.WIDTH), np.float32), "classifier.bias": np.zeros(3, np.float32)}
    config = {**small.CONFIG, "architectures": ["GPT2ForTokenClassification"]}
    source = small.write(tmp_path / "source", small.gpt2() | head, config)
    found, _ = convert(source, tmp_path / "destination", "--fold")
    gamma = small.gpt2()["transformer.ln_f.weight"]
    np.testing.assert_array_equal(found["classifier.weight"], np.tile(gamma, (3, 1)))
