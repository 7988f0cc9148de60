import json
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small
from fuzz import header_of, safetensors_file
from safetensors import safe_open
from safetensors.numpy import save_file

from prenorm_jax.interop.formats import open_checkpoint
from prenorm_jax.interop.safetensors import DTYPES, Writer
from prenorm_jax.interop.tensors import FormatError

TREE = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.c": np.arange(4).astype(ml_dtypes.bfloat16),
    "scalar": np.array(0.5, np.float16),
    "mask": np.array([True, False]),
    "empty": np.zeros((0, 5), np.float64),
}


def same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert np.array_equal(found[name], value), name


def test_the_format_s_own_library_writes_what_we_read(tmp_path):
    save_file(TREE, tmp_path / "x.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    same(checkpoint.read(), TREE)
    assert checkpoint.metadata == {"format": "pt"}


def test_the_format_s_own_library_reads_what_we_write(tmp_path):
    small.write_file(tmp_path / "x.safetensors", TREE)
    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        same({name: file.get_tensor(name) for name in file.keys()}, TREE)  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}


def test_a_large_file_is_not_read_to_be_opened(tmp_path):
    large = 5 << 30  # sparse: all but its ends is no block of the disk
    header = {
        "large": {"dtype": "U8", "shape": [large], "data_offsets": [0, large]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [large, large + 8]},
    }
    with (tmp_path / "x.safetensors").open("wb") as file:
        start = len(safetensors_file(header, b""))
        file.write(safetensors_file(header, b""))
        file.seek(start + large)
        file.write(np.array([1, 2], np.float32).tobytes())
    tensors = open_checkpoint(tmp_path / "x.safetensors").tensors
    assert tensors["large"].nbytes == large
    assert tensors["b"].read().tolist() == [1, 2]


def test_every_dtype_round_trips(tmp_path):
    tensors = {name: np.ones(3).astype(dtype) for name, dtype in DTYPES.items()}
    small.write_file(tmp_path / "x.safetensors", tensors)
    same(open_checkpoint(tmp_path / "x.safetensors").read(), tensors)


def test_shards_are_one_checkpoint(tmp_path):
    tensors = small.gpt2()
    checkpoint = open_checkpoint(small.write(tmp_path / "m", tensors, shards=3))
    same(checkpoint.read(), tensors)
    assert len(checkpoint.files) == 4


def test_npz_as_big_vision_writes_it(tmp_path):
    tree = {"params/head/kernel": np.ones((3, 2), np.float32), "params/b": np.arange(4).astype(ml_dtypes.bfloat16)}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **tree, fortran=np.asfortranarray(np.arange(6.0).reshape(2, 3)))
        same(open_checkpoint(tmp_path / "x.npz").read(), {**tree, "fortran": np.arange(6.0).reshape(2, 3)})


def test_orbax_folders(tmp_path):
    tree = {
        "blocks": [{"kernel": np.ones((2, 3), np.float32)}, {"kernel": np.zeros((2, 3), np.float32)}],
        "b": np.ones(2),
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "o", tree)
    expected = {
        "blocks/0/kernel": tree["blocks"][0]["kernel"],
        "blocks/1/kernel": tree["blocks"][1]["kernel"],
        "b": tree["b"],
    }
    same(open_checkpoint(tmp_path / "o").read(), expected)


def test_an_array_is_its_reader_s_own(tmp_path):
    small.write_file(tmp_path / "x.safetensors", TREE)
    tensor = open_checkpoint(tmp_path / "x.safetensors").tensors["a"]
    tensor.read()[:] = 7
    assert np.array_equal(tensor.read(), TREE["a"])


HEADER, SIZE = header_of({"a": (2, 3), "b": (4,)})


def changed(name, **fields):
    return {**HEADER, name: {**HEADER[name], **fields}}


FAULTS = {
    "nothing": (b"", "0 bytes; expected at least the 8"),
    "no header": (b"\x10\0\0\0\0\0\0\0", "claims 16 bytes of a file of 8; truncated"),
    "huge header": (safetensors_file(HEADER, bytes(SIZE), 2**63), "claims 9223372036854775808 bytes"),
    "no JSON": (safetensors_file(b"{'a'", b""), "not readable as JSON"),
    "nested": (safetensors_file(b"[" * 100_000, b""), "not readable as JSON"),
    "no object": (safetensors_file(b"[]", b""), "its JSON is a list"),
    "cut off": (safetensors_file(HEADER, bytes(SIZE - 1)), "39 bytes of data; its header describes 40"),
    "too long": (safetensors_file(HEADER, bytes(SIZE + 1)), "41 bytes of data; its header describes 40"),
    "overlap": (
        safetensors_file(changed("b", data_offsets=[20, 36]), bytes(36)),
        "tensor b overlaps tensor a (byte 20, expected 24)",
    ),
    "gap": (safetensors_file(changed("b", data_offsets=[28, 44]), bytes(44)), "tensor b leaves a gap behind tensor a"),
    "outside": (
        safetensors_file(changed("b", data_offsets=[24, 2**40]), bytes(SIZE)),
        "bytes for shape (4,) of F32; expected 16",
    ),
    "wrong shape": (
        safetensors_file(changed("a", shape=[2, 4]), bytes(SIZE)),
        "24 bytes for shape (2, 4) of F32; expected 32",
    ),
    "negative": (safetensors_file(changed("a", shape=[-2, -3]), bytes(SIZE)), "shape [-2, -3]; expected"),
    "overflow": (
        safetensors_file(changed("a", shape=[2**62, 2**62]), bytes(SIZE)),
        "shape [4611686018427387904, 4611686018427387904]; expected",
    ),
    "empty but huge": (
        safetensors_file(changed("a", shape=[2**63 - 1, 2, 0], data_offsets=[0, 0]), bytes(SIZE)),
        "shape [9223372036854775807, 2, 0]; expected",
    ),
    "dtype": (safetensors_file(changed("a", dtype="Q4"), bytes(SIZE)), "dtype 'Q4'; expected one of F64"),
    "fields": (safetensors_file(changed("a", more=1), bytes(SIZE)), "does not hold dtype, shape and data_offsets"),
    "metadata": (
        safetensors_file({**HEADER, "__metadata__": {"a": 1}}, bytes(SIZE)),
        "__metadata__ is not a table of text",
    ),
    "twice": (
        safetensors_file(json.dumps(HEADER)[:-1].encode() + b"," + json.dumps(HEADER)[1:].encode(), bytes(SIZE)),
        "'a' occurs twice",
    ),
    "climbs": (
        safetensors_file(header_of({"a/../../b": (1,)})[0], bytes(4)),
        "named 'a/../../b'; expected a relative name",
    ),
    "absolute": (safetensors_file(header_of({"/etc/passwd": (1,)})[0], bytes(4)), "named '/etc/passwd'"),
    "empty": (safetensors_file({}, b""), "holds no tensor"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_corrupt_file_is_refused(fault, tmp_path):
    data, message = FAULTS[fault]
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(FormatError) as refused:
        open_checkpoint(tmp_path / "x.safetensors")
    assert message in str(refused.value)
    assert str(tmp_path / "x.safetensors") in str(refused.value)


def lose_a_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def swap_shards(folder):
    a, b = folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors"
    os.rename(a, folder / "c")
    os.rename(b, a)
    os.rename(folder / "c", b)


def index_says(shard):
    def change(folder):
        file = folder / "model.safetensors.index.json"
        table = json.loads(file.read_text())
        table["weight_map"]["transformer.wte.weight"] = shard
        file.write_text(json.dumps(table))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_a_shard, "shard model-00002-of-00003.safetensors is missing, and with it"),
        (swap_shards, "lacks what model.safetensors.index.json says"),
        (index_says("../other/model.safetensors"), "points to '../other/model.safetensors'; expected the plain name"),
        (index_says("/etc/passwd"), "points to '/etc/passwd'"),
        (index_says(".."), "points to '..'"),
        (index_says(7), "points to '7'"),
        (index_says("model-00002-of-00003.safetensors"), "lacks what"),
    ],
)
def test_an_index_that_is_not_its_shards_is_refused(change, message, tmp_path):
    folder = small.write(tmp_path / "m", shards=3)
    change(folder)
    with pytest.raises(FormatError, match=message.replace(".", r"\.")):
        open_checkpoint(folder)


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.abort, ()

    np.save(tmp_path / "a.npy", np.array([1.0]))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr(
            "a.npy",
            b"\x93NUMPY\1\0\x46\0"
            + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(70)
            + pickle.dumps(Bomb()),
        )
    with pytest.raises(FormatError, match="nothing is ever unpickled"):
        open_checkpoint(tmp_path / "x.npz")


def test_an_empty_array_has_a_shape_that_numpy_has(tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807, 2, 0), }"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\1\0" + bytes([len(header), 0]) + header)
    with pytest.raises(FormatError, match=r"has shape \(9223372036854775807, 2, 0\)"):
        open_checkpoint(tmp_path / "x.npz").read()


def test_a_bomb_is_refused_unopened(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(10_000_000))
    with pytest.raises(FormatError, match="would unpack to 80000128 bytes"):
        open_checkpoint(tmp_path / "x.npz")


def test_what_is_no_checkpoint(tmp_path):
    for path, message in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path, "no checkpoint in it; expected one of model.safetensors"),
    ):
        with pytest.raises(FormatError, match=message):
            open_checkpoint(path)


def test_a_writer_holds_its_word(tmp_path):
    float32 = np.dtype(np.float32)
    with pytest.raises(ValueError, match="never written: a"), Writer(tmp_path / "x", {"a": (float32, (2,))}):
        pass
    with pytest.raises(ValueError, match="expected float32"), Writer(tmp_path / "y", {"a": (float32, (2,))}) as file:
        file.write("a", np.ones(3, np.float32))
    with pytest.raises(FileExistsError):
        Writer(tmp_path / "x", {})


def test_adapters_are_not_left_behind(tmp_path):
    """Loaded by the library, such a folder is another function than its tensors alone."""
    save_file({"weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).format == "safetensors"
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match=r"adapter_config.json: adapters, .* merge them first"):
        open_checkpoint(tmp_path)
