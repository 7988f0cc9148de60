"""Imports evaluated as a user does: pictures in folders by top-1, token ids by perplexity, in every form."""

import json

import jax
import numpy as np
import originals
import pytest
from PIL import Image

import eval as eval_py
from prenorm_jax.interop.__main__ import main
from prenorm_jax.training.data import DataError
from prenorm_jax.training.image_folder import class_numbers
from prenorm_jax.training.pictures import read_preprocessing
from prenorm_jax.training.tasks import ImageClassification
from prenorm_jax.training.text import tokens
from prenorm_jax.training.token_files import open_tokens


@pytest.mark.slow
def test_the_top_1_of_a_folder_is_the_originals_in_every_form(tmp_path):
    model = originals.MODELS["big_vision"]
    params = originals.perturbed(model, dtype=np.float32)
    originals.save(params, tmp_path / "vit.npz")
    rng, images, labels = np.random.default_rng(0), [], []
    for label in range(originals.CLASSES):
        folder = tmp_path / "pictures" / str(label)
        folder.mkdir(parents=True)
        for index in range(4):
            picture = Image.fromarray(rng.integers(0, 255, (10 + index, 12, 3), dtype=np.uint8))
            picture.save(folder / f"{index}.png")
            small = picture.resize((originals.IMAGE, originals.IMAGE), Image.Resampling.BILINEAR)
            images.append(np.asarray(small, np.float32) / 127.5 - 1)
            labels.append(label)
    logits = jax.jit(model.apply)({"params": params}, np.stack(images))
    expected = float(np.mean(np.argmax(logits, axis=-1) == np.asarray(labels)))
    assert main(["import", str(tmp_path / "vit.npz"), str(tmp_path / "imported")]) == 0
    config = f"--config=configs/pretrained.py:{tmp_path / 'imported'}"
    workdir = tmp_path / "out"
    assert eval_py.main([config, f"--config.data.root={tmp_path / 'pictures'}", f"--workdir={workdir}"]) == 0
    report = json.loads((workdir / "equivalence.json").read_text())
    assert [form["accuracy"] for form in report["answers"].values()] == pytest.approx([expected] * 4)
    assert set(report["answers"]) == {"pre_ln", "pre_rmsnorm", "pre_crmsnorm-reflect", "pre_crmsnorm-drop"}
    assert report["failures"] == []


def test_pictures_are_prepared_as_the_file_says(tmp_path):
    said = {
        "size": {"shortest_edge": 12},
        "do_center_crop": True,
        "crop_size": 8,
        "resample": 3,
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    picture = Image.fromarray(np.full((20, 30, 3), 255, np.uint8))
    preprocessing, pixels = read_preprocessing(tmp_path)
    batch = {"inputs": preprocessing(picture)[None], "targets": np.zeros(1, np.int32)}
    prepared = ImageClassification(pixels=pixels).prepare(batch)["inputs"]
    assert prepared.shape == (1, 8, 8, 3)
    np.testing.assert_allclose(prepared, 2.0, atol=1e-6)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(DataError, match="not understood"):
        read_preprocessing(tmp_path)


def test_folders_are_classes_by_label_by_number_or_in_order(tmp_path):
    assert class_numbers(["cat", "ant"], {"ant": 4, "cat": 2}, 9, tmp_path) == {"cat": 2, "ant": 4}
    assert class_numbers(["7", "0"], {}, 9, tmp_path) == {"7": 7, "0": 0}
    assert class_numbers(["b", "a"], {}, 2, tmp_path) == {"a": 0, "b": 1}
    with pytest.raises(DataError, match="2 folders for a model of 9 classes"):
        class_numbers(["b", "a"], {}, 9, tmp_path)


def test_token_ids_are_read_from_npy_and_bin(tmp_path):
    ids = np.arange(7)
    np.save(tmp_path / "a.npy", ids)
    ids.astype(np.uint16).tofile(tmp_path / "a.bin")
    np.testing.assert_array_equal(tokens(tmp_path / "a.npy", ""), ids)
    np.testing.assert_array_equal(open_tokens(tmp_path / "a.bin", "uint16", 7)[:], ids)
    np.save(tmp_path / "b.npy", ids / 2)
    with pytest.raises(DataError, match="expected integers"):
        tokens(tmp_path / "b.npy", "")
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        tokens(tmp_path / "a.txt", str(tmp_path))
