"""Token files: prepared from texts, read where they lie, and refused by name where they are not what they say."""

import json
import os
import pickle
import re

import numpy as np
import pytest

from prenorm_jax.models.config import GPTConfig
from prenorm_jax.training import data, prepare, text, token_files
from prenorm_jax.training.data import DataError
from prenorm_jax.training.experiment import Data, Experiment
from prenorm_jax.training.windows import Windows


def load(root, vocab_size=256, **fields):
    model = GPTConfig(width=8, depth=1, heads=2, mlp_width=8, context=6, vocab_size=vocab_size)
    settings = Data(name="text", root=str(root), threads=0, **fields)
    return data.load(Experiment(task="language_modelling", model=model, data=settings))


def write_bins(root, train, val, dtype=np.uint16):
    root.mkdir()
    np.asarray(train, dtype).tofile(root / "train.bin")
    np.asarray(val, dtype).tofile(root / "val.bin")
    return root


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_files_as_nanogpt_writes_them_are_windows(tmp_path, dtype):
    top = 60_000 if dtype == "uint16" else 200_000
    ids = np.random.default_rng(0).integers(top, size=100)
    root = write_bins(tmp_path / "openwebtext", ids, ids[::-1], dtype)
    splits = load(root, top, token_dtype=dtype)
    batch = splits.train.batch(np.array([0, 3]), None)
    np.testing.assert_array_equal(batch["inputs"], [ids[:6], ids[18:24]])
    np.testing.assert_array_equal(batch["targets"], [ids[1:7], ids[19:25]])
    assert batch["inputs"].dtype == np.int32
    np.testing.assert_array_equal(splits.held_out.batch(np.array([0]), None)["inputs"][0], ids[::-1][:6])


@pytest.mark.parametrize("vocab_size", [256, 128_256, 250_002])
def test_ids_of_32_bits_read_as_16_are_seen(tmp_path, vocab_size):
    """All their halves are in the vocabulary: twice as many, every second one small."""
    ids = np.random.default_rng(0).integers(vocab_size, size=100)
    root = write_bins(tmp_path / "wide", ids, ids, np.uint32)
    most = (vocab_size - 1) // 2**16
    with pytest.raises(
        DataError, match=rf"every second uint16 id is at most {most}, .*--config\.data\.token_dtype=uint32"
    ):
        load(root, vocab_size)
    load(root, vocab_size, token_dtype="uint32")


@pytest.mark.parametrize("top", [1, 2, 256, 2**16])
@pytest.mark.parametrize("vocab_size", [2**16, 128_256, 2**25])
def test_ids_of_16_bits_are_read_as_such_in_any_vocabulary(tmp_path, top, vocab_size):
    ids = np.random.default_rng(0).integers(top, size=100)
    train = load(write_bins(tmp_path / "narrow", ids, ids), vocab_size).train
    np.testing.assert_array_equal(train.batch(np.array([3]), None)["inputs"][0], ids[18:24])


def test_windows_of_a_file_are_those_of_an_array(tmp_path):
    ids = np.random.default_rng(0).integers(256, size=100).astype(np.uint16)
    root = write_bins(tmp_path / "bins", ids, ids)
    from_file, from_memory = load(root).train, Windows(ids, 6, 256)
    rows = np.array([2, 0, 15])
    draws = from_file.draws(np.random.default_rng(1), 3)
    for found, wanted in zip(
        from_file.batch(rows, draws).values(), from_memory.batch(rows, draws).values(), strict=True
    ):
        np.testing.assert_array_equal(found, wanted, strict=True)


def test_a_large_file_is_mapped_and_never_loaded_nor_pickled(tmp_path):
    root = tmp_path / "bins"
    root.mkdir()
    for side in ("train", "val"):
        with (root / f"{side}.bin").open("wb") as stream:
            stream.truncate(2**40)  # a hole of 1 TB: zeros, no disk
    train = load(root).train
    assert len(train) == (2**39 - 1) // 6
    assert train.batch(np.array([len(train) - 1]), np.array([5]))["inputs"].tolist() == [[0] * 6]
    assert len(pickle.dumps(train)) < 1000


# --- faults


def test_a_truncated_file_is_named(tmp_path):
    root = write_bins(tmp_path / "bins", range(100), range(100))
    os.truncate(root / "train.bin", 199)
    with pytest.raises(DataError, match=r"bins/train.bin: 199 bytes, no whole number of uint16 ids; it was cut off"):
        load(root)
    os.truncate(root / "train.bin", 10)
    with pytest.raises(DataError, match=r"bins/train.bin: 5 tokens; expected at least a window of 6 \+ 1"):
        load(root)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_folder_of_a_file_s_name_is_named(tmp_path, dtype):
    (tmp_path / "train.bin").mkdir()
    with pytest.raises(DataError, match=r"^cannot read .*train\.bin: Is a directory$"):
        token_files.open_tokens(tmp_path / "train.bin", dtype, 256)


def test_a_file_of_another_length_than_was_prepared_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a line of text\n" * 100)
    prepare.prepare([tmp_path / "a.txt"], tmp_path / "out", prepare.vocabulary(None, ""), None, 0.1)
    os.truncate(tmp_path / "out" / "train.bin", 1000)
    with pytest.raises(DataError, match=r"out/train.bin: 500 ids, and \d+ in tokens.json beside it; it was cut off"):
        load(tmp_path / "out")


def test_a_file_cut_off_under_a_running_loop_is_named(tmp_path):
    root = write_bins(tmp_path / "bins", range(100), range(100))
    batches = data.train_batches(load(root).train, Data(threads=0), 2)
    next(batches)
    os.truncate(root / "train.bin", 100)
    with pytest.raises(DataError, match=r"^cannot read .*bins/train.bin: "):
        next(batches)


def test_ids_beyond_the_vocabulary_are_named_at_once_or_in_their_batch(tmp_path, monkeypatch):
    root = write_bins(tmp_path / "bins", [*range(50), 300, *range(49)], range(100))
    with pytest.raises(DataError, match=r"bins/train.bin: token ids from 0 to 300; expected 0 to 255"):
        load(root)
    monkeypatch.setattr("prenorm_jax.training.text.LOOKED_THROUGH", 10)
    train = load(root).train
    train.batch(np.array([0]), None)
    with pytest.raises(DataError, match=r"bins/train.bin: token ids from 0 to 300; expected 0 to 255"):
        train.batch(np.array([8]), None)


def test_a_tokens_json_of_another_vocabulary_or_of_nonsense_is_named(tmp_path):
    root = write_bins(tmp_path / "bins", range(100), range(100))
    about = {"dtype": "uint16", "vocab_size": 50257, "train": {"tokens": 100}, "val": {"tokens": 100}}
    (root / token_files.ABOUT).write_text(json.dumps(about))
    with pytest.raises(DataError, match=r"of a vocabulary of 50257; expected at most config.model.vocab_size = 256"):
        load(root)
    assert len(load(root, 50257).train) == 16
    (root / token_files.ABOUT).write_text(json.dumps({**about, "dtype": "int8"}))
    with pytest.raises(DataError, match=r"tokens.json: dtype 'int8'; expected uint16 or uint32"):
        load(root, 50257)
    (root / token_files.ABOUT).write_text("{")
    with pytest.raises(DataError, match=r"^cannot read .*tokens.json: "):
        load(root)


# --- prepare


def text_of(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name} line {i}\n" for i in range(200)))
    return folder


@pytest.mark.parametrize("said", ["[1]", "3", '{"train": 5}', '{"train": {"tokens": 100}, "vocab_size": "all"}'])
def test_a_tokens_json_that_says_nothing_is_named(tmp_path, said):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    (tmp_path / "tokens.json").write_text(said)
    with pytest.raises(DataError, match=r"tokens\.json: not what "):
        token_files.open_tokens(tmp_path / "train.bin", "uint16", 256)


def test_a_npy_file_of_nothing_or_of_several_arrays_is_named(tmp_path):
    (tmp_path / "empty.npy").write_bytes(b"")
    with (tmp_path / "several.npy").open("wb") as stream:
        np.savez(stream, a=np.arange(3))
    for name in ("empty", "several"):
        with pytest.raises(DataError, match=rf"{name}\.npy: "):
            text.tokens(tmp_path / f"{name}.npy", "")


def test_prepared_bytes_are_the_text_s_in_order(tmp_path):
    source = text_of(tmp_path / "texts", "b.txt", "sub/a.txt", "left_out.md")
    assert prepare.main([str(source), "--out", str(tmp_path / "out"), "--val-share", "0.1", "--end", "\0"]) == 0
    about = json.loads((tmp_path / "out" / "tokens.json").read_text())
    train, val = (
        bytes(np.fromfile(tmp_path / "out" / f"{side}.bin", np.uint16).astype(np.uint8)) for side in ("train", "val")
    )
    assert (about["train"]["tokens"], about["val"]["tokens"]) == (len(train), len(val))
    assert (about["dtype"], about["vocab_size"], about["tokenizer"]) == ("uint16", 256, "bytes")
    assert 0.05 < len(val) / (len(train) + len(val)) < 0.15
    whole = (source / "b.txt").read_bytes() + b"\0" + (source / "sub" / "a.txt").read_bytes() + b"\0"
    lines, expected = (sorted(filter(None, re.split(rb"[\n\0]", text))) for text in (train + val, whole))
    assert lines == expected, "every line once"
    assert (train + val).count(b"\0") == 2
    assert len(load(tmp_path / "out").train) == (len(train) - 1) // 6
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "out"}, "nothing half written is left"


def test_what_is_held_out_can_be_given(tmp_path):
    text_of(tmp_path, "wiki.train.tokens", "wiki.valid.tokens")
    command = [str(tmp_path / "wiki.train.tokens"), "--val", str(tmp_path / "wiki.valid.tokens")]
    assert prepare.main([*command, "--out", str(tmp_path / "out")]) == 0
    for side, name in (("train", "train"), ("val", "valid")):
        found = np.fromfile(tmp_path / "out" / f"{side}.bin", np.uint16).astype(np.uint8)
        assert bytes(found) == (tmp_path / f"wiki.{name}.tokens").read_bytes()


def test_a_large_vocabulary_takes_32_bits(tmp_path):
    text_of(tmp_path, "a.txt")
    words = prepare.Vocabulary(lambda texts: [[99_999] * 50 for _ in texts], 100_000, [7], "words")
    about = prepare.prepare([tmp_path / "a.txt"], tmp_path / "out", words, None, 0.1)
    assert about["dtype"] == "uint32"
    ids = np.fromfile(tmp_path / "out" / "train.bin", np.uint32)
    assert set(ids.tolist()) <= {99_999, 7}
    assert len(load(tmp_path / "out", 100_000).train) > 0


def test_lines_keep_their_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n" * 50)
    prepare.prepare([tmp_path / "a.txt"], tmp_path / "out", prepare.vocabulary(None, ""), [tmp_path / "a.txt"])
    assert bytes(np.fromfile(tmp_path / "out" / "train.bin", np.uint16).astype(np.uint8)) == b"one\r\ntwo\rthree\n" * 50


def prepared(folder, side):
    return bytes(np.fromfile(folder / f"{side}.bin", np.uint16).astype(np.uint8))


@pytest.mark.parametrize("lines", [300, 3000])
@pytest.mark.parametrize("share", [0.005, 0.1])
@pytest.mark.parametrize("text", ["letters", "\u4e66\u4e66", "one line"])
def test_what_is_held_out_is_about_the_share_asked_for(tmp_path, lines, share, text):
    rng = np.random.default_rng(0)
    words = [" ".join([text] * n) for n in rng.integers(1, 60, lines)]
    whole = (" " if text == "one line" else "\n").join(words).encode()
    (tmp_path / "book.txt").write_bytes(whole)
    assert prepare.main([str(tmp_path / "book.txt"), "--val-share", str(share), "--out", str(tmp_path / "out")]) == 0
    train, val = (prepared(tmp_path / "out", side) for side in ("train", "val"))
    assert len(train) + len(val) == len(whole)
    assert 0.7 * share < len(val) / len(whole) < 1.3 * share
    if share == 0.005:
        assert val in whole, "one run of the text"


@pytest.mark.parametrize("pieces", [11, 15, 19, 25, 39])
def test_the_share_is_kept_by_a_text_of_any_number_of_pieces(tmp_path, monkeypatch, pieces):
    monkeypatch.setattr(prepare, "PIECE_BYTES", 1000)
    (tmp_path / "a.txt").write_text("nineteen letters in\n" * 50 * pieces)
    about = prepare.prepare([tmp_path / "a.txt"], tmp_path / "out", prepare.vocabulary(None, ""), None, 0.1)
    assert 0.09 < about["val"]["tokens"] / (1000 * pieces) < 0.11


def test_a_line_of_any_length_is_read_in_pieces(tmp_path, monkeypatch):
    """Cut before a space, which tokenizers keep with the word that follows, or else between two characters."""
    monkeypatch.setattr(prepare, "PIECE_BYTES", 100)
    whole = "".join(["a word " * 100, "\u4e66" * 500, "\n", "z" * 1000])
    (tmp_path / "a.txt").write_text(whole)
    texts = []

    def encode(some):
        texts.extend(some)
        return [list(text.encode()) for text in some]

    words = prepare.Vocabulary(encode, 256, [0], "kept")
    prepare.prepare([tmp_path / "a.txt"], tmp_path / "out", words, [tmp_path / "a.txt"])
    assert prepared(tmp_path / "out", "train") == prepared(tmp_path / "out", "val") == whole.encode() + b"\0"
    texts = texts[: len(texts) // 2]
    assert "".join(texts) == whole
    assert max(len(text.encode()) for text in texts) < 200
    assert all(text[0] == " " and text[-1] != " " for text in texts[1:7])


def test_texts_of_a_folder_are_found_as_pictures_are(tmp_path):
    for name in ("a.txt", "B.TXT", "c/d.Txt", "._a.txt", ".git/e.txt", "f.md"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_bytes(b"\xff" if name in ("._a.txt", ".git/e.txt") else name.encode())
    out = tmp_path / "out"
    prepare.prepare([tmp_path / "texts"], out, prepare.vocabulary(None, "\0"), [tmp_path / "texts" / "a.txt"])
    assert sorted(prepared(out, "train").split(b"\0")) == [b"", b"B.TXT", b"a.txt", b"c/d.Txt"]


@pytest.mark.parametrize("share", ["1e-320", "0", "nan", "0.6"])
def test_a_share_that_can_t_be_is_refused(capsys, share):
    with pytest.raises(SystemExit) as ended:
        prepare.main(["a.txt", "--out", "out", "--val-share", share])
    assert ended.value.code == 2
    assert f"--val-share: got {float(share)}; allowed: 1e-06 to 0.5" in capsys.readouterr().err


@pytest.mark.parametrize("files", [63, 64, 65, 200])
def test_every_piece_is_written_however_many_there_are(tmp_path, files):
    for number in range(files):
        (tmp_path / f"{number:03}.txt").write_text(f"{number} ")
    about = prepare.prepare([tmp_path], tmp_path / "out", prepare.vocabulary(None, ""), [tmp_path / "000.txt"])
    written = bytes(np.fromfile(tmp_path / "out" / "train.bin", np.uint16).astype(np.uint8))
    assert written.decode().split() == [str(number) for number in range(files)]
    assert about["train"]["tokens"] == len(written)


def test_an_interrupt_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    text_of(tmp_path, "a.txt")
    monkeypatch.setattr(prepare, "_write", interrupted)
    assert prepare.main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "prenorm_jax.training.prepare: interrupted; nothing was written\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a.txt", "--end", "\udcff"], "--end: got '\\udcff'; expected text"),
        (["nowhere"], "nowhere: expected a text file, a folder of .txt files"),
        (["broken.txt"], "cannot read broken.txt: 'utf-8' codec can't decode"),
        (["a.txt", "--val", "empty.txt"], "prepare: empty.txt: no text in it\n"),
        (["empty.txt"], "prepare: empty.txt: no text in it\n"),
        (
            ["short.txt"],
            "prepare: short.txt: too short to hold out one piece in 200; give --val, or a larger --val-share\n",
        ),
        (["a.txt", "--out", "there"], "--out: there exists; expected a new folder"),
        (["a.txt", "--tokenizer", "nowhere.json"], "nowhere.json"),
    ],
)
def test_a_fault_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    text_of(tmp_path, "a.txt")
    (tmp_path / "broken.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a line\n")
    (tmp_path / "there").mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    assert prepare.main([*flags, *([] if "--out" in flags else ["--out", "out"])]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    text_of(tmp_path, "a.txt")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "_write", full)
    with pytest.raises(DataError, match=r"cannot write .*out: No space left on device"):
        prepare.prepare([tmp_path / "a.txt"], tmp_path / "out", prepare.vocabulary(None, ""), None, 0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
