"""Data sets that the library datasets saved, and tokenizers of the library tokenizers: made here, read by training."""

import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import tokenizers
from PIL import Image

from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training import data, prepare, text
from prenorm_jax.training.data import DataError
from prenorm_jax.training.experiment import Data, Experiment

ROOT = Path(__file__).parents[2]
VIT = ViTConfig(width=8, depth=1, heads=2, mlp_width=8, image_size=16, patch_size=8, channels=3, classes=3)
GPT = GPTConfig(width=8, depth=1, heads=2, mlp_width=8, context=4, vocab_size=280)
LINES = ["the cat sat on the mat", "the dog sat on the cat", "a mat is no dog"] * 20


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def split_of(first: int, count: int, **further: object) -> datasets.Dataset:
    rows = {
        "img": [{"bytes": picture(first + i), "path": None} for i in range(count)],
        "label": [i % 3 for i in range(count)],
        "note": ["x"] * count,
    }
    kinds = {
        "img": datasets.Image(),
        "label": datasets.ClassLabel(names=["a", "b", "c"]),
        "note": datasets.Value("string"),
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))


@pytest.fixture
def saved(tmp_path):
    root = tmp_path / "pictures"
    datasets.DatasetDict({"train": split_of(0, 8), "test": split_of(50, 3)}).save_to_disk(str(root))
    return root


def load(root, **fields):
    settings = Data(name="hugging_face", root=str(root), threads=1, **{"image_key": "img", **fields})
    return data.load(Experiment(task="image_classification", model=VIT, data=settings))


def test_saved_pictures_are_read(saved):
    splits = load(saved)
    assert (len(splits.train), len(splits.held_out)) == (8, 3)
    batch = splits.train.batch(np.arange(8), None)
    assert batch["targets"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    with Image.open(io.BytesIO(picture(5))) as source:
        expected = np.asarray(source.resize((21, 18), Image.Resampling.BICUBIC))[1:17, 2:18]
    np.testing.assert_array_equal(batch["inputs"][5], expected)


def test_a_split_alone_is_evaluated(tmp_path):
    split_of(0, 4).save_to_disk(str(tmp_path / "one"))
    splits = load(tmp_path / "one")
    assert len(splits.held_out) == 4
    with pytest.raises(DataError, match="nothing to train on"):
        len(splits.train)


def test_a_worker_process_reads_them(saved):
    train = load(saved).train
    plain, worker = (
        data.train_batches(train, Data(crop="resized", threads=1, workers=workers), 4) for workers in (0, 1)
    )
    np.testing.assert_array_equal(next(worker)["inputs"], next(plain)["inputs"])
    worker.close()


def test_faults_name_the_folder_and_the_field(saved, tmp_path):
    with pytest.raises(
        DataError, match=r"config.data.image_key: got 'image'; .*pictures has the columns img, label, note"
    ):
        load(saved, image_key="image")
    with pytest.raises(DataError, match=r"pictures: the column note is .*; expected pictures"):
        load(saved, image_key="note")
    with pytest.raises(DataError, match=r"config.data.root: got .*nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"^cannot read .*empty: "):
        load(tmp_path / "empty")
    with pytest.raises(DataError, match=r"pictures, train, row 5: class 2; expected 0 to 1"):
        dataclasses.replace(load(saved).train, classes=2).batch(np.array([5]), None)
    arrow = next((saved / "train").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"pictures"):
        load(saved).train.batch(np.array([7]), None)


def test_a_broken_picture_is_named_by_its_row(tmp_path):
    split = split_of(0, 3).cast_column("img", datasets.Image(decode=False))
    rows = split.to_dict()
    rows["img"][1]["bytes"] = b"no picture"
    datasets.Dataset.from_dict(rows, features=split_of(0, 3).features).save_to_disk(str(tmp_path / "broken"))
    with pytest.raises(DataError, match=r"^cannot read .*broken, .*row 1: cannot identify"):
        load(tmp_path / "broken").held_out.batch(np.array([1]), None)


def save_with(tmp_path, column, kind, values):
    """A split of pictures, with another column of the name."""
    split = split_of(0, len(values))
    features = datasets.Features({**split.features, column: kind})
    rows = split.cast_column("img", datasets.Image(decode=False)).to_dict() | {column: values}
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "other"))
    return tmp_path / "other"


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (datasets.Value("float32"), [0.0, 0.9]),
        (datasets.Value("string"), ["0", "1"]),
        (datasets.List(datasets.Value("int64")), [[0], [1]]),
        (datasets.Value("null"), [None, None]),
    ],
)
def test_classes_that_are_no_whole_numbers_are_named(tmp_path, kind, values):
    root = save_with(tmp_path, "label", kind, values)
    expected = (
        r"other: the column label is .*; expected whole numbers or classes.*, or another config\.data\.label_key$"
    )
    with pytest.raises(DataError, match=expected):
        load(root)


@pytest.mark.parametrize("kind", [datasets.Value("uint8"), datasets.Value("int64")])
def test_classes_of_any_whole_number_are_read(tmp_path, kind):
    batch = load(save_with(tmp_path, "label", kind, [2, 1])).held_out.batch(np.arange(2), None)
    assert batch["targets"].tolist() == [2, 1]


@pytest.mark.parametrize(
    ("column", "kind", "values"),
    [
        ("label", datasets.Value("int64"), [0, None]),
        ("label", datasets.ClassLabel(names=["a", "b", "c"]), [0, None]),
        ("img", datasets.Image(), [{"bytes": picture(0), "path": None}, None]),
    ],
)
def test_a_row_without_a_picture_or_a_class_is_named(tmp_path, column, kind, values):
    root = save_with(tmp_path, column, kind, values)
    with pytest.raises(DataError, match=rf"^cannot read .*other, test, row 1: nothing in the column {column}$"):
        load(root).held_out.batch(np.arange(2), None)


@pytest.mark.parametrize("library", ["datasets", "tokenizers"])
def test_a_missing_library_is_one_line(library, saved, tmp_path):
    """In a process that has not got it, as a user without the extra."""
    (tmp_path / "tokenizer.json").write_text("{}")
    program = f"""
import sys
sys.modules[{library!r}] = None
from prenorm_jax.training import prepare
from prenorm_jax.training.hugging_face import read_splits
if {library!r} == "datasets":
    read_splits({str(saved)!r})
else:
    prepare.vocabulary(prepare.pathlib.Path({str(tmp_path / "tokenizer.json")!r}), "")
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    last = ran.stderr.strip().splitlines()[-1]
    assert re.search(rf"DataError: .* needs the library {library}; pip install", last), ran.stderr


# --- texts


@pytest.fixture
def tokenizer(tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    every_byte = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=every_byte, show_progress=False
    )
    made.train_from_iterator(LINES, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_text_is_prepared_with_a_tokenizer(tokenizer, tmp_path):
    text = "\n".join(LINES) + "\n"
    (tmp_path / "a.txt").write_text(text)
    flags = ["--tokenizer", str(tokenizer), "--end", "<|endoftext|>", "--val", str(tmp_path / "a.txt")]
    assert prepare.main([str(tmp_path / "a.txt"), *flags, "--out", str(tmp_path / "out")]) == 0
    about = json.loads((tmp_path / "out" / "tokens.json").read_text())
    ids = np.fromfile(tmp_path / "out" / "train.bin", about["dtype"])
    read = tokenizers.Tokenizer.from_file(str(tokenizer))
    assert ids[-1] == read.token_to_id("<|endoftext|>")
    assert read.decode(ids[:-1].tolist()) == text
    assert about["vocab_size"] == read.get_vocab_size()
    settings = Data(name="text", root=str(tmp_path / "out"), threads=0)
    splits = data.load(Experiment(task="language_modelling", model=GPT, data=settings))
    np.testing.assert_array_equal(splits.train.batch(np.array([0]), None)["inputs"][0], ids[:4])


def test_a_saved_column_is_prepared_a_document_a_row(tokenizer, tmp_path):
    table = datasets.Dataset.from_dict({"body": LINES, "id": list(range(len(LINES)))})
    table.save_to_disk(str(tmp_path / "texts"))
    flags = ["--tokenizer", str(tokenizer), "--end", "<|endoftext|>", "--text-column", "body", "--val-share", "0.1"]
    assert prepare.main([str(tmp_path / "texts"), *flags, "--out", str(tmp_path / "out")]) == 0
    read = tokenizers.Tokenizer.from_file(str(tokenizer))
    held_out = np.fromfile(tmp_path / "out" / "val.bin", np.uint16)
    documents = read.decode(held_out.tolist(), skip_special_tokens=False).split("<|endoftext|>")
    assert documents == [*LINES[9::10], ""]


def test_a_tokenizer_s_truncation_and_padding_are_not_for_texts(tokenizer, tmp_path):
    """A checkpoint's tokenizer.json often has them switched on, for batches of sentences: here they would lose and add tokens."""
    (tmp_path / "a.txt").write_text("\n".join(LINES))
    for number, line in enumerate(LINES[:3]):
        (tmp_path / f"{number}.txt").write_text(line)
    flags = ["--tokenizer", str(tokenizer), "--val", *(str(tmp_path / f"{number}.txt") for number in range(3))]
    ids = {}
    for kind in ("plain", "truncating", "padding"):
        made = tokenizers.Tokenizer.from_file(str(tokenizer))
        made.no_truncation()
        if kind == "truncating":
            made.enable_truncation(3)
        elif kind == "padding":
            made.enable_padding(pad_id=0, pad_token="<|endoftext|>", length=500)
        made.save(str(tokenizer))
        assert prepare.main([str(tmp_path / "a.txt"), *flags, "--out", str(tmp_path / kind)]) == 0
        prepared = [np.fromfile(tmp_path / kind / f"{side}.bin", np.uint16) for side in ("train", "val")]
        ids[kind] = [*map(list, prepared), text.tokens(tmp_path / "a.txt", str(tmp_path)).tolist()]
    assert ids["truncating"] == ids["padding"] == ids["plain"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a text", None, "a text"], "texts, row 1: nothing in the column text; expected a text"),
        ([1, 2, 3], "texts: the column text is Value('int64'); expected texts, or another --text-column"),
        (
            [["a"], ["b"], ["c"]],
            "texts: the column text is List(Value('string')); expected texts, or another --text-column",
        ),
    ],
)
def test_a_column_or_a_row_without_texts_is_named(tmp_path, capsys, values, message):
    datasets.Dataset.from_dict({"text": values}).save_to_disk(str(tmp_path / "texts"))
    capsys.readouterr()  # a bar of progress
    assert prepare.main([str(tmp_path / "texts"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_faults_of_prepare_are_one_line(tokenizer, tmp_path, capsys):
    datasets.Dataset.from_dict({"body": LINES}).save_to_disk(str(tmp_path / "texts"))
    out = ["--out", str(tmp_path / "out")]
    assert prepare.main([str(tmp_path / "texts"), *out]) == 2
    assert "--text-column: got 'text'" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("a mat\n" * 50)
    assert prepare.main([str(tmp_path / "a.txt"), "--tokenizer", str(tokenizer), "--end", "<eos>", *out]) == 2
    assert "has no token '<eos>'" in capsys.readouterr().err
    tokenizer.write_text("{")
    assert prepare.main([str(tmp_path / "a.txt"), "--tokenizer", str(tokenizer), *out]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
